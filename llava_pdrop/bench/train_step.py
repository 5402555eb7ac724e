"""The training bench: one model, whose schedules take turns on the same batches.

Read `rounds` first. A `BenchArm` is one way to do a step; all arms of a measurement alternate, so that whatever the
machine does meanwhile hits them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_pdrop.bench import optimizer
from llava_pdrop.bench.shapes import Shape, make_model
from llava_pdrop.bench.workload import Workload
from llava_pdrop.cost.elementwise import kernels_of, optimizer_bytes
from llava_pdrop.cost.flops import CountedStep, Recomputed, StepFlops, stage_flops, step_flops
from llava_pdrop.cost.memory import predicted_peak
from llava_pdrop.cost.step_time import is_modelled, timed_parts
from llava_pdrop.cost.time_report import ArmTime
from llava_pdrop.errors import UserError
from llava_pdrop.model import vlm
from llava_pdrop.model.kernels import resolve
from llava_pdrop.model.stream import Layout
from llava_pdrop.model.vlm import Output, PyramidLlava
from llava_pdrop.report.units import MIB
from llava_pdrop.runtime.clock import REGIONS, STAGE, Span, Stopwatch, instrumented, no_garbage_collection, replaced
from llava_pdrop.runtime.device import peak_memory, release_memory, reset_peak_memory
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.optim import freeze
from llava_pdrop.types import IGNORE_INDEX, PackedBatch


def full_logits_loss(lm_head: nn.Module, x_TD: Tensor, predict_row: Tensor, label_L: Tensor) -> Tensor:
    """`vlm.label_loss` by way of the logits of every token that is left, those without a label being ignored."""
    label_T = torch.full((len(x_TD),), IGNORE_INDEX, device=x_TD.device).scatter(0, predict_row, label_L)
    return F.cross_entropy(lm_head(x_TD).float(), label_T, ignore_index=IGNORE_INDEX, reduction="sum")


@dataclass(frozen=True)
class BenchArm:
    """One way to do a training step.

    Attributes:
        name: under which it is reported.
        schedule: of its drops; empty: vanilla.
        setting: which of several settings of recomputation it belongs to; arms of one are compared.
        recomputed: by activation checkpointing.
        backend: attention kernel, one of `attention.BACKENDS`.
        samples: of a micro-batch (None: the shape's).
        prepare: changes the batch before the step, outside of the measured time.
        full_logits: `full_logits_loss` stands in for `vlm.label_loss`.
        context: its steps run in one of these.
        kernels: of norms, rotary embedding and gated product, one of `kernels.CHOICES`.
    """

    name: str
    schedule: Schedule = Schedule()
    recomputed: Recomputed = Recomputed()
    backend: str = "auto"
    samples: int | None = None
    prepare: Callable[[PackedBatch], PackedBatch] | None = None
    full_logits: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    kernels: str = "auto"
    setting: str | None = None


@dataclass
class Measured:
    """What the counted steps of an arm took. Every list has an entry per step.

    Attributes:
        seconds: by region (`clock.REGIONS`): on CUDA between events, on the CPU the time its cores were busy.
        wall: the same by the clock on the wall; empty on CUDA, where the seconds are such already.
        stage_seconds, stage_flops: of the decoder layers' forward, for every stage.
        peak_mib: highest memory during the step: CUDA's allocator, or resident memory of the process.
        predicted_peak_mib: of CUDA's allocator, by `cost.memory`; empty on the CPU.
        tokens: of the samples, without padding; ``stage_tokens`` and ``image_tokens``: of the stream at every stage.
        model_flops: operations that the samples ask for: no recomputation, padding or logits that nobody needs;
            ``ranking_flops``: those of the ranking; ``hardware_flops``: operations that were done (`cost.flops`).
        times: the model of its time (`BenchTrainer.modelled_time`); empty where there is none.
        error: why there are fewer steps than asked for.
    """

    arm: BenchArm
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in REGIONS})
    wall: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in REGIONS})
    stage_seconds: list[list[float]] = field(default_factory=list)
    stage_flops: list[list[float]] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    predicted_peak_mib: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stage_tokens: list[list[int]] = field(default_factory=list)
    image_tokens: list[list[int]] = field(default_factory=list)
    model_flops: list[float] = field(default_factory=list)
    hardware_flops: list[float] = field(default_factory=list)
    ranking_flops: list[float] = field(default_factory=list)
    times: list[ArmTime] = field(default_factory=list)
    error: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps; tokens before any drop."""
        return median(tokens / taken for tokens, taken in zip(self.tokens, self.seconds["step"]))

    @property
    def compute_seconds(self) -> list[float]:
        """Forward and backward of every step: what operations predict. The optimizer has next to none."""
        return [forward + backward for forward, backward in zip(self.seconds["forward"], self.seconds["backward"])]

    def typical(self, seconds: Sequence[float]) -> float:
        """What all counted steps, of which these are the ``seconds``, take at their median speed: the median of seconds
        per operation, by their operations. Batches differ in length, so that neither a median of their seconds nor a
        sum that one interruption may spoil would do."""
        speed = median(taken / count for taken, count in zip(seconds, self.hardware_flops))
        return speed * sum(self.hardware_flops)

    def add(self, output: Output, loss: float, times: dict[str, Span], peak: float, cuda: bool) -> None:
        """Appends one step."""
        for name in REGIONS:
            self.seconds[name].append(times[name].cost)
            if not cuda:
                self.wall[name].append(times[name].seconds)
        stages = [times.get(f"{STAGE} {stage}") for stage in range(len(self.arm.schedule.layers) + 1)]
        self.stage_seconds.append([0.0 if span is None else span.cost for span in stages])  # none before layer 0
        self.losses.append(loss)
        self.peak_mib.append(peak)
        self.stage_tokens.append(output.tokens)
        self.image_tokens.append(output.image_tokens)


class BenchTrainer:
    """A model with its optimizer, ready to do any arm's step.

    Args:
        kind: one of `optimizer.CHOICES`; `kind` then says what ``auto`` came to.

    Raises:
        UserError: an unknown ``kind``, or the weights do not fit.
    """

    def __init__(self, shape: Shape, device: torch.device, workload: Workload, kind: str = "auto") -> None:
        self.shape, self.device, self.workload = shape, device, workload
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            self.model: PyramidLlava = make_model(shape, device, workload.seed).train()
            self.dtype = self.model.hf.dtype
            freeze(self.model, shape.trainable)
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.kind = optimizer.choose(kind, parameters, device)
            self.optimizer = optimizer.make(self.kind, parameters)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory on {device}: weights and optimizer of this shape do not fit: try --optimizer none or a "
                "smaller --shape"
            ) from error
        self.watch = Stopwatch(device)

    def step(self, arm: BenchArm, batch: PackedBatch) -> tuple[Output, float, dict[str, Span], float]:
        """One step of ``arm``: output, loss per label token, seconds by region, peak memory in MiB.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        self.take(arm)
        watch = self.watch
        watch.clear()
        reset_peak_memory()
        other_loss = replaced(vlm, "label_loss", full_logits_loss) if arm.full_logits else nullcontext()
        with other_loss, arm.context(), instrumented(self.model, watch), watch.region("step"):
            with watch.region("forward"):
                output = self.model(batch)
                loss = output.loss / max(1, output.labels)
            with watch.region("backward"):
                loss.backward()
                watch.stop("tower_backward")
            with watch.region("optimizer"):
                if self.optimizer is not None:
                    self.optimizer.step()
        times = watch.read(REGIONS)
        memory = peak_memory(self.device)
        self.model.zero_grad(set_to_none=True)
        return output, float(loss.detach()), times, memory.get("peak_cuda_mib", memory["peak_rss_mib"])

    def counted(self, arm: BenchArm, batch: PackedBatch, layouts: Sequence[Layout] | None = None) -> CountedStep:
        """A step of ``arm`` on ``batch``, for those who count it. ``layouts``: where they are known."""
        shape, config = self.shape, self.model.hf.config
        return CountedStep(config, batch, arm.schedule, shape.geometry, shape.trainable, arm.recomputed, layouts)

    def model_flops(self, arm: BenchArm, batch: PackedBatch) -> StepFlops:
        """Operations that a step of ``arm`` on ``batch`` cannot do without."""
        return step_flops(replace(self.counted(arm, batch), recomputed=Recomputed()))

    def hardware_flops(self, arm: BenchArm, batch: PackedBatch) -> float:
        """Operations that it does, recomputation and logits without a label included."""
        step = self.counted(arm, batch)
        count = step_flops(step)
        if arm.full_logits:
            count = replace(count, head=count.head * step.layouts[-1].tokens / len(batch.label_positions))
        return count.total

    def predicted_peak_mib(self, arm: BenchArm, batch: PackedBatch, layouts: Sequence[Layout] | None = None) -> float:
        """By `cost.memory`, with this optimizer, the arm's kernels and logits of labels alone."""
        on_gpu = self.device.type == "cuda"  # else it is asked for a card that is not here
        kernels = kernels_of(resolve(arm.kernels, self.device) if on_gpu else arm.kernels)
        states = optimizer.states(self.kind, self.dtype)
        return predicted_peak(self.counted(arm, batch, layouts), states, kernels=kernels).total / MIB

    def modelled_time(self, arm: BenchArm, batch: PackedBatch) -> ArmTime | None:
        """The model of its time (`cost.step_time`), in bfloat16 on whatever device, with the kernels that it has here;
        None where there is none."""
        if arm.full_logits or not is_modelled(self.model.hf.config):
            return None
        learning = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        moved = optimizer_bytes(learning) * optimizer.SHARES[self.kind]
        kernels = kernels_of(resolve(arm.kernels, self.device))
        parts = timed_parts(self.counted(arm, batch), kernels)
        return ArmTime(parts, moved, self.model_flops(arm, batch).total)

    def recover(self) -> None:
        """Gives back what a step that ran out of memory has left behind."""
        self.watch.clear()
        self.model.zero_grad(set_to_none=True)
        release_memory()  # the error's traceback holds activations, and the collector is off

    def take(self, arm: BenchArm) -> None:
        """Sets the model as ``arm`` wants it."""
        model = self.model
        model.schedule, model.backend, model.kernels = arm.schedule, arm.backend, arm.kernels
        model.recompute_layers, model.recompute_tower = arm.recomputed.layers, arm.recomputed.tower
        if arm.recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        elif hasattr(model.hf, "activation_checkpointing_disable"):
            model.hf.activation_checkpointing_disable()
        else:  # transformers before 5.20
            model.hf.gradient_checkpointing_disable()


def measure_arms(
    trainer: BenchTrainer, arms: Sequence[BenchArm], steps: int, warmup: int, patient: tuple[type[Exception], ...] = ()
) -> list[Measured]:
    """What `rounds` comes to after all its steps."""
    *_, results = rounds(trainer, arms, steps, warmup, patient)
    return results


def rounds(
    trainer: BenchTrainer, arms: Sequence[BenchArm], steps: int, warmup: int, patient: tuple[type[Exception], ...] = ()
) -> Iterator[list[Measured]]:
    """``steps`` counted steps of every arm, all arms on the same batches one after the other, the first changing from
    step to step. The first warm-up step takes the longest batch, so that the allocator has seen it. Yields the results
    so far after each counted step.

    Args:
        patient: an arm that raises one of these is left out from there on, and its result says so.

    Raises:
        UserError: out of memory (one line that says what to lower).
    """
    results = [Measured(arm) for arm in arms]
    longest = trainer.workload.longest(steps, arms[0].samples)
    order = [longest, *range(warmup - 1)][:warmup] + list(range(steps))
    with no_garbage_collection():
        for place, number in enumerate(order):
            turn = place % len(results)
            for result in [*results[turn:], *results[:turn]]:
                if result.error is None:
                    _one_step(trainer, result, number, place >= warmup, patient)
            if place >= warmup:
                yield results


def _one_step(
    trainer: BenchTrainer, result: Measured, number: int, counted: bool, patient: tuple[type[Exception], ...]
) -> None:
    arm = result.arm
    try:
        samples = trainer.workload.batch(number, trainer.device, arm.samples)
        batch = arm.prepare(samples) if arm.prepare else samples
        taken = trainer.step(arm, batch)
    except patient as error:
        whole = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        result.error = "out of memory" if isinstance(error, torch.OutOfMemoryError) else whole
    except torch.OutOfMemoryError as error:
        again = "--recompute" if arm.setting is None else "--recompute-layers all"
        hints = ["a smaller --samples", *([again] if not arm.recomputed else [])]
        hints += {"adamw": ["--optimizer sharded"], "sharded": ["--optimizer none"]}.get(trainer.kind, [])
        raise UserError(f"out of memory on {trainer.device} in {arm.name}: try {' or '.join(hints)}") from error
    if result.error:
        trainer.recover()  # here, since the error has to be gone
    elif counted:
        cuda = trainer.device.type == "cuda"
        result.add(*taken, cuda=cuda)
        result.tokens.append(sum(samples.seq_lens))
        needed = trainer.model_flops(arm, samples)
        result.model_flops.append(needed.total)
        result.ranking_flops.append(needed.ranking)
        result.hardware_flops.append(trainer.hardware_flops(arm, batch))
        result.stage_flops.append(stage_flops(trainer.counted(arm, batch)))
        if (time := trainer.modelled_time(arm, batch)) is not None:
            result.times.append(time)
        if cuda and not arm.full_logits:
            result.predicted_peak_mib.append(trainer.predicted_peak_mib(arm, batch))
