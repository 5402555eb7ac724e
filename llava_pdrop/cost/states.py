"""Where parameters, their gradients and the optimizer live, as each engine of training keeps them: bytes a parameter.

    one GPU, DDP     float32 weights, gradients and two moments on every GPU; layers compute under autocast in
                     bfloat16. Several GPUs: DDP's buckets, a second copy of the gradients
    ZeRO-2           bfloat16 weights on every GPU; bfloat16 gradients, float32 master weights and moments sharded
    ZeRO-3           the weights sharded too; up to `GATHERED` of them are whole at a time
    FSDP2            float32 weights, gradients and moments sharded; of the layer that runs, and of the one fetched
                     meanwhile, a whole bfloat16 copy, as of all that is in no layer. While micro-batches are
                     accumulated, gradients are whole, in bfloat16
    ZeRO-2 offload   gradients, master weights and moments in the memory of the CPU
    ZeRO-3 offload   the sharded weights too

Read off DeepSpeed 0.19 (runtime/zero/stage_1_and_2.py, stage3.py), accelerate 1.15 (``fsdp2_prepare_model``, DDP's
arguments) and torch 2.13, with the files in configs/; nothing of it has been measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_pdrop.errors import UserError

FLOAT = 4

GATHERED = 10**9
"""Parameters that ZeRO-3 holds gathered at most: ``stage3_max_live_parameters`` of configs/deepspeed/zero3.json."""

PLACES = ("optimizer", "weights")
"""What can be kept in the memory of the CPU; with the optimizer, gradients are there too."""


@dataclass(frozen=True)
class States:
    """How an engine keeps parameters, their gradients and the optimizer.

    Attributes:
        zero: 0 (nothing is sharded), 2 (gradients and optimizer) or 3 (weights too), as DeepSpeed's ZeRO stages.
        gpus: over how many GPUs is sharded.
        bytes: of a number in the layers: 2 (bfloat16) or 4 (float32).
        optimizer: bytes of optimizer state for each trainable parameter, before sharding.
        accumulate: gradients of an earlier micro-batch are there from the start of the step.
        float32: weights and gradients are stored in float32 whatever ``bytes`` says.
        autocast: layers compute under autocast: the stream between them is float32, and weights are cast when used.
        buckets: bytes of a second copy of the gradients for each trainable parameter (DDP's buckets).
        layerwise: weights are gathered layer by layer (FSDP2), and not up to `GATHERED`.
        offloaded: what of `PLACES` lives in the memory of the CPU.

    Raises:
        UserError: another ZeRO stage, no GPU, or an unknown place.
    """

    zero: int = 0
    gpus: int = 1
    bytes: int = 2
    optimizer: float = 12.0
    accumulate: bool = False
    float32: bool = False
    autocast: bool = False
    buckets: float = 0.0
    layerwise: bool = False
    offloaded: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.zero not in (0, 2, 3):
            raise UserError(f"ZeRO stage {self.zero} is not modelled: choose 0, 2 or 3")
        if self.gpus < 1:
            raise UserError(f"memory is predicted for at least 1 GPU, got {self.gpus}")
        if not set(self.offloaded) <= set(PLACES):
            raise UserError(f"only {' and '.join(PLACES)} can be offloaded, got {list(self.offloaded)}")

    @property
    def stored(self) -> int:
        """Bytes of a stored weight, and of its gradient."""
        return FLOAT if self.float32 else self.bytes

    @property
    def stream(self) -> int:
        """Bytes of a number that goes from one layer to the next."""
        return FLOAT if self.autocast else self.bytes

    @property
    def shards(self) -> int:
        """Into how many parts gradients and optimizer are cut."""
        return self.gpus if self.zero else 1

    @property
    def gradient_copy(self) -> float:
        """Bytes a parameter for the gradient that the step of a mixed-precision optimizer makes in float32: as many as
        for the master weight, which is one of its three numbers."""
        return self.optimizer / 3 if self.stored < FLOAT else 0.0

    @property
    def label(self) -> str:
        """The engine in a table's title."""
        if not self.zero:
            return "nothing sharded"
        name = "FSDP2" if self.layerwise else f"ZeRO-{self.zero}"
        return f"{name}{' with offload' if self.offloaded else ''} on {self.gpus} GPUs"

    def cpu_bytes(self, total: int, learning: int) -> float:
        """Bytes in the memory of the CPU for one of the GPUs, of ``total`` parameters of which ``learning`` learn:
        optimizer state, a float32 gradient and, in bfloat16, the gradients that arrive (ZeRO-2: where micro-batches are
        accumulated) and the weights that go back (ZeRO-3 has its weights there)."""
        if not self.offloaded:
            return 0.0
        arriving = self.bytes if self.zero == 3 or self.accumulate else 0
        back = self.bytes if self.zero == 2 else 0
        weights = self.bytes * total if "weights" in self.offloaded else 0
        return ((self.optimizer + FLOAT + arriving + back) * learning + weights) / self.shards
