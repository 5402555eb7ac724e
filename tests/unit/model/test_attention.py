"""Packed attention against plain softmax attention, one segment at a time."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.model.attention import Segments, packed_attention


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [[5, 9, 1], [6, 6], [7]])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_segmentwise_sdpa(groups, lengths, window):
    torch.manual_seed(0)
    total, offsets = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    query, key, value = (torch.randn(n, total, 8, requires_grad=True) for n in (4, groups, groups))
    ours = packed_attention(query, key, value, Segments(lengths, offsets), scaling=0.5, window=window)

    token = torch.arange(total)
    owner = torch.bucketize(token, offsets[1:].long(), right=True)
    distance = token[:, None] - token
    allowed = (owner[:, None] == owner) & (distance >= 0) & (distance < (window or total))
    repeated = (t.repeat_interleave(4 // groups, dim=0) for t in (key, value))
    key_HTE, value_HTE = repeated
    weights = (query @ key_HTE.transpose(1, 2) * 0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
    theirs = (weights @ value_HTE).transpose(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    upstream = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, (query, key, value), upstream) for out in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [4, 2])
def test_varlen_is_called_with_the_arguments_this_torch_knows(groups):
    """Shapes only, on the meta device: the kernel itself needs a GPU (tests/gpu)."""
    query = torch.empty(4, 12, 8, dtype=torch.bfloat16, device="meta")
    key = torch.empty(groups, 12, 8, dtype=torch.bfloat16, device="meta")
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    out = packed_attention(query, key, key, Segments([5, 7], offsets, "varlen"), scaling=0.5)
    assert out.shape == (12, 4, 8)
