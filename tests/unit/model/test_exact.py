"""Fewer passes on a CPU: every bit is that of Hugging Face's operations, forward and backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from llava_pdrop.model import exact, kernels
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.types import PackedBatch
from tests.tiny import DECODERS, LAYERS, PYRAMID, make_tiny_hf, mixed_samples

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.dtype == b.dtype and torch.equal(a, b)


def results(function, inputs, seed=3) -> list[torch.Tensor]:
    """Outputs, and gradients of the inputs for random ones of the outputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    out = list(out) if isinstance(out, tuple) else [out]
    random = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=random).to(o.dtype) for o in out]
    return [*out, *torch.autograd.grad(out, inputs, grads)]


def angles(tokens: int, dtype: torch.dtype, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    half = torch.randn(1, tokens, width // 2).repeat(1, 1, 2)
    return half.cos().to(dtype), half.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_token", [False, True])
def test_the_rotary_embedding(dtype, by_token):
    """Of one layout and the other, the latter being what a projection gives."""
    torch.manual_seed(0)
    for tokens in (1, 7, 300, 2049):
        cos, sin = angles(tokens, dtype)
        q, k = (torch.randn(1, heads, tokens, 16).to(dtype) for heads in (4, 2))
        if by_token:
            q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        own = results(partial(apply_rotary_pos_emb, cos=cos, sin=sin), (q, k))
        ours = results(partial(exact.rotate_both, cos=cos, sin=sin), (q, k))
        assert_same_bits(ours, own)
        assert ours[0].is_contiguous()


def test_the_rotary_embedding_of_two_dtypes():
    """As autocast gives them: angles in float32, queries and keys in bfloat16."""
    cos, sin = angles(9, torch.float32)
    q, k = torch.randn(1, 4, 9, 16).bfloat16(), torch.randn(1, 2, 9, 16).bfloat16()
    own = results(partial(apply_rotary_pos_emb, cos=cos, sin=sin), (q, k))
    assert_same_bits(results(partial(exact.rotate_both, cos=cos, sin=sin), (q, k)), own)


@pytest.mark.parametrize("with_sum", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 32), (1, 300, 32), (301, 48), (1, 130, 512)])
def test_a_sum_and_its_norm(shape, with_sum, monkeypatch):
    """In a stream that goes on, in whose gradient it counts what is added when; in one block and in several."""
    torch.manual_seed(0)
    norm = LlamaRMSNorm(shape[-1], 1e-5)
    torch.nn.init.normal_(norm.weight)

    def behind(function, x, weight, first, *added):
        total, normed = function(x * first, added[0] * 2 if added else None, weight)
        return total + normed * 3

    inputs = [torch.randn(shape), norm.weight.data, *(torch.randn(shape) for _ in range(1 + with_sum))]

    def own(stream, added, weight):
        total = stream if added is None else stream + added
        return total, torch.func.functional_call(norm, {"weight": weight}, total)

    expected = results(partial(behind, own), inputs)
    for block in (exact.NORM_BLOCK, 16 * shape[-1]):
        monkeypatch.setattr(exact, "NORM_BLOCK", block)
        ours = results(partial(behind, partial(exact.sum_and_norm, epsilon=1e-5)), inputs)
        assert_same_bits(ours, expected)


def test_what_is_added_may_be_of_less_precision():
    """As autocast gives it; and what does not learn has no gradient."""
    torch.manual_seed(0)
    stream, added, weight = torch.randn(40, 32, requires_grad=True), torch.randn(40, 32).bfloat16(), torch.rand(32)
    added.requires_grad_()
    total, normed = exact.sum_and_norm(stream, added, weight, 1e-5)
    separate = stream + added
    assert_same_bits(
        [total, normed], [separate, torch.nn.functional.rms_norm(separate, (32,), None, 1e-5) * 1.0 * weight]
    )
    (total * 2 + normed).sum().backward()
    assert (
        added.grad.dtype == torch.bfloat16 and torch.equal(added.grad, stream.grad.bfloat16()) and weight.grad is None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_step_of_every_family(decoder, dtype, monkeypatch):
    """Loss and all gradients, also with recomputation, beside those of Hugging Face's operations."""
    batch = PackedBatch.pack(mixed_samples())

    def step(recompute: bool = False) -> list[torch.Tensor]:
        model = PyramidLlava(make_tiny_hf(decoder).to(dtype), PYRAMID, kernels="eager").train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    sums = []
    monkeypatch.setattr(exact, "_blocks", lambda *tensors, of=exact._blocks: sums.append(1) or of(*tensors))
    ours = step()
    # Two norms of every layer, forward and backward: but in half precision, and beside norms of the head (qwen3).
    assert len(sums) == (0 if dtype != torch.float32 or decoder == "qwen3" else 4 * LAYERS)
    again = step(recompute=True)
    used = []
    monkeypatch.setattr(kernels, "_kernels", lambda *names: used.append(names))
    own = step()
    assert used
    assert_same_bits(ours, own)
    assert_same_bits(again, own)
