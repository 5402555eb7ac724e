"""What a run costs, predicted without weights: operations, memory, the paper's formula."""
