"""What the training of all bases shares: the optimizer's step, the learning rate, the log."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

HIDDEN = 128
"""Width of tower and decoder."""


class Log:
    """Prints lines with the CPU time used so far and keeps them in a file."""

    def __init__(self, path: Path, append: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a" if append else "w", encoding="utf-8")

    def __call__(self, text: str) -> None:
        line = f"[{time.process_time():6.1f} s cpu] {text}"
        print(line, flush=True)
        print(line, file=self.file, flush=True)


def half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
