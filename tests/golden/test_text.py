"""Everything recorded in ``text/`` of the golden directories: prompts, ids, labels, padded batches.

Every entry is compared with ours. Where they differ, a rule of this file must say why (`TEXT_REASONS`), from what is
recorded and not from the entry's name, and ours is held against the conversation itself: it trains on exactly the
assistant's words and their end token. An entry that no rule explains fails.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llava_pdrop.data.conversation import TEMPLATES, Piece, Template, image_to_front
from llava_pdrop.data.labels import IMAGE_SLOT, Encoded, encode_pieces
from llava_pdrop.types import IGNORE_INDEX, IMAGE_MARKER, Turn
from tests.golden.cases import directories
from tests.golden.expectations import TEXT_REASONS

ENDS = {
    **dict.fromkeys(("plain", "v0_plain"), "\n"),
    **dict.fromkeys(("default", "v0", "llava_v0"), "###"),
    **dict.fromkeys(("v1", "vicuna_v1", "llava_v1", "llama_2", "llava_llama_2", "mistral_instruct"), "</s>"),
    **dict.fromkeys(("mpt", "chatml_direct", "mistral_direct"), "<|im_end|>"),
}
"""What ends an answer, as golden/README tells it."""

SAME_AS = {"default": "v0"}
"""Names of the official code under which we have no row of our own."""

EQUAL, BOTH_REFUSE = "equal", "both refuse"


@cache
def load(file: Path):
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)


@cache
def load_tokenizer(directory: Path, name: str):
    return AutoTokenizer.from_pretrained(directory / "tokenizers" / name.partition("@")[0])


def groups() -> list:
    """One test per tokenizer and template of every directory."""
    found = []
    for directory in directories():
        file = directory / "text" / "labels.jsonl"
        for kind in sorted({(line["tokenizer"], line["template"]) for line in load(file)} if file.exists() else ()):
            found.append(pytest.param(directory, *kind, id="-".join([directory.name, *kind])))
    return found


def recorded(name: str) -> pytest.MarkDecorator:
    """One test per directory that has ``text/NAME``."""
    files = [directory / "text" / name for directory in directories()]
    there = [pytest.param(file, id=file.parents[1].name) for file in files if file.is_file()]
    return pytest.mark.parametrize("file", there)


@pytest.fixture
def verdicts(request, record_property):
    """What became of every entry a test looked at; entries without a reason fail the test."""
    counts: Counter[str] = Counter()
    unexplained: list[str] = []

    def add(name: str, verdict: str | None) -> None:
        counts[verdict or "unexplained"] += 1
        if verdict is None:
            unexplained.append(name)
        assert verdict in {None, EQUAL, BOTH_REFUSE, *TEXT_REASONS}

    yield add
    assert not unexplained, f"neither equal nor explained: {unexplained}"
    assert counts, "nothing was compared"
    record_property("golden_text", (request.node.originalname.removeprefix("test_").replace("_", " "), dict(counts)))


# Labels


@pytest.mark.parametrize(("directory", "tokenizer", "template"), groups())
def test_labels(directory, tokenizer, template, verdicts):
    conversations = load(directory / "text" / "conversations.json")
    lines = load(directory / "text" / "labels.jsonl")
    for line in [line for line in lines if (line["tokenizer"], line["template"]) == (tokenizer, template)]:
        verdicts(
            line["conversation"], judge(line | {"in_batch": False}, conversations[line["conversation"]], directory)
        )


def judge(line: dict, conversation: list[dict], directory: Path) -> str | None:
    """Why a line of ``labels.jsonl`` is as it is; None: unknown."""
    tokenizer = load_tokenizer(directory, line["tokenizer"])
    template = TEMPLATES[SAME_AS.get(line["template"], line["template"])]
    if not line["preprocess_multimodal"]:
        template = replace(template, image_first=False)
    turns = [Turn(turn["from"], turn["value"]) for turn in conversation]
    if template.image_first:
        turns = [replace(turn, text=image_to_front(turn.text)) if turn.role == "gpt" else turn for turn in turns]
    try:
        rounds = template.rounds(turns)
    except ValueError:
        return BOTH_REFUSE if "error" in line else accepted_by_official_code_only(turns)
    ours = encode_pieces(template.pieces(rounds), tokenizer)
    if cut(line):
        ours = Encoded(*(values[: line["model_max_length"]] for values in ours))
    assert_answers_are_trained(ours, line, turns, tokenizer)

    greeting = turns[0].role == "gpt"
    wordless = any(turn.role == "human" and not turn.text for turn in turns)
    if "error" in line:
        if set(ours.labels) == {IGNORE_INDEX}:
            return BOTH_REFUSE  # ours when it makes the sample: nothing to learn
        return "greeting" if greeting and template.question_only_images else "wordless" if wordless else None
    if wordless:
        return "wordless"
    if line.get("prompt") is not None and not several_images(turns):
        assert text_of(template, rounds) == line["prompt"]
    if ours.ids == line["input_ids"]:
        if ours.labels == line["labels"]:
            return EQUAL
        return "slot" if ours.labels == without_slots(line["labels"]) else wrong_labels(line, turns, tokenizer)
    composed = normalises(tokenizer) and changed_by_nfc(text_of(template, rounds))
    if several_images(turns):
        merged = [replace(turn, text=merge_images(turn.text)) for turn in turns]
        same = encode_pieces(template.pieces(template.rounds(merged)), tokenizer)
        if composed:
            return composed_otherwise(same, line, merged, tokenizer)
        assert same.ids == line["input_ids"]
        return (
            "merged" if same.labels == without_slots(line["labels"]) or wrong_labels(line, merged, tokenizer) else None
        )
    if composed:
        return composed_otherwise(ours, line, turns, tokenizer)
    return "greeting" if greeting and ENDS[line["template"]] == "###" else None


def accepted_by_official_code_only(turns: list[Turn]) -> str | None:
    if any(len(list(group)) > 1 for _, group in groupby(turn.role for turn in turns)):
        return "one speaker"
    return "greeting" if turns and turns[0].role == "gpt" and IMAGE_MARKER in turns[0].text else None


def cut(line: dict) -> bool:
    """The official code cuts texts without an image while it tokenises, and everything when it makes a batch."""
    return line["in_batch"] or not line["has_image"]


def wrong_labels(line: dict, turns: list[Turn], tokenizer) -> str | None:
    """Why the official labels differ although the ids are equal; None unless they really train on something else than
    the answers."""
    expected = answers(line["template"], turns)
    if trained_text(line["labels"], tokenizer) in (expected, nfc(expected)):
        return None
    if set(line["labels"]) == {IGNORE_INDEX} and (line["in_batch"] or "tokenization mismatch" in line["stdout"]):
        return "masked"
    if len(line["input_ids"]) >= line["model_max_length"]:
        return "unchecked"
    return {"<|im_end|>": "shifted", "###": "generic"}.get(ENDS[line["template"]])


def assert_answers_are_trained(ours: Encoded, line: dict, turns: list[Turn], tokenizer) -> None:
    """Ours against the conversation itself: labels repeat ids, and the trained ids spell the answers and their ends."""
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ours.ids, ours.labels, strict=True))
    trained, expected = trained_text(ours.labels, tokenizer), answers(line["template"], turns)
    shortened = cut(line) and len(ours.ids) == line["model_max_length"]
    if normalises(tokenizer):
        expected = nfc(expected)
    assert expected.startswith(trained) if shortened else trained == expected


def answers(template: str, turns: list[Turn]) -> str:
    """The assistant's words, each answer with its end, without spaces (which decoders add) and without images; an empty
    answer is trained on in captions only, a greeting never."""
    words = [turn.text for turn in turns[turns[0].role == "gpt" :] if turn.role == "gpt"]
    text = "".join(word + ENDS[template] for word in words if word or ENDS[template] == "\n")
    return text.replace(IMAGE_MARKER, "").replace(" ", "")


def trained_text(labels: list[int], tokenizer) -> str:
    ids = [label for label in without_slots(labels) if label != IGNORE_INDEX]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace(" ", "")
    return text.replace("\n###", "###")  # v0: the end of a line belongs to its signal


def normalises(tokenizer) -> bool:
    """Whether a tokenizer writes letters and their accents as one character."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is not None and normalizer.normalize_str("e\u0301") == "\u00e9"


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def changed_by_nfc(text: str) -> bool:
    return nfc(text) != text


def composed_otherwise(ours: Encoded, line: dict, turns: list[Turn], tokenizer) -> str | None:
    """Why a line differs from ours that a tokenizer has made of letters and accents apart: its ids spell ours once both
    are composed, and so do those that are trained on, unless the labels are wrong for a reason of their own."""
    longest = line["model_max_length"] if cut(line) else None
    theirs = line["input_ids"], without_slots(line["labels"])
    texts = [spelled(ids, tokenizer) for ids in (ours.ids, theirs[0])]
    if not (texts[0] == texts[1] or (longest in map(len, (ours.ids, theirs[0])) and begin_alike(*texts))):
        return None
    trained = [nfc(trained_text(labels, tokenizer)) for labels in (ours.labels, theirs[1])]
    if trained[0] == trained[1] or (longest in map(len, (ours.ids, theirs[0])) and begin_alike(*trained)):
        return "nfc"
    return wrong_labels(line, turns, tokenizer)


def spelled(ids: list[int], tokenizer) -> str:
    """The composed text of ids, without images and spaces."""
    shown = [token for token in ids if token != IMAGE_SLOT]
    return nfc(tokenizer.decode(shown, clean_up_tokenization_spaces=False)).replace(" ", "")


def begin_alike(one: str, other: str) -> bool:
    """Of two texts that were cut at the same number of tokens the shorter begins the longer; a character that is cut
    itself does not count."""
    short, long = sorted((one.rstrip("\ufffd"), other.rstrip("\ufffd")), key=len)
    return bool(short) and long.startswith(short[:-1])


def without_slots(labels: list[int]) -> list[int]:
    """Labels as the official model sees them: an image in an answer is masked where its features are merged."""
    return [IGNORE_INDEX if label == IMAGE_SLOT else label for label in labels]


def several_images(turns: list[Turn]) -> bool:
    return any(turn.text.count(IMAGE_MARKER) > 1 for turn in turns)


def merge_images(text: str) -> str:
    """What the official ``preprocess_multimodal`` makes of a turn."""
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}" if IMAGE_MARKER in text else text


def text_of(template: Template, rounds) -> str:
    return "".join(piece.text for piece in template.pieces(rounds))


# Prompts, single texts, batches


@recorded("prompts.json")
def test_prompts(file, verdicts):
    for case in load(file):
        name = f"{case['template']} {case['turns']}"
        row = SAME_AS.get(case["template"], case["template"])
        if row not in TEMPLATES:
            verdicts(name, "tags" if row.endswith("_mmtag") else None)
            continue
        template = TEMPLATES[row]
        texts = [text for question, answer in case["turns"] for text in (question, answer) if text is not None]
        turns = [Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts)]
        turns[0] = replace(turns[0], text=f"{IMAGE_MARKER}\n{turns[0].text}")
        if "error" in case:
            with pytest.raises(ValueError, match="exactly one question"):
                template.rounds(turns)
            verdicts(name, "end" if template.question_only_images and len(turns) > 2 else None)
            continue
        prompt = "".join(piece.text for piece in template.generation_prompt(template.rounds(turns)))
        verdicts(name, EQUAL if prompt == case["prompt"] else None)


@recorded("prompts.json")
def test_a_template_is_added_in_a_few_lines(file):
    rows = {
        "v0_mmtag": replace(TEMPLATES["llava_v0"].prompt_as, system=TAGGED),
        "v1_mmtag": replace(TEMPLATES["v1"], system=f"{TAGGED} "),
    }
    for case in [case for case in load(file) if case["template"] in rows]:
        row = rows[case["template"]]
        texts = [text for question, answer in case["turns"] for text in (question, answer) if text is not None]
        turns = [Turn("gpt" if i % 2 else "human", text) for i, text in enumerate([f"<image>\n{texts[0]}", *texts[1:]])]
        assert "".join(piece.text for piece in row.generation_prompt(row.rounds(turns))) == case["prompt"]


TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)


@recorded("encode.json")
def test_single_texts(file, verdicts):
    for name, cases in load(file).items():
        tokenizer = load_tokenizer(file.parents[1], name)
        for case in cases["encode"]:  # there a marker is taken for text
            marked = IMAGE_MARKER in case["text"]
            ids = tokenizer(case["text"]).input_ids if marked else encode_pieces([Piece(case["text"])], tokenizer).ids
            verdicts(f"{name} encode {case['text']!r}", text_verdict(ids == case["ids"], case["text"], tokenizer))
        for case in cases["tokenizer_image_token"]:
            ids = encode_pieces([Piece(case["text"])], tokenizer).ids
            verdicts(f"{name} {case['text']!r}", text_verdict(ids == case["ids"], case["text"], tokenizer))
        for case in cases["decode"]:
            for key, skip in (("text", False), ("text_skip_special", True)):
                ours = tokenizer.decode(case["ids"], skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                spaces = ours.replace(" ", "") == case[key].replace(" ", "")
                verdict = EQUAL if ours == case[key] else "spaces" if spaces else None
                verdicts(f"{name} decode {case['ids']}", verdict)


def text_verdict(equal: bool, text: str, tokenizer) -> str | None:
    if equal:
        return EQUAL
    return "nfc" if normalises(tokenizer) and changed_by_nfc(text) else None


@recorded("collator.json")
def test_batches(file, verdicts):
    """The official collator: rows cut at model_max_length, then padded. Ours are the rows without the padding."""
    directory, conversations = file.parents[1], load(file.parent / "conversations.json")
    for batch in load(file):
        settings = {key: batch[key] for key in ("tokenizer", "template", "model_max_length")}
        settings |= {"in_batch": True, "preprocess_multimodal": True}
        pad = load_tokenizer(directory, batch["tokenizer"]).pad_token_id
        rows = zip(batch["conversations"], batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        for name, ids, labels, mask in rows:
            length = 1 + max(place for place, token in enumerate(ids) if token != pad)
            assert set(labels[length:]) <= {IGNORE_INDEX} and not any(mask[length:])
            line = settings | {"input_ids": ids[:length], "labels": labels[:length]}
            verdict = judge(line, conversations[name], directory)
            holes = {token for token, real in zip(ids[:length], mask) if not real}
            assert holes <= {pad}
            verdicts(name, "pad" if holes and verdict == EQUAL else verdict)
