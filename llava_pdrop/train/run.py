"""One training run from its configuration: data, stage 1 if it is missing, model, Trainer, and what is left on disk."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainingArguments, set_seed

from llava_pdrop.config import Config, check_paths, load_config, to_yaml
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.data.records import read_records
from llava_pdrop.model.build import Parts, build_parts
from llava_pdrop.model.checkpoint import PROJECTOR_FILE
from llava_pdrop.model.precision import has_fast_bfloat16
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train.history import checkpoint_to_resume, digest, is_finished, mark_finished
from llava_pdrop.train.optim import freeze, trainable_table
from llava_pdrop.train.trainer import PyramidTrainer

DEFAULTS: dict[str, Any] = {"logging_steps": 1, "report_to": "none", "logging_nan_inf_filter": False}
"""Training arguments where a config says nothing: a line of metrics per step, no outside service, and a loss that is
not a number is shown as such (the Trainer would hide it, at the price of a device synchronisation per micro-batch)."""

log = logging.getLogger(__name__)
console = Console(quiet=os.environ.get("RANK", "0") != "0")


def train(config: Config) -> Path:
    """Runs ``config`` to its end and returns ``output_dir``: an ordinary Hugging Face LLaVA directory with
    ``projector.safetensors``, ``metrics.jsonl`` and the resolved configuration. A run that is complete already, with
    the same settings and files, is left as it is.

    Raises:
        ConfigError, FileNotFoundError, ValueError: something named in the config is missing or impossible.
    """
    check_paths(config)
    prepare_data(config)
    if config.pretrain is not None:
        stage1 = train(load_config(config.pretrain))
        config = replace(config, model=replace(config.model, projector=str(stage1 / PROJECTOR_FILE)))
    output, stamp = Path(config.output_dir), digest(config)
    if is_finished(config, stamp):
        console.print(f"[dim]{config.name}: finished before with the same settings, using {output}[/dim]")
        return output

    console.rule(f"{config.name}  ->  {output}")
    checkpoint = checkpoint_to_resume(config)
    args = training_arguments(config)
    if config.train.resume == "never" and args.process_index == 0:
        for old in output.glob("checkpoint-*"):
            shutil.rmtree(old)
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
    args = TrainingArguments(**arguments)
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
    """The model that ``config`` starts from, with float32 weights (DeepSpeed and autocast have their own precision)."""
    model = config.model
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


def build_dataset(config: Config, parts: Parts) -> ConversationDataset:
    """The training samples.

    Raises:
        ValueError: unknown template, or data that cannot be used.
    """
    name = config.model.template
    if name not in TEMPLATES:
        raise ValueError(f"{config.file}: unknown model.template {name!r}: choose one of {sorted(TEMPLATES)}")
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
    """Runs ``data.prepare`` if a data file of the run is missing (on the first process of every machine; the others
    wait until the files are there).

    Raises:
        ValueError: the command failed. FileNotFoundError: it did not make the file.
    """
    wanted = [Path(name) for name in (config.data.train, config.data.eval) if name is not None]
    missing = [file for file in wanted if not file.is_file()]
    if config.data.prepare is None or not missing:
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":
        while not all(file.is_file() for file in missing):
            time.sleep(1)
        return
    console.print(f"preparing {missing[0]}: {' '.join(config.data.prepare)}")
    done = subprocess.run([sys.executable, *config.data.prepare], check=False)
    if done.returncode:
        raise ValueError(
            f"{config.file}: data.prepare failed with status {done.returncode}: {' '.join(config.data.prepare)}"
        )
    for file in missing:
        if not file.is_file():
            raise FileNotFoundError(f"{config.file}: data.prepare ran, but did not write {file}")


def release_memory() -> None:
    """Gives freed memory back to the system, so that the peak of the next run in this process is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
