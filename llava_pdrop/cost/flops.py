"""Floating-point operations of one training step, counted from the layout of its batch.

Everything that is a matrix product is counted, for text and image tokens alike: tower, projector, every decoder layer
at the length its stage leaves, causal attention, the ranking, and the head on the label rows. One multiply-accumulate
is two operations, as in `torch.utils.flop_counter`. Element-wise work, the optimizer and data loading are not counted.
The paper's own figure (image tokens only) is `llava_pdrop.cost.paper.paper_tflop`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.pyramid_drop import RANKERS
from llava_pdrop.model.stream import layouts_of
from llava_pdrop.model.vision import used_tower_layers
from llava_pdrop.report.units import saved
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch

ATTENTION_BACKWARD = 2.5
"""Backward of attention relative to its forward: fused kernels compute the scores once more (5 products for 2)."""


@dataclass(frozen=True)
class Recomputed:
    """What activation checkpointing runs once more in backward: so many first ``layers`` of the decoder (None: all),
    and those of the ``tower``, where it learns."""

    layers: int | None = 0
    tower: bool = False

    def __bool__(self) -> bool:
        return self.layers != 0 or self.tower

    def __str__(self) -> str:
        """In words."""
        count = "all" if self.layers is None else str(self.layers)
        decoder = f"{count} decoder layer{'' if self.layers == 1 else 's'}"
        return " and ".join([decoder] * (self.layers != 0) + ["the tower"] * self.tower) or "nothing"

    @classmethod
    def first(cls, layers: int) -> Recomputed:
        """So many layers, and the tower with the first of them."""
        return cls(layers, layers > 0)


ALL_LAYERS = Recomputed(None, True)
"""Every layer of the decoder and the tower."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of a step by where they happen; forward and backward together."""

    tower: float
    projector: float
    decoder: float
    attention: float
    ranking: float
    head: float

    @property
    def total(self) -> float:
        return sum(getattr(self, entry.name) for entry in fields(self))

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def step_flops(
    config: Any,
    batch: PackedBatch,
    schedule: Schedule,
    geometry: ImageGeometry,
    trainable: Collection[str] = ("projector", "language_model"),
    recomputed: Recomputed = Recomputed(),
    seq_lens: Sequence[Sequence[int]] | None = None,
) -> StepFlops:
    """Operations of forward and backward of one micro-batch.

    Args:
        config: of the Hugging Face LLaVA (``text_config``, ``vision_config``, ``vision_feature_layer``).
        trainable: which of projector, language_model and vision_tower learn (empty: forward only). The gradient
            passes through a frozen decoder to what learns before it.
        recomputed: layers whose forward runs once more in backward, up to the last product, whose result nobody needs
            again.
        seq_lens: the lengths of the samples at every stage, where a forward has told them (`vlm.Output`); None: they
            are planned here.
    """
    text = config.text_config
    stages = [layout.seq_lens for layout in layouts_of(batch, schedule)] if seq_lens is None else seq_lens
    queries = [len(starts) for starts in batch.answer_starts]
    tiles = tiles_of(batch, geometry)
    backward = bool(trainable)
    again = range(text.num_hidden_layers)[: recomputed.layers]
    linear_factor = 1.0 + backward + ("language_model" in trainable)

    decoder = attention = ranking = 0.0
    stage = 0
    for layer in range(text.num_hidden_layers):
        if layer in schedule.layers:
            ranking += ranking_flops(text, stages[stage], queries, schedule)
            stage += 1
        lengths = stages[stage]
        repeat = backward and layer in again
        linear, last, scores = layer_flops(text, lengths)
        decoder += linear * linear_factor + (linear - last) * repeat
        attention += scores * (1 + repeat + ATTENTION_BACKWARD * backward)
    return StepFlops(
        tower=tower_flops(config, tiles, "vision_tower" in trainable, recomputed.tower),
        projector=projector_flops(config, tiles * geometry.patches, trainable),
        decoder=decoder,
        attention=attention,
        ranking=ranking,
        head=2 * len(batch.label_positions) * text.hidden_size * text.vocab_size * linear_factor,
    )


def stage_flops(config: Any, batch: PackedBatch, schedule: Schedule) -> list[float]:
    """Operations of the forward of the decoder layers of every stage, the ranking not counted."""
    text = config.text_config
    edges = (0, *schedule.layers, text.num_hidden_layers)
    return [
        float((stop - first) * (linear + attention))
        for first, stop, layout in zip(edges, edges[1:], layouts_of(batch, schedule))
        for linear, _, attention in [layer_flops(text, layout.seq_lens)]
    ]


def predicted_reduction(
    config: Any,
    batches: Sequence[PackedBatch],
    schedule: Schedule,
    geometry: ImageGeometry,
    trainable: Collection[str],
    recomputed: Recomputed = Recomputed(),
) -> float:
    """Share of a vanilla step's operations that ``schedule`` saves on ``batches``, between 0 and 1."""

    def operations(chosen: Schedule) -> float:
        return sum(step_flops(config, batch, chosen, geometry, trainable, recomputed).total for batch in batches)

    return saved(operations(Schedule()), operations(schedule))


def tiles_of(batch: PackedBatch, geometry: ImageGeometry) -> int:
    """Tiles that go through the tower: a text-only batch sends one dummy."""
    return sum(geometry.num_tiles(size) for size in batch.image_sizes) or 1


def head_size(text: Any) -> int:
    """Numbers in an attention head of a decoder's config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def key_value_heads(text: Any) -> int:
    """Heads that keys and values of a decoder's config have; fewer than the queries' under GQA."""
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def causal_pairs(length: int, window: int | None = None) -> int:
    """(query, key) pairs of causal attention over ``length`` tokens, each seeing at most ``window``."""
    reach = min(length, window or length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def _window(text: Any) -> int | None:
    return getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None


def layer_flops(text: Any, lengths: Sequence[int]) -> tuple[int, int, int]:
    """Operations of the forward of one decoder layer on samples of such lengths: of its linear maps (q, k, v, o and the
    three of the gated MLP), of the last of them, and of its causal attention."""
    tokens, window = sum(lengths), _window(text)
    projections = 2 * (text.num_attention_heads + key_value_heads(text)) * head_size(text)
    last = 2 * tokens * text.hidden_size * text.intermediate_size
    linear = 2 * tokens * text.hidden_size * projections + 3 * last
    pairs = sum(causal_pairs(length, window) for length in lengths)
    return linear, last, 4 * pairs * text.num_attention_heads * head_size(text)


def ranking_flops(text: Any, lengths: Sequence[int], queries: Sequence[int], schedule: Schedule) -> int:
    """Operations of one ranking of samples with so many tokens and so many query tokens: keys of all tokens, queries of
    the query tokens, their products. No backward."""
    if RANKERS[schedule.ranker].projections is None:
        return 0
    size, heads = head_size(text), text.num_attention_heads
    keys = 2 * sum(lengths) * text.hidden_size * key_value_heads(text) * size
    rows = 2 * max(1, sum(queries)) * text.hidden_size * heads * size
    scores = sum(2 * count * length * heads * size for count, length in zip(queries, lengths))
    return keys + rows + scores


def tower_flops(config: Any, tiles: int, trainable: bool, recomputed: bool) -> float:
    """Operations of the tower on so many tiles: only the layers that lead to ``vision_feature_layer`` run."""
    vision = config.vision_config
    width, used = vision.hidden_size, used_tower_layers(config)
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = tiles * (patches + 1)
    embedding = 2 * tiles * patches * 3 * vision.patch_size**2 * width
    linear = 2 * tokens * width * (4 * width + 2 * vision.intermediate_size)
    attention = tower_attention(config, tiles)
    forward = embedding + used * linear + attention
    if not trainable:
        return forward
    last = 2 * tokens * width * vision.intermediate_size
    again = used * (linear - last) + attention if recomputed else 0
    return forward + embedding + used * 2 * linear + ATTENTION_BACKWARD * attention + again


def tower_attention(config: Any, tiles: int) -> int:
    """Operations of the attention in the tower's forward, which `tower_flops` contains."""
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    return 4 * used_tower_layers(config) * tiles * tokens**2 * vision.hidden_size


def projector_flops(config: Any, rows: int, trainable: Collection[str]) -> float:
    """Operations of the two linear maps on so many feature rows. The gradient goes into the first one's input only
    where the tower learns."""
    width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    first, second = 2 * rows * width * hidden, 2 * rows * hidden * hidden
    learns, below = "projector" in trainable, "vision_tower" in trainable
    return first * (1 + learns + below) + second * (1 + learns + (learns or below))
