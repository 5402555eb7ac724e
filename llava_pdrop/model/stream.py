"""The packed stream and what happens to its layout at every drop, planned on the host before the forward.

Text is never dropped and every image keeps a known number of tokens, so lengths, positions of queries and labels and
the places of images are plain integers for all stages. `StreamPlan.build` works them out and sends the index tensors
that the device needs in one copy; the forward then never waits for the device to learn a number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_pdrop.errors import UserError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.attention import Segments
from llava_pdrop.model.pyramid_drop import Candidates, Rows
from llava_pdrop.model.rankers import RANKERS
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the stream at one stage (host integers, see `PackedBatch`).

    ``image_totals`` (I) are the original token counts, from which every stage's budget is taken; ``sample_of`` (I) says
    which sample an image is in (it may have no tokens left, between two samples); ``droppable`` (I)
    is False for images of samples without a query, which pass through whole (golden/README 4.6), and for those inside
    the last answer, which no query sees. ``least`` (I) is how many tokens an image must keep: 1 where nothing else
    stands before a label or the query, 0 elsewhere.
    """

    seq_lens: list[int]
    image_spans: list[tuple[int, int]]
    image_totals: list[int]
    sample_of: list[int]
    droppable: list[bool]
    least: list[int]
    answer_starts: list[list[int]]
    label_positions: list[int]

    @staticmethod
    def of(batch: PackedBatch) -> Layout:
        """The layout before any drop."""
        ends = np.cumsum(batch.seq_lens).tolist()
        sample_of = [bisect_right(ends, start) for start, _ in batch.image_spans]
        needed = {*batch.label_positions, *(start for starts in batch.answer_starts for start in starts)}
        least, text_before = [], _text_before(batch)
        for (_, stop), text in zip(batch.image_spans, text_before):
            least.append(int(text == 0 and stop in needed))
        return Layout(
            seq_lens=batch.seq_lens,
            image_spans=batch.image_spans,
            image_totals=[stop - start for start, stop in batch.image_spans],
            sample_of=sample_of,
            droppable=[
                _is_seen(batch, start, sample, ends) for (start, _), sample in zip(batch.image_spans, sample_of)
            ],
            least=least,
            answer_starts=batch.answer_starts,
            label_positions=batch.label_positions,
        )

    def kept(self, schedule: Schedule, stage: int) -> list[int]:
        """Tokens every image has after drop ``stage``."""
        return [
            max(schedule.kept(total, stage), min(least, total)) if droppable else total
            for total, droppable, least in zip(self.image_totals, self.droppable, self.least)
        ]

    def after_drop(self, kept: Sequence[int]) -> Layout:
        """The layout once every image is shortened to ``kept`` tokens."""
        starts, stops = np.array(self.image_spans, dtype=np.int64).reshape(-1, 2).T
        lost = np.concatenate([[0], np.cumsum(stops - starts - np.asarray(kept, dtype=np.int64))])

        def moved(positions: Sequence[int] | np.ndarray) -> np.ndarray:
            """Every position less what the images that end before it have lost."""
            positions = np.asarray(positions, dtype=np.int64)
            return positions - lost[np.searchsorted(stops, positions, side="right")]

        answers = iter(moved([start for sample in self.answer_starts for start in sample]).tolist())
        return replace(
            self,
            seq_lens=np.diff(moved(np.cumsum([0, *self.seq_lens]))).tolist(),
            image_spans=[(start, start + count) for start, count in zip(moved(starts).tolist(), kept)],
            answer_starts=[[next(answers) for _ in sample] for sample in self.answer_starts],
            label_positions=moved(self.label_positions).tolist(),
        )

    def text_alone(self) -> Layout:
        """The layout without any image token: of the layers before these enter."""
        return self.after_drop([0] * len(self.image_spans))

    def text_rows(self) -> list[list[int]]:
        """Of every sample the text that asks about its pictures (`Ranking.text`): what stands between the last of them
        and the last query, labels left out, and that query. None where there is nothing to ask or nobody to."""
        labels, behind = set(self.label_positions), dict[int, int]()
        for (start, stop), sample in zip(self.image_spans, self.sample_of):
            if start < max(self.answer_starts[sample], default=0):
                behind[sample] = stop
        return [
            [*(row for row in range(behind[sample], starts[-1] - 1) if row not in labels), starts[-1] - 1]
            if sample in behind
            else []
            for sample, starts in enumerate(self.answer_starts)
        ]

    @property
    def tokens(self) -> int:
        return sum(self.seq_lens)

    @property
    def image_tokens(self) -> int:
        return sum(stop - start for start, stop in self.image_spans)


def layouts_of(batch: PackedBatch, schedule: Schedule, geometry: ImageGeometry) -> list[Layout]:
    """The layout of every stage of ``batch``: before any drop and after each one. Pooled pictures enter the first with
    the tokens that are left of them, from which every stage's budget is taken."""
    layouts = [Layout.of(batch)]
    if schedule.downsample:
        left = [len(rows) for rows, _ in _pooled(batch, schedule, geometry)]
        layouts = [replace(layouts[0].after_drop(left), image_totals=left)]
    for stage in range(len(schedule.layers)):
        layouts.append(layouts[-1].after_drop(layouts[0].kept(schedule, stage)))
    return layouts


def layout_of_layers(layouts: Sequence[Layout], schedule: Schedule, num_layers: int) -> list[Layout]:
    """The layout of every decoder layer, given those of the stages (`layouts_of`)."""
    text = layouts[0].text_alone() if schedule.inject else layouts[0]
    stages = [layouts[schedule.stage(layer)] for layer in range(num_layers)]
    return [text] * schedule.inject + stages[schedule.inject :]


@dataclass(frozen=True)
class TextStage:
    """The layers before the image tokens enter: attention segments and position ids (X,) of the text alone, and where
    it lies in the whole stream (X,)."""

    segments: Segments
    position_X: Tensor
    row_X: Tensor


@dataclass(frozen=True)
class StreamStage:
    """One stage on the device: the attention segments, position ids (T,), who may rank (the last tokens of the
    instructions, or the ``text`` of `Ranking.text`), and unless it is the last stage, which tokens the next drop may
    take."""

    layout: Layout
    segments: Segments
    position_T: Tensor
    instruction: Rows
    text: Rows
    candidates: Candidates | None


@dataclass(frozen=True)
class StreamPlan:
    """All stages of a batch and what the device needs to know of its text: token ids ``text_T`` (T,), 0 where an image
    is (the placeholder may lie outside the vocabulary); where features go in (``image_row``, ``feature_row``); labels
    ``label_L`` (L,) and the tokens before them, in the last stream, that predict them (``predict_row``). ``alone`` is
    there where image tokens enter late."""

    stages: list[StreamStage]
    alone: TextStage | None
    text_T: Tensor
    image_row: Tensor
    feature_row: Tensor
    label_L: Tensor
    predict_row: Tensor

    @property
    def image_tokens(self) -> list[int]:
        """Image tokens at every stage, first to last."""
        return [stage.layout.image_tokens for stage in self.stages]

    @staticmethod
    def build(
        batch: PackedBatch,
        schedule: Schedule,
        geometry: ImageGeometry,
        device: torch.device,
        backend: str = "auto",
    ) -> StreamPlan:
        """Plans every stage of ``batch``, whose ids and labels are on the host.

        Raises:
            UserError: an image has more placeholders than its size gives features.
        """
        layouts = layouts_of(batch, schedule, geometry)
        entering, image_at, feature_at = _feature_rows(batch, schedule, geometry)
        image_row, feature_row = _index(image_at), _index(feature_at)
        rows = {
            "text_T": batch.input_ids.index_select(0, _index(entering)).index_fill(0, image_row, 0),
            "image_row": image_row,
            "feature_row": feature_row,
            "label_L": batch.labels.index_select(0, _index(batch.label_positions)),
            "predict_row": _index(np.asarray(layouts[-1].label_positions) - 1),
        }
        once = list(rows)  # the others are there once a stage
        with_text = any(RANKERS[name].text for name in schedule.rankers)
        texts: list[list[list[int]]] = [
            layout.text_rows() if with_text else [[]] * len(layout.seq_lens) for layout in layouts
        ]
        drops = [_candidates(layout, after) for layout, after in pairwise(layouts)]
        for stage, layout in enumerate(layouts):
            rows[f"offsets {stage}"] = _index(np.concatenate([[0], np.cumsum(layout.seq_lens)]))
            rows[f"position_T {stage}"] = _index(np.concatenate([np.arange(length) for length in layout.seq_lens]))
            rows[f"query_Q {stage}"] = _index([start - 1 for sample in layout.answer_starts for start in sample])
            rows[f"text_Q {stage}"] = _index([row for sample in texts[stage] for row in sample])
            for name, column in drops[stage][0].items() if stage < len(drops) else ():
                rows[f"{name} {stage}"] = _index(column)
        if schedule.inject:
            lengths = layouts[0].text_alone().seq_lens
            rows["alone offsets"] = _index(np.cumsum([0, *lengths]))
            rows["alone position_X"] = _index(np.concatenate([np.arange(length) for length in lengths]))
            rows["alone row_X"] = _index(np.delete(np.arange(layouts[0].tokens), image_at))
        if schedule.positions == "keep":
            whole = np.concatenate([np.arange(length) for length in batch.seq_lens])
            rows["position_T 0"] = _index(whole[entering])
        sent = send(rows, device)

        stages = []
        for stage, layout in enumerate(layouts):
            segments = Segments(layout.seq_lens, sent[f"offsets {stage}"].to(torch.int32), backend)
            instruction = Rows(sent[f"query_Q {stage}"], [len(starts) for starts in layout.answer_starts])
            text = Rows(sent[f"text_Q {stage}"], [len(sample) for sample in texts[stage]])
            candidates = None
            if stage < len(drops):
                columns, counts = drops[stage]
                candidates = Candidates(**{name: sent[f"{name} {stage}"] for name in columns}, **counts)
            position_T = sent[f"position_T {stage}"]
            stages.append(StreamStage(layout, segments, position_T, instruction, text, candidates))
        alone = None
        if schedule.inject:
            segments = Segments(lengths, sent["alone offsets"].to(torch.int32), backend)
            alone = TextStage(segments, sent["alone position_X"], sent["alone row_X"])
        return StreamPlan(stages, alone, **{name: sent[name] for name in once})


def _is_seen(batch: PackedBatch, start: int, sample: int, ends: Sequence[int]) -> bool:
    """Whether the image at ``start`` can be ranked: its sample has a query, which comes behind it unless there is
    nothing more to learn behind it."""
    starts = batch.answer_starts[sample]
    if not starts or start < starts[-1]:
        return bool(starts)
    following = bisect_right(batch.label_positions, start)
    return following == len(batch.label_positions) or batch.label_positions[following] >= ends[sample]


def _text_before(batch: PackedBatch) -> list[int]:
    """Text tokens of the same sample that stand before each image."""
    ends = np.cumsum(batch.seq_lens).tolist()
    counts, sample, images = [], -1, 0
    for start, stop in batch.image_spans:
        if (own := bisect_right(ends, start)) != sample:
            sample, images = own, 0
        counts.append(start - (ends[own] - batch.seq_lens[own]) - images)
        images += stop - start
    return counts


def _pooled(batch: PackedBatch, schedule: Schedule, geometry: ImageGeometry) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of every image, which of its placeholders stay, and which of its features each of them takes."""
    for (start, stop), size in zip(batch.image_spans, batch.image_sizes, strict=True):
        rows, index = geometry.pooled_index(size, schedule.downsample)
        here = rows < stop - start  # a sample cut at the maximum length may have lost the end of its image
        yield rows[here], index[here]


def _feature_rows(
    batch: PackedBatch, schedule: Schedule, geometry: ImageGeometry
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions in the batch of the tokens that enter the decoder; of the image tokens among them the position in that
    stream, and the row in the table of all features (the newline is its last one)."""
    is_text, is_image = np.ones(len(batch.input_ids), dtype=bool), np.zeros(len(batch.input_ids), dtype=bool)
    features, first = [np.empty(0, dtype=np.int64)], 0
    for (start, stop), size, (rows, index) in zip(
        batch.image_spans, batch.image_sizes, _pooled(batch, schedule, geometry)
    ):
        if stop - start > (most := geometry.num_tokens(size)):
            raise UserError(
                f"an image of {size[0]}x{size[1]} pixels has {stop - start} placeholders, but only {most} features"
            )
        is_text[start:stop], is_image[start + rows] = False, True
        features.append(np.where(index < 0, -1, index + first))
        first += geometry.num_tiles(size) * geometry.features(schedule.downsample)
    feature_row, entering = np.concatenate(features), np.flatnonzero(is_text | is_image)
    return entering, np.flatnonzero(is_image[entering]), np.where(feature_row < 0, first, feature_row)


def _candidates(layout: Layout, after: Layout) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `Candidates` has on the device and on the host, by its name."""
    images = np.flatnonzero(layout.droppable)
    start_I, stop_I = np.array(layout.image_spans, dtype=np.int64).reshape(-1, 2)[images].T
    keep_I = np.diff(np.array(after.image_spans, dtype=np.int64).reshape(-1, 2)[images])[:, 0]
    columns = candidate_columns(images, stop_I - start_I, keep_I)
    columns["row_V"] = np.arange(len(columns["first_V"])) - columns["first_V"] + start_I.repeat(stop_I - start_I)
    samples = np.array(layout.sample_of, dtype=np.int64)[images]
    counts = {"counts": stop_I - start_I, "keeps": keep_I, "samples": samples}
    return columns, {"survivors": after.tokens, **{name: count.tolist() for name, count in counts.items()}}


def candidate_columns(number_I: np.ndarray, count_I: np.ndarray, keep_I: np.ndarray) -> dict[str, np.ndarray]:
    """The columns (V,) of `Candidates`, without ``row_V``, of images that have and keep so many tokens."""
    of_image = {"image_V": number_I, "first_V": count_I.cumsum() - count_I, "count_V": count_I, "keep_V": keep_I}
    return {name: column.repeat(count_I) for name, column in of_image.items()}


def _index(row: np.ndarray | Sequence[int]) -> Tensor:
    return torch.from_numpy(np.asarray(row, dtype=np.int64))


def send(rows: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """All int64 ``rows``, by name, as views of one tensor on ``device``: one copy, which the host does not wait for."""
    flat = torch.cat(list(rows.values()))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return dict(zip(rows, flat.to(device, non_blocking=True).split([len(row) for row in rows.values()])))
