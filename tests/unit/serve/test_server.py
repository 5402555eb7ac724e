"""The server, asked by the official client on loopback: answers are those of the conversations one by one."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.answering import answer_all
from llava_pdrop.eval.questions import ask
from llava_pdrop.eval.respondent import LlavaRespondent, open_respondent
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.server import bound, told
from llava_pdrop.serve.service import Service, Settings
from tests.messages import says
from tests.unit.serve.conftest import DROP
from tests.unit.serve.serving import NAME, at_rest, client_of, message, served, shown

SCHEDULES: list[tuple[dict[str, Any], Schedule]] = [
    ({}, DROP),
    ({"pyramid_drop": None}, Schedule()),
    ({"pyramid_drop": {"layers": [1, 3], "ratios": [0.5, 0.2]}}, Schedule((1, 3), (0.5, 0.2))),
    ({"pyramid_drop": "pyramiddrop"}, DROP),
]


@pytest.fixture(scope="module")
def server(respondent: LlavaRespondent, tiny_files: Path) -> Iterator[tuple[Service, str]]:
    from llava_pdrop.serve.pictures import Limits

    with served(respondent, rows=8, limits=Limits(directory=tiny_files / "data/images")) as made:
        yield made


def asked(client: openai.OpenAI, *messages: dict[str, Any], **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 6} | options
    return client.chat.completions.create(model=NAME, messages=list(messages), **options)  # type: ignore[call-overload]


def test_models(server: tuple[Service, str]) -> None:
    client = client_of(server[1])
    (model,) = client.models.list().data
    assert model.id == NAME and model.object == "model"
    assert client.models.retrieve(NAME).model_extra["pyramid_drop"] == DROP.to_dict()
    assert client.models.retrieve(NAME).model_extra["one_by_one"] is None
    with pytest.raises(openai.NotFoundError, match=says("other")):
        client.models.retrieve("other")


@pytest.mark.parametrize(("extra", "schedule"), SCHEDULES, ids=["own", "null", "section", "preset"])
def test_an_answer_and_what_it_took(
    server: tuple[Service, str], respondent: LlavaRespondent, pictures: list[Path], extra: dict, schedule: Schedule
) -> None:
    client, question = client_of(server[1]), ask("q", "Which colour is it", pictures[:2], "q", "")
    answer = asked(client, message("Which colour is it", *pictures[:2]), extra_body=extra)
    assert at_rest(server[0])
    choice, usage = answer.choices[0], answer.usage
    (expected,) = answer_all(respondent, [question], schedule=schedule, max_new_tokens=6).answers
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert (choice.finish_reason == "length") <= (usage.completion_tokens == 6)
    inputs, _ = respondent.inputs([respondent.prepare(question)], schedule)
    assert usage.prompt_tokens == inputs["input_ids"].shape[1]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.model_extra["image_tokens"] == [32, *(2 * schedule.kept(16, n) for n in range(len(schedule.layers)))]


def test_the_pieces_of_a_stream_are_the_answer(server: tuple[Service, str], pictures: list[Path]) -> None:
    client, turn = client_of(server[1]), message("Which colour is it", pictures[0])
    whole = asked(client, turn, max_completion_tokens=12, max_tokens=openai.omit)
    pieces = list(
        asked(
            client, turn, max_completion_tokens=12, max_tokens=openai.omit, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *said, last, figures = pieces
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content for piece in said) == whole.choices[0].message.content
    assert len(said) > 3 and last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert figures.choices == [] and figures.usage == whole.usage
    assert len({piece.id for piece in pieces}) == 1
    assert asked(client, turn, stream=True).response.headers["content-type"].startswith("text/event-stream")


def test_conversations_files_and_drawn_answers(
    server: tuple[Service, str], respondent: LlavaRespondent, pictures: list[Path]
) -> None:
    client = client_of(server[1])
    named = {"type": "image_url", "image_url": {"url": pictures[0].name, "detail": "auto"}}
    of_file = asked(client, {"role": "user", "content": [named, {"type": "text", "text": "Which colour is it"}]})
    of_data = asked(client, message("Which colour is it", pictures[0]))
    assert of_file.choices[0].message.content == of_data.choices[0].message.content
    turns = [message("Which colour is it", pictures[0]), {"role": "assistant", "content": "red"}]
    more = asked(client, *turns, {"role": "user", "content": "Are you sure"})
    assert more.usage.prompt_tokens > of_data.usage.prompt_tokens
    drawn = [
        asked(client, turns[0], temperature=1.5, top_p=0.9, seed=seed, max_tokens=12).choices[0].message.content
        for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    unseeded = {asked(client, turns[0], temperature=2, max_tokens=12).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1


def test_200_requests_of_16_clients(
    server: tuple[Service, str], respondent: LlavaRespondent, pictures: list[Path]
) -> None:
    """None is lost or mixed up: each answer is that of its own question, alone."""
    draw = random.Random(0)
    requests = [
        (f"Which {draw.choice('abcdefgh') * draw.randrange(1, 9)} is it, {number}", pictures[: draw.randrange(3)],
         draw.randrange(4), draw.randrange(1, 9), draw.random() < 0.5)
        for number in range(200)
    ]  # fmt: skip

    def client(number: int) -> list[tuple[int, str]]:
        own, found = client_of(server[1]), []
        for place in range(number, 200, 16):
            text, shown_here, which, most, streams = requests[place]
            extra = SCHEDULES[which][0]
            answer = asked(own, message(text, *shown_here), max_tokens=most, extra_body=extra, stream=streams)
            if streams:
                said = "".join(piece.choices[0].delta.content or "" for piece in answer)
            else:
                said = answer.choices[0].message.content
            found.append((place, said))
        return found

    with ThreadPoolExecutor(16) as pool:
        found = dict(entry for own in pool.map(client, range(16)) for entry in own)
    assert sorted(found) == list(range(200)) and at_rest(server[0])
    for place, (text, shown_here, which, most, _) in enumerate(requests):
        question = ask("q", text, shown_here, "q", "")
        (expected,) = answer_all(respondent, [question], schedule=SCHEDULES[which][1], max_new_tokens=most).answers
        assert found[place] == expected.text, requests[place]


def test_of_a_long_and_a_short_request_the_short_one_ends_first(
    server: tuple[Service, str], pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server[0].loop, "ends", [])
    monkeypatch.setattr(server[0].loop, "stops", ())
    order, client = list[str](), client_of(server[1])

    def one(name: str, most: int) -> None:
        asked(client, message("Which colour is it", pictures[0]), max_tokens=most)
        order.append(name)

    threads = [threading.Thread(target=one, args=own) for own in (("long", 300), ("short", 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["short", "long"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(
    server: tuple[Service, str], pictures: list[Path], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server[0].loop, "ends", [])
    monkeypatch.setattr(server[0].loop, "stops", ())
    client = client_of(server[1]).with_options(timeout=1.0)
    turn = message("Which colour is it", pictures[0])
    if stream:
        answer = asked(client, turn, max_tokens=1900, stream=True)
        next(iter(answer))
        assert server[0].loop.running == 1
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            asked(client, turn, max_tokens=1900)
    start = time.monotonic()
    assert at_rest(server[0]) and time.monotonic() - start < 1.5, "long before its tokens are written"


def test_a_full_queue_and_a_time_limit(
    respondent: LlavaRespondent, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(respondent, rows=1, queue=1, seconds=1.5) as (service, address):
        service.loop.ends, service.loop.stops = [], ()
        client, turn = client_of(address), message("Which colour is it", pictures[0])
        begun = asked(client, turn, max_tokens=1900, stream=True)
        next(iter(begun))
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(asked, client, turn, max_tokens=3)
            while service.inside < 2:
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError, match=says("2 requests", "try later")) as full:
                asked(client, turn)
            assert full.value.response.headers["retry-after"] == "1"
            with pytest.raises(openai.APIError, match=says("time")):
                list(begun)
            late = waits.exception()
        assert late is None or (isinstance(late, openai.InternalServerError) and late.status_code == 504)
        assert at_rest(service) and asked(client, turn).choices[0].message.role == "assistant"


def test_a_key_is_asked_for(respondent: LlavaRespondent) -> None:
    with served(respondent, key="secret") as (_, address):
        for key in ("wrong", "secre", "secrets", "SECRET"):
            with pytest.raises(openai.AuthenticationError, match=says("Authorization")):
                client_of(address, key).models.list()
            with pytest.raises(openai.AuthenticationError, match=says("Authorization")):
                asked(client_of(address, key), message("Which colour is it"))
        assert len(client_of(address, "secret").models.list().data) == 1
        for header in ({}, {"Authorization": "Basic secret"}, {"Authorization": "secret"}):
            assert httpx.get(f"{address}/v1/models", headers=header).status_code == 401


def test_models_that_answer_one_by_one_say_so(vip: Path, pictures: list[Path]) -> None:
    respondent = open_respondent(vip)
    respondent.hf.generation_config.repetition_penalty = 1.1
    with served(respondent, rows=8) as (service, address):
        client = client_of(address)
        assert "repetition_penalty" in client.models.retrieve(NAME).model_extra["one_by_one"]
        assert any("one request at a time" in line for line in told(service, address))
        with ThreadPoolExecutor(4) as pool:
            turns = [message(f"Which {number}", pictures[0]) for number in range(4)]
            found = [answer.choices[0].message.content for answer in pool.map(lambda t: asked(client, t), turns)]
        content = [{"type": "text", "text": "See"}, shown(pictures[0]), shown(pictures[1])]
        with pytest.raises(openai.BadRequestError, match=says("image_url parts first")):
            asked(client, {"role": "user", "content": content})
    for number, text in enumerate(found):
        question = ask("q", f"Which {number}", pictures[:1], "q", "")
        assert answer_all(respondent, [question], schedule=DROP, max_new_tokens=6).answers[0].text == text


def test_addresses_and_what_is_told(respondent: LlavaRespondent) -> None:
    taken = bound("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    for host, number in (("127.0.0.1", port), ("nowhere.invalid", 8000), ("127.0.0.1", 10**6)):
        with pytest.raises(UserError, match=says("--port", str(number))):
            bound(host, number)
    taken.close()
    service = Service(respondent, Settings(NAME))
    assert len(told(service, "http://127.0.0.1:8000/v1")) == 2
    assert "--key-file" in told(service, "http://0.0.0.0:8000/v1")[-1]
