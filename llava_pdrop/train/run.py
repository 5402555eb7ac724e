"""One training run from its configuration: data, stage 1 if it is missing, model, Trainer, and what is left on disk."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import TrainingArguments, set_seed

from llava_pdrop.config import Config, ConfigError, to_yaml
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.data.records import read_records
from llava_pdrop.model.build import Parts, build_parts
from llava_pdrop.model.checkpoint import PROJECTOR_FILE
from llava_pdrop.model.precision import has_fast_bfloat16
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train.checks import check_name, check_run, stage1_config
from llava_pdrop.train.history import checkpoint_to_resume, clear, digest, is_finished, mark_finished, why_outdated
from llava_pdrop.train.optim import freeze, trainable_table
from llava_pdrop.train.trainer import PyramidTrainer

DEFAULTS: dict[str, Any] = {"logging_steps": 1, "report_to": "none", "logging_nan_inf_filter": False}
"""Training arguments where a config says nothing: a line of metrics per step, no outside service, and a loss that is
not a number is shown as such (the Trainer would hide it, at the price of a device synchronisation per micro-batch)."""

_prepared: set[tuple[str, ...]] = set()
"""Commands of ``data.prepare`` that this process has run."""

log = logging.getLogger(__name__)
console = Console(quiet=os.environ.get("RANK", "0") != "0")


def train(config: Config) -> Path:
    """Runs ``config`` to its end and returns ``output_dir``: an ordinary Hugging Face LLaVA directory with
    ``projector.safetensors``, ``metrics.jsonl`` and the resolved configuration. A run that is complete already, with
    the same settings and files, is left as it is.

    Raises:
        ConfigError, FileNotFoundError, ValueError: something named in the config is missing or impossible.
    """
    check_run(config)
    prepare_data(config)
    first = stage1_config(config)
    if first is not None:
        config = replace(config, model=replace(config.model, projector=str(train(first) / PROJECTOR_FILE)))
    output, stamp = Path(config.output_dir), digest(config)
    if is_finished(config, stamp):
        console.print(f"[dim]{config.name}: finished before with the same settings, using {output}[/dim]")
        return output
    outdated = why_outdated(config)
    fresh = config.train.resume == "never" or (outdated is not None and config.train.resume == "auto")
    checkpoint = None if fresh else checkpoint_to_resume(config)

    console.rule(f"{config.name}  ->  {output}")
    if outdated:
        say(f"{config.name}: trained again, because the finished run in {output} had {outdated}")
    args = training_arguments(config)
    if fresh:
        args.distributed_state.wait_for_everyone()  # every rank has looked at what is removed now
        if args.process_index == 0:
            clear(output)
    set_seed(config.seed)
    parts = load_parts(config)
    model = PyramidLlava(parts.host, config.schedule, parts.geometry, config.model.attention)
    freeze(model, config.model.trainable)
    dataset = build_dataset(config, parts)
    trainer = PyramidTrainer(
        model,
        args,
        dataset,
        build_plan(config, dataset, args),
        learning_rates(config, args),
        processor=parts.processor(),
        config_yaml=to_yaml(config),
    )
    console.print(trainable_table(model, trainer.learning_rates))
    if checkpoint:
        console.print(f"resuming from {checkpoint}")
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output))
    if args.process_index == 0:
        seconds = round(time.perf_counter() - start, 2)
        mark_finished(config, stamp, {"steps": result.global_step, "seconds": seconds, "resumed_from": checkpoint})
    trainer.accelerator.wait_for_everyone()  # no rank starts a next stage before the files of this one are complete
    del trainer, model, parts, dataset
    release_memory()
    return output


def training_arguments(config: Config) -> TrainingArguments:
    """The Trainer's arguments: ours where nothing is said, the ``train:`` section, and what other sections decide."""
    arguments = {
        **DEFAULTS,
        **config.train.arguments,
        "output_dir": config.output_dir,
        "run_name": config.name,
        "seed": config.seed,
        "per_device_train_batch_size": config.data.samples_per_batch or 1,
        "remove_unused_columns": False,
    }
    on_cpu = arguments.get("use_cpu") or not torch.cuda.is_available()
    if arguments.get("bf16") and on_cpu and not has_fast_bfloat16(torch.device("cpu")):
        log.warning(
            "%s: this CPU has no bfloat16 instructions, so train.bf16 is ignored: float32 is faster", config.name
        )
        arguments["bf16"] = False
    try:
        args = TrainingArguments(**arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{config.file}: train: {first_line(error)}") from error
    if args.n_gpu > 1:
        log.warning(
            "%d GPUs are visible and one is used: torchrun --nproc_per_node %d uses all", args.n_gpu, args.n_gpu
        )
        args._n_gpu = 1  # the Trainer would wrap the model in nn.DataParallel, which cannot split a packed stream
    return args


def learning_rates(config: Config, args: TrainingArguments) -> dict[str, float]:
    """Peak learning rate of every part of the model."""
    section, rate = config.train, args.learning_rate
    return {
        "language_model": rate,
        "projector": rate if section.projector_lr is None else section.projector_lr,
        "vision_tower": rate if section.vision_tower_lr is None else section.vision_tower_lr,
    }


def load_parts(config: Config) -> Parts:
    """The model that ``config`` starts from, with float32 weights (DeepSpeed and autocast have their own precision).

    Raises:
        ConfigError: a part cannot be read, or does not fit.
    """
    model = config.model
    try:
        return build_parts(
            path=model.path,
            language_model=model.language_model,
            vision_tower=model.vision_tower,
            projector=model.projector,
            aspect=model.aspect,
            merge=model.merge,
            pinpoints=model.pinpoints,
            rounding=model.rounding,
            image_size=model.image_size,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        called = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        key = "path" if model.path is not None else "language_model"
        if "load_projector" in called:
            key = "projector"
        elif model.path is None and called & {"load_tower", "load_image_processor"}:
            key = "vision_tower"
        raise ConfigError(f"{config.file}: model.{key} {getattr(model, key)}: {first_line(error)}") from error


def build_dataset(config: Config, parts: Parts) -> ConversationDataset:
    """The training samples.

    Raises:
        ValueError: unknown template, or data that cannot be used.
    """
    name = config.model.template
    check_name(config, "model.template", name, TEMPLATES)
    return ConversationDataset(
        read_records(config.data.train, config.data.image_root),
        TEMPLATES[name],
        parts.tokenizer,
        parts.host.config.image_token_id,
        parts.geometry,
        parts.image_processor,
        config.data.max_length,
        config.data.truncation,
    )


def build_plan(config: Config, dataset: ConversationDataset, args: TrainingArguments) -> BatchPlan:
    """The micro-batches of the run."""
    return BatchPlan(
        dataset.lengths(),
        seed=config.seed,
        world_size=args.world_size,
        gradient_accumulation=args.gradient_accumulation_steps,
        samples_per_batch=config.data.samples_per_batch,
        tokens_per_batch=config.data.tokens_per_batch,
    )


def prepare_data(config: Config) -> None:
    """Runs ``data.prepare``, which does nothing where its data are up to date: once per program, on the first process
    of every machine. The other processes wait until the files are there.

    Raises:
        ValueError: the command failed. FileNotFoundError: it did not make the file.
    """
    wanted = [Path(name) for name in (config.data.train, config.data.eval) if name is not None]
    missing = [file for file in wanted if not file.is_file()]
    if config.data.prepare is None or (config.data.prepare in _prepared and not missing):
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":
        while not all(file.is_file() for file in missing):
            time.sleep(1)
        return
    if missing:
        console.print(f"preparing {missing[0]}: {' '.join(config.data.prepare)}")
    done = subprocess.run([sys.executable, *config.data.prepare], check=False)
    if done.returncode:
        raise ValueError(
            f"{config.file}: data.prepare failed with status {done.returncode}: {' '.join(config.data.prepare)}"
        )
    for file in missing:
        if not file.is_file():
            raise FileNotFoundError(f"{config.file}: data.prepare ran, but did not write {file}")
    _prepared.add(config.data.prepare)


def say(line: str) -> None:
    """Prints a line that must stay one line, and is no markup, on the first rank."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind too where the message is only a name."""
    text = str(error).strip().splitlines()
    kind = type(error).__name__
    return kind if not text else f"{kind} {text[0]}" if isinstance(error, KeyError) else text[0]


def release_memory() -> None:
    """Gives freed memory back to the system, so that the peak of the next run in this process is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
