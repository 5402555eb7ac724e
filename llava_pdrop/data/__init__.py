"""From files on disk to packed batches: records, conversations, tokens, images, batch plan."""
