"""How long a micro-batch of training takes on a named card, stage by stage. A MODEL: nobody has measured these times.

Matrix products and attention are counted as `cost.flops` counts them, what lies between as `cost.elementwise` does. Two
bounds follow from a card's data sheet: all operations at its peak, all bytes at its bandwidth. No kernel is faster, and
since a step waits for one kind while the other runs, the time is their sum, at rates that real kernels reach. Those are
assumptions:

    products     760 of an H100's 989 TFLOP/s, the upper end of what large products are said to reach (600 to 760)
    bandwidth    2.75 of an H100's 3.35 TB/s (2.4 to 2.75)
    attention    `Card.attention`; for H100 330 forward and 260 backward (280 and 210 to 400 and 300)

so times are rather too short. Ratios of two arms move less: of dropping to vanilla by half a point within those ranges.

A product also takes whole waves of tiles, which short streams do not fill: that is why time falls by less than its
operations where tokens leave.

NOT in it: what `cost.elementwise` leaves out, gaps between kernels, communication, waiting for data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

from llava_pdrop.cost.elementwise import (
    HALF,
    MODELLED,
    Moved,
    drop_bytes,
    layer_bytes,
    loss_bytes,
    norm_bytes,
    projector_bytes,
    tower_layer_bytes,
)
from llava_pdrop.cost.flops import (
    ATTENTION_BACKWARD,
    Recomputed,
    head_size,
    key_value_heads,
    layer_flops,
    tiles_of,
    tower_attention,
)
from llava_pdrop.errors import UserError, did_you_mean
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.pyramid_drop import RANKERS
from llava_pdrop.model.stream import Layout, layouts_of
from llava_pdrop.model.vision import used_tower_layers
from llava_pdrop.runtime.device import PEAK_TFLOPS
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch

NOTE = (
    "A model that no GPU has confirmed: counted operations and bytes at assumed rates (llava_pdrop/cost/step_time.py)."
)

MATRIX_SHARE = 760 / 989.4
"""Of a card's peak, that large products are assumed to reach."""

BANDWIDTH_SHARE = 2.75 / 3.35
"""Of a card's bandwidth, that element-wise kernels are assumed to reach."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        flops: dense bfloat16 operations a second, the data sheet's.
        bandwidth: bytes a second to its memory, the data sheet's.
        gib: its memory.
        processors: streaming multiprocessors; each makes one tile of a product at a time.
        attention: operations a second that a fused attention kernel is assumed to reach, forward and backward.
        source: of the data sheet's numbers.
    """

    flops: float
    bandwidth: float
    gib: float
    processors: int
    attention: tuple[float, float]
    source: str


CARDS: dict[str, Card] = {
    "H100": Card(PEAK_TFLOPS["H100"] * 1e12, 3.35e12, 80, 132, (330e12, 260e12), "NVIDIA H100 data sheet, SXM5 80 GB"),
    "H200": Card(PEAK_TFLOPS["H200"] * 1e12, 4.8e12, 141, 132, (330e12, 260e12), "NVIDIA H200 data sheet, SXM 141 GB"),
    "A100": Card(PEAK_TFLOPS["A100"] * 1e12, 2.039e12, 80, 108, (190e12, 160e12), "NVIDIA A100 data sheet, SXM4 80 GB"),
}
"""Cards by the name that `runtime.device.known_gpu` gives them; a new one is a row here."""


def card_named(name: str) -> Card:
    """The card called ``name``.

    Raises:
        UserError: there is none.
    """
    if name not in CARDS:
        raise UserError(
            f"--card {name!r} is none of the known cards: choose one of {list(CARDS)}" + did_you_mean(name, CARDS)
        )
    return CARDS[name]


TILE = (128, 256)
"""Rows and columns of the tile of a product that a multiprocessor makes at a time."""


class Product(NamedTuple):
    """``times`` products of matrices (rows, inner) and (inner, columns)."""

    rows: int
    inner: int
    columns: int
    times: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns * self.times

    def occupied(self, card: Card) -> float:
        """Operations that ``card`` could have done meanwhile: its multiprocessors work in waves, and those without a
        tile in the last one wait for the others."""
        tiles = ceil(self.rows / TILE[0]) * ceil(self.columns / TILE[1])
        return 2.0 * ceil(tiles / card.processors) * card.processors * TILE[0] * TILE[1] * self.inner * self.times


@dataclass(frozen=True)
class Work:
    """Matrix products, operations of attention, forward and backward apart since kernels differ, and bytes of
    element-wise kernels."""

    products: tuple[Product, ...] = ()
    attention: float = 0.0
    attention_backward: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.attention_backward + other.attention_backward,
            self.bytes + other.bytes,
        )

    @property
    def flops(self) -> float:
        return sum(product.flops for product in self.products) + self.attention + self.attention_backward

    def bounds(self, card: Card) -> tuple[float, float]:
        """Seconds that its operations take at the card's peak, and its bytes at the card's bandwidth."""
        return self.flops / card.flops, self.bytes / card.bandwidth

    def seconds(self, card: Card) -> float:
        """Seconds that the model predicts."""
        products = sum(product.occupied(card) for product in self.products) / (MATRIX_SHARE * card.flops)
        attention = self.attention / card.attention[0] + self.attention_backward / card.attention[1]
        return products + attention + self.bytes / (BANDWIDTH_SHARE * card.bandwidth)


@dataclass(frozen=True)
class StepPart:
    """A part of the step: the ``tokens`` that go through it, its forward, and its backward, recomputation included."""

    name: str
    tokens: int
    forward: Work
    backward: Work

    @property
    def whole(self) -> Work:
        return self.forward + self.backward


def is_modelled(config: Any) -> bool:
    """Whether the element-wise parts of a Hugging Face LLaVA config's decoder and tower are counted."""
    vision = config.vision_config
    known = vision.model_type == "clip_vision_model" and vision.hidden_act == "quick_gelu"
    return known and config.text_config.model_type in MODELLED


def step_parts(
    config: Any,
    batch: PackedBatch,
    schedule: Schedule,
    geometry: ImageGeometry,
    trainable: Collection[str] = ("projector", "language_model"),
    recomputed: Recomputed = Recomputed(),
    kernels: str = "eager",
    split: Collection[int] = (),
) -> list[StepPart]:
    """Work of forward and backward of one micro-batch in bfloat16: tower, projector, the layers of each stage, all
    rankings, head. Their operations are those of `step_flops`, whose arguments these are.

    Args:
        kernels: of norms, rotary embedding and gated product in the decoder, one of `elementwise.KERNELS`.
        split: layers before which a part begins though nothing is dropped there, to stand beside a schedule's.

    Raises:
        UserError: a decoder or tower that is not modelled (`is_modelled`), or unknown kernels.
    """
    text = config.text_config
    if not is_modelled(config):
        raise UserError(f"the time of a step is modelled for {' and '.join(MODELLED)} with CLIP, not {text.model_type}")
    tiles, layouts = tiles_of(batch, geometry), layouts_of(batch, schedule)
    learns, backward = "language_model" in trainable, bool(trainable)
    repeated = len(range(text.num_hidden_layers)[: recomputed.layers]) * backward
    parts = [_tower(config, tiles, "vision_tower" in trainable, recomputed.tower)]
    parts.append(_projector(config, tiles * geometry.patches, trainable))
    edges = sorted({0, *schedule.layers, *split, text.num_hidden_layers})
    for first, stop in zip(edges, edges[1:]):
        layout = layouts[sum(layer <= first for layer in schedule.layers)]
        again = max(0, min(stop, repeated) - first)
        parts.append(_stage(text, first, stop, again, layout.seq_lens, learns, backward, kernels))
    if schedule.layers:
        parts.append(_drops(text, batch, layouts, schedule, backward, kernels))
    parts.append(_head(text, layouts[-1].tokens, len(batch.label_positions), learns, backward, kernels))
    return parts


def _backward(products: Collection[Product], weights: bool, inputs: bool = True) -> tuple[Product, ...]:
    """Products of the gradients of inputs and weights of linear maps, whose forward ``products`` are."""
    found = [Product(rows, columns, inner, times) for rows, inner, columns, times in products if inputs]
    found += [Product(inner, rows, columns, times) for rows, inner, columns, times in products if weights]
    return tuple(found)


def _times(products: Collection[Product], layers: int) -> tuple[Product, ...]:
    """The same in so many layers."""
    return tuple(product._replace(times=product.times * layers) for product in products if layers)


def _stage(
    text: Any, first: int, stop: int, again: int, lengths: list[int], learns: bool, backward: bool, kernels: str
) -> StepPart:
    """Decoder layers ``first`` to ``stop`` - 1, so many of which run ``again`` in backward."""
    tokens, layers, hidden, mlp = sum(lengths), stop - first, text.hidden_size, text.intermediate_size
    queries, keys = (heads * head_size(text) for heads in (text.num_attention_heads, key_value_heads(text)))
    maps = ((hidden, queries, 1), (hidden, keys, 2), (queries, hidden, 1), (hidden, mlp, 2), (mlp, hidden, 1))
    products = [Product(tokens, *sizes) for sizes in maps]
    attention, moved = layer_flops(text, lengths)[2], layer_bytes(text, tokens, learns, kernels)
    forward = Work(_times(products, layers), layers * attention, bytes=layers * moved.forward)
    back = Work(
        _times(_backward(products, learns), layers) + _times(products[:-1], again),
        again * attention,
        layers * attention * ATTENTION_BACKWARD,
        layers * moved.backward + again * moved.again,
    )
    return StepPart(f"layers {first}-{stop - 1}", tokens, forward, back if backward else Work())


def _drops(
    text: Any, batch: PackedBatch, layouts: list[Layout], schedule: Schedule, backward: bool, kernels: str
) -> StepPart:
    """All rankings and selections."""
    asks = [len(starts) for starts in batch.answer_starts]
    size, hidden, heads, groups = head_size(text), text.hidden_size, text.num_attention_heads, key_value_heads(text)
    forward, back = Work(), Work()
    for before, after in zip(layouts, layouts[1:]):
        moved = drop_bytes(text, before.tokens, after.tokens, kernels)
        if RANKERS[schedule.ranker].projections is None:
            moved = Moved(after.tokens * 2 * HALF * hidden, moved.backward)
        else:
            keys, rows = Product(before.tokens, hidden, groups * size), Product(max(1, sum(asks)), hidden, heads * size)
            scores = 2.0 * heads * size * sum(count * length for count, length in zip(asks, before.seq_lens))
            forward += Work((keys, rows), attention=scores)
        forward += Work(bytes=moved.forward)
        back += Work(bytes=moved.backward * backward)
    return StepPart("ranking, dropping", layouts[0].tokens, forward, back)


def _tower(config: Any, tiles: int, learns: bool, again: bool) -> StepPart:
    vision, layers = config.vision_config, used_tower_layers(config)
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    tokens = tiles * (patches + 1)
    embedding = (Product(tiles * patches, 3 * vision.patch_size**2, width),)
    maps = ((width, width, 4), (width, vision.intermediate_size, 1), (vision.intermediate_size, width, 1))
    products = [Product(tokens, *sizes) for sizes in maps]
    attention, moved = tower_attention(config, tiles), tower_layer_bytes(vision, tokens)
    forward = Work(embedding + _times(products, layers), attention, bytes=layers * moved.forward)
    if not learns:
        return StepPart("tower", tokens, forward, Work())
    back = Work(
        _backward(embedding, weights=True, inputs=False)
        + _times(_backward(products, weights=True), layers)
        + _times(products[:-1], layers * again),
        attention * again,
        attention * ATTENTION_BACKWARD,
        layers * (moved.backward + moved.again * again),
    )
    return StepPart("tower", tokens, forward, back)


def _projector(config: Any, rows: int, trainable: Collection[str]) -> StepPart:
    """The gradient goes into the first map's input only where the tower learns."""
    width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    first, second = (Product(rows, width, hidden),), (Product(rows, hidden, hidden),)
    learns, below = "projector" in trainable, "vision_tower" in trainable
    moved = projector_bytes(hidden, rows)
    back = Work(
        _backward(first, learns, below) + _backward(second, learns, learns or below),
        bytes=moved.backward * (learns or below),
    )
    return StepPart("projector", rows, Work(first + second, bytes=moved.forward), back)


def _head(text: Any, tokens: int, labels: int, learns: bool, backward: bool, kernels: str) -> StepPart:
    norm, loss = norm_bytes(text.hidden_size, tokens, learns, kernels), loss_bytes(text.vocab_size, labels)
    product = (Product(labels, text.hidden_size, text.vocab_size),)
    back = Work(_backward(product, learns), bytes=norm.backward + loss.backward) if backward else Work()
    return StepPart("head and loss", tokens, Work(product, bytes=norm.forward + loss.forward), back)
