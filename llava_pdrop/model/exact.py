"""The rotary embedding on a CPU in fewer passes over the stream, to the last bit Hugging Face's.

There a pass costs what it reads and writes, and a new tensor of some MB the pages that the system has to clear. Every
rounding is the one that the separate operations make: no multiplication is fused with an addition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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
