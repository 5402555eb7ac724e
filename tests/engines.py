"""The engines of ``configs/`` as training arguments for the tests: cut up for real, though the models are tiny."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed: pip install -e '.[train]'")
FSDP2 = {"fsdp": True, "fsdp_config": str(CONFIGS / "fsdp2.json")}


def deepspeed_arguments(name: str, directory: Path) -> dict[str, str]:
    """``train:`` keys for ``configs/deepspeed/NAME.json`` with two changes, in a copy in ``directory``: ZeRO-3 would
    leave the weights of a tiny model whole, and offloading would compile an optimizer for minutes."""
    content = json.loads((CONFIGS / f"deepspeed/{name}.json").read_text())
    if content["zero_optimization"]["stage"] == 3:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if "offload_optimizer" in content["zero_optimization"]:
        content["zero_force_ds_cpu_optimizer"] = False
    file = directory / f"{name}.json"
    file.write_text(json.dumps(content))
    return {"deepspeed": str(file)}
