"""What can be wrong with a run, looked for before the first step: names, files, and the stage 1 it starts from."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from accelerate.utils import DynamoBackend
from huggingface_hub.errors import StrictDataclassError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import integration_utils
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.models.llama import modeling_llama
from transformers.utils import is_torch_tf32_available

from llava_pdrop.config.load import load_config
from llava_pdrop.config.paths import check_paths, number, part_configs, pretrain_words
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.nominal import recomputes
from llava_pdrop.data.conversation import template_of
from llava_pdrop.data.readers import READERS
from llava_pdrop.errors import ConfigError, UserError, check_name, first_line, line_of
from llava_pdrop.model.attention import check_transformers
from llava_pdrop.model.decoder import COVERED, check_decoder
from llava_pdrop.train.arguments import LIBRARY_ERRORS, NOT_TRIED, TriedArguments, on_cpu, tried_arguments
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.world import number_of_processes


@dataclass(frozen=True)
class CheckedRun:
    """A run in which nothing was found wrong, as far as that can be seen before data and model are read; and its stage
    1. ``finished``: ``output_dir`` holds a finished run, which is used as it is wherever it was made, so that neither
    the directory nor the training arguments were looked at."""

    config: Config
    stage1: CheckedRun | None = None
    finished: bool = False

    def variant(self, config: Config) -> CheckedRun:
        """The run ``config``, which differs in name, place and schedule only: its drops are those of this run, or none.

        Raises:
            ConfigError: its ``output_dir`` cannot be written to.
        """
        finished = holds_a_run(config.output_dir)
        if not finished:
            check_output(config)
        return replace(self, config=config, finished=finished or self.finished)


def checked(config: Config) -> CheckedRun:
    """Checks names, paths and training arguments of ``config`` and of its stage 1, once for all that is done with it.

    Raises:
        ConfigError: one line with file, key and remedy.
    """
    try:
        check_transformers()
    except UserError as error:
        raise ConfigError(f"{config.file}: {error}") from None
    check_paths(config)
    check_decoder_type(config)
    template_of(config)
    if config.data.format is not None:
        check_name("data.format", config.data.format, READERS, config.file)
    check_bits(config)
    check_reporting(config)
    finished = holds_a_run(config.output_dir)
    if not finished:
        check_output(config)
        check_arguments(config)
    first = stage1_config(config)
    return CheckedRun(config, None if first is None else checked(first), finished)


def holds_a_run(directory: str) -> bool:
    """Whether a run in ``directory`` came to its end."""
    return (Path(directory) / FINISHED_FILE).is_file()


def check_decoder_type(config: Config) -> None:
    """Raises `ConfigError` if the decoder is none that the training forward is proved on, before anything of it is
    loaded. The layout of the original code names a decoder otherwise: it is looked at when it has been opened."""
    language = part_configs(config.model)[0] or {}
    kind, entry = language.get("model_type"), "language_model" if config.model.path is None else "path"
    if kind is None or (entry == "path" and str(kind).startswith("llava")):
        return
    text = SimpleNamespace(model_type=kind)
    try:
        if kind in COVERED:
            text = AutoConfig.for_model(**language)
        check_decoder(text, config.schedule)
    except (*LIBRARY_ERRORS, StrictDataclassError) as error:
        place = f"{config.file}: model.{entry}: {getattr(config.model, entry)}"
        raise ConfigError(f"{place}: {line_of(error)}") from None


def check_output(config: Config) -> None:
    """Raises `ConfigError` if ``output_dir`` cannot be made, or not be written to."""
    place = os.path.abspath(config.output_dir)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    problem = None if os.path.isdir(place) else "is no directory"
    if problem is None and not os.access(place, os.W_OK | os.X_OK):
        problem = "cannot be written to"
    if problem is not None:
        raise ConfigError(f"{config.file}: output_dir: {place} {problem}: give another output_dir")


def check_bits(config: Config) -> None:
    """Raises `ConfigError` if ``lora.bits`` asks for weights that cannot be quantised on this machine."""
    if config.lora is None or config.lora.bits is None:
        return
    line = f"{config.file}: lora.bits: {config.lora.bits}-bit weights need"
    if on_cpu(config.train.arguments):
        raise ConfigError(f"{line} a CUDA GPU, and this run has none: lora.bits=null trains plain LoRA")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{line} bitsandbytes, which is not installed: pip install bitsandbytes, or lora.bits=null")


def check_reporting(config: Config) -> None:
    """Raises `ConfigError` if ``train.report_to`` names a service that is unknown or not installed."""
    named = config.train.arguments.get("report_to") or []
    for service in [named] if isinstance(named, str) else named:
        key = f"{config.file}: train.report_to:"
        if service in ("all", "none"):
            continue
        check_name("train.report_to", service, integration_utils.INTEGRATION_TO_CALLBACK, config.file)
        if service in ("wandb", "tensorboard"):
            if importlib.util.find_spec(service) is None:
                raise ConfigError(
                    f"{key} {service} is not installed: pip install {service}, or llava_pdrop with its extra [train]"
                )
        elif service not in integration_utils.get_available_reporting_integrations():
            raise ConfigError(f"{key} the package of {service} is not installed")


def stage1_config(config: Config) -> Config | None:
    """The config that ``pretrain`` names, with its overrides; None where the run has no stage 1.

    Raises:
        ConfigError: it trains the projector of another decoder, tower or image size than this run has.
    """
    if config.pretrain is None:
        return None
    path, *overrides = pretrain_words(config)
    first = load_config(path, overrides)
    for key in ("language_model", "vision_tower", "image_size"):
        here, there = _part(config, key), _part(first, key)
        if here != there:
            raise ConfigError(
                f"{config.file}: pretrain: {first.file} has model.{key} {there}, this run has {here}: the projector "
                f"would not fit; give stage 1 the same, e.g. pretrain: '{path} model.{key}={here} output_dir=...'"
            )
    return first


def _part(config: Config, key: str) -> str | int | None:
    """A model part by its path or id, the image size in pixels where it is known."""
    if key == "image_size":
        tower = part_configs(config.model)[1]
        return config.model.image_size or (number(tower, "image_size") if tower else None)
    part = config.model.path or getattr(config.model, key)
    return os.path.normpath(part) if part else None


# Mistakes in the ``train:`` section, found before anything is trained: those of stage 2 too, which begins hours later.
#
# Names, types and lists of values are looked at when a config is read (`llava_pdrop.config.load`). The rest is tried
# out by the libraries themselves, where nothing can depend on it: `TrainingArguments` without a device or a process
# group, and the optimizer and the schedule of its learning rate on one number.

NEED_EVALUATION: dict[str, tuple[Any, ...]] = {
    "eval_strategy": ("steps", "epoch"),
    "eval_on_start": (True,),
    "load_best_model_at_end": (True,),
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
    "save_strategy": ("best",),
}
"""Training argument -> its values that want the model evaluated between the steps."""

NOT_DONE_HERE = {
    "auto_find_batch_size": "the order of the batches is made before the first step",
    "data_seed": "seed is that of the order of the data too",
    "dataloader_drop_last": "every sample has its place in the order of the batches",
    "group_by_length": "packed micro-batches have no padding, and data.tokens_per_batch evens out their length",
    "include_num_input_tokens_seen": "metrics.jsonl has the tokens of every step",
    "label_smoothing_factor": "the loss is the cross entropy of the labels as they are",
    "neftune_noise_alpha": "the embeddings are not the model's outermost, where the Trainer looks for them",
    "train_sampling_strategy": "packed micro-batches have no padding, and data.tokens_per_batch evens out their length",
    "use_liger_kernel": "its kernels are for whole Hugging Face models, and packed samples have their own",
}
"""Training argument that is for other models or other data -> why, or what there is instead."""

OFF = (None, False, 0, "no", "random")
"""Values with which a training argument asks for nothing."""

NEEDED_BY_DEEPSPEED = ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu")
"""What DeepSpeed replaces by values of its own where its settings leave it out."""

NOT_DEEPSPEEDS = {"optimizer": "train.optim", "scheduler": "train.lr_scheduler_type"}
"""Section of DeepSpeed's settings that would take the place of ours, and with it the learning rates of the parts."""

ZERO_STAGES = (0, 1, 2, 3)

GATHER = "stage3_gather_16bit_weights_on_model_save"


def check_arguments(config: Config) -> None:
    """Raises at the first setting in ``train:`` with which the run would fail, or would silently not be what it says.

    Raises:
        ConfigError: one line with file, key and remedy.
    """
    given, line = config.train.arguments, f"{config.file}: train"
    for name, values in NEED_EVALUATION.items():
        if given.get(name) in values:
            raise ConfigError(
                f"{line}.{name}: {given[name]!r} needs a run that evaluates itself, none does: llava-pdrop eval does"
            )
    for name, reason in NOT_DONE_HERE.items():
        if given.get(name) not in OFF:
            raise ConfigError(f"{line}.{name}: {given[name]!r} cannot be done here ({reason}): leave it away")
    check_hub(config)
    check_engine(config)
    args = tried_arguments(config)
    if config.train.recompute_layers is not None and not recomputes(vars(args)):
        raise ConfigError(f"{line}.recompute_layers needs train.gradient_checkpointing=true")
    if args.max_steps == 0:
        raise ConfigError(f"{line}.max_steps must be above 0, or -1 (as many as train.num_train_epochs has), got 0")
    if args.save_strategy == "steps" and args.save_steps <= 0:
        raise ConfigError(f"{line}.save_steps must be above 0, got {args.save_steps:g}: save_strategy 'no' saves none")
    check_optimizer(config, args)
    if given.get("deepspeed"):
        check_deepspeed(config, args)


def check_hub(config: Config) -> None:
    """Raises `ConfigError` if the run is to be sent to the hub, which does not know this user or is not there."""
    if not config.train.arguments.get("push_to_hub"):
        return
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # noqa: BLE001  every HTTP client has its own kinds, with one meaning here
        raise ConfigError(
            f"{config.file}: train.push_to_hub needs the hub, and a login there ({type(error).__name__}): set HF_TOKEN "
            "or log in (hf auth login), or train.push_to_hub=false and send output_dir afterwards (hf upload)"
        ) from None


def check_engine(config: Config) -> None:
    """Raises `ConfigError` if the machine, or the way the run was launched, is not what ``train:`` needs."""
    given, line, processes = config.train.arguments, f"{config.file}: train", number_of_processes()
    if processes > 1 and not given.get("use_cpu") and not torch.accelerator.is_available():
        raise ConfigError(
            f"{config.file}: {processes} processes were started, but without GPUs each of them would train alone: "
            "train.use_cpu=true makes one run of them"
        )
    check_tf32(config)
    if (compiler := given.get("torch_compile_backend")) is not None:
        known = [name.lower() for name in DynamoBackend.list()]
        check_name("train.torch_compile_backend", str(compiler).lower(), known, config.file)
    if not given.get("fsdp"):
        return
    if given.get("deepspeed"):
        raise ConfigError(f"{line}.fsdp and train.deepspeed exclude each other: say it by train.engine alone")
    if processes == 1:
        raise ConfigError(
            f"{line}.fsdp shards the model over several processes, and this is one: launch more (scripts/README.md), "
            "or train.engine=ddp"
        )
    if isinstance(given.get("fsdp_config"), str):
        read_settings(config, "fsdp_config")


def check_tf32(config: Config) -> None:
    """Raises `ConfigError` if the run asks for TF32 where there is none, or where positions would suffer from it."""
    given, line = config.train.arguments, f"{config.file}: train"
    if given.get("tf32") and not is_torch_tf32_available():
        raise ConfigError(f"{line}.tf32 needs a GPU of NVIDIA's Ampere generation or later: train.tf32=null")
    compiled = any(given.get(name) for name in NOT_TRIED if name.startswith("torch_compile"))
    on_gpu = is_torch_tf32_available() and not given.get("use_cpu")
    by_compiling = compiled and on_gpu and given.get("tf32") is None and (given.get("bf16") or not given.get("fp16"))
    if not (given.get("tf32") or by_compiling) or not rotary_angles_are_a_product():
        return
    reason = (
        f"transformers {transformers.__version__} makes the angles of rotary position embeddings by a matrix product, "
        "in which TF32 rounds positions and frequencies to 11 bits"
    )
    what, remedy = ("tf32", "null") if given.get("tf32") else ("torch_compile allows TF32, which", "false")
    raise ConfigError(f"{line}.{what} cannot be: {reason}: train.tf32={remedy}, or transformers from 5.19 on")


def rotary_angles_are_a_product() -> bool:
    """Whether this transformers makes rotary angles by a matrix product (5.17 and 5.18 do) or number by number. Seen by
    the operations of LLaMA's module, which the other decoders have copies of."""
    rotary = modeling_llama.LlamaRotaryEmbedding(LlamaConfig(hidden_size=8, num_attention_heads=1))
    with FlopCounterMode(display=False) as counter:
        rotary(torch.zeros(1, 2, 8), torch.arange(2)[None])
    return counter.get_total_flops() > 0  # it counts matrix products only


def check_optimizer(config: Config, args: TrainingArguments) -> None:
    """Raises `ConfigError` if the optimizer or the schedule of its learning rate cannot be made: a package is not
    installed, ``optim_args`` or ``lr_scheduler_kwargs`` do not fit it."""
    group = {
        "params": [torch.zeros(1, requires_grad=True)],
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
    }
    key = "optim"
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        kind([group], **options)
        key = "lr_scheduler_type"
        plain = torch.optim.SGD([group], lr=args.learning_rate)
        get_scheduler(args.lr_scheduler_type, plain, 0, 1, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except LIBRARY_ERRORS as error:
        name = getattr(args, key).value
        raise ConfigError(f"{config.file}: train.{key}: {name}: {first_line(error)}") from error


def check_deepspeed(config: Config, args: TriedArguments) -> None:
    """Raises `ConfigError` if the settings for DeepSpeed cannot be read, do not say what the run says, or leave the
    weights of ZeRO-3 in pieces where they are saved, after the last step."""
    content = read_settings(config, "deepspeed")
    line = f"{config.file}: train.deepspeed: {_named(config.train.arguments['deepspeed'])}"
    for section in ("bf16", "fp16", "zero_optimization"):
        if not isinstance(content.get(section, {}), Mapping):
            raise ConfigError(f"{line}: its {section!r} must be a mapping of keys, got {content[section]!r}")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage not in ZERO_STAGES:
        raise ConfigError(f"{line}: zero_optimization.stage must be one of {list(ZERO_STAGES)}, got {stage!r}")
    for section, key in NOT_DEEPSPEEDS.items():
        if section in content:
            raise ConfigError(f"{line}: its {section!r} would replace that of the run: remove it, and set {key}")
    for name in NEEDED_BY_DEEPSPEED:
        if name not in content:
            raise ConfigError(f'{line} needs "{name}": "auto"')
    try:
        settings = HfTrainerDeepSpeedConfig(content)
        settings.trainer_config_process(args)
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"{line}: {first_line(error)}") from error
    if settings.mismatches:
        other = "; ".join(entry.removeprefix("- ") for entry in settings.mismatches)
        raise ConfigError(f'{line} does not say what the config says: {other}: write "auto" there')
    if settings.is_zero3() and settings.get_value(f"zero_optimization.{GATHER}") is not True:
        raise ConfigError(f"{line} needs zero_optimization.{GATHER}: true")


def read_settings(config: Config, name: str) -> Mapping[str, Any]:
    """The settings that ``train.NAME`` holds, or the JSON file that it names.

    Raises:
        ConfigError: that cannot be read, or holds no keys.
    """
    value = config.train.arguments[name]
    line = f"{config.file}: train.{name}: {_named(value)}"
    try:
        content = json.loads(Path(value).read_text(encoding="utf-8")) if isinstance(value, str) else value
    except OSError as error:
        raise ConfigError(f"{line}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{line}: not readable as JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"{line}: must be a mapping of keys, got {type(content).__name__}")
    return content


def _named(settings: Any) -> str:
    """A file by its path, settings that stand in the config itself by what they are."""
    return settings if isinstance(settings, str) else "the mapping"
