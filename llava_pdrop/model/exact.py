"""Norms, residual sums and rotary embedding on a CPU in fewer passes over the stream, to the last bit Hugging Face's.

There a pass costs what it reads and writes, and a new tensor of some MB the pages that the system has to clear. Every
rounding is the one that the separate operations make: no multiplication is fused with an addition, and sums are made
in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

NORM_BLOCK = 2**16
"""Elements of a block of a norm per thread: its temporaries lie in a core's own cache."""


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """``apply_rotary_pos_emb`` of Hugging Face's LLaMA: (1, H, T, E), (1, G, T, E), cos and sin (1, T, E), whose halves
    of E are equal, -> the first two rotated, contiguous: attention reads them faster. Where dtypes differ (autocast)
    every operation rounds by rules of its own, so there they stay separate."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    rotated = _Rotation.apply if q.dtype == k.dtype == cos.dtype else _separately
    return rotated(q, cos, sin), rotated(k, cos, sin)


def _separately(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        low, high = x.chunk(2, dim=-1)
        sin_low, sin_high = sin.chunk(2, dim=-1)
        out = torch.mul(x, cos, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
        out_low, out_high = out.chunk(2, dim=-1)
        out_low -= high * sin_low
        out_high += low * sin_high
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        low, high = grad.chunk(2, dim=-1)
        sin_low, sin_high = sin.chunk(2, dim=-1)
        by_token = torch.empty_like(grad.transpose(1, 2), memory_format=torch.contiguous_format)  # as q_proj wants it
        out = torch.mul(grad, cos, out=by_token.transpose(1, 2))
        out_low, out_high = out.chunk(2, dim=-1)
        out_low += high * sin_high
        out_high -= low * sin_low
        return out, None, None


def sum_and_norm(stream: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The residual stream (..., D) float32, contiguous, with what a layer adds to it (None: nothing) -> their sum, and
    of it Hugging Face's ``LlamaRMSNorm`` with weight (D,)."""
    total, normed = _SumAndNorm.apply(stream, added, weight, epsilon)
    return total, normed


class _SumAndNorm(Function):
    """Block by block, so that a norm reads and its gradient is added while the block lies in the cache. The gradient
    of the sum is that of the stream behind, plus that of the product, plus that of the mean: the order in which
    autograd adds them behind the separate operations."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, added: Tensor | None, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        total = stream if added is None else torch.empty_like(stream)
        out, scale = torch.empty_like(stream), stream.new_empty(*stream.shape[:-1], 1)
        others = () if added is None else (stream, added.contiguous())
        for total_RD, out_RD, scale_R1, *summands in _blocks(total, out, scale, *others):
            if summands:
                torch.add(*summands, out=total_RD)
            torch.rsqrt(total_RD.pow(2).mean(-1, keepdim=True) + epsilon, out=scale_R1)
            torch.mul(total_RD, scale_R1, out=out_RD)
            torch.mul(weight, out_RD, out=out_RD)
        ctx.save_for_backward(total, scale, weight)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, behind: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, scale, weight = ctx.saved_tensors
        _, is_added, learns, _ = ctx.needs_input_grad
        of_x, of_weight = torch.empty_like(x), torch.empty_like(x)
        blocks = _blocks(x, behind.contiguous(), grad.contiguous(), scale, of_x, of_weight)
        for x_RD, behind_RD, grad_RD, scale_R1, of_x_RD, of_weight_RD in blocks:
            in_product_RD = torch.mul(grad_RD, weight)
            of_scale_R1 = torch.mul(in_product_RD, x_RD, out=of_weight_RD).sum(-1, keepdim=True)
            of_mean_R1 = -0.5 * of_scale_R1 * scale_R1.pow(3) / x.shape[-1]
            in_product_RD *= scale_R1
            torch.add(behind_RD, in_product_RD, out=of_x_RD)
            of_x_RD += torch.mul(x_RD, 2 * of_mean_R1, out=in_product_RD)
            torch.mul(x_RD, scale_R1, out=of_weight_RD)
            of_weight_RD *= grad_RD
        return of_x, of_x if is_added else None, of_weight.sum_to_size(weight.shape) if learns else None, None


def _blocks(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views (R, D) of contiguous (..., D) that have the rows of ``x``."""
    rows = max(1, torch.get_num_threads() * NORM_BLOCK // x.shape[-1])
    return zip(*(tensor.view(-1, tensor.shape[-1]).split(rows) for tensor in (x, *others)))
