"""The optimizer of a measured step: clipped gradients and AdamW, whole, the eighth of it that one of 8 ZeRO-2 ranks
holds, or none."""

from __future__ import annotations

from collections.abc import Iterable

import psutil
import torch
from torch import Tensor, nn

from llava_pdrop.cost.states import States
from llava_pdrop.errors import check_name

STATE_BYTES = 16
"""Bytes per trainable parameter of mixed-precision AdamW: weight and gradient in half precision, weight and two moments
in float32 (ZeRO, arXiv 1910.02054, section 3.1); without mixed precision four times float32, the same."""

SHARDS = 8
"""Ranks that the ``sharded`` optimizer pretends to be one of."""

SHARES = {"adamw": 1.0, "sharded": 1 / SHARDS, "none": 0.0}
"""Definite choice, the one that needs most first -> share of the trainable parameters that are updated."""

CHOICES = ("auto", *SHARES)

HEADROOM = 0.75
"""Share of the free memory that gradients and optimizer may take; the rest is for activations."""

LEARNING_RATE = 2e-5

MAX_GRAD_NORM = 1.0
"""Training clips gradients to this norm unless told otherwise (``TrainingArguments.max_grad_norm``)."""

DESCRIPTIONS = {
    "adamw": "gradient clipping and AdamW over all trainable parameters",
    "sharded": "gradient clipping and AdamW over one eighth of the parameters, as one of 8 ZeRO-2 ranks; gradients are "
    "whole, and communication is not in it",
    "none": "left out: forward and backward only",
}


class MasterAdamW:
    """AdamW over ``parameters``, whose gradients are clipped together. Those in half precision are updated through
    float32 copies, as in mixed precision."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.masters: list[Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.parameters
        ]
        fused = all(p.is_cuda for p in self.parameters)
        self.adamw = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=fused, foreach=None if fused else True)

    @torch.no_grad()
    def step(self) -> None:
        """Updates the parameters from their gradients."""
        copies = [(m, p) for m, p in zip(self.masters, self.parameters) if m is not p]
        for master, parameter in copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        nn.utils.clip_grad_norm_(self.masters, MAX_GRAD_NORM)
        self.adamw.step()
        if copies:
            torch._foreach_copy_([parameter for _, parameter in copies], [master for master, _ in copies])
        for master, _ in copies:
            master.grad = None


def choose(name: str, parameters: list[nn.Parameter], device: torch.device) -> str:
    """``auto`` made definite: the first of adamw, sharded and none whose state fits beside the weights.

    Raises:
        UserError: an unknown name.
    """
    check_name("--optimizer", name, CHOICES)
    if name != "auto":
        return name
    room = HEADROOM * free_bytes(device)
    return next(kind for kind in SHARES if kind == "none" or extra_bytes(kind, parameters) <= room)


def extra_bytes(kind: str, parameters: list[nn.Parameter]) -> float:
    """Bytes that gradients, as many as the weights have, and optimizer need beside these."""
    count, weights = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    return weights + SHARES[kind] * (STATE_BYTES * count - 2 * weights)


def states(kind: str, dtype: torch.dtype) -> States:
    """What `cost.memory` has to know of a definite choice. Gradients are whole with ``sharded`` too: on one GPU there
    is nobody to send the rest to."""
    mixed = dtype in (torch.float16, torch.bfloat16)
    return States(bytes=dtype.itemsize, optimizer=SHARES[kind] * (12.0 if mixed else 8.0))


def make(kind: str, parameters: list[nn.Parameter]) -> MasterAdamW | None:
    """The optimizer of a definite choice (see `choose`)."""
    if kind == "none":
        return None
    return MasterAdamW(parameters if kind == "adamw" else shard(parameters))


def shard(parameters: list[nn.Parameter], shards: int = SHARDS) -> list[nn.Parameter]:
    """Whole parameters that make up about one of ``shards`` equal parts: every so many-th of them, then whatever else
    fits, so that tensors of all kinds are among them."""
    target = sum(p.numel() for p in parameters) / shards
    chosen: list[nn.Parameter] = []
    elements = 0
    for parameter in parameters[::shards] + [p for place, p in enumerate(parameters) if place % shards]:
        if elements + parameter.numel() <= target or not chosen:
            chosen.append(parameter)
            elements += parameter.numel()
    return chosen


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor on ``device`` may take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
