"""The Trainer's arguments: what the ``train:`` section says, and what stands where it says nothing."""

from __future__ import annotations

import copy
import logging
import math
import netrc
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from llava_pdrop.config.schema import Config
from llava_pdrop.errors import ConfigError, first_line
from llava_pdrop.runtime.device import has_fast_bfloat16, peak_flops
from llava_pdrop.world import environment_kept, number_of_processes

DEFAULTS: dict[str, Any] = {"logging_steps": 1, "report_to": "none", "logging_nan_inf_filter": False}
"""Training arguments where a config says nothing: a line of metrics per step, no outside service, and a loss that is
not a number is shown as such (the Trainer would hide it, at the price of a device synchronisation per micro-batch)."""

NOT_TRIED = ("deepspeed", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Training arguments that change the process they are read in."""

LIBRARY_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ImportError, OSError, RuntimeError)
"""What the libraries raise at settings that they do not take."""

log = logging.getLogger(__name__)

_set_here: dict[str, str] = {}
"""What `prepare_reporting` did for the run before in this process (stage 1, a vanilla model to compare with)."""


class Arguments(TrainingArguments):
    """`TrainingArguments` with a CPU that has no number. Several processes are given "cpu:0", which torch cannot read
    a checkpoint to: transformers 5.17 asks for that, 5.23 does not."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


class TriedArguments(TrainingArguments):
    """`TrainingArguments` that only look at their values: no device is taken, no other process is waited for."""

    @property
    def device(self) -> torch.device:
        """None is looked for."""
        return torch.device("cpu")

    @property
    def world_size(self) -> int:
        """As the launcher says."""
        return number_of_processes()


def given_arguments(config: Config) -> dict[str, Any]:
    """What `TrainingArguments` are made of: ours where nothing is said, the ``train:`` section, and what other sections
    decide. The library changes what it is given, so these are copies."""
    arguments = {
        **DEFAULTS,
        **copy.deepcopy(config.train.arguments),
        "output_dir": config.output_dir,
        "run_name": config.name,
        "seed": config.seed,
        "per_device_train_batch_size": config.data.samples_per_batch or 1,
        "remove_unused_columns": False,
    }
    if arguments.get("bf16") and on_cpu(arguments) and not has_fast_bfloat16(torch.device("cpu")):
        arguments["bf16"] = False
    return arguments


def tried_arguments(config: Config) -> TriedArguments:
    """The training arguments as far as they are values.

    Raises:
        ConfigError: transformers refuses them.
    """
    arguments = {name: value for name, value in given_arguments(config).items() if name not in NOT_TRIED}
    try:
        with environment_kept():
            return TriedArguments(**arguments)
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"{config.file}: train: {first_line(error)}") from error


def on_cpu(arguments: Mapping[str, Any]) -> bool:
    """Whether a run with these training ``arguments`` takes place on the CPU, its evaluation too."""
    return bool(arguments.get("use_cpu")) or not torch.cuda.is_available()


def training_arguments(config: Config) -> TrainingArguments:
    """The Trainer's arguments of a run that `llava_pdrop.train.checks.checked` found nothing wrong with. Takes a
    device, joins the other processes, and sets what DeepSpeed and the services of ``report_to`` read."""
    arguments = given_arguments(config)
    if arguments.get("bf16") != config.train.arguments.get("bf16"):
        log.warning(
            "%s: this CPU has no bfloat16 instructions, so train.bf16 is ignored: float32 is faster", config.name
        )
    try:
        if arguments.get("deepspeed"):
            prepare_deepspeed(on_cpu(arguments))
        args = Arguments(**arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{config.file}: train: {first_line(error)}") from error
    warn_of_locks(args)
    if args.n_gpu > 1:
        log.warning(
            "%d GPUs are visible and one is used: torchrun --nproc_per_node %d uses all", args.n_gpu, args.n_gpu
        )
        args._n_gpu = 1  # the Trainer would wrap the model in nn.DataParallel, which cannot split a packed stream
    if args.deepspeed and args.device.type == "cpu":  # on GPUs the Trainer has done it; ZeRO-3 needs it for the model
        import deepspeed

        deepspeed.init_distributed("gloo")
    if args.fsdp:
        prepare_fsdp(args)
    prepare_reporting(args)
    return args


def prepare_deepspeed(on_cpu: bool) -> None:
    """Tells DeepSpeed what a launcher would, as it takes a process without one for a part of an MPI job; and on CPUs,
    where it would compile a faster gloo of its own for over a minute, to use what is there."""
    if on_cpu:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update(MASTER_ADDR="127.0.0.1", **{name: str(value) for name, value in world.items()})


def prepare_fsdp(args: TrainingArguments) -> None:
    """Tells accelerate two things that it does not do by itself."""
    if args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        # It shards for GPUs only; on CPUs it would, without a word, train by DDP.
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    if (args.bf16 or args.fp16) and args.fsdp_plugin_args["fsdp_version"] == 2:
        # It would also round what comes out of the model: the loss, a sum in float32, to the 8 bits of bfloat16.
        half = torch.bfloat16 if args.bf16 else torch.float16
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half)


def warn_of_locks(args: TrainingArguments) -> None:
    """Warns of what offloading by DeepSpeed would wait for without a word."""
    settings = getattr(args, "hf_deepspeed_config", None)  # there with args.deepspeed only
    compiled = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    for lock in compiled.glob("**/cpu_adam/lock") if settings is not None and settings.is_offload() else ():
        log.warning("this run waits for %s: if no other one is compiling, it was killed while it did: remove it", lock)


def peak_of(args: TrainingArguments) -> float | None:
    """Operations a second that a GPU of this run can do in the run's precision; None without a GPU."""
    if args.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return peak_flops(args.device, dtype)[0]


def prepare_reporting(args: TrainingArguments) -> None:
    """Lets the services that ``report_to`` names start without asking anything: W&B writes to the disk (offline) where
    it has no key, and what is not said in its environment variables belongs to this project and this run, to nobody."""
    if "tensorboard" in args.report_to:
        _set_default("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir) / "tensorboard"))
    if "wandb" in args.report_to:
        _end_earlier_wandb_run(args.run_name)
        _set_default("WANDB_PROJECT", "llava_pdrop")
        _set_default("WANDB_DIR", args.output_dir)
        Path(os.environ["WANDB_DIR"]).mkdir(parents=True, exist_ok=True)
        if "WANDB_MODE" not in os.environ and not _has_wandb_key():
            os.environ["WANDB_MODE"] = "offline"
            log.warning("W&B has no key: it writes to %s, to be sent later with wandb sync", os.environ["WANDB_DIR"])


def _set_default(name: str, value: str) -> None:
    """Sets an environment variable that is not set, or that an earlier run in this process has set."""
    if os.environ.get(name) in (None, _set_here.get(name)):
        os.environ[name] = _set_here[name] = value


def _end_earlier_wandb_run(name: str) -> None:
    """Every training is a run of its own, called ``name``; without this a second one would go on in the first. A run
    that somebody else has begun is left alone."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None and wandb.run.name == _set_here.get("run"):
        wandb.finish()
        wandb.teardown()  # forgets the settings too, or the next run would be written to the directory of this one
    _set_here["run"] = name


def _has_wandb_key() -> bool:
    """Whether W&B finds a key without asking: in its variable, or in netrc, where ``wandb login`` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def total_steps(args: TrainingArguments, steps_per_epoch: int) -> int:
    """Steps of a run."""
    return args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)


def endless_warmup(args: TrainingArguments, steps_per_epoch: int) -> str | None:
    """What to say of a run whose learning rate is still rising at its end; None of all others."""
    steps = total_steps(args, steps_per_epoch)
    warmup = args.get_warmup_steps(steps)
    if warmup < steps or warmup < 2 or args.lr_scheduler_type == "constant":
        return None
    return (
        f"train.warmup_steps={args.warmup_steps:g} is not below the {steps} steps of this run, so that its learning "
        f"rate never reaches {args.learning_rate:g}: lower it, or give a share of all steps (below 1)"
    )


def learning_rates(config: Config, args: TrainingArguments) -> dict[str, float]:
    """Peak learning rate of every part of the model."""
    section, rate = config.train, args.learning_rate
    return {
        "language_model": rate,
        "projector": rate if section.projector_lr is None else section.projector_lr,
        "vision_tower": rate if section.vision_tower_lr is None else section.vision_tower_lr,
    }
