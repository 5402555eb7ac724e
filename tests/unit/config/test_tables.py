"""configs/README.md says of every key what the schema says."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from transformers import TrainingArguments

from llava_pdrop.config.load import ENGINES, load_config
from llava_pdrop.config.schema import Config, ReferenceShape
from llava_pdrop.config.tables import (
    MARKED,
    TABLES,
    Engine,
    TrainingArgumentsHere,
    filled,
    keys_in,
    render,
    sentences,
)
from llava_pdrop.config.values import hints_of, keys_of
from llava_pdrop.train.arguments import DEFAULTS

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
SCHEMAS = [*(schema for schemas in TABLES.values() for schema in schemas), ReferenceShape]


def literals(hint: object) -> list[str]:
    """The words that an annotation allows."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [word for part in get_args(hint) for word in literals(part)]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_carries_its_sentence(schema: type) -> None:
    said = sentences(schema)
    for name in keys_in(schema):
        assert name in said, (
            f"{schema.__name__}.{name}: write a string under the field, it is its row in configs/README.md"
        )
        assert re.fullmatch(r"\S.*\.", said[name]), f"{schema.__name__}.{name}: {said[name]!r} is no sentence"


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_sentences_name_every_choice(schema: type) -> None:
    for name in keys_in(schema):
        for word in literals(hints_of(schema)[name]):
            assert f"``{word}``" in sentences(schema)[name], f"{schema.__name__}.{name} does not say what {word} is"


def test_the_document_has_the_tables_of_the_schema() -> None:
    """Mend: python -m llava_pdrop.config.tables"""
    assert filled(TEXT) == TEXT


def test_every_key_is_in_a_table() -> None:
    assert sorted(match[2] for match in MARKED.finditer(TEXT)) == sorted(TABLES)
    shown = [f"{'' if table == 'top' else f'{table}.'}{name}" for table in TABLES for schema in TABLES[table]
             for name in keys_in(schema)]  # fmt: skip
    sections = [name for name in TABLES if "." not in name]
    below = "model.reference_shape."  # said by the row above
    wanted = {key for key in keys_of(Config) if key not in sections and not key.startswith(below)}
    assert wanted <= set(shown)


def test_a_changed_default_and_a_key_without_sentence_show(tmp_path: Path) -> None:
    module = tmp_path / "other.py"
    module.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Said:\n"
        "    a: tuple[str, ...] = ('x', 'y')\n"
        '    """One | other, ``x``\n'
        '    or ``y``."""\n'
        "    b: bool = True\n"
        '    """Two."""\n'
        "@dataclass\n"
        "class Silent(Said):\n"
        "    c: int = 1\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        from other import Said, Silent
    finally:
        sys.path.remove(str(tmp_path))
    assert render(Said).splitlines()[2:] == ["| `a` | `[x, y]` | One \\| other, `x` or `y`. |", "| `b` | true | Two. |"]
    with pytest.raises(KeyError):
        render(Silent)


def test_what_load_fills_in(tmp_path: Path) -> None:
    file = tmp_path / "somewhere" / "run.yaml"
    file.parent.mkdir()
    file.write_text("model: {path: a}\ndata: {train: b, samples_per_batch: 1}\n")
    config = load_config(file)
    assert (config.name, config.output_dir) == ("somewhere/run", "checkpoints/somewhere/run")
    assert "| `name` | `DIRECTORY/FILE` |" in TEXT and "| `output_dir` | `checkpoints/NAME` |" in TEXT


def test_defaults_of_training_arguments() -> None:
    """Ours where we set one, else the library's."""
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(TrainingArgumentsHere):
        assert field.default == DEFAULTS.get(field.name, theirs[field.name]), field.name


def test_the_sentence_of_engine_names_all_engines() -> None:
    for name in ENGINES:
        assert f"``{name}``" in sentences(Engine)["engine"]


def test_the_command_writes_the_document(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "README.md"
    file.write_text("before\n<!-- keys: eval -->\nold\n<!-- end -->\nafter\n")
    code = (
        "import runpy, sys; runpy.run_module('llava_pdrop.config.tables', run_name='__main__'); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"
    written = file.read_text()
    assert written.startswith("before\n<!-- keys: eval -->\n| key | default | meaning |\n")
    assert "old" not in written and written.endswith("|\n<!-- end -->\nafter\n")
