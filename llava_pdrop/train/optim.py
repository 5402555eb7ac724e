"""What learns, and how fast: freezing, parameter groups and the table of trainable parameters."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from llava_pdrop.checkpoint.lora import ADAPTER
from llava_pdrop.errors import UserError
from llava_pdrop.model.vision import used_tower_layers
from llava_pdrop.model.vlm import MODULE
from llava_pdrop.report.page import Table

MODEL_PARTS: dict[str, tuple[str, ...]] = {
    "language_model": ("model.language_model.", "lm_head."),
    "projector": ("model.multi_modal_projector.", "model.image_newline"),
    "vision_tower": ("model.vision_tower.",),
}
"""Part of the model (a key of ``model.trainable``) -> prefixes of its parameters in the Hugging Face LLaVA."""

NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of biases and norms, which get no weight decay (the list of `transformers.Trainer`)."""

WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_orig_mod\.|_checkpoint_wrapped_module\.|^module\.")
"""What wrappers put into parameter names."""


def part_of(name: str) -> str:
    """The part a parameter belongs to, by its name in the Hugging Face LLaVA or in a (wrapped) `PyramidLlava`.

    One that belongs to none would silently never be trained: it fails.
    """
    plain = WRAPPERS.sub("", name).removeprefix(f"{MODULE}.")
    for part, prefixes in MODEL_PARTS.items():
        if plain.startswith(prefixes):
            return part
    raise AssertionError(f"parameter {name} belongs to none of the parts {list(MODEL_PARTS)}")


def freeze(model: nn.Module, trainable: Collection[str]) -> None:
    """Lets exactly the parts in ``trainable`` learn; of a decoder with adapters only these.

    Of a trainable tower the layers behind the one whose output is used, and its last norm, stay frozen: they get no
    gradient, and `DistributedDataParallel` waits for every parameter that wants one.

    Args:
        model: a `PyramidLlava`.

    Raises:
        UserError: an unknown part, or none.
    """
    unknown = sorted(set(trainable) - set(MODEL_PARTS))
    if unknown or not trainable:
        raise UserError(f"model.trainable must name some of {list(MODEL_PARTS)}, got {list(trainable)}")
    used = used_tower_layers(model.hf.config)
    adapted = any(ADAPTER.search(name) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        part = part_of(name)
        fixed = _is_unused(name, used) or (adapted and part == "language_model" and not ADAPTER.search(name))
        parameter.requires_grad_(part in trainable and not fixed)


def _is_unused(name: str, used: int) -> bool:
    if part_of(name) != "vision_tower":
        return False
    layer = re.search(r"encoder\.layers\.(\d+)\.", name)
    return "post_layernorm" in name or (layer is not None and int(layer[1]) >= used)


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """One optimizer group per part and decay, holding every trainable parameter exactly once. The decoder comes first:
    the Trainer logs the learning rate of the first group.

    Args:
        learning_rates: part -> peak learning rate.
    """
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NO_DECAY))
    members: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[part_of(name), name in decayed].append(parameter)
    return [
        {"params": members[part, decay], "lr": learning_rates[part], "weight_decay": weight_decay if decay else 0.0}
        for part in MODEL_PARTS
        for decay in (True, False)
        if members[part, decay]
    ]


def trainable_table(model: nn.Module, learning_rates: Mapping[str, float]) -> Table:
    """Parameters and trainable parameters of every part, for the start of a run."""
    total: dict[str, int] = dict.fromkeys(MODEL_PARTS, 0)
    learning = dict(total)
    labels = {part: part for part in MODEL_PARTS}
    for name, parameter in model.named_parameters():
        if ADAPTER.search(name):
            labels[part_of(name)] = f"{part_of(name)} (LoRA)"
        count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty shard in place
        total[part_of(name)] += count
        learning[part_of(name)] += count * parameter.requires_grad
    columns = [
        ("part", [*labels.values(), "all"]),
        ("parameters", [f"{count:,}" for count in (*total.values(), sum(total.values()))]),
        ("trainable", [f"{count:,}" for count in (*learning.values(), sum(learning.values()))]),
        ("learning rate", [*(f"{learning_rates[part]:g}" if learning[part] else "frozen" for part in MODEL_PARTS), ""]),
    ]
    return Table.of_columns(columns, "What learns")
