"""The drop plan of a padded batch, as Hugging Face's ``generate`` feeds it to the decoder.

The batch is planned as the stream of its real tokens, row after row, with one `Frame` per stage that says where each
token of the stream lies in the padded batch. From the first drop on, padding is on the left. How many tokens every
picture and row keeps is known beforehand; which ones, and where a picture of several runs keeps them, only the device
knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_pdrop.generate.cache import PromptStages
from llava_pdrop.model.pyramid_drop import Candidates, Ranking, Rows, keep_index
from llava_pdrop.model.rankers import Ranker
from llava_pdrop.model.stream import candidate_columns, send
from llava_pdrop.schedule import Schedule


@dataclass
class ForwardStep:
    """What one forward of an attached model did, on the host.

    Attributes:
        position_ids: per decoder layer that was given some, (B, tokens fed), or (axes, B, tokens fed).
        entered: where pictures are pooled, the positions of that stream (see ``survivors``) which enter the decoder.
        survivors: per drop, the positions that survive it in the stream of the prompt's real tokens, row after row;
            empty lists in a forward that drops nothing.
        scores: per drop, those (V,) of the tokens that it could take, picture after picture.
        pictures: of every picture, where its tokens lie in that stream.
    """

    position_ids: list[Tensor] = field(default_factory=list)
    entered: list[int] | None = None
    survivors: list[list[int]] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    pictures: list[list[int]] = field(default_factory=list)

    def drop(self, index_K: Tensor, score_V: Tensor | None) -> None:
        """Notes a drop by ``score_V``, of which ``index_K`` are the survivors among those of the drop before; or, with
        None, what enters before any drop."""
        before = self.survivors[-1] if self.survivors else self.entered
        index = index_K.tolist() if before is None else [before[position] for position in index_K.tolist()]
        if score_V is None:
            self.entered = index
        else:
            self.scores.append(score_V.cpu())
            self.survivors.append(index)

    def kept(self, drop: int) -> list[list[int]]:
        """Per picture, which of its original tokens 0..n-1 survive drop number ``drop``."""
        return self._of_pictures(self.survivors[drop])

    def entering(self) -> list[list[int]]:
        """Per picture, which of its tokens 0..n-1 enter the decoder: all of them, unless pictures are pooled."""
        everything = [place for places in self.pictures for place in places]
        return self._of_pictures(everything if self.entered is None else self.entered)

    def _of_pictures(self, positions: list[int]) -> list[list[int]]:
        alive = set(positions)
        return [[number for number, place in enumerate(places) if place in alive] for places in self.pictures]


@dataclass(frozen=True)
class Frame:
    """Where the tokens of a stream lie in a padded batch: ``row_T`` (T,) indices into the flattened (B, N). ``last_B``
    (B,) says which entry of the stream is the last token of each row."""

    row_T: Tensor
    last_B: Tensor
    shape: tuple[int, int]

    @property
    def padded(self) -> bool:
        return len(self.row_T) < self.shape[0] * self.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, ...) or (1, N, ...), the same for every row -> (T, ...)."""
        flat = x.expand(self.shape[0], *x.shape[1:]).flatten(0, 1)
        return flat.index_select(0, self.row_T.to(x.device)) if self.padded else flat

    def unpack(self, x_T: Tensor) -> Tensor:
        """(T, ...) -> (B, N, ...), zeros at the padding."""
        if self.padded:
            empty = x_T.new_zeros(self.shape[0] * self.shape[1], *x_T.shape[1:])
            x_T = empty.index_copy(0, self.row_T.to(x_T.device), x_T)
        return x_T.unflatten(0, self.shape)


@dataclass(frozen=True)
class PromptStage:
    """The stream between two drops: where it lies in the batch, tokens per row, positions 0, 1, 2, ... of every row
    (T,), who may rank (the last token of every prompt with pictures, or the ``text`` of `Ranking.text`), and of the
    tokens that the next drop may take what `Candidates` can say before it (None behind the last drop)."""

    frame: Frame
    seq_lens: list[int]
    position_T: Tensor
    instruction: Rows
    text: Rows
    known: dict[str, Any] | None


@dataclass(frozen=True)
class Prefill:
    """A prompt about to be pruned.

    Attributes:
        stages: one more than there are drops; pooling is the first of these.
        alone: the text alone, and its places in the stream (X,), where image tokens enter late.
        picture_T: (T,) number of the picture of every token before any drop, -1 for text.
        text_tail: how many of the last columns hold text in every row.
        places: of every picture, where its tokens lie in the stream before any drop.
        entering: (K,) the positions of that stream that pooling leaves; None: pictures are not pooled.
    """

    stages: list[PromptStage]
    alone: tuple[PromptStage, Tensor] | None
    picture_T: Tensor
    text_tail: int
    places: list[list[int]]
    entering: Tensor | None

    @staticmethod
    def build(
        picture_BN: np.ndarray,
        real_BN: np.ndarray,
        prompt: int | None,
        schedule: Schedule,
        device: torch.device,
        staying: Callable[[list[int], np.ndarray], list[np.ndarray]] | None = None,
    ) -> Prefill:
        """Plans the drops of a batch.

        Args:
            picture_BN: (B, N) number of the picture of every token, rising in reading order; -1 for text.
            real_BN: (B, N) bool, which columns are no padding.
            prompt: columns of the prompt, whose last token ranks; None: the last real token of each row ranks.
            staying: given tokens and row of every picture, which of them pooling leaves; None: it does not pool.
        """
        stream_T = picture_BN[real_BN]
        seq_lens, rows = real_BN.sum(1), np.arange(len(real_BN)).repeat(real_BN.sum(1))
        asking = seq_lens if prompt is None else real_BN[:, :prompt].sum(1)
        ends = seq_lens.cumsum()
        query_B = ends - seq_lens + asking - 1
        shows_B = (picture_BN >= 0).any(1)
        totals = np.bincount(stream_T[stream_T >= 0])
        row_of = rows[np.unique(stream_T, return_index=True)[1][-len(totals) :]]
        behind_B = ends - 1 - query_B  # guessed tokens behind the prompt
        # What asks besides the query: the text between it and the last picture, in every stage as far behind.
        shown, last_B = np.flatnonzero(stream_T >= 0), np.zeros_like(ends)
        last_B[rows[shown]] = shown  # the last one that is written stays
        texts_B = np.maximum(query_B - last_B, 1) * shows_B
        # A row keeps its query: one token of the last picture, where nothing else stands there.
        text_B = np.bincount(
            rows, weights=(stream_T < 0) & (np.arange(len(rows)) <= query_B[rows]), minlength=len(ends)
        )
        alone_I = (text_B[row_of] == 0) & (np.append(np.diff(row_of), 1) > 0) & (totals > 0)
        sent: dict[str, np.ndarray] = {"picture_T": stream_T}
        enters, keeping = totals.tolist(), list[list[int]]()
        shown_V = np.argsort(stream_T, kind="stable")[len(stream_T) - sum(enters) :]
        places = [shown_V[end - count : end] for count, end in zip(enters, accumulate(enters))]  # what dynamo can trace
        if staying is not None:
            stays = [place[left] for place, left in zip(places, staying(enters, row_of))]
            sent["entering"] = np.sort(np.concatenate([np.flatnonzero(stream_T < 0), *stays]))
            enters = [len(left) for left in stays]
            keeping.append(enters)
        keeping += [[schedule.kept(count, drop) for count in enters] for drop in range(len(schedule.layers))]
        lengths, counts, shapes = [seq_lens], [totals], [real_BN.shape]
        for kept in keeping:
            counts.append(np.maximum(kept, alone_I.astype(int)))
            lost_B = np.bincount(row_of, weights=totals - counts[-1], minlength=len(seq_lens)).astype(np.int64)
            lengths.append(seq_lens - lost_B)
            shapes.append((len(seq_lens), int(lengths[-1].max())))
        if schedule.inject:  # behind the stages, the text alone
            lengths.append(seq_lens - np.bincount(row_of, weights=totals, minlength=len(seq_lens)).astype(np.int64))
            shapes.append((len(seq_lens), max(1, int(lengths[-1].max()))))
            sent["row_X"] = np.flatnonzero(stream_T < 0)
        for stage, (length_B, (_, width)) in enumerate(zip(lengths, shapes)):
            real = real_BN if stage == 0 else np.arange(width) >= width - length_B[:, None]
            sent[f"row_T {stage}"] = np.flatnonzero(real)
            sent[f"last_B {stage}"] = np.maximum(length_B.cumsum() - 1, 0)
            sent[f"position_T {stage}"] = np.concatenate([np.arange(length) for length in length_B])
            asks_B = length_B.cumsum() - behind_B
            sent[f"query_Q {stage}"] = asks_B[shows_B] - 1
            sent[f"text_Q {stage}"] = np.concatenate([np.arange(ask - n, ask) for ask, n in zip(asks_B, texts_B)])
            if stage < len(keeping):
                columns = candidate_columns(np.arange(len(totals)), counts[stage], counts[stage + 1])
                sent |= {f"{name} {stage}": column for name, column in columns.items()}
        on_device = send({name: torch.from_numpy(row.astype(np.int64)) for name, row in sent.items()}, device)
        stages = []
        for stage, (length_B, shape) in enumerate(zip(lengths, shapes)):
            frame = Frame(on_device[f"row_T {stage}"], on_device[f"last_B {stage}"], shape)
            known: dict[str, Any] | None = None
            if stage < len(keeping):
                known = {name: on_device[f"{name} {stage}"] for name in columns}
                known |= {"counts": counts[stage].tolist(), "keeps": counts[stage + 1].tolist()}
                known |= {"samples": row_of.tolist(), "survivors": int(lengths[stage + 1].sum())}
            instruction = Rows(on_device[f"query_Q {stage}"], shows_B.astype(int).tolist())
            text = Rows(on_device[f"text_Q {stage}"], texts_B.tolist())
            position_T = on_device[f"position_T {stage}"]
            stages.append(PromptStage(frame, length_B.tolist(), position_T, instruction, text, known))
        alone = (stages.pop(), on_device["row_X"]) if schedule.inject else None
        last_image = int(np.nonzero((picture_BN >= 0).any(0))[0][-1])
        return Prefill(
            stages,
            alone,
            on_device["picture_T"],
            picture_BN.shape[1] - 1 - last_image,
            [place.tolist() for place in places],
            on_device.get("entering"),
        )

    @torch.no_grad()
    def rank(
        self, stage: int, picture_T: Tensor, ranker: Ranker, look: Callable[[Candidates], Ranking]
    ) -> tuple[Candidates, Tensor, Tensor]:
        """The tokens that the drop behind ``stage`` may take, their scores (V,), and the positions (K,) of the stream
        that survive it.

        Args:
            picture_T: (T,) number of the picture of every token of that stream, -1 for text.
            look: makes what the ranker may look at.
        """
        known = self.stages[stage].known
        assert known is not None, "every stage but the last has a drop"
        here = {
            name: value.to(picture_T.device) if isinstance(value, Tensor) else value for name, value in known.items()
        }
        # Image tokens first, in their order: how many they are is known, so nothing is read back from the device.
        row_V = (picture_T < 0).to(torch.uint8).argsort(stable=True)[: len(here["image_V"])]
        candidates = Candidates(row_V=row_V, **here)
        score_V = ranker.score(look(candidates))
        return candidates, score_V, keep_index(score_V, candidates, len(picture_T))

    def remembered(self, schedule: Schedule, position_BN: Tensor | None, device: torch.device) -> PromptStages:
        """What the cache has to remember of the prompt. Where the survivors stood is noted drop by drop
        (`PromptStages.column_BN`), if positions are kept.

        Args:
            position_BN: position ids (B or 1, N) of the whole prompt; needed where positions are numbered anew.
        """
        first, last_B = self.stages[0].frame, None
        if schedule.positions == "renumber":
            assert position_BN is not None, "checked before the first drop"
            last_B = first.pack(position_BN).index_select(0, first.last_B.to(position_BN.device))
        shifts, real = [], []
        placed = [self.alone[0], *self.stages] if self.alone else self.stages[1:]
        for stage in placed:
            now_B = stage.position_T.index_select(0, stage.frame.last_B).to(device)
            same = last_B is None or stage is self.stages[0]  # the whole prompt has the model's own positions
            shifts.append(torch.zeros_like(now_B) if same else last_B - now_B)
            real.append(stage.frame.unpack(torch.ones_like(stage.frame.row_T, dtype=torch.bool)))
        return PromptStages(
            real,
            shifts,
            [] if schedule.positions == "keep" else None,
            [stage.frame.padded for stage in placed],
            first.shape[1],
            self.text_tail,
            schedule,
        )
