"""What is looked at once in every optimizer step, before its last backward pass: is every loss a number, and was any
rank told to stop?

The answer needs one all-reduce of a few numbers and makes the host wait for the device once per optimizer step, between
the last forward and the last backward. It cannot come later: DeepSpeed takes its optimizer step within the last
backward. Micro-batches before the last one are never waited for. The wait costs what the host could have queued ahead,
the first kernels of one backward pass; a run that logs every step (the default) waits at its end anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from llava_pdrop.train.preemption import Preemption
from llava_pdrop.train.ranks import from_every_rank, number_of_ranks


class NotFiniteError(ValueError):
    """A loss is NaN or infinite."""


class StepGuard:
    """Collects the losses of a step's micro-batches on the device, and looks at them together.

    Args:
        device: of the losses.
        rank: of this process.
        preemption: is told what the ranks agree on.
    """

    def __init__(self, device: torch.device, rank: int, preemption: Preemption) -> None:
        self.device, self.rank, self.preemption = device, rank, preemption
        self._losses: list[Tensor] = []
        self._samples: list[list[str]] = []

    def watch(self, loss: Tensor, sample_ids: list[str]) -> None:
        """Notes the loss (scalar) of a micro-batch; waits for nothing."""
        self._losses.append(loss.detach().float())
        self._samples.append(sample_ids)

    def check(self, step: int) -> None:
        """Looks at all losses since the last call, on all ranks together.

        Args:
            step: number of the optimizer step that is about to be made, from 1.

        Raises:
            NotFiniteError: some loss is no number; on every rank, naming rank, micro-batch and samples.
        """
        ranks = number_of_ranks()
        flags = torch.zeros(ranks + 1, device=self.device)
        flags[self.rank] = (~torch.stack(self._losses).isfinite()).any()
        flags[ranks] = float(self.preemption.received is not None)
        if ranks > 1:
            distributed.all_reduce(flags)
        *failed, signals = flags.tolist()
        self.preemption.agreed = signals > 0
        losses, samples = self._losses, self._samples
        self._losses, self._samples = [], []
        if any(failed):
            lines = from_every_rank(self._describe(losses, samples))
            raise NotFiniteError(
                f"step {step} is not made, its loss is not a number: {'; '.join(line for line in lines if line)}; look "
                "at these samples, lower train.learning_rate, or give train.max_grad_norm; the last checkpoint is sound"
            )

    def _describe(self, losses: list[Tensor], samples: list[list[str]]) -> str:
        found = [
            f"rank {self.rank}, micro-batch {number} of {len(losses)}, loss {loss:g}, samples {', '.join(ids)}"
            for number, (loss, ids) in enumerate(zip(torch.stack(losses).tolist(), samples), 1)
            if loss != loss or loss in (float("inf"), float("-inf"))
        ]
        return "; ".join(found)
