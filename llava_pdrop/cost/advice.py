"""On what GPUs a config fits and how: ``llava-pdrop plan CONFIG --gpus 8x80``.

`advise` takes the first setting that fits, by three preferences:

1. The engine whose GPUs wait least for each other. With P parameters that learn and a accumulated micro-batches,
   `ddp` adds up gradients once per optimizer step (8P bytes through every GPU, float32, while the last backward still
   runs) and depends on nothing else. `zero2` does so after every micro-batch and then fetches weights (2Pa + 2P).
   `zero3` and `fsdp2` fetch the weights of every layer before it runs, in forward and in backward (6Pa). Offloading
   moves gradients and weights over the bus of the CPU and waits for its AdamW besides. Where few micro-batches are
   accumulated `zero2` sends fewer bytes than `ddp`; what counts more is who has to wait before computing.
2. The fewest recomputed layers: each costs its forward once more, in every step, on every machine.
3. The largest micro-batch: longer products, and fewer of the transfers above. It comes last, since a sample of some
   thousand tokens fills a GPU by itself; where samples are short, measure (`llava-pdrop bench train --samples N`).

The global batch stays what it is: samples of a micro-batch x accumulated micro-batches x GPUs. All of it is arithmetic
on `cost.memory` and `cost.flops`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llava_pdrop.config.load import ENGINES, SET_BY_ENGINE
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.lora import adapter_parameters
from llava_pdrop.cost.memory import cpu_memory
from llava_pdrop.cost.mixtures import OPEN_LLAVA_NEXT
from llava_pdrop.cost.nominal import model_of, samples_of, states_of
from llava_pdrop.cost.plan import plan_memory, plan_step, room_in
from llava_pdrop.data.mixture import read_data
from llava_pdrop.errors import UserError
from llava_pdrop.report.units import GIB
from llava_pdrop.runtime.device import PEAK_TFLOPS

ORDER = ("ddp", "zero2", "zero3", "fsdp2", "zero2_offload", "zero3_offload")
"""Engines, the preferred one first."""

QUANTISED = ("ddp", "zero2")
"""Engines that train adapters on quantised weights."""

RECIPE_GPUS = 8
"""GPUs that configs are written for (configs/README.md): what makes a global batch of what they say."""

MFU = 0.4
"""Default of ``--mfu``, as the rate ``llava-pdrop doctor`` assumes: 40 % of an A100's peak."""

PEAKS = {name: PEAK_TFLOPS[name] * 1e12 for name in ("A100", "H100")}
"""GPU -> operations a second in bfloat16, which hours are given for."""


RECIPES: dict[str, tuple[int, str]] = {
    "blip_laion_cc_sbu_558k.json": (558_128, "LLaVA's stage 1"),
    "llava_v1_5_mix665k.json": (665_298, "LLaVA-1.5's mixture"),
    "open-llava-next_instruct_mix1M.json": (
        round(1000 * sum(part.thousands for part in OPEN_LLAVA_NEXT)),
        "Open-LLaVA-NeXT's mixture, by its components in llava_pdrop/cost/mixtures.py",
    ),
}
"""Name of a recipe's data file -> its records, and what it is (data/README.md)."""


@dataclass(frozen=True)
class AdviceSetting:
    """One way to train. ``total``: predicted bytes of a GPU; ``cpu``: bytes of the CPU's memory for each GPU."""

    engine: str
    samples: int
    accumulation: int
    recomputed: int
    total: float
    cpu: float


@dataclass(frozen=True)
class AdviceArm:
    """Training without dropping (``vanilla``) or with it (``dropping``).

    Attributes:
        setting: the preferred one of those that fit, or None.
        least: the one that needs the least memory of a GPU, fitting or not.
        flops: operations of a sample in ``setting``, recomputed ones included; 0 without it.
    """

    name: str
    setting: AdviceSetting | None
    least: AdviceSetting
    flops: float


@dataclass(frozen=True)
class RunLength:
    """``samples`` that a run trains on, repeated ones counted again, or None; ``source``: where the number is from, or
    why there is none."""

    samples: float | None
    source: str


@dataclass(frozen=True)
class Advice:
    """``gib``: memory of a GPU, of which `RESERVE` stays free; ``batch``: samples of an optimizer step, and ``told``
    where that number is from; ``mfu``: the share of a GPU's peak that all operations are assumed to run at."""

    gpus: int
    gib: float
    batch: int
    told: str
    mfu: float
    length: RunLength
    arms: list[AdviceArm]

    def seconds(self, arm: AdviceArm, peak: float, samples: float) -> float:
        """That all GPUs together take for so many samples, if each of them can do ``peak`` operations a second."""
        return samples * arm.flops / (self.gpus * self.mfu * peak)


def advise(config: Config, gpus: int, gib: float, mfu: float = MFU, batch: int | None = None) -> Advice:
    """How to train ``config``, without dropping and, where it has a schedule, with it.

    Args:
        gpus, gib: how many GPUs, and the memory of each in GiB.
        batch: samples of an optimizer step (default: what the config says, times `RECIPE_GPUS`).

    Raises:
        UserError: the global batch cannot be shared out evenly.
    """
    samples = samples_of(config, model_of(config).geometry)
    accumulation = config.train.arguments.get("gradient_accumulation_steps", 1)
    told = "--global-batch"
    if batch is None:
        batch = samples * accumulation * RECIPE_GPUS
        told = f"{samples} samples x {accumulation} accumulated x the {RECIPE_GPUS} GPUs that configs are written for"
    if batch % gpus:
        near = max(1, round(batch / gpus)) * gpus
        raise UserError(
            f"--gpus {gpus}: a global batch of {batch} samples ({told}) cannot be shared out evenly: give another "
            f"number of GPUs, or --global-batch {near}"
        )
    names = ["vanilla"] if config.schedule.vanilla else ["vanilla", "dropping"]
    found: dict[str, AdviceSetting] = {}
    least: dict[str, AdviceSetting] = {}
    for settings in _by_engine(config, gpus, batch // gpus):
        for name in names:
            mine = settings[name]
            smallest = min(mine, key=lambda setting: setting.total)
            least[name] = min(smallest, least.get(name, smallest), key=lambda setting: setting.total)
            fitting = [setting for setting in mine if setting.total <= room_in(gib)]
            if fitting and name not in found:
                found[name] = min(fitting, key=lambda setting: (setting.recomputed, -setting.samples))
        if len(found) == len(names):
            break
    arms = [AdviceArm(name, found.get(name), least[name], _flops(config, name, found.get(name))) for name in names]
    return Advice(gpus, gib, batch, told, mfu, run_length(config, batch), arms)


def run_length(config: Config, batch: int) -> RunLength:
    """The samples of ``config`` with optimizer steps of ``batch`` samples. Reads the data where they are on this
    machine, without looking at single records."""
    steps = config.train.arguments.get("max_steps", -1)
    if steps > 0:
        return RunLength(float(steps * batch), f"train.max_steps={steps} of {batch} samples")
    file, epochs = Path(config.data.train), config.train.arguments.get("num_train_epochs", 3)
    if file.exists():
        try:
            records = len(read_data(file, config.data.image_root, config.data.format, config.seed))
        except (UserError, OSError) as error:
            return RunLength(None, f"data.train cannot be read: {' '.join(str(error).split())}")
        return RunLength(epochs * records, f"{epochs:g} x the {records:,} records of {file}")
    if file.name not in RECIPES:
        return RunLength(None, f"data.train {file} is not on this machine, and no recipe's file is called so")
    records, name = RECIPES[file.name]
    return RunLength(epochs * records, f"{epochs:g} x {name} (the file {file.name} is not here)")


def with_setting(config: Config, setting: AdviceSetting) -> Config:
    """``config`` with engine, micro-batch and accumulation of ``setting``; recomputation is told to `plan_memory`."""
    kept = {name: value for name, value in config.train.arguments.items() if name not in SET_BY_ENGINE}
    arguments = {**kept, **ENGINES[setting.engine], "gradient_accumulation_steps": setting.accumulation}
    return replace(
        config,
        train=replace(config.train, arguments=arguments),
        data=replace(config.data, samples_per_batch=setting.samples, tokens_per_batch=None),
    )


def overrides(config: Config, arm: AdviceArm) -> str:
    """The words that make ``config`` the run of ``arm``, to be pasted behind it; empty where nothing fits."""
    setting = arm.setting
    if setting is None:
        return ""
    names = ("activation_checkpointing", "gradient_checkpointing")  # transformers 5.23 renamed it, and takes both
    again = next((name for name in names if name in config.train.arguments), names[1])
    words = {
        "train.engine": setting.engine,
        "data.samples_per_batch": setting.samples,
        "train.gradient_accumulation_steps": setting.accumulation,
        f"train.{again}": "true" if setting.recomputed else "false",
        "train.recompute_layers": setting.recomputed or "null",
    }
    if config.data.tokens_per_batch is not None:
        words["data.tokens_per_batch"] = "null"
    if arm.name == "vanilla" and not config.schedule.vanilla:
        words["pyramid_drop"] = "null"
    return " ".join(f"{name}={value}" for name, value in words.items())


def what_lacks(advice: Advice, arm: AdviceArm, config: Config) -> str:
    """One line for an arm that fits in no way: how much is missing, and what would help."""
    least, room = arm.least, room_in(advice.gib)
    missing = f"{(least.total - room) / GIB:.1f} GiB are missing"
    adapters = "" if config.lora or "language_model" not in config.model.trainable else " LoRA (a lora: section),"
    return (
        f"{arm.name}: nothing fits. {least.engine} needs the least, {least.total / GIB:.1f} GiB with {least.samples} "
        f"samples and {least.recomputed} recomputed layers; of {advice.gib:g} GiB {room / GIB:.1f} can be used, "
        f"so {missing}. What helps: GPUs with more memory,{adapters} shorter samples (data.max_length, fewer tiles)"
    )


def _by_engine(config: Config, gpus: int, share: int) -> Iterator[dict[str, list[AdviceSetting]]]:
    """For one engine after the other: name of an arm -> all its settings, of a GPU's ``share`` of the global batch."""
    model = model_of(config)
    adapters = sum(adapter_parameters(model.config.text_config, config.lora))
    for engine in ORDER:
        if (engine == "fsdp2" and gpus == 1) or (config.lora and config.lora.bits and engine not in QUANTISED):
            continue  # refused by training
        found: dict[str, list[AdviceSetting]] = {"vanilla": [], "dropping": []}
        for samples in (count for count in range(1, share + 1) if share % count == 0):
            one = AdviceSetting(engine, samples, share // samples, 0, 0.0, 0.0)
            changed = with_setting(config, one)
            states = states_of(changed, gpus)
            cpu = cpu_memory(model.config, config.model.trainable, states, adapters)
            for row in plan_memory(changed, range(model.layers + 1), states):
                for name, memory in (("vanilla", row.vanilla), ("dropping", row.dropping)):
                    found[name].append(replace(one, recomputed=row.recomputed, total=memory.total, cpu=cpu))
        yield found


def _flops(config: Config, name: str, setting: AdviceSetting | None) -> float:
    if setting is None:
        return 0.0
    step = plan_step(with_setting(config, setting), (setting.recomputed, setting.recomputed))
    return (step.vanilla if name == "vanilla" else step.dropping).total / step.samples
