"""One opinion of where an answer ends: whose files contradict each other is named, and settled."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, GenerationConfig

from llava_pdrop.checkpoint.convert import convert
from llava_pdrop.checkpoint.ends import ids_of, one_or_all, settle_ends
from llava_pdrop.checkpoint.open import open_llava
from llava_pdrop.files import read_json
from tests.messages import says
from tests.unit.checkpoint.layout_files import TOKENIZER, original, with_tokenizer, write


@pytest.fixture(scope="module")
def tokenizer():
    """Ends with </s> (2); <s> is 1, <|end|> 1000, and 300 an ordinary token."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("generation", "config", "settled", "lines"),
    [
        (2, 2, (2, 2), []),
        ([1000, 2], 1000, ([1000, 2], 1000), []),  # LLaMA 3: each of them ends something
        ([2, 300], 2, ([2, 300], 2), []),  # a template that ends with a line end
        (None, None, (None, None), []),
        (2, None, (2, None), []),
        (300, 2, (2, 2), [says("generation_config.json", "300", "tokenizer_config.json", "</s>", "end at 2")]),
        (
            1000,
            2,
            ([1000, 2], 2),
            [says("generation_config.json", "1000 (<|end|>)", "end at 1000 (<|end|>), 2 (</s>)")],
        ),
        (300, 300, (2, 2), [says("generation_config.json", "300")]),
        (2, 300, (2, 2), [says("config.json", "300", "end at 2")]),
        (99999, 2, (2, 2), [says("99999 (no token)")]),
    ],
)
def test_what_is_said_and_what_is_used(tmp_path, tokenizer, generation, config, settled, lines):
    (tmp_path / "generation_config.json").touch()
    own = GenerationConfig(eos_token_id=generation)
    whole = SimpleNamespace(text_config=SimpleNamespace(eos_token_id=config))
    said = settle_ends(tmp_path, own, whole, tokenizer)
    assert (own.eos_token_id, whole.text_config.eos_token_id) == settled
    assert len(said) == len(lines)
    assert all(re.search(pattern, line) and "\n" not in line for pattern, line in zip(lines, said))


def test_lists_and_numbers():
    assert [ids_of(value) for value in (None, 3, [3, 4], (5,))] == [[], [3], [3, 4], [5]]
    assert [one_or_all(ids) for ids in ([], [3], [3, 4])] == [None, 3, [3, 4]]


def test_a_checkpoint_that_contradicts_itself_is_written_without_contradiction(tmp_path):
    config, tensors = original("e2e_l15")
    source = with_tokenizer(write(tmp_path / "source", config | {"eos_token_id": 300}, tensors))
    written = convert(str(source), tmp_path / "hf", "llava-hf")
    (line,) = written.notes
    assert re.search(says("source/config.json", "300", "tokenizer_config.json", "</s>"), line)
    assert read_json(tmp_path / "hf" / "generation_config.json")["eos_token_id"] == 2
    assert read_json(tmp_path / "hf" / "config.json")["text_config"]["eos_token_id"] == 2
    assert not open_llava(str(tmp_path / "hf")).notes
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (line,) = open_llava(str(source)).notes
    assert re.search(says("source/config.json", "300"), line)
