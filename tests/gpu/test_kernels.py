"""CUDA kernels against segment-wise sdpa. Run where there is a GPU; see the skip reason elsewhere."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.model.attention import Segments, packed_attention

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: its kernels have no CPU version"
)


@pytest.mark.parametrize("lengths", [[5, 900, 1, 130], [64, 64]])
@pytest.mark.parametrize("groups", [8, 2])
def test_varlen_equals_segmentwise_sdpa(groups, lengths):
    torch.manual_seed(0)
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    make = lambda n: torch.randn(n, total, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # noqa: E731
    query, key, value = make(8), make(groups), make(groups)
    results = {}
    for backend in ("sdpa", "varlen"):
        out = packed_attention(query, key, value, Segments(lengths, offsets, backend), scaling=0.125)
        results[backend] = (out, *torch.autograd.grad(out.float().square().sum(), (query, key, value)))
    for ours, theirs in zip(results["varlen"], results["sdpa"]):
        torch.testing.assert_close(ours, theirs, atol=3e-2, rtol=3e-2)  # bfloat16: 8 bits, sums in another order
