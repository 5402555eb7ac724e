"""``train.engine``: one word for the training arguments that say what is cut up over the GPUs. A new engine is a row in
`ENGINES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_pdrop.config_values import Problem, did_you_mean

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"deepspeed": "configs/deepspeed/zero2.json"},
    "zero3": {"deepspeed": "configs/deepspeed/zero3.json"},
    "zero2_offload": {"deepspeed": "configs/deepspeed/zero2_offload.json"},
    "zero3_offload": {"deepspeed": "configs/deepspeed/zero3_offload.json"},
    "fsdp2": {"fsdp": True, "fsdp_config": "configs/fsdp2.json"},
}
"""``train.engine`` -> fields of TrainingArguments. Memory and use of each: configs/deepspeed/README.md."""

SET_BY_ENGINE = ("deepspeed", "fsdp", "fsdp_config")


def without_other_engine(inherited: Mapping[str, Any], layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """``inherited`` less what the ``train.engine`` of ``layer`` takes the place of: a saved run, and a config that is
    older than that key, say their engine by its training arguments."""
    before, now = inherited.get("train"), layer.get("train")
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)) or now.get("engine") is None:
        return inherited
    return {**inherited, "train": {name: value for name, value in before.items() if name not in SET_BY_ENGINE}}


def with_engine(train: Mapping[str, Any]) -> dict[str, Any]:
    """The ``train:`` section with its ``engine`` replaced by what that stands for: a name in `ENGINES`, or a file with
    settings for DeepSpeed (``*.json``).

    Raises:
        Problem: it is neither, or the section says the same in another way too.
    """
    engine = train.get("engine")
    rest = {name: value for name, value in train.items() if name != "engine"}
    if engine is None:
        return rest
    if isinstance(engine, str) and engine in ENGINES:
        chosen = ENGINES[engine]
    elif isinstance(engine, str) and engine.endswith(".json"):
        chosen = {"deepspeed": engine}
    else:
        raise Problem(
            "train.engine",
            f"train.engine cannot be {engine!r}: choose one of {list(ENGINES)}, or name a DeepSpeed file (*.json)"
            f"{did_you_mean(str(engine), ENGINES)}",
        )
    for name in SET_BY_ENGINE:
        if name in rest:
            raise Problem(
                f"train.{name}",
                f"train.{name} is said by train.engine here ({engine}): leave it away, and change train.engine: one of "
                f"{list(ENGINES)}, a DeepSpeed file, or null to say it by train.{name}",
            )
    return {**rest, **chosen}
