"""What a golden directory holds is what the other files here compare: nothing is left out, and nothing is empty.

The last tests spoil what is recorded and look that it is noticed.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import PIL
import pytest
import torch

from llava_pdrop.types import PackedBatch
from tests.golden import test_cases, test_generation
from tests.golden.cases import REPOSITORY, Case, case_files, directories
from tests.golden.test_cases import check_official
from tests.golden.test_models import model_directories
from tests.golden.test_text import judge, load
from tests.messages import says

KINDS = {"text": "*.json*", "preprocess": "geometry.json", "cases": "*.json", "models": "*/config.json"}
"""Folder -> its files that are compared."""

USED = {"tokenizers", "e2e", *KINDS}
TEXTS = {"prompts.json", "encode.json", "conversations.json", "labels.jsonl", "collator.json"}
REFERENCE = REPOSITORY / "tests" / "golden" / "reference"


@pytest.mark.parametrize("directory", directories(), ids=lambda directory: directory.name)
def test_nothing_is_left_out(directory: Path) -> None:
    folders = {entry.name for entry in directory.iterdir() if entry.is_dir()}
    assert folders <= USED, "a folder that no test reads"
    kinds = sorted(folders & KINDS.keys())
    assert kinds, f"{directory} holds none of {sorted(KINDS)}: there is nothing to compare"
    for kind in kinds:
        assert list((directory / kind).glob(KINDS[kind])), f"{directory / kind}: there is nothing to compare"
    for file in (directory / "text").glob("*"):
        assert file.name in TEXTS, f"{file}: no test reads it"
        assert load(file), f"{file}: there is nothing to compare"
    if "models" in folders:
        assert any(model.is_relative_to(directory) for model in model_directories()), "towers alone are not compared"
    if "e2e" in folders:
        cases = [Case.load(file) for file in case_files() if file.is_relative_to(directory)]
        assert any(case.data_file for case in cases), f"{directory / 'e2e'}: no case names it"


# ---- what is recorded wrongly is noticed ----


@pytest.fixture(scope="module")
def text() -> tuple[dict, list[dict]]:
    """A line whose labels equal ours, and its conversation."""
    conversations = load(REFERENCE / "text" / "conversations.json")
    lines = [line | {"in_batch": False} for line in load(REFERENCE / "text" / "labels.jsonl") if "labels" in line]
    line = next(line for line in lines if judge(line, conversations[line["conversation"]], REFERENCE) == "equal")
    return line, conversations[line["conversation"]]


@pytest.mark.parametrize("change", ["a label", "all labels", "an id"])
def test_a_wrong_line_is_not_explained(text, change) -> None:
    line, conversation = copy.deepcopy(text)
    place = next(i for i, label in enumerate(line["labels"]) if label != -100)
    if change == "an id":
        line["input_ids"][place] += 1
    else:
        line["labels"][place : place + 1 if change == "a label" else None] = [-100] * (
            1 if change == "a label" else len(line["labels"]) - place
        )
    assert judge(line, conversation, REFERENCE) is None


@pytest.mark.parametrize("key", ["keep_length", "kept_original", "kept_current", "query_index", "survivors_in_merged"])
def test_a_wrong_number_in_a_case_is_noticed(key) -> None:
    case = spoilt(lambda value: value + 1 if isinstance(value, int) else [*value[:-1], value[-1] + 1], key)
    with pytest.raises(AssertionError, match="ours .*, official"):
        check_official(case, PackedBatch.pack(case.samples()))


def test_a_wrong_tensor_in_a_case_is_noticed() -> None:
    case = spoilt(None)
    case.tensors["train.token_nll"] = case.tensors["train.token_nll"] + 1e-3
    with pytest.raises(AssertionError, match="train.token_nll"):
        check_official(case, PackedBatch.pack(case.samples()))


def spoilt(change, key: str = "") -> Case:
    """A case of several answers with one number of its JSON changed."""
    case = Case.load(REFERENCE / "cases" / "l15_train_multiturn.json")
    case.info = json.loads(json.dumps(case.info))
    sample = next(s for s in case.info["stages"][1]["samples"] if s["status"] == "dropped")
    if change is not None:
        sample[key] = change(sample[key])
    assert torch.is_tensor(case.tensors["train.token_nll"])
    return case


@pytest.mark.parametrize("version", ["12.3.0", "13.0.0", "14.1.0"])
def test_other_pixels_are_an_error_but_for_an_older_pillow(monkeypatch, version) -> None:
    """Which is named, once what does not depend on pixels has been compared."""
    monkeypatch.setattr(PIL, "__version__", version)
    end_to_end, older = REFERENCE / "cases" / "e2e_l15_infer0.json", version.startswith("12")
    expected = pytest.skip.Exception if older else pytest.fail.Exception
    for test in (test_cases.test_case, test_generation.test_recomputation):
        case = Case.load(end_to_end)
        test(case)
        case = Case.load(end_to_end)
        case.info["images_summary"][0]["std"] += 1e-3
        with pytest.raises(expected, match=says("100x60", "pixels")) as end:
            test(case)
        assert bool(re.search(says("Pillow 12.3.0", "13.0"), str(end.value))) == older
        assert bool(case.compared) == (test is test_cases.test_case)
