"""Which precision a machine is good at."""

from __future__ import annotations

import platform

import torch


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 in hardware. On an x86 processor without such instructions torch takes up
    to a hundred times as long as in float32."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # not known to be slow
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_dtype(device: torch.device, bf16: bool = False, fp16: bool = False) -> torch.dtype | None:
    """The half precision asked for, or None where it would be slower than float32 (`has_fast_bfloat16`) or nothing is
    asked for."""
    if bf16:
        return torch.bfloat16 if has_fast_bfloat16(device) else None
    return torch.float16 if fp16 else None
