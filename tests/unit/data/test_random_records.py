"""Random but typed input: whatever stands in a data file, the reader and the label encoder give the user's error or a
valid result, never another exception, a wrong length or a lost sample. ``LLAVA_PDROP_EXAMPLES``: cases of each test."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.entries import parse_entry, unknown_keys
from llava_pdrop.data.labels import encode_pieces
from llava_pdrop.data.records import read_records
from llava_pdrop.data.tokens import Encoder, Unlabelled
from llava_pdrop.errors import QUOTED, RecordError, UserError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import IGNORE_INDEX, IMAGE_MARKER, ImageInput, PackedBatch, Record, Turn
from tests.properties import cases

PAD = ImageGeometry(56, 14)

WORDS = [
    "", " ", "\n", "a", "What?", IMAGE_MARKER, "<video>", "</s>", "<s>", "<unk>", "<|picture|>",
    "{}", "日本", "😀", "\ud83d",
    "\0", "data:image/png;base64,", "data:", "http://x/a", "file://[", "iVBORw0KGgo" + "A" * 60, "a.png", "x" * 500,
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=4).map("".join)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def result(action: Callable[[], Any]) -> Any:
    """What comes of ``action``, the user's error included; any other is a failure."""
    try:
        return action()
    except RecordError as error:
        return error


def some(*keys: str, **known: st.SearchStrategy):
    """Objects with some of these keys; what stands there mostly is of the right type, or else anything."""
    return st.fixed_dictionaries({}, optional={**dict.fromkeys(keys, anything), **known})


pictures = st.one_of(texts, some("bytes", path=texts, url=texts, base64=texts), anything)
types = st.sampled_from(["text", "image", "image_url", "video", "input_audio", "box"])
parts = some("detail", type=types, text=texts, image=pictures, image_url=pictures, url=texts)
speakers = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool"])
contents = st.one_of(texts, st.lists(parts, max_size=3), anything)
marks = st.one_of(st.booleans(), st.sampled_from([0, 1, 0.5, None, "no"]))
turns = st.one_of(
    st.fixed_dictionaries({"from": speakers, "value": texts}, optional={"loss": marks, "weight": marks}),
    st.fixed_dictionaries({"role": speakers, "content": contents}, optional={"loss": marks, "tool_calls": anything}),
    some("loss", "weight", "video", "image", **{"from": speakers, "value": contents, "role": speakers}),
    anything,
)
entries = st.one_of(
    some(
        "id", "image", "video", "audio", "image_path", "model",
        images=st.lists(pictures, max_size=3), conversations=st.lists(turns, max_size=5),
        messages=st.one_of(st.none(), st.lists(turns, max_size=5)), system=texts, loss=marks, weight=marks,
    ),
    anything,
)  # fmt: skip


@cases
@hypothesis.given(entries)
def test_any_entry_is_a_record_or_one_line(entry):
    record = result(lambda: parse_entry(entry, Path("root"), "d.json[0]"))
    if isinstance(record, RecordError):
        assert len(str(record).splitlines()) == 1 and str(record).encode() and len(str(record)) < 5 * QUOTED
        return
    assert record.turns and all(turn.role in ("human", "gpt") and isinstance(turn.text, str) for turn in record.turns)
    assert sum(turn.text.count(IMAGE_MARKER) for turn in record.turns) == len(record.images)
    assert all(hasattr(image, "open") and str(image) is not None and hash(image) for image in record.images)
    assert record.system is None or record.system
    assert all(isinstance(key, str) for key in unknown_keys(entry))


@cases
@hypothesis.given(st.lists(entries, min_size=1, max_size=5), st.booleans())
def test_no_record_of_a_file_is_lost(content, lines):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "d.jsonl" if lines else "d.json")
        path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
        records = read_records(path, check=False)
        assert len(records) == len(content)
        for index, entry in enumerate(content):
            found = []
            for made in (
                result(partial(records.__getitem__, index)),
                result(partial(parse_entry, entry, path.parent, "")),
            ):
                found.append(made.kind if isinstance(made, RecordError) else (made.turns, made.images, made.system))
            assert found[0] == found[1]


conversations = st.lists(st.builds(Turn, st.sampled_from(["human", "gpt"]), texts, st.booleans()), max_size=6)
alternating = st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4).map(
    lambda rounds: [turn for q, a, learnt in rounds for turn in (Turn("human", q), Turn("gpt", a, learnt))]
)


@cases
@hypothesis.given(
    st.one_of(alternating, conversations),
    st.sampled_from(sorted(TEMPLATES)),
    st.one_of(st.none(), texts.filter(bool)),
    st.one_of(st.none(), st.integers(1, 400)),
    st.sampled_from(["turns", "tokens"]),
)
def test_any_conversation_is_a_sample_or_one_line(tokenizer, image_token_id, talk, name, system, limit, truncation):
    record = Record("r", tuple(talk), (), "d.json[0]", None, system)
    shown = sum(turn.text.count(IMAGE_MARKER) for turn in talk)
    images = [ImageInput(torch.empty(0), (30 + i, 20)) for i in range(shown)]
    encoder = Encoder(TEMPLATES[name], tokenizer, image_token_id, PAD, limit, truncation)
    (length,) = encoder.lengths([record], [[image.size for image in images]])
    sample = result(lambda: encoder.train(record, images))
    if isinstance(sample, RecordError):
        assert isinstance(length, RecordError) and (length.reason, length.kind) == (sample.reason, sample.kind)
        return
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    assert len(ids) == len(labels) == length and (limit is None or len(ids) <= limit)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    assert isinstance(length, Unlabelled) == (set(labels) <= {IGNORE_INDEX})
    assert len(sample.images) == len(sample.image_spans) <= shown
    inside = {place for start, stop in sample.image_spans for place in range(start, stop)}
    assert all((token == image_token_id) == (place in inside) for place, token in enumerate(ids))
    if labels and labels[0] == IGNORE_INDEX:
        (starts,) = PackedBatch.pack([sample]).answer_starts
        assert starts == sorted(set(starts)) and all(0 < start <= len(ids) for start in starts)
        assert bool(starts) == (set(labels) > {IGNORE_INDEX})


@cases
@hypothesis.given(alternating, st.sampled_from(sorted(TEMPLATES)))
def test_labels_are_the_letters_of_the_learnt_answers(tokenizer, talk, name):
    """With one token per byte every label can be held against the text."""
    template = TEMPLATES[name]
    try:
        pieces = template.pieces(template.rounds(talk))
        encoded = encode_pieces(pieces, tokenizer)
    except UserError:
        return
    learnt = [label for label in encoded.labels if label != IGNORE_INDEX]
    text = "".join(piece.text.replace(IMAGE_MARKER, "") for piece in pieces if piece.is_target)
    assert tokenizer.decode(learnt, clean_up_tokenization_spaces=False) == text
    assert encoded.firsts == sorted(encoded.firsts) and len(encoded.firsts) == len(encoded.ids)
