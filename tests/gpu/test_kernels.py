"""The fused attention kernels against segment-wise sdpa, and both against float32.

The bounds are relative errors of a whole tensor (Frobenius norm), in units of the half precision's ``eps``, the
distance of 1 from the next number. The kernels add up in float32 and round to half precision the weights, which are
averaged over, and the result: each rounding is at most eps / 2 of a number, so a forward within eps is right. In the
backward the weights, their gradient and the result are rounded, and the row sums are made of the rounded output: within
2 eps. A wrong segment, window, scale or group of heads gives an error of about 1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_pdrop.model import attention
from llava_pdrop.model.attention import Segments, packed_attention

HEADS = 8
RAGGED, EQUAL = [5, 900, 1, 130], [64, 64, 64]


def inputs(groups: int, tokens: int, head: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(heads, tokens, head, device="cuda", generator=generator).to(dtype)
        for heads in (HEADS, groups, groups)
    ]


def attend(tensors: list[Tensor], lengths: list[int], backend: str, window: int | None) -> list[Tensor]:
    """Output and the gradients of query, key and value, for an upstream gradient that is the same for all."""
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    out = packed_attention(*tensors, Segments(lengths, offsets, backend), tensors[0].shape[-1] ** -0.5, window)
    upstream = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.bfloat16().to(out.dtype))]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs).norm() / theirs.norm()).item()


def assert_close(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype, bounds: tuple[int, ...]) -> None:
    """Output and gradients within so many ``eps`` of ``dtype`` each."""
    eps = torch.finfo(dtype).eps
    for name, bound, half, full in zip(("out", "dq", "dk", "dv"), bounds, ours, exact, strict=True):
        assert half.dtype == dtype and half.shape == full.shape
        assert relative_error(half, full) < bound * eps, name


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("lengths", [RAGGED, EQUAL], ids=["ragged", "equal"])
@pytest.mark.parametrize("groups", [8, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backend", ["varlen", "flash_attn", "sdpa"])
def test_half_precision_against_float32(backend, dtype, head, groups, lengths, window):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn", reason="the package flash-attn is not installed")
    halves = inputs(groups, sum(lengths), head, dtype)
    exact = attend([tensor.float() for tensor in halves], lengths, "sdpa", window)
    assert_close(attend(halves, lengths, backend, window), exact, dtype, (1, 2, 2, 2))


@pytest.mark.parametrize("window", [None, 48])
def test_grouped_keys_by_the_signature_of_torch_2_11(monkeypatch, window):
    """Which has no ``enable_gqa``: keys are repeated, and their gradients, rounded once, added up and rounded again."""
    halves = inputs(2, sum(RAGGED), 64, torch.bfloat16)
    exact = attend([tensor.float() for tensor in halves], RAGGED, "sdpa", window)
    monkeypatch.setattr(attention, "_takes_groups", lambda kernel: False)
    assert_close(attend(halves, RAGGED, "varlen", window), exact, torch.bfloat16, (1, 2, 3, 3))


@pytest.mark.parametrize("backend", ["varlen", "flash_attn"])
def test_a_segment_of_one_token_returns_its_value(backend):
    if backend == "flash_attn":
        pytest.importorskip("flash_attn", reason="the package flash-attn is not installed")
    tensors = inputs(2, sum(RAGGED), 64, torch.bfloat16)
    out, query_gradient, *_ = attend(tensors, RAGGED, backend, None)
    alone = sum(RAGGED[:2])
    torch.testing.assert_close(out[alone], tensors[2][:, alone].repeat_interleave(4, 0))
    assert query_gradient[:, alone].abs().max() < 0.05 * query_gradient.abs().max()  # one weight cannot change


def test_auto_is_varlen_in_half_precision_and_under_autocast(monkeypatch):
    taken = []
    fused = attention._fused
    monkeypatch.setattr(attention, "_fused", lambda backend, *rest: taken.append(backend) or fused(backend, *rest))
    tensors = inputs(2, 12, 64, torch.float32)
    segments = Segments([5, 7], torch.tensor([0, 5, 12], dtype=torch.int32, device="cuda"))
    assert packed_attention(*tensors, segments, 0.125).dtype == torch.float32 and not taken
    with torch.autocast("cuda", torch.bfloat16):
        assert packed_attention(*tensors, segments, 0.125).dtype == torch.bfloat16
    packed_attention(*(tensor.half() for tensor in tensors), segments, 0.125)
    assert taken == ["varlen", "varlen"]
