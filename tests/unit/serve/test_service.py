"""Places, keys, and what becomes of a request before it is in the queue."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_pdrop.config.load import load_config
from llava_pdrop.errors import UserError
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.serve.loop import Finish, Late
from llava_pdrop.serve.pictures import Limits
from llava_pdrop.serve.protocol import Asked, Refusal
from llava_pdrop.serve.service import Service, Settings
from llava_pdrop.train.run import train
from llava_pdrop.types import Turn
from tests.messages import says
from tests.unit.serve.conftest import DROP

ASKED = Asked((Turn("human", "Which colour is it"),), None, (), DROP, 3, temperature=0)


@pytest.fixture
def service(respondent: LlavaRespondent) -> Service:
    return Service(respondent, Settings("tiny", rows=2, queue=1), DROP)


def test_places_are_given_back(service: Service) -> None:
    with service.place(), service.place(), service.place():
        with pytest.raises(Refusal, match=says("3 requests")) as full, service.place():
            pass
        assert full.value.status == 429 and service.inside == 3
    with pytest.raises(KeyError), service.place():
        raise KeyError
    assert service.inside == 0


@pytest.mark.parametrize(
    ("header", "fits"),
    [("Bearer a key", True), ("bearer a key", True), ("Bearer a ke", False), ("Bearer a keys", False), ("a key", False),
     ("Basic a key", False), ("Bearer ", False), ("", False), (None, False), ("Bearer \udcff", False)],
)  # fmt: skip
def test_keys(service: Service, header: str | None, fits: bool) -> None:
    service.check_key(header)  # none is asked for
    service.settings = replace(service.settings, key="a key")
    if fits:
        return service.check_key(header)
    with pytest.raises(Refusal, match=says("Authorization")) as refused:
        service.check_key(header)
    assert refused.value.status == 401


def test_a_request_from_the_queue_to_its_end(service: Service) -> None:
    async def answered() -> list[Any]:
        made, events = await service.answer(ASKED, time.monotonic()), list[Any]()
        while not events or not isinstance(events[-1], Finish):
            events.append(await made.next())
        made.leave()
        assert made.job is not None and made.job.left and made.prompt == 18
        return events

    service.start()
    *pieces, finish = asyncio.run(answered())
    service.stop()
    assert "".join(pieces) == finish.text and finish.tokens <= 3


def test_an_answer_that_never_comes_is_late(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is not there to say so itself."""
    monkeypatch.setattr("llava_pdrop.serve.service.GRACE", 0.1)
    service.settings = replace(service.settings, seconds=0.1)

    async def waits() -> None:
        made = await service.answer(ASKED, time.monotonic())
        await made.next()

    with pytest.raises(Late, match=says("time")):
        asyncio.run(waits())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": (("a", "x"),) * 9}, says("9 pictures", "8")),
        ({"most": 5000}, says("max_tokens", "5000", "4096")),
        ({"most": 2040}, says("2048", "2040")),
        ({"pictures": (("messages[0].content[0]", "x.png"),)}, says("messages[0].content[0]", "--pictures")),
        ({"turns": (Turn("human", "a" * 3000),)}, says("2048")),
    ],
)
def test_what_no_prompt_is_made_of(service: Service, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        asyncio.run(service.answer(replace(ASKED, **change), time.monotonic()))
    assert service.loop.waiting == 0


def test_an_answer_is_as_long_as_there_is_room(service: Service) -> None:
    long = replace(ASKED, turns=(Turn("human", "a" * 2000),), most=None)
    inputs, tokens, most = service._prepared(long, [])
    assert inputs["input_ids"].shape[1] + most == 2048 and sum(tokens) == 0
    assert service._prepared(replace(ASKED, most=None), [])[2] == 512


def test_draws_without_a_seed_differ(service: Service) -> None:
    async def seeds() -> set[int]:
        found = [await service.answer(replace(ASKED, temperature=1), time.monotonic()) for _ in range(3)]
        return {made.job.sampler.seed for made in found if made.job is not None}

    assert len(asyncio.run(seeds())) == 3


def test_a_run_is_served_with_its_schedule(tiny_config: Any) -> None:
    drop = {"layers": [1, 2], "ratios": [0.5, 0.25]}
    run = train(load_config(tiny_config(pyramid_drop=drop), ["train.max_steps=1"]))
    service = Service.of(run, [], Settings("run"))
    assert service.schedule.layers == (1, 2) and service.model()["pyramid_drop"]["ratios"] == [0.5, 0.25]
    assert Service.of(run, ["pyramid_drop=null"], Settings("run")).model()["pyramid_drop"] is None
    with pytest.raises(UserError, match=says("pyramid_drop.layers", "9")):
        Service.of(run, ["pyramid_drop={layers: [9], ratios: [0.5]}"], Settings("run"))


def test_settings_that_mean_nothing() -> None:
    with pytest.raises(UserError, match=says("--rows", "0")):
        Settings("a", rows=0)
    with pytest.raises(UserError, match=says("--most-new-tokens", "512")):
        Settings("a", most_new_tokens=4)
    with pytest.raises(UserError, match=says("--pictures", "gone")):
        Settings("a", limits=Limits(directory=Path("gone")))
