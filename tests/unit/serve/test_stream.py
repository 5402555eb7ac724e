"""The pieces of an answer, put together, are the answer; nothing is shown that is taken back."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.eval.generation import answer_text
from llava_pdrop.serve.stream import AnswerStream, AtStop

END = 0


class Bytes:
    """A tokenizer whose tokens are bytes; 0 ends an answer."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i).decode("utf-8", errors="replace")


def streamed(text: str, stops: tuple[str, ...] = (), end: bool = True) -> tuple[list[str], AnswerStream]:
    pieces = list[str]()
    stream = AnswerStream(Bytes(), [END], stops, pieces.append)
    stream.put(torch.tensor([[5, 6, 7]]))  # the prompt
    for token in [*text.encode(), *([END] if end else [])]:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces, stream


@pytest.mark.parametrize(
    "text", ["a bus", "  a bus \n", "Grüße, 日本, 🚌!", "", " ", "a  b\n\nc", "USER", "US", "a USER: b", "USERS are U"]
)
@pytest.mark.parametrize("stops", [(), ("USER:",), ("USER:", "ERS", "\n")])
def test_pieces_are_the_answer(text: str, stops: tuple[str, ...]) -> None:
    pieces, stream = streamed(text, stops)
    assert "".join(pieces) == stream.answer == answer_text([*text.encode(), END], Bytes(), [END], stops)


def test_letters_come_one_by_one_and_whole() -> None:
    assert streamed("aé🚌")[0] == ["a", "é", "🚌"]


def test_what_may_be_a_stop_is_held_back_and_at_a_stop_it_ends() -> None:
    pieces, stream = streamed("a bus USER: what", ("USER:",), end=False)
    assert pieces == ["a", " b", "u", "s"] and stream.stopped
    assert AtStop(stream)(torch.zeros(2, 3), None).tolist() == [True, True]
    assert not AtStop(streamed("a bus USE", ("USER:",))[1])(torch.zeros(1, 3), None).any()


def test_tokens_are_timed_and_the_prompt_is_none() -> None:
    stream = AnswerStream(Bytes(), [END], (), None)
    stream.put(torch.tensor([[5, 6, 7]]))
    assert stream.first is None and stream.ids == []
    for token in b"ab":
        stream.put(torch.tensor([token]))
    assert stream.first is not None and stream.last is not None and stream.first <= stream.last
