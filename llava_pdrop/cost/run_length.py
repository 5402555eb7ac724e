"""How many samples a run trains on: by its steps, its data, or what is known of the data that its recipe names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava_pdrop.config.schema import Config
from llava_pdrop.cost.mixtures import OPEN_LLAVA_NEXT
from llava_pdrop.data.mixture import read_data
from llava_pdrop.errors import UserError

RECIPES: dict[str, tuple[int, str]] = {
    "blip_laion_cc_sbu_558k.json": (558_128, "LLaVA's stage 1"),
    "llava_v1_5_mix665k.json": (665_298, "LLaVA-1.5's mixture"),
    "open-llava-next_instruct_mix1M.json": (
        round(1000 * sum(part.thousands for part in OPEN_LLAVA_NEXT)),
        "Open-LLaVA-NeXT's mixture, by its components in llava_pdrop/cost/mixtures.py",
    ),
}
"""Name of a recipe's data file -> its records, and what it is (data/README.md)."""


@dataclass(frozen=True)
class RunLength:
    """``samples`` that a run trains on, repeated ones counted again, or None; ``source``: where the number is from, or
    why there is none."""

    samples: float | None
    source: str


def run_length(config: Config, batch: int) -> RunLength:
    """The samples of ``config`` with optimizer steps of ``batch`` samples. Reads the data where they are on this
    machine, without looking at single records."""
    steps = config.train.arguments.get("max_steps", -1)
    if steps > 0:
        return RunLength(float(steps * batch), f"train.max_steps={steps} of {batch} samples")
    file, epochs = Path(config.data.train), config.train.arguments.get("num_train_epochs", 3)
    if file.exists():
        try:
            records = len(read_data(file, config.data.image_root, config.data.format, config.seed))
        except (UserError, OSError) as error:
            return RunLength(None, f"data.train cannot be read: {' '.join(str(error).split())}")
        return RunLength(epochs * records, f"{epochs:g} x the {records:,} records of {file}")
    if file.name not in RECIPES:
        return RunLength(None, f"data.train {file} is not on this machine, and no recipe's file is called so")
    records, name = RECIPES[file.name]
    return RunLength(epochs * records, f"{epochs:g} x {name} (the file {file.name} is not here)")
