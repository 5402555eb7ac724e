"""LoRA and QLoRA: peft's low-rank matrices beside the decoder's own weights, which stay as they are.

The matrices sit inside the Hugging Face LLaVA under peft's names, so that the model's forward, the Trainer and the
ranking (which calls q_proj and k_proj as modules) need to know nothing of them. What is saved is small: the matrices,
the projector, and the tower where it learns. `llava_pdrop.checkpoint.lora` merges it into the base model when it is
read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_pdrop.checkpoint.hf_files import write_config, write_processor
from llava_pdrop.checkpoint.layouts import TOWER
from llava_pdrop.checkpoint.load import PROJECTOR_FILE, check_shapes
from llava_pdrop.checkpoint.lora import ADAPTER, ADAPTERS, NON_LORA, PREFIX
from llava_pdrop.checkpoint.shards import open_tensors, remove_weights
from llava_pdrop.checkpoint.zero3 import gathered, overwrite, own_tensors, whole_shape
from llava_pdrop.config.places import absolute
from llava_pdrop.config.schema import Config, LoraSection
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.runtime.device import autocast_dtype
from llava_pdrop.train.optim import freeze, part_of

TARGETS = {
    "attention": (r"self_attn\.[qkvo]_proj",),
    "mlp": (r"mlp\.(?:gate|up|down)_proj",),
    "both": (r"self_attn\.[qkvo]_proj", r"mlp\.(?:gate|up|down)_proj"),
}
"""``lora.target`` -> patterns of the modules in a decoder layer that get adapters."""

SAMPLED = 4096
"""Numbers of every weight, evenly spaced, that `fingerprint_of_base` looks at."""

NAME_IN_PEFT = "default"
"""Peft's name for the only adapter of a model, which its files leave out."""


def adapt(model: PyramidLlava, config: Config, args: TrainingArguments) -> None:
    """Makes ``model`` learn by adapters, as ``config.lora`` says, and freezes what does not learn.

    Raises:
        ConfigError: ``lora.bits`` with weights that are sharded, or a ``rank_pattern`` that fits nothing.
    """
    assert config.lora is not None
    half = autocast_dtype(args.device, args.bf16, args.fp16)
    if config.lora.bits is not None and (is_deepspeed_zero3_enabled() or args.fsdp):
        raise ConfigError(
            f"{config.file}: lora.bits: {config.lora.bits}-bit weights cannot be sharded: train without FSDP and "
            "ZeRO-3, or lora.bits=null"
        )
    key = "model.path" if config.model.path is not None else "model.language_model"
    base = absolute(key, config.model.path or config.model.language_model or "")
    try:
        attach_adapters(model.hf, config.lora, str(base), args.device, half)
    except UserError as error:
        raise ConfigError(f"{config.file}: {error}") from None
    except re.error as error:
        raise ConfigError(f"{config.file}: lora.rank_pattern: {error.pattern!r} cannot be matched: {error}") from None
    freeze(model, config.model.trainable)
    model.register_load_state_dict_post_hook(_miss_nothing_frozen)
    if half is not None and not args.deepspeed and not args.fsdp:
        halve_frozen(model, half)


def attach_adapters(
    hf: Any,
    section: LoraSection,
    base: str,
    device: torch.device = torch.device("cpu"),
    half: torch.dtype | None = None,
) -> None:
    """Gives the decoder of ``hf`` adapters, which add nothing yet (their second matrix is zero), and freezes the rest
    of ``hf``. They are float32 on the device of the weights beside them.

    Args:
        base: the model that the adapters are for, as `llava_pdrop.checkpoint.lora` will look for it.
        device, half: where and in which precision (None: float32) quantised weights compute.

    Raises:
        UserError: a name in ``rank_pattern`` fits no module that gets adapters.
    """
    target = rf"model\.language_model\.layers\.\d+\.(?:{'|'.join(TARGETS[section.target])})"
    adapted = [name for name, _ in hf.named_modules() if re.fullmatch(target, name)]
    for pattern in section.rank_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):  # as peft matches
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in adapted}))
            raise UserError(f"lora.rank_pattern: {pattern!r} fits none of the adapted modules: {known}")
    if section.bits is not None:
        quantise(hf.model.language_model.layers, section, device, half)
        setattr(hf, f"is_loaded_in_{section.bits}bit", True)  # where peft looks
    settings = LoraConfig(
        base_model_name_or_path=base,
        target_modules=target,
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        rank_pattern=dict(section.rank_pattern),
    )
    inject_adapter_in_model(settings, hf, NAME_IN_PEFT)
    for name, parameter in hf.named_parameters():
        if ADAPTER.search(name):
            parameter.data = parameter.data.float()


def quantise(layers: nn.Module, section: LoraSection, device: torch.device, half: torch.dtype | None) -> None:
    """Replaces every linear map in ``layers`` by bitsandbytes' of ``section.bits`` bits, one after the other, on
    ``device`` (CUDA)."""
    import bitsandbytes as bnb

    for name, module in list(layers.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        shape = (module.in_features, module.out_features, module.bias is not None)
        if section.bits == 8:
            small = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        else:
            small = bnb.nn.Linear4bit(
                *shape,
                compute_dtype=half,
                compress_statistics=section.double_quant,
                quant_type=section.quant_type,
            )
        small.load_state_dict(module.state_dict())
        layers.set_submodule(name, small.requires_grad_(False).to(device))  # this is where it is quantised


def halve_frozen(model: nn.Module, half: torch.dtype) -> None:
    """Turns linear maps of which nothing learns into ``half``. Autocast does so at every call, to the same numbers:
    what is saved is the memory of the float32 weights and the time of turning them. A head that is the embedding stays,
    as the embedding makes the stream.

    Not for DeepSpeed and FSDP, which have their own precision and want one for all.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if type(module) is nn.Linear and frozen and id(module.weight) not in tables:
            module.to(half)


def is_adapted(hf: nn.Module) -> bool:
    """Whether ``hf`` has adapters."""
    return hasattr(hf, "peft_config")


# ---- the base, which no checkpoint holds ----


@contextmanager
def base_left_out(model: PyramidLlava) -> Iterator[None]:
    """As long as it lasts, ``model.state_dict()`` is without the frozen weights of the decoder, and of a tower of which
    nothing learns. That is what DeepSpeed and FSDP gather and write."""
    learning = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved_whole = {"projector", *(learning - {"language_model"})}
    base = [name for name in _frozen(model) if part_of(name) not in saved_whole]

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in base:
            state.pop(prefix + name, None)

    with model.register_state_dict_post_hook(drop):
        yield


def fingerprint_of_base(model: PyramidLlava) -> str:
    """A hash of the frozen weights, from a sample of each: another base shows, a single other number may not. Weights
    that are quantised are not looked at, as GPUs of two kinds may round them differently. Every rank comes here (ZeRO-3
    gathers).
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not parameter.is_floating_point():
            continue
        with gathered(parameter):
            weights = parameter.detach().flatten()
            sample = weights[:: max(1, len(weights) // SAMPLED)].cpu().contiguous()
        digest.update(name.encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _frozen(model: nn.Module) -> set[str]:
    """Names of the parameters that do not learn, of a shared one all its names."""
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}


def _miss_nothing_frozen(model: nn.Module, keys: Any) -> None:
    """Called behind ``model.load_state_dict``: frozen weights are there already; any other missing one stays an
    error."""
    frozen = _frozen(model)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


# ---- onto a disk and back ----


def save_adapters(
    hf: Any, processor: Any, directory: Path, tower: bool, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes what a LoRA run has learnt beside its projector, with config and processor: ``adapter_config.json`` and
    ``adapter_model.safetensors`` as peft does, and with ``tower`` the vision tower.

    Args:
        state_dict: gathered weights (DeepSpeed, FSDP); default: the model's own.
    """
    state = hf.state_dict() if state_dict is None else state_dict
    directory.mkdir(parents=True, exist_ok=True)
    remove_weights(directory)
    _write({_in_peft(name): tensor for name, tensor in state.items() if ADAPTER.search(name)}, directory / ADAPTERS[0])
    hf.peft_config[NAME_IN_PEFT].save_pretrained(directory)
    if tower:
        _write({name: tensor for name, tensor in state.items() if name.startswith(TOWER)}, directory / NON_LORA)
    write_config(hf.config, directory, hf.dtype)
    hf.generation_config.save_pretrained(directory)
    if processor is not None:
        write_processor(processor, directory)


def load_adapters(hf: nn.Module, directory: Path) -> None:
    """Reads back into ``hf`` what `save_adapters` has written, and the projector beside it.

    Raises:
        UserError: it is of other adapters or another model; every key is listed.
    """
    stored = {_in_memory(name): tensor for name, tensor in open_tensors(directory / ADAPTERS[0]).items()}
    for name in (PROJECTOR_FILE, NON_LORA):
        if (directory / name).is_file():
            stored |= open_tensors(directory / name)
    own = own_tensors(hf)
    wanted = {name: whole_shape(own[name]) for name in own if ADAPTER.search(name) or name in stored}
    check_shapes(wanted, stored, f"{directory} does not fit the model")
    for name, tensor in stored.items():
        overwrite(own[name], tensor.read)


def _write(tensors: Mapping[str, Tensor], file: Path) -> None:
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(plain, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors leaves it to its owner alone


def _in_peft(name: str) -> str:
    return PREFIX + name.replace(f".{NAME_IN_PEFT}.", ".")


def _in_memory(name: str) -> str:
    return re.sub(r"\.(lora_[AB])\.", rf".\1.{NAME_IN_PEFT}.", name.removeprefix(PREFIX))
