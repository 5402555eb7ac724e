"""The packed stream and what happens to its layout at every drop, planned on the host before the forward.

Text is never dropped and every image keeps a known number of tokens, so lengths, positions of queries and labels and
the places of images are plain integers for all stages. `StreamPlan.build` works them out and sends the index tensors
that the device needs in one copy; the forward then never waits for the device to learn a number.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llava_pdrop.errors import UserError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.attention import Segments
from llava_pdrop.model.pyramid_drop import Candidates
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch

COLUMNS = ("row_V", "image_V", "first_V", "count_V", "keep_V")
"""The tensors of `Candidates`."""


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the stream at one stage (host integers, see `PackedBatch`).

    ``image_totals`` (I) are the original token counts, from which every stage's budget is taken; ``droppable`` (I)
    is False for images of samples without a query, which pass through whole (golden/README 4.6), and for those inside
    the last answer, which no query sees. ``least`` (I) is how many tokens an image must keep: 1 where nothing else
    stands before a label or the query, 0 elsewhere.
    """

    seq_lens: list[int]
    image_spans: list[tuple[int, int]]
    image_totals: list[int]
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

    @property
    def tokens(self) -> int:
        return sum(self.seq_lens)

    @property
    def image_tokens(self) -> int:
        return sum(stop - start for start, stop in self.image_spans)


def layouts_of(batch: PackedBatch, schedule: Schedule) -> list[Layout]:
    """The layout of every stage of ``batch``: before any drop and after each one."""
    layouts = [Layout.of(batch)]
    for stage in range(len(schedule.layers)):
        layouts.append(layouts[-1].after_drop(layouts[0].kept(schedule, stage)))
    return layouts


@dataclass(frozen=True)
class StreamStage:
    """One stage on the device: the attention segments, position ids (T,), and unless it is the last stage, which rows
    are the queries (Q,) and which tokens the next drop may take."""

    layout: Layout
    segments: Segments
    position_T: Tensor
    query_Q: Tensor
    candidates: Candidates | None

    @property
    def asked(self) -> tuple[Tensor, list[int], list[int]]:
        """Who ranks: the rows of the queries (Q,), and how many tokens and queries every sample has."""
        return self.query_Q, self.layout.seq_lens, [len(starts) for starts in self.layout.answer_starts]


@dataclass(frozen=True)
class StreamPlan:
    """All stages of a batch and what the device needs to know of its text: token ids ``text_T`` (T,), 0 where an image
    is (the placeholder may lie outside the vocabulary); where features go in (``image_row``, ``feature_row``); labels
    ``label_L`` (L,) and the tokens before them, in the last stream, that predict them (``predict_row``)."""

    stages: list[StreamStage]
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
        layouts = layouts_of(batch, schedule)
        image_row, feature_row = (_index(row) for row in _feature_rows(batch, geometry))
        rows = {
            "text_T": batch.input_ids.index_fill(0, image_row, 0),
            "image_row": image_row,
            "feature_row": feature_row,
            "label_L": batch.labels.index_select(0, _index(layouts[0].label_positions)),
            "predict_row": _index(np.asarray(layouts[-1].label_positions) - 1),
        }
        once = list(rows)  # the others are there once a stage
        for stage, layout in enumerate(layouts):
            queries = [start - 1 for sample in layout.answer_starts for start in sample]
            rows[f"offsets {stage}"] = _index(np.concatenate([[0], np.cumsum(layout.seq_lens)]))
            rows[f"position_T {stage}"] = _index(np.concatenate([np.arange(length) for length in layout.seq_lens]))
            rows[f"query_Q {stage}"] = _index(queries)
            if stage < len(schedule.layers):
                columns = _candidate_rows(layout, layouts[0].kept(schedule, stage))
                rows |= {f"{name} {stage}": _index(column) for name, column in columns.items()}
        sent = send(rows, device)

        stages = []
        for stage, layout in enumerate(layouts):
            segments = Segments(layout.seq_lens, sent[f"offsets {stage}"].to(torch.int32), backend)
            candidates = None
            if stage < len(schedule.layers):
                candidates = Candidates(
                    **{name: sent[f"{name} {stage}"] for name in COLUMNS}, survivors=layouts[stage + 1].tokens
                )
            stages.append(
                StreamStage(layout, segments, sent[f"position_T {stage}"], sent[f"query_Q {stage}"], candidates)
            )
        return StreamPlan(stages, **{name: sent[name] for name in once})


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


def _feature_rows(batch: PackedBatch, geometry: ImageGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Stream position of every image token, and its row in the table of all features (the newline is row -1)."""
    positions, features, first = [], [], 0
    for (start, stop), size in zip(batch.image_spans, batch.image_sizes):
        index = geometry.merge_index(size)
        if stop - start > len(index):
            raise UserError(
                f"an image of {size[0]}x{size[1]} pixels has {stop - start} placeholders, "
                f"but only {len(index)} features"
            )
        index = index[: stop - start]  # a sample cut at the maximum length may have lost the end of its image
        positions.append(np.arange(start, stop))
        features.append(np.where(index < 0, -1, index + first))
        first += geometry.num_tiles(size) * geometry.patches
    if not positions:
        return np.empty(0), np.empty(0)
    feature_row = np.concatenate(features)
    return np.concatenate(positions), np.where(feature_row < 0, first, feature_row)


def _candidate_rows(layout: Layout, kept: Sequence[int]) -> dict[str, np.ndarray]:
    """The columns of `Candidates` by their name."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    first = 0
    for image, ((start, stop), keep) in enumerate(zip(layout.image_spans, kept)):
        if not layout.droppable[image]:
            continue
        count = stop - start
        columns["row_V"].append(np.arange(start, stop))
        for name, value in (("image_V", image), ("first_V", first), ("count_V", count), ("keep_V", keep)):
            columns[name].append(np.full(count, value))
        first += count
    return {name: np.concatenate(column) if column else np.empty(0) for name, column in columns.items()}


def _index(row: np.ndarray | Sequence[int]) -> Tensor:
    return torch.from_numpy(np.asarray(row, dtype=np.int64))


def send(rows: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """All int64 ``rows``, by name, as views of one tensor on ``device``: one copy, which the host does not wait for."""
    flat = torch.cat(list(rows.values()))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return dict(zip(rows, flat.to(device, non_blocking=True).split([len(row) for row in rows.values()])))
