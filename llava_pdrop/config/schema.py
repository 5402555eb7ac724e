"""The schema of a run: one frozen dataclass per section of the YAML.

A field's annotation is its rule (`values.convert` walks the annotations), and the string under it is its row in
configs/README.md (`tables.py`): to add a key, add a field. Everything a user can get wrong raises `Problem`, which
knows the key; `load.py` adds the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from llava_pdrop.config.values import at_least, build_schedule, convert
from llava_pdrop.errors import ConfigError, Problem, UserError
from llava_pdrop.schedule import Schedule


@dataclass(frozen=True)
class ModelSection:
    """Either ``path`` (a whole LLaVA) or ``language_model`` and ``vision_tower`` (parts, fresh projector)."""

    path: str | None = None
    """A LLaVA, in Hugging Face or original layout: directory or hub id. Its own image settings apply."""
    language_model: str | None = None
    """Decoder: directory or hub id."""
    vision_tower: str | None = None
    """CLIP tower: directory or hub id."""
    projector: str | None = None
    """Pretrained projector: ``projector.safetensors`` of a stage 1, or an original ``mm_projector.bin``."""
    aspect: Literal["pad", "anyres"] = "pad"
    """``pad``: one square tile (LLaVA-1.5). ``anyres``: the whole picture and tiles of it (LLaVA-NeXT)."""
    merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    """Order of anyres tokens: ``flat``, ``spatial``, or ``spatial_unpad`` (padding removed, a newline per row)."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Anyres canvases ``[[width, height], ...]``, or a key of ``PINPOINTS`` in ``llava_pdrop/geometry.py``: ``5_tiles``
    (the paper's), ``9_tiles`` (ours)."""
    rounding: Literal["original", "hf"] = "original"
    """How unpadded sizes are rounded: as LLaVA (``original``) or newer transformers (``hf``) do. Few sizes differ."""
    image_size: int | None = None
    """Side of a tile in pixels, if not the tower's own; the tower's position embeddings are interpolated."""
    attention: Literal["auto", "sdpa", "varlen", "flash_attn"] = "auto"
    """Kernel for packed streams: ``auto``, ``sdpa``, ``varlen`` or ``flash_attn``."""
    kernels: Literal["auto", "eager", "torch", "liger"] = "auto"
    """Norms, rotary embedding and gated product of the decoder: Hugging Face's (``eager``), PyTorch's fused and
    compiled ones (``torch``), or those of liger-kernel (``liger``). ``auto``: on CUDA ``liger`` where it
    is installed, else ``torch``; on a CPU ``eager``."""
    template: str = "v1"
    """Conversation format: a key of ``TEMPLATES`` in ``llava_pdrop/data/conversation.py``."""
    trainable: tuple[Literal["projector", "language_model", "vision_tower"], ...] = ("projector", "language_model")
    """Parts to train: any of ``projector``, ``language_model`` and ``vision_tower``."""
    beyond_positions: Literal["stop", "allow"] = "stop"
    """A sample longer than the decoder has positions (its ``config.json``, rope scaling included): ``stop`` before
    training, or ``allow``, and a line says so."""
    reference_shape: ReferenceShape | None = None
    """The ``config.json`` of decoder and tower, so that ``plan`` needs no weights."""

    def __post_init__(self) -> None:
        parts = [name for name in ("language_model", "vision_tower") if getattr(self, name) is not None]
        if self.path is not None and parts:
            raise Problem("model.path", f"model.path and model.{parts[0]} exclude each other: set one of them to null")
        if self.path is None and len(parts) < 2:
            raise Problem("model", "give either model.path, or both model.language_model and model.vision_tower")
        if self.aspect == "anyres" and not self.pinpoints:
            raise Problem("model.pinpoints", "model.aspect 'anyres' needs model.pinpoints, a list of [width, height]")
        at_least(1, "model.image_size", self.image_size)
        if not self.trainable:
            raise Problem("model.trainable", "model.trainable is empty: nothing would be trained")


@dataclass(frozen=True)
class ReferenceShape:
    """What the ``config.json`` files of the parts say, for `plan` and for building without the weights."""

    language_model: dict[str, Any]
    """Content of the decoder's ``config.json``."""
    vision_tower: dict[str, Any]
    """Content of the tower's ``config.json``."""


@dataclass(frozen=True)
class DataSection:
    train: str
    """LLaVA JSON, JSON lines, tar shards, a ``datasets`` directory, parquet, or a mixture of them (YAML)."""
    eval: str | None = None
    """LLaVA JSON to evaluate on."""
    format: str | None = None
    """Format of ``train`` if its name does not show it: a key of ``READERS`` in ``llava_pdrop/data/readers``."""
    image_root: str | None = None
    """Directory that image paths in the records are relative to."""
    index: str | None = None
    """``clean_index.json`` of ``llava-pdrop doctor``: train only on the records it lists. Must match the data."""
    on_invalid: Literal["stop", "skip"] = "stop"
    """An unusable record: ``stop`` before training, or ``skip`` it and list it in ``OUTPUT_DIR/skipped.jsonl``."""
    max_invalid: float = 0.01
    """Largest share of records that ``skip`` may leave out; more is an error."""
    cache: str | None = "~/.cache/llava_pdrop"
    """Directory for token counts and image sizes of data sets of 10,000 records or more; null: no cache."""
    prepare: tuple[str, ...] | None = None
    """Script and arguments, a list, run before training. It must do nothing if its output is up to date."""
    max_length: int = 2048
    """Maximum tokens per sample, image tokens included."""
    truncation: Literal["turns", "tokens"] = "turns"
    """Longer samples lose whole ``turns``, or are cut at the token (``tokens``, as the official code does)."""
    tokens_per_batch: int | None = None
    """Token budget of a packed micro-batch. Set either this or ``samples_per_batch``."""
    samples_per_batch: int | None = None
    """Samples per packed micro-batch."""

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
    """Learning rate of the projector; null: ``learning_rate``."""
    vision_tower_lr: float | None = None
    """Learning rate of the vision tower; null: ``learning_rate``."""
    recompute_layers: int | None = None
    """Checkpoint activations of the first N decoder layers only (they have the longest streams); null: of all."""
    resume: str = "auto"
    """``auto``: from the newest complete checkpoint in ``output_dir``; ``never``; or the path of a checkpoint."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """A sample that fails to load during training: ``stop``, or ``skip``: another takes its place, and it is listed in
    ``OUTPUT_DIR/bad_samples.jsonl``."""
    max_bad_samples: int = 100
    """Maximum samples that ``skip`` replaces in the whole run; more is an error."""
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(0, "train.recompute_layers", self.recompute_layers)
        at_least(0, "train.max_bad_samples", self.max_bad_samples)


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters in the decoder instead of its own weights; the defaults are those of the official
    ``finetune_lora.sh``."""

    target: Literal["attention", "mlp", "both"] = "both"
    """Decoder modules with adapters: ``attention`` (q, k, v, o), ``mlp`` (gate, up, down) or ``both``."""
    r: int = 128
    """Rank."""
    alpha: int = 256
    """Scale: adapters are multiplied by ``alpha / r``."""
    dropout: float = 0.05
    """Dropout on the input of the adapters."""
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    r"""Other ranks, by module name or peft's regular expression: ``{q_proj: 64, 'layers\.0\.mlp\.up_proj': 8}``."""
    bits: Literal[4, 8] | None = None
    """``4`` or ``8``: QLoRA. Needs a CUDA GPU and ``pip install bitsandbytes``; not with FSDP or ZeRO-3."""
    double_quant: bool = True
    """4-bit weights: quantise their scales too."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit weights: ``nf4`` or ``fp4``."""

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
    """Questions per batch."""
    max_new_tokens: int | None = None
    """Maximum tokens per answer; null: 16, and for a benchmark what its own evaluation gives."""
    limit: int | None = None
    """Evaluate only the first N questions, of each benchmark too; null: all."""
    scorer: str = "exact_match"
    """A key of ``SCORERS`` in ``llava_pdrop/eval/scorers.py``, for ``data.eval``."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks to measure: names that ``llava-pdrop benchmarks`` lists, or ``paper``: those that the paper reports.
    On the command line ``benchmarks=mme,pope``."""
    training_free: tuple[str, ...] = ()
    """Measure them with these schedules too: names in ``compare.training_free``, or ``vanilla``. On the command line
    ``training_free=vanilla,fastv``."""
    root: str | None = None
    """Directory of the benchmarks' own, as LLaVA's ``eval.zip`` has them; null: ``playground/data/eval``."""
    max_unread: float = 0.01
    """Largest share of a benchmark's questions that may be unreadable; more, and the exit status is 1."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "limit"):
            at_least(1, f"eval.{name}", getattr(self, name))
        if not 0 <= self.max_unread <= 1:
            raise Problem("eval.max_unread", f"eval.max_unread is a share, 0 to 1, got {self.max_unread}")


@dataclass(frozen=True)
class CompareSection:
    """What ``compare`` does besides; entries of ``training_free``: see `Config.training_free`."""

    vanilla: bool = True
    """Also train this config without ``pyramid_drop``, from the same start, on the same batches."""
    training_free: dict[str, Any] | None = None
    """Schedules to try on the vanilla model without training: name -> schedule."""

    def __post_init__(self) -> None:
        entries = self.training_free or {}  # null takes an inherited entry away
        object.__setattr__(self, "training_free", {k: v for k, v in entries.items() if v is not None})


@dataclass(frozen=True)
class PaperRow:
    """What a paper reports for this run: shown beside its own results, and otherwise without effect."""

    table: str
    """Where the paper has it."""
    gpu_hours: float | None = None
    """GPU hours of this run, both stages together."""
    vanilla_gpu_hours: float | None = None
    """GPU hours of the vanilla run in the same row, both stages together."""
    tflop: float | None = None
    """Cost of the image tokens by the paper's formula."""
    scores: dict[str, float] = field(default_factory=dict)
    """Benchmark -> score as printed."""

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
    """Name of the run, in logs and tables."""
    output_dir: str
    """Everything the run writes goes here."""
    model: ModelSection
    data: DataSection
    seed: int = 0
    """Seeds freshly initialised weights, batch order and random ranking."""
    pyramid_drop: Schedule | None = None
    train: TrainSection = TrainSection()
    lora: LoraSection | None = None
    eval: EvalSection = EvalSection()
    pretrain: str | None = None
    """Stage-1 config whose projector this run starts from; it runs first if its output is missing. Override its keys
    after the path: ``"CONFIG a.b=c ..."``. Decoder, tower and image size must match this run's."""
    compare: CompareSection = CompareSection()
    paper: PaperRow | None = None
    file: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        at_least(0, "seed", self.seed)
        if self.seed >= 2**32:
            raise Problem("seed", f"seed must be less than 2**32, got {self.seed}: choose a smaller one")
        if self.lora is not None and "language_model" not in self.model.trainable:
            raise Problem(
                "lora", "lora trains the language_model, which model.trainable leaves out: add it, or lora=null"
            )

    @cached_property
    def schedule(self) -> Schedule:
        """The dropping schedule; the empty one for a vanilla run."""
        return self.pyramid_drop or Schedule()

    def vanilla(self) -> Config:
        """The same run without dropping."""
        return replace(self, pyramid_drop=None, paper=None)

    def training_free(self, num_layers: int | None) -> dict[str, Schedule]:
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

    def check(self, num_layers: int | None, compares: bool = True) -> dict[str, Schedule]:
        """Checks all schedules, against the decoder too where its ``num_layers`` is known, and returns those of
        ``compare.training_free``.

        Args:
            compares: whether they are wanted; else one that the run's own schedule leaves no room for is left out.

        Raises:
            Problem: an unknown key or ranker, a wrong type, a schedule that cannot be.
        """
        self._check_one(self.schedule, "pyramid_drop", num_layers)
        schedules = {}
        for name, entry in (self.compare.training_free or {}).items():
            key = f"compare.training_free.{name}"
            if "/" in str(name):
                raise Problem(key, f"{key}: files are named after a schedule: give it a name without /")
            if entry != "same" and not isinstance(entry, Mapping):
                raise Problem(key, f"{key} must be 'same' or a mapping of pyramid_drop keys, got {entry!r}")
            changes = {} if entry == "same" else dict(entry)
            layer = convert(changes.pop("single_drop", None), int | None, f"{key}.single_drop")
            schedule = build_schedule({**self.schedule.to_dict(), **changes}, key)
            if layer is not None and num_layers is not None:
                if not 0 < layer < num_layers:
                    raise Problem(key, f"{key}.single_drop must be from 1 to {num_layers - 1}, got {layer}")
                try:
                    schedule = schedule.single_drop(layer, num_layers, schedule.ranker)
                except UserError as error:
                    if not compares:
                        continue
                    raise Problem(key, f"{key}: {error} (compare.training_free=null compares with none)") from None
            schedules[name] = self._check_one(schedule, key, num_layers)
        return schedules

    @staticmethod
    def _check_one(schedule: Schedule, key: str, num_layers: int | None) -> Schedule:
        from llava_pdrop.model.rankers import check_rankers  # imports torch: only when a config is really loaded

        check_rankers(schedule, key)
        try:
            return schedule if num_layers is None else schedule.check(num_layers)
        except UserError as error:
            raise Problem(f"{key}.layers", str(error) if key == "pyramid_drop" else f"{key}: {error}") from None


@dataclass(frozen=True)
class AblationFile:
    """What the file of an ablation may hold (`llava_pdrop.compare.variants`). ``base`` and the configs of variants are
    relative to it, all else to the checkout."""

    base: str
    """Config to vary."""
    name: str | None = None
    """Name of the ablation; null: ``DIRECTORY/FILE``."""
    output_dir: str | None = None
    """Variants are trained in ``OUTPUT_DIR/VARIANT``; null: ``checkpoints/NAME``."""
    checkpoint: str | None = None
    """Train nothing: evaluate this model with every schedule. Variants may then differ in ``pyramid_drop`` only."""
    variants: dict[str, Any] = field(default_factory=dict)
    """Name -> keys to change, or another config."""
    grid: dict[str, Any] = field(default_factory=dict)
    """Key -> list of values; every combination is a variant. One of ``variants`` and ``grid`` is needed."""
    seeds: tuple[int, ...] = ()
    """Every variant is trained once per seed, and its row shows the mean and its standard error; ``[]``: once, with the
    config's seed. A variant may have ``seeds`` of its own."""
    budgets: tuple[Literal["own", "same"] | float, ...] = ("own",)
    """A table each: schedules as they are written (``own``), or with ratios solved anew so that all average as many
    image tokens as the base's (``same``), or so many (a number). A variant may have ``budgets`` of its own."""
    also_training_free: bool = False
    """Also evaluate the runs of the variant without drops with the schedules of all others: rows ``vanilla + NAME``."""

    def __post_init__(self) -> None:
        check_seeds(self.seeds, "seeds")
        check_budgets(self.budgets, "budgets")


def check_seeds(seeds: tuple[int, ...], key: str) -> None:
    """Raises `Problem` where one cannot be, or stands twice."""
    for seed in seeds:
        at_least(0, key, seed)
    if len(set(seeds)) < len(seeds):
        raise Problem(key, f"{key}: a seed stands twice: {list(seeds)}")


def check_budgets(budgets: tuple[str | float, ...], key: str) -> None:
    """Raises `Problem` where there is none, or one cannot be."""
    if not budgets:
        raise Problem(key, f"{key} is empty, so nothing would be run: give own, same or a number of image tokens")
    for budget in budgets:
        if not isinstance(budget, str) and not 0 < budget < math.inf:
            raise Problem(key, f"{key}: an average number of image tokens is a number above 0, got {budget:g}")
    if len(set(budgets)) < len(budgets):
        raise Problem(key, f"{key}: a budget stands twice: {list(budgets)}")
