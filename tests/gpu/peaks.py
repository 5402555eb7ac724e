"""What CUDA's allocator holds beside the bytes that `llava_pdrop.cost.memory` predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TOLERANCE = 0.1
"""Of the prediction, for what the allocator rounds up and leaves between its blocks. At the shapes of these tests the
prediction is within 3 % of the tensors of a step (tests/unit/cost/test_memory.py)."""


def cublas_workspaces() -> int:
    """Bytes that cuBLAS and cuBLASLt keep, one workspace for each thread that multiplied (the main one, and autograd's)
    on a stream: on Hopper of 32 MiB each, elsewhere of 8. They are in the allocator's account. Gives them back."""
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated()


def assert_predicted(peaks: Sequence[float], predicted: Sequence[float], uncounted: float) -> None:
    """Every peak is the predicted one within `TOLERANCE`, where it may hold ``uncounted`` bytes more: workspaces, and
    the batch's pixels, which live on during the optimizer's step. (A fused AdamW makes no temporary tensors:
    tests/unit/bench/test_optimizer.py.) All in one unit."""
    assert len(peaks) == len(predicted) > 0
    for peak, expected in zip(peaks, predicted):
        assert (1 - TOLERANCE) * expected <= peak <= (1 + TOLERANCE) * expected + uncounted, (
            f"peak {peak:,.0f}, predicted {expected:,.0f}, not counted in it {uncounted:,.0f}"
        )
