"""The stages of a GPU check, most valuable first: what each runs, how long it may take, and what it must find.

Adding one is one entry in `STAGES` and a function that fills a `Check`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from llava_pdrop.errors import UserError

ARM = ("step_ms", "quartiles_ms", "mfu", "hfu", "peak_gib", "predicted_peak_gib", "tokens_per_second")
"""What the README's tables say of each schedule of a training step."""

TRAINING = (
    *(f"{arm}.{key}" for arm in ("vanilla", "dropping") for key in ARM),
    "dropping.ranking_share", "predicted", "realised", "realised_over_predicted", "realised_by_step", "samples",
    "image_tokens", "kernels",
)  # fmt: skip

FORCED = (*TRAINING, "forced.vanilla.step_ms", "forced.dropping.step_ms", "forced.realised")
"""The same, and the arms that recompute only what memory forces."""

PREFILL = ("vanilla_ms", "dropping_ms", "speedup", "speedup_predicted", "ranking_share", "decode_tokens_per_s")

GENERATE = (
    "vanilla_first_token_ms", "dropping_first_token_ms", "vanilla_token_ms", "dropping_token_ms", "tokens_per_s",
    "cache_gib", "speedup", "prefill_realised_over_predicted", "hooks_share",
)  # fmt: skip

LEARN = ("accuracy", "standard_error", "seconds_per_step", "image_tokens")

NULL_ON_CPU = frozenset(
    {"predicted_peak_gib", "gpu", "driver", "cuda", "memory_gib", "busy_share", "copy_tb_per_s", "counted_by"}
)
"""Last words of keys that a rehearsal on a CPU may leave empty: the machine has no such thing."""


@dataclass(frozen=True)
class CheckStage:
    """One stage.

    Attributes:
        module: below `llava_pdrop.bench.gpu`. It is imported when the stage begins: one that cannot be costs one
            stage.
        seconds: what it may take. Stages share a schedule: what one leaves over, the next ones may use.
        needs: dotted keys of its result that the README's tables are made of.
        function: its function that is the stage; takes a `Check`.
    """

    module: str
    seconds: int
    needs: tuple[str, ...]
    function: str = "run"

    def load(self) -> Callable[[Any], None]:
        """The function, which takes a `check.Check`."""
        return getattr(import_module(f"llava_pdrop.bench.gpu.{self.module}"), self.function)


STAGES: dict[str, CheckStage] = {
    "env": CheckStage(
        "env", 45,
        ("gpu", "driver", "cuda", "memory_gib", "torch", "transformers", "commit", "matmul_tflops", "linear_tflops",
         "copy_tb_per_s", "rotary_error"),
    ),
    "tests": CheckStage("suite", 130, ("passed", "failed", "skipped", "failures")),
    "next": CheckStage("measured", 100, FORCED, "train"),
    "inside": CheckStage(
        "inside", 115,
        ("synchronisations.vanilla", "synchronisations.dropping", "counted_by", "profile.vanilla.kinds_ms",
         "profile.dropping.kinds_ms", "profile.vanilla.busy_share", "profile.dropping.busy_share", "kernels",
         "remedies"),
    ),
    "prefill": CheckStage("measured", 60, tuple(f"batch_{n}.{key}" for n in (1, 8) for key in PREFILL), "prefill"),
    "l15": CheckStage("measured", 45, FORCED, "train"),
    "p9": CheckStage("measured", 55, TRAINING, "train"),
    "mixture": CheckStage("measured", 30, TRAINING, "train"),
    "ranks": CheckStage("ranks", 240, ("gpus", "engines"), "run"),
    "learn": CheckStage(
        "learning", 240,
        (*(f"arms.{arm}.{key}" for arm in ("vanilla", "pyramid_drop", "random", "fastv") for key in LEARN), "chance",
         "questions"),
    ),
    "generate": CheckStage(
        "measured", 120, tuple(f"batch_{n}.{key}" for n in (1, 4, 8) for key in GENERATE), "generate"
    ),
}  # fmt: skip
"""Stages by name, in the order in which they run."""

LATER = ("ranks", "learn", "generate")
"""Not among the stages of one call on one GPU: `ranks` needs several, `learn` and `generate` have a call of their
own."""


def chosen(words: str | None, device: str, gpus: int) -> list[str]:
    """The stages that are asked for, in their order. By default all on a CPU (a rehearsal); on a GPU all but ``learn``
    and ``generate``, and ``ranks`` only where there are several.

    Raises:
        UserError: one that there is not.
    """
    if words is None:
        left_out = () if device == "cpu" else LATER[1:] if gpus > 1 else LATER
        return [name for name in STAGES if name not in left_out]
    asked = [word.strip() for word in words.split(",") if word.strip()]
    unknown = [name for name in asked if name not in STAGES]
    if unknown or not asked:
        named = ", ".join(map(repr, unknown)) or "none"
        raise UserError(f"--stages: unknown stage {named}: choose from {','.join(STAGES)}")
    return [name for name in STAGES if name in asked]


def limit_of(names: Sequence[str]) -> float:
    """Seconds that the stages ``names`` may take together: the default of ``--seconds``, so that none is cut short by
    the others."""
    return float(sum(STAGES[name].seconds for name in names))


def ends(names: Sequence[str], seconds: float) -> dict[str, float]:
    """Seconds after the start by which each stage has to end: its own time and that of all before it, at most
    ``seconds``."""
    total, found = 0.0, {}
    for name in names:
        total += STAGES[name].seconds
        found[name] = min(total, seconds)
    return found


def missing(stage: CheckStage, result: dict[str, Any], on_cpu: bool) -> list[str]:
    """The keys that ``stage`` needs and ``result`` has not, or has as None."""
    lacking = []
    for key in stage.needs:
        value: Any = result
        for word in key.split("."):
            value = value.get(word, _NOTHING) if isinstance(value, dict) else _NOTHING
        nullable = on_cpu and key.rsplit(".", 1)[-1] in NULL_ON_CPU
        if value is _NOTHING or (value is None and not nullable):
            lacking.append(key)
    return lacking


_NOTHING = object()
