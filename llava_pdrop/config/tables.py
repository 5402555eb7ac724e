"""The key tables of configs/README.md, made of the schema: ``python -m llava_pdrop.config.tables`` writes them.

A key's sentence is the string under its field; its default is that of the dataclass. In the document each table stands
between two comments, ``<!-- keys: NAME -->`` and ``<!-- end -->``; all else there is written by hand.
"""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from llava_pdrop.config import schema
from llava_pdrop.config.values import hints_of
from llava_pdrop.schedule import Schedule

README = Path("configs/README.md")

MARKED = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""A table in the document: its first comment, its name, its last comment."""


@dataclass(frozen=True)
class Inherited:
    """The key that `load.py` uses up."""

    base: str | None = None
    """YAML file to inherit from, relative to this one."""


@dataclass(frozen=True)
class Engine:
    """The key that stands for several training arguments (`load.ENGINES`)."""

    engine: str | None = None
    """How to shard over GPUs: ``ddp`` (not at all), ``zero2``, ``zero3``, ``zero2_offload``, ``zero3_offload``,
    ``fsdp2``, or a DeepSpeed file (``*.json``). null: as ``deepspeed``, ``fsdp`` and ``fsdp_config`` say, else DDP.
    Replaces these three where they are inherited."""


@dataclass(frozen=True)
class TrainingArgumentsHere:
    """Fields of `transformers.TrainingArguments` that mean more here than there, with the default that holds here."""

    logging_steps: int = 1
    """Steps per line of ``metrics.jsonl``, whatever ``report_to`` says. A line holds means over these steps; the last
    step always gets one. The 7B and 13B recipes take 10, because each line makes the CPU wait for the GPU."""
    report_to: str = "none"
    """``wandb``, ``tensorboard`` or a list; both come with the extra ``[train]``. Without a key W&B writes offline
    into ``OUTPUT_DIR``. Its project is ``llava_pdrop`` unless ``WANDB_PROJECT`` is set. Each training of a command
    (stage 1, stage 2) is a run of its own."""
    save_total_limit: int | None = None
    """Keep the newest N complete checkpoints; torn ones do not count. Two or more survive a disk that loses files."""
    ddp_timeout: int = 1800
    """After 0.9 of these seconds without progress every rank reports who is missing, the stuck rank shows its stack,
    and all exit with code 86. A single process is watched too, while it trains and saves: raise this for a
    debugger."""
    gradient_accumulation_steps: int = 1
    """May change on resume if processes x this stays the same: same data order, other order of summation."""
    tf32: bool | None = None
    """Refused with transformers before 5.19, which compute rotary angles by a matrix product: TF32 would round
    positions."""
    torch_compile: bool = False
    """Allows TF32 too, and is refused likewise, unless ``train.tf32=false``."""


TABLES: dict[str, tuple[type, ...]] = {
    "top": (Inherited, schema.Config),
    "model": (schema.ModelSection,),
    "data": (schema.DataSection,),
    "pyramid_drop": (Schedule,),
    "train": (Engine, schema.TrainSection),
    "training_arguments": (TrainingArgumentsHere,),
    "lora": (schema.LoraSection,),
    "eval": (schema.EvalSection,),
    "compare": (schema.CompareSection,),
    "paper": (schema.PaperRow,),
    "ablation": (schema.AblationFile,),
}
"""Name of a table -> the dataclasses whose keys it lists."""

FILLED_IN: dict[tuple[type, str], str] = {
    (schema.Config, "name"): "`DIRECTORY/FILE`",
    (schema.Config, "output_dir"): "`checkpoints/NAME`",
}
"""Required fields of the schema that `load.py` fills in where the file does not set them."""


def sentences(section: type) -> dict[str, str]:
    """The strings under the fields of a dataclass, each on one line."""
    definition = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, below in zip(definition.body, definition.body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                found[statement.target.id] = " ".join(text.split())
    return found


def keys_in(section: type) -> list[str]:
    """The keys of a dataclass that need a sentence: all that YAML may set, less sections that have a table."""
    apart = TABLES.keys() if section is schema.Config else ()
    return [name for name in hints_of(section) if name not in apart]


def render(*sections: type) -> str:
    """The Markdown table of these dataclasses.

    Raises:
        KeyError: a field has no sentence.
    """
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for section in sections:
        entries, meaning = {entry.name: entry for entry in fields(section)}, sentences(section)
        for name in keys_in(section):
            default = FILLED_IN.get((section, name)) or in_yaml(entries[name])
            lines.append(f"| `{name}` | {default} | {meaning[name].replace('``', '`').replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def in_yaml(entry: Any) -> str:
    """The default of a dataclass field as one writes it in YAML."""
    default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
    if default is MISSING:
        return "required"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default}`" if isinstance(default, str | dict) else str(default)


def filled(text: str) -> str:
    """The document ``text`` with every marked table made anew.

    Raises:
        KeyError: a comment names no table.
    """
    return MARKED.sub(lambda match: f"{match[1]}{render(*TABLES[match[2]])}{match[3]}", text)


def main() -> None:
    """Writes the tables into configs/README.md of the checkout it is started in."""
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {README}")


if __name__ == "__main__":
    main()
