"""What the page of ``llava-pdrop demo`` does, without the page: one question answered with and without dropping, the
picture at every stage, and which image tokens a token of an answer attended to."""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava_pdrop.compare.survivors import Sight, shade, stages_of
from llava_pdrop.data.images import load_image
from llava_pdrop.errors import UserError, clip
from llava_pdrop.eval.respondent import LlavaRespondent, Respondent
from llava_pdrop.report.units import MEMORY, time_text, unit_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.conversation import Conversation, Reply, Settings, Written
from llava_pdrop.serve.pictures import Limits, Picture, looked_at
from llava_pdrop.serve.stream import UNFINISHED
from llava_pdrop.study.attended import attention_of, drawn, share_text, spans
from llava_pdrop.study.show import sight_of

Captioned = tuple[Image.Image, str]

SMALLEST = 320
"""Pixels of a drawn picture's longer side at least: what a small model sees is drawn larger."""

MOST_CHARACTERS = 4_000
"""Of a question. A longer one is not looked at: its tokens alone may fill the memory."""

SHORTEN = "ask a shorter question, or show a smaller picture"
"""What a visitor can do where the model takes no more tokens."""

LARGEST = 1e9
"""Of a number that is sent: larger ones fit no schedule, and may have thousands of digits."""

HEADERS = ("", "answer", "image tokens", "prompt", "first token", "whole answer", "tokens", "keys and values")


@dataclass
class Side:
    """One of the two answers: its ``reply``, how it came about, and its tokens as text, ``pieces``. ``sight`` is how
    the model sees the picture then, None where its tokens lie on no grid. ``weights`` are filled by the first click: of
    every span of layers its name, (tokens of the answer, image tokens) float32, and which image tokens are alive."""

    schedule: Schedule
    reply: Reply
    written: Written
    pieces: list[str]
    sight: Sight | None = None
    weights: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)


@dataclass
class Compared:
    """A question answered by the vanilla model and with dropping; ``note`` says why no picture is drawn, if so."""

    vanilla: Side
    dropping: Side
    note: str = ""


class Demo:
    """One model, asked by one visitor at a time: the schedule is attached to it while it answers.

    Attributes:
        own: the schedule that sliders begin with: the model's, else the paper's. depth: decoder layers.
    """

    def __init__(self, conversation: Conversation, limits: Limits = Limits()) -> None:
        self.conversation, self.limits = conversation, limits
        self.depth = conversation.depth
        self.own = conversation.schedule
        if self.own.vanilla:
            layers = dict.fromkeys(max(1, self.depth * quarter // 4) for quarter in (1, 2, 3))
            ratios = (0.5, 0.25, 0.125)[: len(layers)]
            self.own = Schedule(tuple(layers), ratios).check(self.depth)
        self._lock = threading.Lock()

    @property
    def sliders(self) -> list[tuple[int, float]]:
        """(layer, ratio) of every drop of `own`; a count of tokens is a ratio on no slider, so it begins as 0.5, 0.25
        and so on."""
        amounts = [
            share if isinstance(share, float) else 0.5 ** (drop + 1) for drop, share in enumerate(self.own.amounts)
        ]
        return list(zip(self.own.layers, amounts))

    def count(self, sent: object, most: int) -> int:
        """How many drops are meant by what was sent, of any type.

        Raises:
            UserError: it is no whole number from 0 to ``most``.
        """
        count = _whole(sent, "the number of drops")
        if not 0 <= count <= most:
            raise UserError(f"the number of drops must be from 0 to {most}, got {clip(count, 40)}")
        return count

    def schedule(self, drops: Sequence[tuple[object, object]]) -> Schedule:
        """`own` with these (layer, ratio), None where the number beside a slider is deleted; `own` itself where nothing
        was moved.

        Raises:
            UserError: they are no numbers, or no schedule of this model.
        """
        if any(None in drop for drop in drops):
            raise UserError("a drop without a number: give its layer and the share that it keeps")
        numbers = [
            (_whole(layer, f"the layer of drop {drop}"), _number(ratio, f"the share that drop {drop} keeps"))
            for drop, (layer, ratio) in enumerate(drops, 1)
        ]
        if numbers == self.sliders:
            return self.own
        if not drops and not self.own.downsample:
            raise UserError("no drop is left, which is the vanilla model: set one drop at least")
        own = self.own.ranker
        return replace(
            self.own,
            layers=tuple(layer for layer, _ in numbers),
            ratios=tuple(ratio for _, ratio in numbers),
            keep=(),
            ranker=own if isinstance(own, str) or len(own) == len(drops) else own[0],
        ).check(self.depth)

    def warm(self) -> None:
        """Answers once by both, so that the first visitor's seconds are not those of a first call."""
        file = BytesIO()
        Image.new("RGB", (336, 336), (127, 127, 127)).save(file, "PNG")
        grey = looked_at(file.getvalue(), "a grey picture", Limits())
        short = replace(self.conversation.settings, max_new_tokens=2)
        with self._lock:
            for schedule in (Schedule(), self.own):
                self._side(grey, "What is shown?", schedule, short)

    def compare(self, picture: str | Path | None, question: object, drops: Sequence[tuple[object, object]]) -> Compared:
        """Answers a question about a picture file without and with dropping.

        Raises:
            UserError: no picture, one that cannot be read or is too large, no question or too long a one, no schedule.
        """
        if picture is None:
            raise UserError("no picture is shown: choose one")
        if not isinstance(question, str):
            raise UserError("the question is no text: write one")
        if len(question) > MOST_CHARACTERS:
            raise UserError(
                f"the question has {len(question):,} characters, and at most {MOST_CHARACTERS:,} are taken: shorten it"
            )
        schedule = self.schedule(drops)
        with Path(picture).open("rb") as file:  # no more is read than may be
            data = file.read(self.limits.picture_bytes + 1)
        shown = looked_at(data, "the picture", self.limits)
        with self._lock:
            settings, respondent = self.conversation.settings, self.conversation.respondent
            _check_readable(shown)
            vanilla, dropping = (self._side(shown, question, own, settings) for own in (Schedule(), schedule))
            found = Compared(vanilla, dropping)
            tokens = len(dropping.written.step.pictures[0])
            try:
                for side in (vanilla, dropping):
                    side.sight = sight_of(respondent, side.written.question, tokens, side.schedule)
            except UserError as error:
                found.note = str(error)
        return found

    def _side(self, shown: Picture, question: str, schedule: Schedule, settings: Settings) -> Side:
        respondent = self.conversation.respondent
        if isinstance(respondent, LlavaRespondent):  # it keeps pictures: both answers are to pay for reading it
            respondent.preprocessed.cache_clear()  # type: ignore[attr-defined]
        asked = Conversation(respondent, Schedule(), settings, waiting=[shown], if_full=SHORTEN)
        asked.take(schedule)
        reply = asked.ask(question)
        assert asked.written is not None, "it has just answered"
        return Side(schedule, reply, asked.written, pieces_of(asked.written.ids, respondent))

    def stages(self, found: Compared) -> list[Captioned]:
        """The picture as it enters the decoder, and what is left of it after every drop; nothing without a sight."""
        side, sight = found.dropping, found.dropping.sight
        if sight is None:
            return []
        names = ["at first", *(f"from layer {layer} on" for layer in side.schedule.layers)]
        picture, stages = np.asarray(sight.picture.convert("RGB")), stages_of(side.written.step)
        return [
            (enlarged(Image.fromarray(shade(picture, sight.grid(kept), sight.patch))), f"{name}: {sight.text(kept)}")
            for name, kept in zip(names, stages)
        ]

    def attention(self, found: Compared, dropping: bool, token: int) -> list[Captioned]:
        """Which image tokens a token of an answer attended to, averaged over all layers and over those of each stage.
        The first call of an answer runs the model once; its weights are kept in ``found``.

        Raises:
            UserError: the picture's tokens lie on no grid, or as `attention_of`.
        """
        side = found.dropping if dropping else found.vanilla
        if side.sight is None:
            raise UserError(found.note)
        if not 0 <= token < len(side.pieces):
            raise UserError(f"the answer has no token {token}: click on one of its {len(side.pieces)}")
        if not side.weights:
            side.weights = self._weights(side, found.dropping.schedule)
        return [
            (
                enlarged(drawn(side.sight, weight_QN[token], alive_N)),
                f"{layers}: {share_text(side.sight, weight_QN[token], alive_N)}",
            )
            for layers, weight_QN, alive_N in side.weights
        ]

    def _weights(self, side: Side, schedule: Schedule) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        asked, own = side.written, self.conversation
        ids = asked.ids[: len(side.pieces)]
        with self._lock:
            seen = attention_of(own.respondent, asked.question, ids, side.schedule, own.settings.dtype)
        whole = range(self.depth)  # layers before `inject` see no image token while tokens are dropped: these count 0
        stages = [whole, *(span for span in spans(schedule, self.depth) if span and span != whole)]
        return [
            (
                f"layer {span[0]}" if len(span) == 1 else f"mean of layers {span[0]} to {span[-1]}",
                seen.weight_QLN[:, list(span)].mean(1),
                seen.alive_LN[list(span)].any(0),
            )
            for span in stages
        ]


def _check_readable(shown: Picture) -> None:
    """Raises `UserError` unless all of the picture can be read. The reader's own words are of files in a data set."""
    try:
        load_image(shown)
    except UserError:
        raise UserError(
            "the picture cannot be read: it is damaged, or needs more memory than there is: choose another one"
        ) from None


def _number(sent: object, name: str) -> float:
    """``sent``, which stands for what ``name`` says; a `UserError` where it is no finite number."""
    if isinstance(sent, int | float) and not isinstance(sent, bool) and -LARGEST < sent < LARGEST:  # so no NaN
        return sent
    shown = clip(repr(sent), 40) if isinstance(sent, int | float | str | None) else f"a {type(sent).__name__}"
    raise UserError(f"{name} must be a number, got {shown}")


def _whole(sent: object, name: str) -> int:
    """The same of a whole number."""
    number = _number(sent, name)
    if number != int(number):
        raise UserError(f"{name} must be a whole number, got {number:g}")
    return int(number)


def table_of(found: Compared) -> str:
    """Both answers and what they took, as HTML."""
    rows = [_row("vanilla", found.vanilla.reply), _row("with dropping", found.dropping.reply)]
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADERS)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def pictures_of(shown: Sequence[Captioned]) -> str:
    """Pictures with their captions, as HTML that holds them."""
    figures = []
    for picture, caption in shown:
        file = BytesIO()
        picture.save(file, "WEBP", quality=90)
        data, text = b64encode(file.getvalue()).decode(), escape(caption)
        figures.append(
            f'<figure><img src="data:image/webp;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _row(name: str, reply: Reply) -> tuple[str, ...]:
    size = unit_of([reply.whole_cache_bytes], MEMORY)
    return (
        name,
        reply.text + ("" if reply.finished else " [cut]"),
        " > ".join(map(str, reply.stages)),
        f"{reply.prompt_tokens} tokens",
        time_text(reply.first_seconds),
        time_text(reply.seconds),
        str(reply.tokens),
        f"{size.text(reply.cache_bytes)} {size.name}",
    )


def pieces_of(ids: Sequence[int], respondent: Respondent) -> list[str]:
    """The text of every token of an answer, up to what ends it. A token that is a part of a character is ``""``, and
    the last part of it the character."""
    pieces, before = list[str](), ""
    for count, token in enumerate(ids, 1):
        whole = respondent.tokenizer.decode(list(ids[:count]), skip_special_tokens=True).rstrip(UNFINISHED)
        if token in respondent.ends or any(stop in whole.lstrip() for stop in respondent.stops):
            break
        pieces.append(whole.removeprefix(before))
        before = whole
    return pieces


def enlarged(picture: Image.Image) -> Image.Image:
    """As large as `SMALLEST` by a whole factor, its patches as they are."""
    factor = -(-SMALLEST // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
