"""What we do where the official code has a bug or its result is arbitrary: one table.

Every case with the flag ``quirk`` or ``tie`` or with a recorded crash is held against a slow reference of ours
(`tests/reference.py`) instead of the recorded result. The inputs, the merged embeddings (where no image was cut off)
and the model without dropping are still compared with what was recorded.
"""

from __future__ import annotations

REASONS: dict[str, str] = {
    "l15_train_multi_image": "B4: official drops from the first image only; every image keeps its own share here",
    "l15_infer_multi_image": "B4: as above, and the query really is the last prompt token",
    "next_train_multi_image": "B4: official reads image counts by sample; here each image has its own",
    "l15_infer_textonly_dummy": "B6: official shifts decode positions of a text-only prompt; nothing happens here",
    "l15_infer_trunc_crash": "B8: official crashes on prompts over the training limit; no prompt is cut here",
    "l15_train_trunc_inside_image": "B8: a cut image is counted by the tokens that are left of it; all its scores tie",
    "l15_train_trunc_inside_image_crash": "B8: as above, where official asks topk for more tokens than there are",
}
"""Known flagged cases. A flagged case of another directory is held against the same expectations (`DEFAULT`)."""

DEFAULT = "flagged in its JSON: every image keeps the best int(n * ratio) of its own tokens, text is whole"

NOT_COMPARED: dict[str, str] = {
    r"in\..*": "an input",
    r"stage\d+\.attention_mask_(in|out)": "padding does not exist in a packed stream",
    r"merged\.(attention_mask|position_ids_padded)": "padding does not exist in a packed stream",
    r"(train|eval)\.final_valid_mask|vanilla\.valid_mask": "says which rows are real",
}
"""Recorded tensors that carry no number of their own, with the reason."""
