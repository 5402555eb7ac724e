"""The schema of a run: one frozen dataclass per section of the YAML.

A field's annotation is its rule (`values.convert` walks the annotations), so adding a key is adding a field and
a row in configs/README.md. Everything a user can get wrong raises `Problem`, which knows the key; `load.py` adds the
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llava_pdrop.config.values import at_least, build_schedule, convert
from llava_pdrop.errors import ConfigError, Problem, did_you_mean
from llava_pdrop.schedule import Schedule


@dataclass(frozen=True)
class ModelSection:
    """Either ``path`` (a whole LLaVA) or ``language_model`` and ``vision_tower`` (parts, fresh projector)."""

    path: str | None = None
    language_model: str | None = None
    vision_tower: str | None = None
    projector: str | None = None
    aspect: Literal["pad", "anyres"] = "pad"
    merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    pinpoints: tuple[tuple[int, int], ...] = ()
    rounding: Literal["original", "hf"] = "original"
    image_size: int | None = None
    attention: Literal["auto", "sdpa", "varlen", "flash_attn"] = "auto"
    template: str = "v1"
    trainable: tuple[Literal["projector", "language_model", "vision_tower"], ...] = ("projector", "language_model")
    reference_shape: ReferenceShape | None = None

    def __post_init__(self) -> None:
        parts = [name for name in ("language_model", "vision_tower") if getattr(self, name) is not None]
        if self.path is not None and parts:
            raise Problem("model.path", f"model.path and model.{parts[0]} exclude each other: set one of them to null")
        if self.path is None and len(parts) < 2:
            raise Problem("model", "give either model.path, or both model.language_model and model.vision_tower")
        if self.aspect == "anyres" and not self.pinpoints:
            raise Problem("model.pinpoints", "model.aspect 'anyres' needs model.pinpoints, a list of [width, height]")
        if self.image_size is not None:
            at_least(1, "model.image_size", self.image_size)
        if not self.trainable:
            raise Problem("model.trainable", "model.trainable is empty: nothing would be trained")


@dataclass(frozen=True)
class ReferenceShape:
    """What the ``config.json`` files of the parts say, for `plan` and for building without the weights."""

    language_model: dict[str, Any]
    vision_tower: dict[str, Any]


@dataclass(frozen=True)
class DataSection:
    train: str
    eval: str | None = None
    format: str | None = None
    image_root: str | None = None
    index: str | None = None
    on_invalid: Literal["stop", "skip"] = "stop"
    max_invalid: float = 0.01
    cache: str | None = "~/.cache/llava_pdrop"
    prepare: tuple[str, ...] | None = None
    max_length: int = 2048
    truncation: Literal["turns", "tokens"] = "turns"
    tokens_per_batch: int | None = None
    samples_per_batch: int | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("tokens_per_batch", "samples_per_batch") if getattr(self, n) is not None]
        if not given:
            raise Problem("data.samples_per_batch", "set data.samples_per_batch or data.tokens_per_batch, not neither")
        if len(given) == 2:
            raise Problem(
                "data.tokens_per_batch",
                "data.tokens_per_batch and data.samples_per_batch exclude each other: set one of them to null",
            )
        for name in ("max_length", *given):
            at_least(1, f"data.{name}", getattr(self, name))
        if not 0 <= self.max_invalid <= 1:
            raise Problem("data.max_invalid", f"data.max_invalid is a share, 0 to 1, got {self.max_invalid}")


@dataclass(frozen=True)
class TrainSection:
    """Own keys, and in ``arguments`` the fields of `transformers.TrainingArguments` under their own names."""

    projector_lr: float | None = None
    vision_tower_lr: float | None = None
    recompute_layers: int | None = None
    resume: str = "auto"
    on_bad_sample: Literal["stop", "skip"] = "stop"
    max_bad_samples: int = 100
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recompute_layers is not None:
            at_least(0, "train.recompute_layers", self.recompute_layers)
        at_least(0, "train.max_bad_samples", self.max_bad_samples)


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters in the decoder instead of its own weights; the defaults are those of the official
    ``finetune_lora.sh``. ``rank_pattern``: name of a module, or a regular expression of peft's -> its rank."""

    target: Literal["attention", "mlp", "both"] = "both"
    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    bits: Literal[4, 8] | None = None
    double_quant: bool = True
    quant_type: Literal["nf4", "fp4"] = "nf4"

    def __post_init__(self) -> None:
        at_least(1, "lora.r", self.r)
        at_least(1, "lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise Problem("lora.dropout", f"lora.dropout must be from 0 to below 1, got {self.dropout:g}")
        for name, rank in self.rank_pattern.items():
            at_least(1, f"lora.rank_pattern.{name}", convert(rank, int, f"lora.rank_pattern.{name}"))


@dataclass(frozen=True)
class EvalSection:
    batch_size: int = 50
    max_new_tokens: int = 16
    limit: int | None = None
    scorer: str = "exact_match"

    def __post_init__(self) -> None:
        at_least(1, "eval.batch_size", self.batch_size)
        at_least(1, "eval.max_new_tokens", self.max_new_tokens)
        if self.limit is not None:
            at_least(1, "eval.limit", self.limit)


@dataclass(frozen=True)
class CompareSection:
    """``training_free``: name -> ``same``, or keys of ``pyramid_drop`` to change; see `Config.training_free`."""

    vanilla: bool = True
    training_free: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        entries = self.training_free or {}  # null takes an inherited entry away
        object.__setattr__(self, "training_free", {k: v for k, v in entries.items() if v is not None})


@dataclass(frozen=True)
class PaperRow:
    """What a paper reports for this run: shown beside its own results, and otherwise without effect.

    ``gpu_hours`` count both stages; ``vanilla_gpu_hours`` are those of the run it is compared with; ``tflop`` is the
    cost of the image tokens by the paper's formula; ``scores``: benchmark -> value as printed.
    """

    table: str
    gpu_hours: float | None = None
    vanilla_gpu_hours: float | None = None
    tflop: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def saved(self) -> float | None:
        """Share of the GPU hours saved."""
        if self.gpu_hours is None or self.vanilla_gpu_hours is None:
            return None
        return 1 - self.gpu_hours / self.vanilla_gpu_hours


@dataclass(frozen=True)
class Config:
    """One run. ``file`` (where it was read) takes no part in comparisons and is not written back."""

    name: str
    output_dir: str
    model: ModelSection
    data: DataSection
    seed: int = 0
    pyramid_drop: Schedule | None = None
    train: TrainSection = TrainSection()
    lora: LoraSection | None = None
    eval: EvalSection = EvalSection()
    pretrain: str | None = None
    compare: CompareSection = CompareSection()
    paper: PaperRow | None = None
    file: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        at_least(0, "seed", self.seed)
        if self.lora is not None and "language_model" not in self.model.trainable:
            raise Problem(
                "lora", "lora trains the language_model, which model.trainable leaves out: add it, or lora=null"
            )

    @property
    def schedule(self) -> Schedule:
        """The dropping schedule; the empty one for a vanilla run."""
        return self.pyramid_drop or Schedule()

    def vanilla(self) -> Config:
        """The same run without dropping."""
        return replace(self, pyramid_drop=None, paper=None)

    def training_free(self, num_layers: int) -> dict[str, Schedule]:
        """The schedules of ``compare.training_free`` for a decoder of ``num_layers`` layers.

        ``same`` is the schedule of this run; a mapping changes keys of it. Its extra key ``single_drop: n`` puts one
        drop after layer n instead, with the ratio that leaves the same average number of image tokens.

        Raises:
            ConfigError: a schedule that cannot be.
        """
        try:
            return self.check(num_layers)
        except Problem as problem:
            raise ConfigError(f"{self.file}: {problem}") from None

    def check(self, num_layers: int | None) -> dict[str, Schedule]:
        """Checks all schedules, against the decoder too where its ``num_layers`` is known, and returns those of
        ``compare.training_free``.

        Raises:
            Problem: an unknown key or ranker, a wrong type, a schedule that cannot be.
        """
        self._check_one(self.schedule, "pyramid_drop", num_layers)
        schedules = {}
        for name, entry in (self.compare.training_free or {}).items():
            key = f"compare.training_free.{name}"
            if entry != "same" and not isinstance(entry, Mapping):
                raise Problem(key, f"{key} must be 'same' or a mapping of pyramid_drop keys, got {entry!r}")
            changes = {} if entry == "same" else dict(entry)
            layer = convert(changes.pop("single_drop", None), int | None, f"{key}.single_drop")
            schedule = build_schedule({**self.schedule.to_dict(), **changes}, key)
            if layer is not None and num_layers is not None:
                try:
                    schedule = schedule.single_drop(layer, num_layers, schedule.ranker)
                except (ValueError, ZeroDivisionError) as error:
                    raise Problem(key, f"{key}: {error}") from None
            schedules[name] = self._check_one(schedule, key, num_layers)
        return schedules

    @staticmethod
    def _check_one(schedule: Schedule, key: str, num_layers: int | None) -> Schedule:
        from llava_pdrop.model.pyramid_drop import RANKERS  # imports torch: only when a config is really loaded

        if schedule.ranker not in RANKERS:
            raise Problem(
                f"{key}.ranker",
                f"unknown {key}.ranker {schedule.ranker!r}: choose one of {sorted(RANKERS)}"
                + did_you_mean(schedule.ranker, RANKERS),
            )
        try:
            return schedule if num_layers is None else schedule.check(num_layers)
        except ValueError as error:
            raise Problem(f"{key}.layers", str(error) if key == "pyramid_drop" else f"{key}: {error}") from None
