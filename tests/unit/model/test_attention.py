"""Packed attention against plain softmax attention, one segment at a time; what it refuses."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llava_pdrop.model import attention
from llava_pdrop.model.attention import Segments, check_backend, packed_attention
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.types import PackedBatch
from tests.messages import says
from tests.parity.test_export import sources  # noqa: F401
from tests.tiny import PYRAMID, make_sample, make_tiny_hf


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


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_varlen_is_called_with_the_arguments_this_torch_knows(groups, window):
    """Shapes only, forward and backward, on the meta device: the kernel itself needs a GPU (tests/gpu)."""
    query, key, value = (
        torch.empty(heads, 12, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for heads in (4, groups, groups)
    )
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    out = packed_attention(query, key, value, Segments([5, 7], offsets, "varlen"), 0.5, window)
    assert out.shape == (12, 4, 8)
    gradients = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


def segments_one_by_one(query_THE, key_TGE, value_TGE, offsets, longest, scale, window_size) -> Tensor:
    """What a fused kernel computes, after checks of what it must be given."""
    assert query_THE.dtype == key_TGE.dtype == value_TGE.dtype == torch.bfloat16
    assert offsets.dtype == torch.int32 and offsets[0] == 0 and offsets[-1] == len(query_THE)
    assert longest == offsets.diff().max() and all(t.stride(-1) == 1 for t in (query_THE, key_TGE, value_TGE))
    before, after = window_size
    outputs = []
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:]):
        query, key, value = (t[start:stop].transpose(0, 1) for t in (query_THE, key_TGE, value_TGE))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = ((distance <= before) | (before < 0)) & ((distance >= -after) | (after < 0))
        repeat = len(query) // len(key)
        key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
        weights = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append((weights @ value).transpose(0, 1))
    return torch.cat(outputs)


def varlen_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert cu_seq_q is cu_seq_k and max_q == max_k and return_aux is None
    assert query.shape[1] == key.shape[1] == value.shape[1], "knows no grouped keys"
    return segments_one_by_one(query, key, value, cu_seq_q, max_q, scale, window_size)


def varlen_of_torch_2_12_and_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert cu_seq_q is cu_seq_k and max_q == max_k and return_aux is None
    assert seqused_k is block_table is num_splits is None
    assert enable_gqa or query.shape[1] == key.shape[1] == value.shape[1]
    return segments_one_by_one(query, key, value, cu_seq_q, max_q, scale, window_size)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k and causal and not dropout_p
    return segments_one_by_one(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, window_size)


KERNELS = [
    ("varlen", varlen_of_torch_2_11),
    ("varlen", varlen_of_torch_2_12_and_2_13),
    ("flash_attn", flash_attn_varlen_func),
]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel[1].__name__)
def fused(request, monkeypatch) -> str:
    """A backend whose kernel is a stand-in for one signature; also on the CPU."""
    backend, kernel = request.param
    if backend == "varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    else:
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=kernel))
    return backend


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_fused_kernels_are_given_what_makes_them_equal_to_sdpa(fused, groups, window):
    torch.manual_seed(0)
    lengths, offsets = [5, 9, 1], torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    query, key, value = (torch.randn(n, 15, 8, dtype=torch.bfloat16, requires_grad=True) for n in (4, groups, groups))
    segments = Segments(lengths, offsets, fused)
    ours = attention._fused(fused, query, key, value, segments, 0.5, window)
    theirs = packed_attention(query, key, value, Segments(lengths, offsets, "sdpa"), 0.5, window)
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)  # bfloat16 weights on one side
    upstream = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, (query, key, value), upstream) for out in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=6e-2, rtol=6e-2)


def test_autocast_makes_the_inputs_half_precision(monkeypatch):
    """Rotary embedding leaves float32 queries and keys beside half precision values."""
    given = []
    monkeypatch.setattr(attention, "_segmentwise_sdpa", lambda query, *rest: given.extend((query, *rest[:2])) or query)
    query, value = torch.randn(2, 3, 8), torch.randn(2, 3, 8, dtype=torch.bfloat16)
    segments = Segments([3], torch.tensor([0, 3], dtype=torch.int32))
    with torch.autocast("cpu", torch.bfloat16):
        packed_attention(query, query, value, segments, 0.5)
    assert [t.dtype for t in given] == [torch.bfloat16] * 3


@pytest.mark.parametrize(("backend", "needed"), [("varlen", "CUDA"), ("flash_attn", "flash-attn")])
def test_a_backend_that_is_not_there_is_one_line_before_the_first_step(backend, needed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=says("model.attention", backend, needed, "'auto'")) as error:
        PyramidLlava(make_tiny_hf(), backend=backend)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    check_backend(backend)


@pytest.mark.parametrize("backend", ["varlen", "flash_attn"])
def test_a_fused_backend_on_the_cpu_says_what_it_needs(backend):
    x, offsets = torch.randn(2, 3, 8), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=says(backend, "CUDA", "bfloat16", "cpu", "torch.float32", "'sdpa'")):
        packed_attention(x, x, x, Segments([3], offsets, backend), 0.5)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=says("model.attention", "'triton'", "sdpa")):
        check_backend("triton")


def test_attention_dropout_is_refused_in_training():
    model = PyramidLlava(make_tiny_hf(), PYRAMID).train()
    for layer in model.hf.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        model(PackedBatch.pack([make_sample(3, (28, 28), 5, "4")]))
