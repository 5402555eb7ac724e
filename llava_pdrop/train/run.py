"""One training run from its configuration: data, stage 1 if it is missing, model, Trainer, and what is left on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments, set_seed

from llava_pdrop.checkpoint.build import ModelParts, build_parts, require_tokenizer
from llava_pdrop.checkpoint.load import PROJECTOR_FILE
from llava_pdrop.config.load import to_yaml
from llava_pdrop.config.schema import Config
from llava_pdrop.data.clean_index import CleanIndex
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.mixture import read_data
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.errors import ConfigError, MissingFileError, UserError, first_line, naming
from llava_pdrop.model.kernels import resolve
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.report.console import console, say
from llava_pdrop.runtime.device import release_memory
from llava_pdrop.runtime.lock import owning
from llava_pdrop.runtime.preemption import Preempted
from llava_pdrop.runtime.processes import end_with_launcher
from llava_pdrop.runtime.ranks import by_first_rank, engine_for_one_run
from llava_pdrop.runtime.watchdog import SHARE_OF_TIMEOUT, Watchdog
from llava_pdrop.train import history
from llava_pdrop.train.adapters import adapt
from llava_pdrop.train.arguments import endless_warmup, learning_rates, total_steps, training_arguments
from llava_pdrop.train.checks import CheckedRun, check_arguments, checked
from llava_pdrop.train.fit import check_learning, check_positions, check_templates, make_servable, warn_of_rates
from llava_pdrop.train.optim import freeze, trainable_table
from llava_pdrop.train.report import TRAINING_FILE, forget_report, leave_report
from llava_pdrop.train.trainer import PyramidTrainer
from llava_pdrop.world import is_first, is_first_here

SKIPPED_FILE = "skipped.jsonl"
"""In ``output_dir``: the records that ``data.on_invalid: skip`` left out, and why."""

_prepared: set[tuple[str, ...]] = set()
"""Commands of ``data.prepare`` that this process has run."""


def train(config: Config, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Runs ``config`` to its end and returns ``output_dir``: an ordinary Hugging Face LLaVA directory (of a LoRA run
    the adapters instead of the weights) with ``projector.safetensors``, ``metrics.jsonl``, ``training.md`` and the
    resolved configuration. A run that is complete already, with the same settings and files, is left as it is.
    ``callbacks`` are asked in this run, not in its stage 1.

    Raises:
        ConfigError, MissingFileError, UserError: something named in the config is missing or impossible.
        Preempted: a signal said stop (see `llava_pdrop.runtime.preemption`).
    """
    run = checked(config)
    prepare_data(config)
    return train_checked(run, callbacks)


def train_checked(run: CheckedRun, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """`train` of a run that was checked and whose data are there."""
    end_with_launcher()
    config = run.config
    if run.stage1 is not None:
        prepare_data(run.stage1.config)
        projector = str(Path(run.stage1.config.output_dir) / PROJECTOR_FILE)
        config = replace(config, model=replace(config.model, projector=projector))
        history.why_outdated(config)  # raises before stage 1, not after it
        train_checked(run.stage1)
    output, stamp = Path(config.output_dir), history.digest(config)
    if history.is_finished(config, stamp):
        say(f"{config.name}: finished before with the same settings{history.made_elsewhere(config)}, using {output}")
        if is_first() and not (output / TRAINING_FILE).is_file():
            leave_report(output, config.name, say)
        return output
    outdated = history.why_outdated(config)
    fresh = config.train.resume == "never" or (outdated is not None and config.train.resume == "auto")

    console().rule(f"{config.name}  ->  {output}")
    if outdated:
        say(f"{config.name}: trained again, because the finished run in {output} had {outdated}")
    if run.finished:  # before, but with other settings or files
        check_arguments(config)
    with engine_for_one_run(), ExitStack() as stack:
        args = training_arguments(config)
        watchdog = Watchdog(output, args.process_index, args.world_size, SHARE_OF_TIMEOUT * args.ddp_timeout)
        mine = owning(output, f"{config.file}: output_dir", say)
        by_first_rank(lambda: stack.enter_context(mine))  # from here on no other run writes to it
        stack.enter_context(watchdog.running())
        complete = by_first_rank(lambda: history.is_finished(config, stamp))  # by the run that this one waited for
        complete = complete or train_watched(config, args, watchdog, stamp, fresh, callbacks)
    release_memory()
    if not complete:
        raise Preempted
    return output


def train_watched(
    config: Config,
    args: TrainingArguments,
    watchdog: Watchdog,
    stamp: str,
    fresh: bool,
    callbacks: Sequence[TrainerCallback] = (),
) -> bool:
    """The part of `train` in which ranks wait for each other: each says where it is. Returns whether the run came to
    its end, or was told to stop before.

    Args:
        watchdog: it runs already.
        stamp: the `history.digest` under which the finished run will be known.
        fresh: whether to start over, instead of going on from a checkpoint.
    """
    output, checkpoint = Path(config.output_dir), None
    if not fresh:
        with watchdog.led_by(args.process_index == 0, "looking for a checkpoint"):
            checkpoint = by_first_rank(lambda: history.checkpoint_to_resume(config, say))
    else:
        args.distributed_state.wait_for_everyone()  # every rank has looked at what is removed now
        if args.process_index == 0:
            history.clear(output)
    set_seed(config.seed)
    watchdog.at("loading the model", limited=args.world_size > 1)
    parts, model = learning_model(config, args)
    with watchdog.led_by(args.local_process_index == 0, "counting tokens"), args.main_process_first():
        # The others of a machine read what the first one leaves in the cache.
        dataset = build_dataset(config, parts)
    with watchdog.led_by(args.local_process_index == 0, "comparing data and model"):
        check_positions(config, parts.hf.config.text_config, dataset)
    rates = learning_rates(config, args)
    warn_of_rates(config, rates)
    plan = build_plan(config, dataset, args)
    if checkpoint:
        history.check_steps(config, checkpoint, total_steps(args, plan.steps))
    if (line := endless_warmup(args, plan.steps)) is not None:
        say(f"{config.name}: {line}")
    trainer = PyramidTrainer(
        model,
        args,
        dataset,
        plan,
        rates,
        processor=parts.processor(),
        config_yaml=to_yaml(config, from_anywhere=True),
        skip_bad_samples=config.train.on_bad_sample == "skip",
        max_bad_samples=config.train.max_bad_samples,
        watchdog=watchdog,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    trainable_table(model, rates).show()
    if checkpoint:
        say(f"resuming from {checkpoint}")
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if result.global_step < trainer.state.max_steps:
        say(f"{config.name}: told to stop, saved after step {result.global_step}; the same command goes on from there")
        return False
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_finished()
    with watchdog.led_by(args.process_index == 0, "writing the report"):
        if args.process_index == 0:
            seconds = round(time.perf_counter() - start, 2)
            facts = {"steps": result.global_step, "seconds": seconds, "resumed_from": checkpoint}
            forget_report(output)
            history.mark_finished(config, stamp, facts)
            leave_report(output, config.name, say)  # from here on nothing that fails costs the run
    trainer.accelerator.wait_for_everyone()  # no rank starts a next stage before the files of this one are complete
    return True


def learning_model(config: Config, args: TrainingArguments) -> tuple[ModelParts, PyramidLlava]:
    """What the run starts from, and the training model around it, with what does not learn frozen."""
    parts = load_parts(config)
    for line in parts.notes:
        say(line)
    model = build_model(config, parts)
    say(f"{config.name}: model.kernels: {kernels_in_use(config.model.kernels, args)}")
    if config.lora is None:
        freeze(model, config.model.trainable)
    else:
        adapt(model, config, args)
    return parts, model


def kernels_in_use(asked: str, args: TrainingArguments) -> str:
    """What ``model.kernels`` comes to, and why where that is something else."""
    found, reason = resolve(asked, args.device), f"on {args.device.type}"
    if args.torch_compile:  # it reads Hugging Face's own operations, see `kernels`
        found, reason = "eager", "under train.torch_compile"
    return found if asked == found else f"{found} ({asked}, {reason})"


def load_parts(config: Config) -> ModelParts:
    """The model that ``config`` starts from, with float32 weights (DeepSpeed and autocast have their own precision).

    Raises:
        ConfigError: a part cannot be read, or does not fit.
    """
    model = config.model
    try:
        parts = build_parts(
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
        with naming("model.path"):
            require_tokenizer(parts, model.path or "")  # without a path it has been read with the decoder
        return parts
    except UserError as error:
        part = "" if error.key is None else f"{error.key} {getattr(model, error.key.removeprefix('model.'))}: "
        named = ConfigError(f"{config.file}: {part}{first_line(error)}")
        named.key = error.key
        raise named from error


def build_model(config: Config, parts: ModelParts) -> PyramidLlava:
    """The training model of ``config`` around ``parts``."""
    section, recompute = config.model, config.train.recompute_layers
    return PyramidLlava(parts.hf, config.schedule, parts.geometry, section.attention, recompute, section.kernels)


def build_dataset(config: Config, parts: ModelParts) -> ConversationDataset:
    """The training samples, after a pass over all records that counts their tokens and finds what cannot be used. The
    model learns here, too, at which tokens ``generate`` will stop.

    Raises:
        UserError: data that cannot be used, or do not fit the tokenizer or what learns.
    """
    section, name = config.data, config.model.template
    records = read_data(section.train, section.image_root, section.format, config.seed)
    for line in records.summary() if len(records.parts) > 1 else ():
        say(line)
    if section.index is not None:
        index = CleanIndex.read(Path(section.index))
        records = index.choose(records, f"{config.file}: data.index {section.index}")
        say(f"data.index: {len(records):,} of {index.records:,} records are used")
    for line in check_templates(config, records, parts.tokenizer):
        say(line)
    make_servable(parts.hf.generation_config, name, records, parts.tokenizer)
    encoder = Encoder.of(config, parts.tokenizer, parts.hf.config.image_token_id, parts.geometry)
    cache = Path(section.cache) if section.cache is not None else None
    dataset = ConversationDataset(records, encoder, parts.image_processor, min(os.cpu_count() or 1, 16), cache)
    usable = dataset
    if section.on_invalid == "stop":
        dataset.lengths()  # reports the first record that cannot be used
    else:
        report = Path(config.output_dir) / SKIPPED_FILE if is_first() else None
        usable = dataset.without_unusable(section.max_invalid, report)
        if len(usable) < len(dataset):
            left_out = len(dataset) - len(usable)
            say(f"{left_out:,} of {len(dataset):,} records cannot be used and are left out, listed in {report}")
    if unread := usable.survey.unread():
        say(f"data.train: {unread}")
    for line in check_learning(config, usable):
        say(line)
    return usable


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
        UserError: the command failed. MissingFileError: it did not make the file.
    """
    wanted = [Path(name) for name in (config.data.train, config.data.eval) if name is not None]
    missing = [file for file in wanted if not file.exists()]
    if config.data.prepare is None or (config.data.prepare in _prepared and not missing):
        return
    if not is_first_here():
        while not all(file.exists() for file in missing):
            time.sleep(1)
        return
    if missing:
        say(f"preparing {missing[0]}: {' '.join(config.data.prepare)}")
    done = subprocess.run([sys.executable, *config.data.prepare], check=False)
    if done.returncode:
        raise UserError(
            f"{config.file}: data.prepare failed with status {done.returncode}: {' '.join(config.data.prepare)}"
        )
    for file in missing:
        if not file.exists():
            raise MissingFileError(
                f"{config.file}: {file} is not there, and data.prepare did not make it: correct the path"
            )
    _prepared.add(config.data.prepare)
