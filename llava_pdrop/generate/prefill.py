"""The drop plan of a padded batch, as Hugging Face's ``generate`` feeds it to the decoder.

The batch is planned as the packed stream of its real tokens (`model/stream.py`), with one `Frame` per stage that says
where each token of the stream lies in the padded batch. From the first drop on, padding is on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llava_pdrop.errors import UserError
from llava_pdrop.generate.cache import PromptStages
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.decoder import Rope, project_instruction
from llava_pdrop.model.pyramid_drop import RANKERS, keep_index
from llava_pdrop.model.stream import StreamPlan, send
from llava_pdrop.model.vlm import geometry_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch


@dataclass
class ForwardStep:
    """What one forward of an attached model did, on the host.

    Attributes:
        position_ids: per decoder layer (B, tokens fed).
        survivors: per drop, the positions that survive it in the stream of the prompt's real tokens, row after row;
            empty lists in a forward that drops nothing.
        image_spans: where the images lie in that stream.
    """

    position_ids: list[Tensor] = field(default_factory=list)
    survivors: list[list[int]] = field(default_factory=list)
    image_spans: list[tuple[int, int]] = field(default_factory=list)

    def drop(self, index_K: Tensor) -> None:
        """Notes a drop, of which ``index_K`` are the survivors among those of the drop before."""
        index = index_K.tolist()
        self.survivors.append([self.survivors[-1][position] for position in index] if self.survivors else index)

    def kept(self, drop: int) -> list[list[int]]:
        """Per image, which of its original tokens 0..n-1 survive drop number ``drop``."""
        return [[p - start for p in self.survivors[drop] if start <= p < stop] for start, stop in self.image_spans]


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
        return flat.index_select(0, self.row_T) if self.padded else flat

    def unpack(self, x_T: Tensor) -> Tensor:
        """(T, ...) -> (B, N, ...), zeros at the padding."""
        if self.padded:
            empty = x_T.new_zeros(self.shape[0] * self.shape[1], *x_T.shape[1:])
            x_T = empty.index_copy(0, self.row_T, x_T)
        return x_T.unflatten(0, self.shape)


@dataclass(frozen=True)
class Prefill:
    """A prompt about to be pruned: the plan of its stream, a frame per stage and the columns of text at its end."""

    plan: StreamPlan
    frames: list[Frame]
    text_tail: int

    @staticmethod
    def build(
        image_BN: np.ndarray,
        real_BN: np.ndarray,
        lengths: Sequence[int] | None,
        prompt: int | None,
        schedule: Schedule,
        device: torch.device,
    ) -> Prefill:
        """Plans the drops of a batch.

        Args:
            image_BN, real_BN: (B, N) bool, which columns are image placeholders and which are no padding.
            lengths: tokens of every image in order of appearance; None: every run of placeholders is one image.
            prompt: columns of the prompt, whose last token ranks; None: the last real token of each row ranks.

        Raises:
            UserError: ``lengths`` and the number of placeholders disagree.
        """
        runs, seq_lens, starts, rows = [], [], [], []
        offset = 0
        for row, (image_N, real_N) in enumerate(zip(image_BN, real_BN)):
            columns = np.flatnonzero(real_N)
            edges = np.flatnonzero(np.diff(image_N[columns], prepend=False, append=False)) + offset
            runs += [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2])]
            ranking = len(columns) if prompt is None else int((columns < prompt).sum())
            starts.append([offset + ranking] if len(edges) else [])
            seq_lens.append(len(columns))
            rows.append(columns + row * real_BN.shape[1])
            offset += len(columns)
        nothing = torch.empty(0, dtype=torch.int64)  # the plan needs the layout only: the tokens are embedded already
        batch = PackedBatch(
            input_ids=nothing,
            labels=nothing,
            pixels=torch.empty(0),
            seq_lens=seq_lens,
            image_spans=_split(runs, lengths),
            image_sizes=[],
            answer_starts=starts,
            label_positions=[],
        )
        plan = StreamPlan.build(batch, schedule, ImageGeometry(tile=1, patch=1), device)
        frames = _frames(
            [(seq_lens, rows, real_BN.shape[1])] + [_left_padded(stage.layout.seq_lens) for stage in plan.stages[1:]],
            device,
        )
        last_image = np.where(image_BN, np.arange(image_BN.shape[1]), -1).max()
        return Prefill(plan, frames, text_tail=int(image_BN.shape[1] - 1 - last_image))

    @torch.no_grad()
    def rank(
        self,
        decoder: nn.Module,
        index: int,
        schedule: Schedule,
        stage: int,
        hidden_BND: Tensor,
        before_BND: Tensor | None,
        rope: Rope,
    ) -> Tensor:
        """Positions (K,) of the packed prompt that survive the drop before layer ``index``.

        Args:
            stage: how many drops came before.
            hidden_BND: what the layer would be given.
            before_BND: what the previous layer was given, for rankers that use its projections.
            rope: cos and sin at these positions, (B, N, E) or (1, N, E).
        """
        frame, candidates = self.frames[stage], self.plan.stages[stage].candidates
        assert candidates is not None, "every stage but the last has a drop"
        ranker, instruction = RANKERS[schedule.ranker], None
        if ranker.projections is not None:
            layer = decoder.layers[index if ranker.projections == "next" else index - 1]
            source_BND = hidden_BND if ranker.projections == "next" else before_BND
            packed = (frame.pack(rope[0])[None], frame.pack(rope[1])[None])
            instruction = project_instruction(layer, frame.pack(source_BND), packed, self.plan.stages[stage])
        return keep_index(ranker.score(instruction, candidates), candidates, len(frame.row_T))

    def stages(self, position_BN: Tensor, schedule: Schedule) -> PromptStages:
        """What the cache has to remember, given the position ids (B, N) of the whole prompt."""
        last_B = self.frames[0].pack(position_BN).index_select(0, self.frames[0].last_B)
        shifts, real = [], []
        for stage, frame in enumerate(self.frames[1:], start=1):
            now_B = self.plan.stages[stage].position_T.index_select(0, frame.last_B)
            shifts.append(last_B - now_B if schedule.positions == "renumber" else torch.zeros_like(last_B))
            real.append(frame.unpack(torch.ones_like(frame.row_T, dtype=torch.bool)))
        padded = [frame.padded for frame in self.frames[1:]]
        return PromptStages(real, shifts, padded, self.frames[0].shape[1], self.text_tail, schedule)


def image_lengths(
    config: Any, placeholders: int, inputs: dict[str, Any], geometry: ImageGeometry | None = None
) -> list[int] | None:
    """Tokens of every image of a prompt, in order.

    Counted from the features where they are there already, else by picture size (LLaVA-NeXT) or equal for all
    (LLaVA); None for a model of which only the sum is known.

    Args:
        placeholders: image tokens in the prompt.
        inputs: arguments of the model's forward.
        geometry: by which the model was told to lay its features out (`vision.pack_by_geometry`); None: left alone.
    """
    features, sizes = (inputs.get("mm_encoder_outputs") or {}).get("image"), inputs.get("image_sizes")
    if features is not None:
        return [len(feature) for feature in features.pooler_output]
    if config.model_type == "llava_next" and sizes is not None:
        geometry = geometry or replace(geometry_of(config), merge="spatial_unpad", rounding="hf")
        return [geometry.num_tokens((int(width), int(height))) for height, width in torch.as_tensor(sizes).tolist()]
    images = len(inputs["pixel_values"])
    if config.model_type in ("llava", "llava_next") and sizes is None and placeholders % images == 0:
        return [placeholders // images] * images
    return None


def _split(runs: list[tuple[int, int]], lengths: Sequence[int] | None) -> list[tuple[int, int]]:
    """Runs of placeholders -> one span per image (two images may follow each other without text between them)."""
    if lengths is None:
        return runs
    placeholders = sum(stop - start for start, stop in runs)
    if placeholders != sum(lengths):
        raise UserError(f"the prompt has {placeholders} image placeholders, but its images have {sum(lengths)} tokens")
    spans, queue = [], [length for length in lengths if length][::-1]
    for start, stop in runs:
        while start < stop:
            length = queue.pop()
            if start + length > stop:  # other tokens inside the image (Pixtral's row breaks): a budget for every run
                return runs
            spans.append((start, start + length))
            start += length
    return spans


def _left_padded(lengths: list[int]) -> tuple[list[int], list[np.ndarray], int]:
    """Tokens of each row, their places in the flattened batch and its columns, with the padding on the left."""
    longest = max(lengths)
    rows = [np.arange(longest - length, longest) + row * longest for row, length in enumerate(lengths)]
    return lengths, rows, longest


def _frames(stages: Sequence[tuple[list[int], list[np.ndarray], int]], device: torch.device) -> list[Frame]:
    """A frame per stage, sent to the device at once."""
    rows_by_name = {}
    for stage, (lengths, rows, _) in enumerate(stages):
        rows_by_name[f"row_T {stage}"] = torch.from_numpy(np.concatenate(rows))
        rows_by_name[f"last_B {stage}"] = torch.from_numpy(np.cumsum(lengths) - 1)
    sent = send(rows_by_name, device)
    return [
        Frame(sent[f"row_T {stage}"], sent[f"last_B {stage}"], (len(lengths), columns))
        for stage, (lengths, _, columns) in enumerate(stages)
    ]
