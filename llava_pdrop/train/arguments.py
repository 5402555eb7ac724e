"""The Trainer's arguments: what the ``train:`` section says, and what stands where it says nothing."""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from transformers import TrainingArguments

from llava_pdrop.config import Config, ConfigError
from llava_pdrop.model.hardware import peak_flops
from llava_pdrop.model.precision import has_fast_bfloat16

DEFAULTS: dict[str, Any] = {"logging_steps": 1, "report_to": "none", "logging_nan_inf_filter": False}
"""Training arguments where a config says nothing: a line of metrics per step, no outside service, and a loss that is
not a number is shown as such (the Trainer would hide it, at the price of a device synchronisation per micro-batch)."""

log = logging.getLogger(__name__)


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
    if arguments.get("deepspeed") and "RANK" not in os.environ:
        be_a_world_of_one()
    try:
        args = TrainingArguments(**arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"{config.file}: train: {first_line(error)}") from error
    if config.train.recompute_layers is not None and not recomputes_activations(args):
        raise ConfigError(f"{config.file}: train.recompute_layers needs train.gradient_checkpointing=true")
    if args.n_gpu > 1:
        log.warning(
            "%d GPUs are visible and one is used: torchrun --nproc_per_node %d uses all", args.n_gpu, args.n_gpu
        )
        args._n_gpu = 1  # the Trainer would wrap the model in nn.DataParallel, which cannot split a packed stream
    if args.deepspeed and args.device.type == "cpu":  # on GPUs the Trainer has done it; ZeRO-3 needs it for the model
        import deepspeed

        deepspeed.init_distributed("gloo")
    prepare_reporting(config, args)
    return args


def be_a_world_of_one() -> None:
    """Tells DeepSpeed what a launcher would: it takes a process without one for a part of an MPI job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update(MASTER_ADDR="127.0.0.1", **{name: str(value) for name, value in world.items()})


def recomputes_activations(args: TrainingArguments) -> bool:
    """Whether the backward pass computes activations anew; transformers 5.23 renamed the argument."""
    return bool(getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False))


def peak_of(args: TrainingArguments) -> float | None:
    """Operations a second that a GPU of this run can do in the run's precision; None without a GPU."""
    if args.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return peak_flops(args.device, dtype)[0]


def prepare_reporting(config: Config, args: TrainingArguments) -> None:
    """Lets the services that ``report_to`` names start without asking anything: W&B writes to the disk (offline) where
    it has no key, and what is not said in its environment variables belongs to this project and this run, to nobody.

    Raises:
        ConfigError: a service is not installed.
    """
    for service, package in (("wandb", "wandb"), ("tensorboard", "tensorboard")):
        if service in args.report_to and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{config.file}: train.report_to: {service} is not installed: pip install {package}")
    if "tensorboard" in args.report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(config.output_dir) / "tensorboard"))
    if "wandb" in args.report_to:
        os.environ.setdefault("WANDB_PROJECT", "llava_pdrop")
        os.environ.setdefault("WANDB_DIR", config.output_dir)
        Path(os.environ["WANDB_DIR"]).mkdir(parents=True, exist_ok=True)
        if "WANDB_MODE" not in os.environ and not _has_wandb_key():
            os.environ["WANDB_MODE"] = "offline"
            log.warning("W&B has no key: it writes to %s, to be sent later with wandb sync", os.environ["WANDB_DIR"])


def _has_wandb_key() -> bool:
    """Whether W&B finds a key without asking: in its variable, or in netrc, where ``wandb login`` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def learning_rates(config: Config, args: TrainingArguments) -> dict[str, float]:
    """Peak learning rate of every part of the model."""
    section, rate = config.train, args.learning_rate
    return {
        "language_model": rate,
        "projector": rate if section.projector_lr is None else section.projector_lr,
        "vision_tower": rate if section.vision_tower_lr is None else section.vision_tower_lr,
    }


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind too where the message is only a name."""
    text = str(error).strip().splitlines()
    kind = type(error).__name__
    return kind if not text else f"{kind} {text[0]}" if isinstance(error, KeyError) else text[0]
