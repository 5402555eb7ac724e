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
from tokenizers.normalizers import Sequence
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.labels import encode_pieces
from llava_pdrop.types import PackedBatch, Turn
from tests.golden import test_cases, test_generation
from tests.golden.cases import REPOSITORY, Case, case_files, directories
from tests.golden.test_cases import check_official
from tests.golden.test_models import model_directories
from tests.golden.test_text import judge, load, merge_images
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


# ---- text that no recorded line has, made here ----


def made(template: str, reader, turns: list[dict], **changes) -> dict:
    """A line as the official code would record it: ours, before ``changes``."""
    row = TEMPLATES[template]
    rounds = row.rounds([Turn(turn["from"], turn["value"]) for turn in turns])
    encoded = encode_pieces(row.pieces(rounds), reader)
    line = {"template": template, "preprocess_multimodal": True, "has_image": True, "in_batch": False, "stdout": ""}
    return line | {"model_max_length": 2048, "input_ids": encoded.ids, "labels": encoded.labels, **changes}


ACCENTS = [{"from": "human", "value": "<image>\nUn cafe\u0301 ?"}, {"from": "gpt", "value": "Le cafe\u0301."}]


@pytest.fixture
def apart() -> PreTrainedTokenizerFast:
    """The tokenizer ``bpe_neox`` as transformers 4.37 used it: letters and accents stay apart."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tokenizers" / "bpe_neox")
    tokenizer.backend_tokenizer.normalizer = Sequence([])
    return tokenizer


@pytest.mark.parametrize("template", ["plain", "mistral_instruct"])
def test_letters_and_accents_that_only_we_compose_are_explained(apart, template) -> None:
    line = made(template, apart, ACCENTS, tokenizer="bpe_neox")
    assert judge(line, ACCENTS, REFERENCE) == "nfc"
    place = [i for i, label in enumerate(line["labels"]) if label != -100][2]  # behind the space, which may be any
    other = apart("x", add_special_tokens=False).input_ids[0]
    wrong = copy.deepcopy(line)
    wrong["labels"][place] = -100
    assert judge(wrong, ACCENTS, REFERENCE) is None
    wrong = copy.deepcopy(line)
    wrong["input_ids"][place] = wrong["labels"][place] = other
    assert judge(wrong, ACCENTS, REFERENCE) is None
    masked = line | {"labels": [-100] * len(line["labels"]), "stdout": "WARNING: tokenization mismatch"}
    assert judge(masked, ACCENTS, REFERENCE) == "masked"
    length = len(line["input_ids"]) - 2
    shortened = line | {"model_max_length": length, "has_image": False}  # texts are cut while they are tokenised
    shortened |= {key: line[key][:length] for key in ("input_ids", "labels")}
    assert judge(shortened, ACCENTS, REFERENCE) == "nfc"


@pytest.mark.parametrize("answer", ["Like <image> this.", "<image>", "<image> or <image>"])
def test_labels_that_hold_an_image_are_explained(answer) -> None:
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": answer}]
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "tokenizers" / "sp_legacy_false")
    shown = [turns[0], {"from": "gpt", "value": merge_images(answer)}]  # the official code keeps one of several
    line = made("v1", tokenizer, shown, tokenizer="sp_legacy_false")
    first = next(i for i, label in enumerate(line["labels"]) if label != -100)
    places = [i for i, token in enumerate(line["input_ids"]) if token == -200][1:]
    for place in places:
        line["labels"][place] = -200
    assert places and judge(line, turns, REFERENCE) == ("merged" if answer.count("<image>") > 1 else "slot")
    wrong = copy.deepcopy(line)
    wrong["labels"][first] = -100
    assert judge(wrong, turns, REFERENCE) is None


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
