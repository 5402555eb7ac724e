"""Every question is answered as the whole conversation would be, and what it took is told as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava_pdrop.config.load import load_config
from llava_pdrop.errors import UserError
from llava_pdrop.eval.answering import answer_all
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.files import read_json, write_json
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.conversation import Conversation, Settings
from llava_pdrop.train.run import train
from llava_pdrop.types import Record
from tests.messages import says
from tests.unit.serve.conftest import DROP


def expected(conversation: Conversation) -> str:
    """The last answer, as the benchmarks' code gives it."""
    record = Record("q", tuple(conversation.turns[:-1]), tuple(conversation.images), "q")
    options = {"schedule": conversation.schedule, "max_new_tokens": conversation.settings.max_new_tokens}
    return answer_all(conversation.respondent, [Question(record, "")], **options).answers[0].text


def test_every_turn_prefills_the_whole_conversation(conversation: Conversation, pictures: list[Path]) -> None:
    conversation.show(pictures[0])
    for number, text in enumerate(["Which colour is it", "Are you sure", "And this"]):
        if number == 2:
            conversation.show(pictures[1])
        pieces = list[str]()
        reply = conversation.ask(text, pieces.append)
        assert reply.text == expected(conversation) == "".join(pieces) and not reply.reused
        shown = 1 + (number == 2)
        assert reply.stages == tuple(shown * tokens for tokens in (16, 8, 4, 2))
    assert [turn.role for turn in conversation.turns] == ["human", "gpt"] * 3
    assert conversation.images == pictures[:2] and conversation.waiting == []


def test_figures_are_those_of_the_cache(conversation: Conversation, pictures: list[Path]) -> None:
    conversation.show(pictures[0])
    reply = conversation.ask("Which colour is it")
    held = [reply.prompt_tokens - 16 + tokens + reply.tokens - 1 for tokens in (16, 8, 4, 2)]
    per_token = 2 * 2 * 8 * 4  # keys and values, two heads of 8, float32
    assert reply.cache_bytes == per_token * sum(held) and reply.whole_cache_bytes == per_token * 4 * held[0]
    assert 0 < reply.first_seconds <= reply.seconds and 1 <= reply.tokens <= 6
    assert (reply.tokens_per_second is None) == (reply.tokens == 1)
    conversation.take(Schedule())
    whole = conversation.ask("Which colour is it")
    assert whole.stages == (16,) and whole.cache_bytes == whole.whole_cache_bytes


def test_a_prompt_is_as_long_as_what_enters(conversation: Conversation, pictures: list[Path]) -> None:
    """Pooled pictures keep the placeholders of the vanilla model, which do not."""
    conversation.show(pictures[0])
    whole = conversation.ask("Which colour is it").prompt_tokens
    conversation.clear()
    conversation.take(Schedule(downsample=4))
    conversation.show(pictures[0])
    reply = conversation.ask("Which colour is it")
    assert reply.stages == (4,) and reply.prompt_tokens == whole - 12


def test_a_reused_cache_goes_on_where_it_is(conversation: Conversation, pictures: list[Path]) -> None:
    conversation.settings = replace(conversation.settings, reuse_cache=True)
    conversation.show(pictures[0])
    first = conversation.ask("Which colour is it")
    again = conversation.ask("Are you sure")
    assert not first.reused and again.stages == (16, 8, 4, 2)
    if again.reused:  # unless the answer's tokens are not those of its text
        assert again.cache_bytes > first.cache_bytes
    conversation.show(pictures[1])
    assert not conversation.ask("And this").reused, "a new picture has to be ranked"
    conversation.take(DROP)
    assert not conversation.ask("Really").reused, "a schedule taken anew starts anew"


def test_a_cache_is_not_gone_on_with_after_an_answer_that_was_stopped(conversation: Conversation) -> None:
    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    conversation.settings = replace(conversation.settings, reuse_cache=True)
    conversation.ask("Which colour is it")
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Are you sure", stop)
    assert conversation._cache is None, "it may hold the stopped answer"
    reply = conversation.ask("And this")
    assert not reply.reused and reply.text == expected(conversation)


def test_a_prompt_that_begins_otherwise_is_not_gone_on_with(conversation: Conversation) -> None:
    conversation.settings = replace(conversation.settings, reuse_cache=True)
    conversation.ask("Which colour is it")
    held = list(conversation._cached_ids)
    assert conversation._goes_on([*held, 5]) and not conversation._goes_on([5, *held])
    assert not conversation._goes_on(held[:-1]), "nothing is left to feed"


def test_draws_are_those_of_the_seed(conversation: Conversation, pictures: list[Path]) -> None:
    def drawn(seed: int) -> str:
        conversation.clear()
        conversation.settings = Settings(max_new_tokens=12, temperature=1.5, seed=seed)
        conversation.show(pictures[0])
        return conversation.ask("Which colour is it").text

    assert drawn(1) == drawn(1) and len({drawn(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("  ", says("nothing is asked")), ("what is <image>", says("<image>")), ("a" * 3000, says("2048", "/clear"))],
)
def test_after_an_error_it_is_as_it_was(
    conversation: Conversation, pictures: list[Path], text: str, message: str
) -> None:
    conversation.show(pictures[0])
    conversation.ask("Which colour is it")
    conversation.show(pictures[1])
    before = (list(conversation.turns), list(conversation.images), list(conversation.waiting))
    with pytest.raises(UserError, match=message):
        conversation.ask(text)
    assert before == (conversation.turns, conversation.images, conversation.waiting)
    assert conversation.ask("And this").text == expected(conversation)


def test_what_does_not_fit_is_one_line(conversation: Conversation, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says("gone.png")):
        conversation.show(tmp_path / "gone.png")
    with pytest.raises(UserError, match=says("pyramid_drop.layers", "4 layers")):
        conversation.take(Schedule((8,), (0.5,)))
    assert conversation.schedule == DROP
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(UserError, match=says(f"--{next(iter(wrong)).replace('_', '-')}")):
            Settings(**wrong)


def test_an_answer_is_as_long_as_there_is_room(conversation: Conversation) -> None:
    conversation.settings = Settings(max_new_tokens=10_000)
    assert conversation._room(2040) == 8


def test_a_kept_conversation_is_a_record(conversation: Conversation, pictures: list[Path], tmp_path: Path) -> None:
    from llava_pdrop.data.records import read_records

    conversation.show(pictures[0])
    conversation.ask("Which colour is it")
    conversation.take(Schedule())
    conversation.ask("Are you sure")
    write_json(tmp_path / "kept.json", [conversation.as_record()])
    (record,) = read_records(tmp_path / "kept.json", None)
    assert record.turns == tuple(conversation.turns) and len(record.images) == 1
    (kept,) = json.loads((tmp_path / "kept.json").read_text())
    assert [Schedule.from_dict(reply["schedule"]) for reply in kept["replies"]] == [DROP, Schedule()]


def test_runs_and_other_families(tiny_config, vip: Path, pictures: list[Path]) -> None:
    run = train(load_config(tiny_config(), ["train.max_steps=1"]))
    for directory in (run, vip):
        words = ["pyramid_drop={layers: [1, 2, 3], ratios: [0.5, 0.25, 0.125]}"]
        conversation = Conversation.of(directory, words, Settings(max_new_tokens=4))
        conversation.show(pictures[0])
        reply = conversation.ask("Which colour is it")
        assert reply.text == expected(conversation) and reply.stages == (16, 8, 4, 2)
        assert read_json(directory / "config.json") and isinstance(conversation.respondent, LlavaRespondent) == (
            directory == run
        )
