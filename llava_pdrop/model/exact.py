"""Norms and rotary embedding on a CPU in fewer passes over the stream, to the last bit Hugging Face's.

There a pass costs what it reads and writes, and a new tensor of some MB the pages that the system has to clear. Every
rounding is the one that the separate operations make: no multiplication is fused with an addition, and sums are made
in their order.
"""

from __future__ import annotations

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


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Hugging Face's ``LlamaRMSNorm``: (..., D), (D,) -> (..., D). In float32 block by block; elsewhere its casts are
    roundings of their own, so there the operations stay separate."""
    if x.dtype == torch.float32 and x.is_contiguous():
        norm: Tensor = _Norm.apply(x, x, weight, epsilon)
        return norm
    in_float32 = x.to(torch.float32)
    in_float32 = in_float32 * torch.rsqrt(in_float32.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * in_float32.to(x.dtype)


class _Norm(Function):
    """It is given x twice, and gives the gradients of x in the product and of x in the mean apart: autograd adds the
    one and then the other to what the residual stream brings, as it does behind the separate operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
        for x_RD, out_RD, scale_R1 in zip(*_blocks(x, out, scale)):
            torch.rsqrt(x_RD.pow(2).mean(-1, keepdim=True) + epsilon, out=scale_R1)
            torch.mul(x_RD, scale_R1, out=out_RD)
            torch.mul(weight, out_RD, out=out_RD)
        ctx.save_for_backward(x, scale, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        grad = grad.contiguous()
        in_product, in_mean, of_weight = (torch.empty_like(x) for _ in range(3))
        blocks = _blocks(x, grad, scale, in_product, in_mean, of_weight)
        for x_RD, grad_RD, scale_R1, in_product_RD, in_mean_RD, of_weight_RD in zip(*blocks):
            torch.mul(x_RD, scale_R1, out=of_weight_RD)
            of_weight_RD *= grad_RD
            torch.mul(grad_RD, weight, out=in_product_RD)
            of_scale_R1 = torch.mul(in_product_RD, x_RD, out=in_mean_RD).sum(-1, keepdim=True)
            in_product_RD *= scale_R1
            of_mean_R1 = -0.5 * of_scale_R1 * scale_R1.pow(3) / x.shape[-1]
            torch.mul(x_RD, 2 * of_mean_R1, out=in_mean_RD)
        return in_product, in_mean, of_weight.sum_to_size(weight.shape), None


def _blocks(x: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Views (R, D) of contiguous (..., D) that have the rows of ``x``."""
    rows = max(1, torch.get_num_threads() * NORM_BLOCK // x.shape[-1])
    return [tensor.view(-1, tensor.shape[-1]).split(rows) for tensor in (x, *others)]
