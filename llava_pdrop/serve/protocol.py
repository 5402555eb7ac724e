"""OpenAI's chat completions: what a request may ask, checked word by word, and the answers in their form.

Whatever the server does not do is refused in one line, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llava_pdrop.config.presets import CHECKOUT, bare_schedule
from llava_pdrop.config.values import read_mapping
from llava_pdrop.errors import UserError, check_name, clip, did_you_mean, line_of
from llava_pdrop.model.rankers import check_rankers
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.loop import Finish, Late, Unable
from llava_pdrop.types import IMAGE_MARKER, Turn

KNOWN = (
    "model", "messages", "stream", "stream_options", "stop", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "seed", "n", "pyramid_drop",
)  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "tools": [],
    "response_format": {"type": "text"}, "modalities": ["text"], "store": False,
}  # fmt: skip
"""Other parameters of the API -> the value that asks for nothing, which is taken."""

MISTAKE = "the server has made a mistake: its log says which"
STOPS, STOP_LENGTH = 4, 200
MESSAGES = 1000
LONGEST = 600
"""Characters of an error message."""


class Refusal(UserError):
    """A request that is not answered: what `error_body` says of it, and its HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Asked:
    """What a request asks.

    Attributes:
        turns, system: the conversation, with a marker in the place of every picture.
        pictures: of each, its place in the request and its URL.
        most: tokens of the answer; None: not said.
        schedule: by which image tokens are dropped. stops: texts that end the answer.
        stream: as it is written. with_usage: with the figures in a last chunk.
    """

    turns: tuple[Turn, ...]
    system: str | None
    pictures: tuple[tuple[str, str], ...]
    schedule: Schedule
    most: int | None = None
    stops: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stream: bool = False
    with_usage: bool = False


def read_json_body(body: bytes) -> Any:
    """``body`` as strict JSON.

    Raises:
        Refusal: it is none.
    """

    def constant(name: str) -> Any:
        raise Refusal(f"the body is no JSON: {name} is no number there")

    try:
        return json.loads(body, parse_constant=constant)
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON: {clip(line_of(error), 100)}") from None


def read_request(body: Any, served: str, schedule: Schedule, depth: int, temperature: float = 1.0) -> Asked:
    """What ``body`` asks.

    Args:
        served: name of the model. schedule: where the request names none. depth: decoder layers of the model.
        temperature: where the request names none.

    Raises:
        Refusal: a key that is not known, a value that does not fit, or what this server does not do.
    """
    if not isinstance(body, dict):
        raise Refusal("the body must be a JSON object")
    for name, value in body.items():
        if name in NEUTRAL:
            if value not in (None, NEUTRAL[name]):
                raise Refusal(f"{name} is not supported: leave it out", name, code="unsupported_parameter")
        elif name not in KNOWN:
            hint = did_you_mean(name, KNOWN)
            raise Refusal(f"unknown parameter {clip(name, 60)!r}{hint}", clip(name, 60), code="unknown_parameter")
    given = {name: value for name, value in body.items() if value is not None or name == "pyramid_drop"}
    model = given.get("model")
    if not isinstance(model, str):
        raise Refusal(f"model must be the name of a model: {served}", "model")
    if model != served:
        message = f"there is no model {clip(model, 100)!r} here, only {served}"
        raise Refusal(message, "model", 404, "model_not_found")
    if _number(given, "n", int, 1, 128, 1) != 1:
        raise Refusal("n must be 1: one answer is given to a request", "n", code="unsupported_value")
    turns, system, pictures = _conversation(given.get("messages"))
    both = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    if len(both) == 2:
        raise Refusal("max_tokens and max_completion_tokens mean the same: give one", "max_tokens")
    stream = _flag(given, "stream")
    return Asked(
        turns,
        system,
        pictures,
        _schedule(given["pyramid_drop"], depth) if "pyramid_drop" in given else schedule,
        _number(given, both[0], int, 1, 2**31 - 1, None) if both else None,
        _stops(given.get("stop")),
        _number(given, "temperature", float, 0, 2, temperature),
        _number(given, "top_p", float, 1e-6, 1, 1.0),
        _number(given, "seed", int, -(2**63), 2**63 - 1, None),
        stream,
        _with_usage(given.get("stream_options"), stream),
    )


def _number(given: Mapping[str, Any], name: str, kind: type, low: float, high: float, default: Any) -> Any:
    value = given.get(name, default)
    if name not in given:
        return value
    kinds = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise Refusal(f"{name} must be {what} from {low:g} to {high:g}, got {clip(value, 60)}", name)
    return kind(value)


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(f"{name} must be true or false, got {clip(value, 60)}", name)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    fits = isinstance(stops, list) and len(stops) <= STOPS
    if not fits or not all(isinstance(stop, str) and 0 < len(stop) <= STOP_LENGTH for stop in stops):
        raise Refusal(f"stop must be up to {STOPS} texts of 1 to {STOP_LENGTH} characters", "stop")
    return tuple(stops)


def _with_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise Refusal("stream_options is for stream: true", "stream_options")
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise Refusal("stream_options takes include_usage, nothing else", "stream_options")
    return _flag(options, "include_usage")


def _schedule(value: Any, depth: int) -> Schedule:
    """A section of keys, the name of a preset in configs/schedules, or None: no drop."""
    try:
        if value is None:
            return Schedule()
        if isinstance(value, str):
            presets = {file.stem: file for file in sorted((CHECKOUT / "configs" / "schedules").glob("*.yaml"))}
            check_name("pyramid_drop", clip(value, 60), presets)
            value = read_mapping(presets[value], wanted="a schedule")
        found = bare_schedule(value, depth).check(depth)
        check_rankers(found)
    except UserError as error:
        raise Refusal(line_of(error), "pyramid_drop") from None
    return found if "positions" in value else replace(found, positions="auto")


def _conversation(messages: Any) -> tuple[tuple[Turn, ...], str | None, tuple[tuple[str, str], ...]]:
    if not isinstance(messages, list) or not 0 < len(messages) <= MESSAGES:
        raise Refusal(f"messages must be a list of 1 to {MESSAGES} messages", "messages")
    turns, system, pictures = list[Turn](), None, list[tuple[str, str]]()
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise Refusal(f"{where} must be an object with role and content", where)
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise Refusal(f"{where}.role must be system, user or assistant, got {clip(role, 60)!r}", f"{where}.role")
        for name, value in message.items():
            if name not in ("role", "content") and value is not None:
                raise Refusal(f"{where}.{clip(name, 60)} is not supported: leave it out", where)
        text, shown = _content(message.get("content"), f"{where}.content", role == "user")
        pictures += shown
        if role in ("system", "developer"):
            if number:
                raise Refusal(f"{where}: only the first message may be of the system", where)
            system = text
            continue
        expected = "assistant" if turns and turns[-1].role == "human" else "user"
        if role != expected:
            raise Refusal(f"{where}.role must be {expected}: questions and answers take turns", f"{where}.role")
        turns.append(Turn("human" if role == "user" else "gpt", text))
    if not turns or turns[-1].role == "gpt":
        raise Refusal("the last message must be of the user: what is to be answered", "messages")
    if not turns[-1].text.replace(IMAGE_MARKER, "").strip():
        raise Refusal("the last message asks nothing: write a question", "messages")
    return tuple(turns), system, tuple(pictures)


def _content(content: Any, where: str, may_show: bool) -> tuple[str, list[tuple[str, str]]]:
    """The text of a message with a marker for every picture, and those."""
    if isinstance(content, str):
        return _words(content, where), []
    if not isinstance(content, list) or not content:
        raise Refusal(f"{where} must be a text or a list of parts", where)
    written, pictures = list[str](), list[tuple[str, str]]()
    for number, part in enumerate(content):
        place = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and set(part) == {"type", "text"}:
            written.append(_words(part["text"], f"{place}.text"))
        elif kind == "image_url" and set(part) == {"type", "image_url"} and may_show:
            written.append(IMAGE_MARKER)
            pictures.append((place, _url(part["image_url"], f"{place}.image_url")))
        else:
            kinds = "text or image_url" if may_show else "text"
            raise Refusal(f"{place} must be a part of type {kinds}, with what belongs to it and nothing else", place)
    return "\n".join(written), pictures


def _words(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise Refusal(f"{where} must be a text", where)
    if IMAGE_MARKER in text:
        raise Refusal(f"{where}: {IMAGE_MARKER} stands for a picture: write it otherwise", where)
    return text


def _url(value: Any, where: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("url"), str) or set(value) - {"url", "detail"}:
        raise Refusal(f"{where} must be an object with url", where)
    if value.get("detail") not in (None, "auto"):
        raise Refusal(f"{where}.detail cannot be chosen: the model decides, leave it out", f"{where}.detail")
    url: str = value["url"]
    return url


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and OpenAI's form of an error; of a bug nothing is told."""
    status, param, code, message = 400, None, None, clip(line_of(error), LONGEST)
    if isinstance(error, Refusal):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, Late):
        status, code = 504, "timeout"
    elif isinstance(error, Unable):
        status, code = 503, "unavailable"
    elif not isinstance(error, UserError):
        status, message = 500, MISTAKE
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt: int, finish: Finish) -> dict[str, Any]:
    """Tokens of a prompt (image tokens as they enter) and its answer, and image tokens before and after every drop."""
    counts = {"prompt_tokens": prompt, "completion_tokens": finish.tokens, "total_tokens": prompt + finish.tokens}
    return counts | {"image_tokens": list(finish.stages)}


def completion(head: Mapping[str, Any], prompt: int, finish: Finish) -> dict[str, Any]:
    """A whole answer; ``head``: its id, time and model."""
    message = {"role": "assistant", "content": finish.text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": finish.reason, "logprobs": None}
    return {"object": "chat.completion", **head, "choices": [choice], "usage": usage(prompt, finish)}


def chunk(head: Mapping[str, Any], delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
    """A piece of an answer."""
    choice = {"index": 0, "delta": dict(delta), "finish_reason": reason, "logprobs": None}
    return {"object": "chat.completion.chunk", **head, "choices": [choice]}


def last_chunk(head: Mapping[str, Any], prompt: int, finish: Finish) -> dict[str, Any]:
    """The figures, behind the pieces."""
    return {"object": "chat.completion.chunk", **head, "choices": [], "usage": usage(prompt, finish)}
