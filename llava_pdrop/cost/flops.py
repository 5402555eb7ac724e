"""Floating-point operations of one training step, counted from the layout of its batch.

Everything that is a matrix product is counted, for text and image tokens alike: tower, projector, every decoder layer
at the length its stage leaves, causal attention, the ranking, and the head on the label rows. One multiply-accumulate
is two operations, as in `torch.utils.flop_counter`. Element-wise work, the optimizer and data loading are not counted.
The paper's own figure (image tokens only) is `llava_pdrop.cost.paper.paper_tflop`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.rankers import RANKERS, Ranker
from llava_pdrop.model.stream import Layout, layout_of_layers, layouts_of
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
class CountedStep:
    """What is counted: a step on one micro-batch.

    Attributes:
        config: of the Hugging Face LLaVA (``text_config``, ``vision_config``, ``vision_feature_layer``).
        trainable: which of projector, language_model and vision_tower learn (empty: forward only). The gradient
            passes through a frozen decoder to what learns before it.
        recomputed: layers that keep their inputs only. Their forward runs once more in backward, up to the last
            product, whose result nobody needs again.
        known: `layouts`, where they are known already.
    """

    config: Any
    batch: PackedBatch
    schedule: Schedule
    geometry: ImageGeometry
    trainable: Collection[str] = ("projector", "language_model")
    recomputed: Recomputed = Recomputed()
    known: Sequence[Layout] | None = None

    @cached_property
    def layouts(self) -> Sequence[Layout]:
        """Of the stream at every stage (`layouts_of`)."""
        return self.known or layouts_of(self.batch, self.schedule, self.geometry)

    @property
    def tiles(self) -> int:
        """That go through the tower: a text-only batch sends one dummy."""
        return sum(map(self.geometry.num_tiles, self.batch.image_sizes)) or 1

    @property
    def features(self) -> int:
        """Rows that go through the projector."""
        return self.tiles * self.geometry.features(self.schedule.downsample)


class Product(NamedTuple):
    """``times`` products of matrices (rows, inner) and (inner, columns)."""

    rows: int
    inner: int
    columns: int
    times: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns * self.times


@dataclass(frozen=True)
class Work:
    """Matrix products, operations of attention, forward and backward apart since kernels differ, and bytes of
    element-wise kernels, which `cost.step_time` adds."""

    products: tuple[Product, ...] = ()
    attention: float = 0.0
    attention_backward: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))

    @property
    def linear(self) -> float:
        """Operations of the products."""
        return float(sum(product.flops for product in self.products))

    @property
    def flops(self) -> float:
        return self.linear + self.attention + self.attention_backward


@dataclass(frozen=True)
class StepPart:
    """A part of the step.

    Attributes:
        kind: tower, projector, layers (of the decoder, between two drops), ranking or head.
        name: by which it is shown.
        tokens: that go through it.
        forward, backward: of all its layers; the backward with what is recomputed in it.
        layers, again: how many equal layers it has, and how many of these are recomputed.
    """

    kind: str
    name: str
    tokens: int
    forward: Work
    backward: Work
    layers: int = 1
    again: int = 0

    @property
    def whole(self) -> Work:
        return self.forward + self.backward


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


def step_flops(step: CountedStep) -> StepFlops:
    """Operations of forward and backward."""
    found: dict[str, Work] = {}
    for part in step_parts(step):
        found[part.kind] = found.get(part.kind, Work()) + part.whole
    layers = found["layers"]
    return StepFlops(
        tower=found["tower"].flops,
        projector=found["projector"].flops,
        decoder=layers.linear,
        attention=layers.attention + layers.attention_backward,
        ranking=found.get("ranking", Work()).flops,
        head=found["head"].flops,
    )


def stage_flops(step: CountedStep) -> list[float]:
    """Operations of the forward of the decoder layers of every stage, the ranking not counted."""
    stages, layer = [0.0] * (len(step.schedule.layers) + 1), 0
    for part in _stages(step):
        stages[step.schedule.stage(layer)] += part.forward.flops
        layer += part.layers
    return stages


def predicted_reduction(steps: Sequence[CountedStep]) -> float:
    """Share of the operations of vanilla ``steps`` that these save, between 0 and 1."""
    vanilla = [replace(step, schedule=Schedule(), known=None) for step in steps]
    return saved(*(sum(step_flops(step).total for step in counted) for counted in (vanilla, steps)))


def step_parts(step: CountedStep, split: Collection[int] = ()) -> list[StepPart]:
    """Products and attention, forward and backward: tower, projector, the layers of each stage, all rankings, head.

    Args:
        split: layers before which a part begins though nothing is dropped there, to stand beside a schedule's.
    """
    text, trainable = step.config.text_config, step.trainable
    logits = (Product(len(step.batch.label_positions), text.hidden_size, text.vocab_size),)
    back = Work(_backward(logits, "language_model" in trainable)) if trainable else Work()
    return [
        _tower(step),
        _projector(step),
        *_stages(step, split),
        *([_rankings(step)] if step.schedule.layers else []),
        StepPart("head", "head and loss", step.layouts[-1].tokens, Work(logits), back),
    ]


def _backward(products: Collection[Product], weights: bool, inputs: bool = True) -> tuple[Product, ...]:
    """Products of the gradients of inputs and weights of linear maps, whose forward ``products`` are."""
    found = [Product(rows, columns, inner, times) for rows, inner, columns, times in products if inputs]
    found += [Product(inner, rows, columns, times) for rows, inner, columns, times in products if weights]
    return tuple(found)


def _alike(products: Sequence[Product], attention: int, layers: int, again: int, learns: bool) -> tuple[Work, Work]:
    """Forward and backward of so many ``layers``, each of which has these ``products`` and ``attention``."""

    def times(products: Collection[Product], layers: int) -> tuple[Product, ...]:
        return tuple(product._replace(times=product.times * layers) for product in products if layers)

    return Work(times(products, layers), layers * attention), Work(
        times(_backward(products, learns), layers) + times(products[:-1], again),
        again * attention,
        layers * attention * ATTENTION_BACKWARD,
    )


def _tower(step: CountedStep) -> StepPart:
    """Only the layers that lead to ``vision_feature_layer`` run."""
    vision, layers = step.config.vision_config, used_tower_layers(step.config)
    tiles, learns = step.tiles, "vision_tower" in step.trainable
    width, mlp, patches = vision.hidden_size, vision.intermediate_size, (vision.image_size // vision.patch_size) ** 2
    tokens, again = tiles * (patches + 1), layers * step.recomputed.tower * learns
    products = [Product(tokens, *sizes) for sizes in ((width, width, 4), (width, mlp, 1), (mlp, width, 1))]
    forward, back = _alike(products, 4 * tiles * (patches + 1) ** 2 * width, layers, again, learns)
    embedding = (Product(tiles * patches, 3 * vision.patch_size**2, width),)
    back += Work(_backward(embedding, weights=True, inputs=False))
    return StepPart("tower", "tower", tokens, Work(embedding) + forward, back if learns else Work(), layers, again)


def _projector(step: CountedStep) -> StepPart:
    """The gradient goes into the first map's input only where the tower learns."""
    width, hidden, rows = step.config.vision_config.hidden_size, step.config.text_config.hidden_size, step.features
    first, second = (Product(rows, width, hidden),), (Product(rows, hidden, hidden),)
    learns, below = "projector" in step.trainable, "vision_tower" in step.trainable
    back = _backward(first, learns, below) + _backward(second, learns, learns or below)
    return StepPart("projector", "projector", rows, Work(first + second), Work(back))


def _stages(step: CountedStep, split: Collection[int] = ()) -> list[StepPart]:
    """The decoder's layers. Their linear maps are q, k, v, o and the three of the gated MLP."""
    text, schedule, trainable = step.config.text_config, step.schedule, step.trainable
    hidden, mlp, window = text.hidden_size, text.intermediate_size, _window(text)
    queries, keys = (heads * head_size(text) for heads in (text.num_attention_heads, key_value_heads(text)))
    maps = ((hidden, queries, 1), (hidden, keys, 2), (queries, hidden, 1), (hidden, mlp, 2), (mlp, hidden, 1))
    repeated = len(range(text.num_hidden_layers)[: step.recomputed.layers]) * bool(trainable)
    by_layer = layout_of_layers(step.layouts, schedule, text.num_hidden_layers)
    edges = sorted({0, schedule.inject, *schedule.layers, *split, text.num_hidden_layers})
    found = []
    for first, stop in pairwise(edges):
        own = by_layer[first].seq_lens
        tokens, again = sum(own), max(0, min(stop, repeated) - first)
        attention = 4 * queries * sum(causal_pairs(length, window) for length in own)
        products = [Product(tokens, *sizes) for sizes in maps]
        forward, back = _alike(products, attention, stop - first, again, "language_model" in trainable)
        name = f"layers {first}-{stop - 1}"
        found.append(StepPart("layers", name, tokens, forward, back if trainable else Work(), stop - first, again))
    return found


def _rankings(step: CountedStep) -> StepPart:
    """All of a step."""
    whole, back = Work(), Work()
    for name, (before, after) in zip(step.schedule.rankers, pairwise(step.layouts)):
        forward, backward = _ranking(step, RANKERS[name], before, after)
        whole, back = whole + forward, back + backward
    return StepPart("ranking", "ranking, dropping", step.layouts[0].tokens, whole, back)


def _ranking(step: CountedStep, ranker: Ranker, before: Layout, after: Layout) -> tuple[Work, Work]:
    """Forward and backward of a drop: projections of keys and queries and their products, products of two hidden
    states, and those of pairs of a survivor and a token that may be merged into it. A ranking has no backward, a mean
    of tokens has."""
    text, hidden = step.config.text_config, step.config.text_config.hidden_size
    texts = [len(rows) for rows in before.text_rows()] if ranker.text else [0] * len(before.seq_lens)
    taken = [
        (stop - start, kept[1] - kept[0], sample)
        for (start, stop), kept, sample, droppable in zip(
            before.image_spans, after.image_spans, before.sample_of, before.droppable
        )
        if droppable
    ]
    products = sum(ranker.products(count, keep, texts[sample]) for count, keep, sample in taken)
    merged = sum(keep * (count - keep) for count, keep, _ in taken) * (step.schedule.merge == "nearest")
    back = Work((), 0, 2 * hidden * merged * bool(step.trainable))
    if ranker.projections is None:
        return Work((), 2 * hidden * (products + 2 * merged)), back
    if ranker.queries == "image":
        asking = [(count, before.seq_lens[sample]) for count, _, sample in taken]
    else:
        counts = {"instruction": [len(starts) for starts in before.answer_starts], "text": texts, None: [0]}
        asking = list(zip(counts[ranker.queries], before.seq_lens))
    rows = max(1, sum(count for count, _ in asking))  # where none asks, one row is projected
    queries, keys = (heads * head_size(text) for heads in (text.num_attention_heads, key_value_heads(text)))
    projected = (Product(before.tokens, hidden, keys), Product(rows, hidden, queries))
    scores = queries * sum(count * length for count, length in asking)
    return Work(projected, 2 * (scores + hidden * (products + 2 * merged))), back


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
