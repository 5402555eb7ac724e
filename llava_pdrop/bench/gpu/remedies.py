"""What could make a step faster, each switched on for single steps of one model, so that all take turns with the step
as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama import modeling_llama

from llava_pdrop.bench.gpu.check import Check
from llava_pdrop.bench.train_step import Arm, Measured, Trainer, measure
from llava_pdrop.model.vlm import Output, PyramidLlava
from llava_pdrop.runtime.clock import Seconds, replaced
from llava_pdrop.runtime.device import peak_flops
from llava_pdrop.types import PackedBatch

Switch = Callable[[PyramidLlava], AbstractContextManager[Any]]

ROUNDS = 3
"""Counted steps of every arm."""


@dataclass(frozen=True)
class RemedyArm(Arm):
    """An arm with a ``switch``, a context in which its steps run."""

    switch: Switch = lambda model: nullcontext()


class RemedyTrainer(Trainer):
    """A `Trainer` that throws the switch of an arm for the time of a step."""

    def step(self, arm: Arm, batch: PackedBatch) -> tuple[Output, float, dict[str, Seconds], float]:
        """See `Trainer.step`."""
        with arm.switch(self.model) if isinstance(arm, RemedyArm) else nullcontext():
            return super().step(arm, batch)


@dataclass(frozen=True)
class Remedy:
    """A change of the arms (vanilla, dropping), and what it needs that may not be here."""

    change: Callable[[RemedyArm, int], RemedyArm]
    package: str | None = None
    cuda: bool = True


@contextmanager
def fused_norms(model: PyramidLlava) -> Iterator[None]:
    """`F.rms_norm` for the decoder's norms: one kernel instead of eight. In bfloat16 it rounds once, where Hugging
    Face's norms round before and after the weight."""

    def fused(self: Any, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    modules = model.hf.model.language_model.modules()
    norms = [module for module in modules if type(module).__name__.endswith("RMSNorm")]
    with _methods((norm, fused) for norm in norms):
        yield


@contextmanager
def liger_rotary(model: PyramidLlava) -> Iterator[None]:
    """liger's rotary embedding, one Triton kernel."""
    with replaced(
        modeling_llama, "apply_rotary_pos_emb", import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
    ):
        yield


@contextmanager
def liger_mlp(model: PyramidLlava) -> Iterator[None]:
    """liger's SiLU and product, one Triton kernel."""
    function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction

    def gated(self: Any, hidden: Tensor) -> Tensor:
        return self.down_proj(function.apply(self.gate_proj(hidden), self.up_proj(hidden)))

    with _methods((layer.mlp, gated) for layer in model.hf.model.language_model.layers):
        yield


@contextmanager
def _methods(pairs: Iterator[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """Another ``forward`` of each module, as long as it lasts."""
    with ExitStack() as undo:
        for module, function in pairs:
            module.forward = MethodType(function, module)  # type: ignore[method-assign]
            undo.callback(delattr, module, "forward")
        yield


def all_of(*switches: Switch) -> Switch:
    """One switch that throws several."""

    @contextmanager
    def together(model: PyramidLlava) -> Iterator[None]:
        with ExitStack() as stack:
            for switch in switches:
                stack.enter_context(switch(model))
            yield

    return together


def cudnn_first(model: PyramidLlava) -> AbstractContextManager[Any]:
    """cuDNN's attention where `F.scaled_dot_product_attention` has the choice."""
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


def _switched(switch: Switch, **changes: Any) -> Callable[[RemedyArm, int], RemedyArm]:
    return lambda arm, depth: replace(arm, switch=switch, **changes)


def _as_memory_allows(arm: RemedyArm, depth: int) -> RemedyArm:
    """On 80 GB: vanilla has to recompute about 12 of 32 layers, with dropping none."""
    layers = 0 if arm.schedule.layers else depth * 12 // 32
    return replace(arm, recompute=layers > 0, recompute_layers=layers or None)


REMEDIES: dict[str, Remedy] = {
    "as it is": Remedy(lambda arm, depth: arm, cuda=False),
    "each recomputes what it must": Remedy(_as_memory_allows, cuda=False),
    "F.rms_norm": Remedy(_switched(fused_norms), cuda=False),
    "sdpa": Remedy(lambda arm, depth: replace(arm, backend="sdpa"), cuda=False),
    "sdpa, cuDNN first": Remedy(_switched(cudnn_first, backend="sdpa")),
    "F.rms_norm, liger rotary": Remedy(_switched(all_of(fused_norms, liger_rotary)), "liger_kernel"),
    "F.rms_norm, liger rotary and MLP": Remedy(
        _switched(all_of(fused_norms, liger_rotary, liger_mlp)), "liger_kernel"
    ),
    "the same, each recomputes what it must": Remedy(
        lambda arm, depth: replace(
            _as_memory_allows(arm, depth), switch=all_of(fused_norms, liger_rotary, liger_mlp)
        ),
        "liger_kernel",
    ),
}  # fmt: skip
"""By name. The first is the step as it is."""


def try_remedies(check: Check, trainer: RemedyTrainer, arms: Sequence[Arm]) -> None:
    """Measures all remedies that can run here, taking turns step by step, and reports after every round, so that a time
    limit costs precision and not the answer. One that fails in its first step is reported and left out."""
    depth = trainer.shape.text["num_hidden_layers"]
    changed: dict[str, list[Arm]] = {}
    found: dict[str, Any] = {}
    for name, remedy in REMEDIES.items():
        if remedy.cuda and check.rehearsal:
            found[name] = {"unavailable": "needs a CUDA device"}
        elif remedy.package and find_spec(remedy.package) is None:
            found[name] = {"unavailable": f"{remedy.package} is not installed"}
        else:
            own = [remedy.change(arm, depth) for arm in arms if isinstance(arm, RemedyArm)]
            if (reason := _first_step(trainer, own)) is None:
                changed[name] = list(own)
            else:
                found[name] = {"unavailable": reason}
    check.put(remedies=found)
    flat = [arm for own in changed.values() for arm in own]
    totals: list[Measured] = []
    for _ in range(1 if check.rehearsal else ROUNDS):
        taken = measure(trainer, flat, 1, 0, patient=True)
        totals = [_added(total, more) for total, more in zip(totals, taken)] if totals else taken
        results = iter(totals)
        found |= {name: _figures(trainer, next(results), next(results)) for name in changed}
        check.put(remedies=found)
    for name, figures in found.items():
        check.note(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in figures.items()))


def _first_step(trainer: RemedyTrainer, arms: Sequence[RemedyArm]) -> str | None:
    """A step of every arm, not counted. Why it cannot be done, or None.

    Raises:
        RuntimeError: the device no longer works: no remedy can be tried after that.
    """
    reason = None
    try:
        measure(trainer, arms, 1, 0)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises that does not fit, the next one is tried
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    trainer.recover()  # where a broken context raises, and ends the stage
    return reason


def _added(total: Measured, more: Measured) -> Measured:
    """The steps of both."""
    for field in fields(Measured):
        own, new = getattr(total, field.name), getattr(more, field.name)
        if isinstance(own, list):
            own.extend(new)
        elif isinstance(own, dict):
            for key, values in new.items():
                own[key].extend(values)
    total.error = total.error or more.error
    return total


def _figures(trainer: Trainer, vanilla: Measured, dropping: Measured) -> dict[str, Any]:
    """Of one remedy."""
    if reason := vanilla.error or dropping.error:
        return {"unavailable": reason}
    rate, _ = peak_flops(trainer.device, trainer.dtype)
    before, after = (median(measured.seconds["step"]) for measured in (vanilla, dropping))
    return {
        "vanilla_ms": 1000 * before,
        "dropping_ms": 1000 * after,
        "saved": 1 - after / before,
        "predicted": 1 - sum(dropping.hardware_flops) / sum(vanilla.hardware_flops),
        "vanilla_mfu": median(vanilla.model_flops) / before / rate,
        "dropping_mfu": median(dropping.model_flops) / after / rate,
        "vanilla_peak_gib": max(vanilla.peak_mib) / 1024,
        "dropping_peak_gib": max(dropping.peak_mib) / 1024,
        "steps": len(vanilla.losses),
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
