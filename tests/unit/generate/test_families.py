"""The table of model classes, where it is printed and where it stands in documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.generate.families import ATTACHABLE, HEADERS, rows
from llava_pdrop.generate.pictures import UNITS
from llava_pdrop.report.page import Table
from tests.families import FAMILIES as TRIED

ROOT = Path(__file__).parents[3]


def block(document: str) -> str:
    """What stands between the marks in a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.search(r"<!-- families[^>]*-->\n?(.*?)<!-- /families -->", text, re.DOTALL)[1]


def test_the_documents_hold_the_table():
    """Otherwise: ``llava-pdrop families --markdown``."""
    assert block("llava_pdrop/generate/README.md") == Table(HEADERS, rows(), left=len(HEADERS)).markdown()
    named = re.findall(r"`(\w+)`", block("README.md"))
    assert named == [*ATTACHABLE]


@pytest.mark.parametrize("words", [[], ["--markdown"]], ids=["table", "markdown"])
def test_the_command_prints_every_class(words, capsys):
    assert main(["families", *words]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^\W*{kind}\s", printed, re.MULTILINE) for kind in ATTACHABLE)


@pytest.mark.parametrize("kind", ATTACHABLE)
def test_what_the_table_says_is_tried(kind):
    """Every class with every text decoder, by tests/parity/test_families.py."""
    family, tried = ATTACHABLE[kind], TRIED[kind]
    decoders = {name.removesuffix("_window") for name in tried.decoders}
    assert decoders == {*family.decoders} or (decoders == {"own"} and len(family.decoders) == 1)
    assert tried.flat is (family.positions == "renumber")
    assert family.unit in UNITS and (family.clip is None or family.clip in UNITS)


def test_nothing_is_tried_that_the_table_does_not_say():
    assert {*TRIED} - {"pixtral"} == {*ATTACHABLE}
