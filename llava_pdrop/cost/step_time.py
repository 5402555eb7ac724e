"""How long a micro-batch of training takes on a named card, stage by stage: a model, held against one H100.

Matrix products and attention are counted as `cost.flops` counts them, what lies between as `cost.elementwise` does. Two
bounds follow from a card's data sheet: all operations at its peak, all bytes at its bandwidth. No kernel is faster, and
since a step waits for one kind while the other runs, the time is their sum, at rates below the data sheet's:

    products     705 of an H100's 989 TFLOP/s (8192 x 8192 alone: 783)
    attention    `Card.attention`; for H100 250 TFLOP/s forward and 215 backward (a profiled step: 241 and 211)
    bandwidth    2.75 of an H100's 3.35 TB/s (a copy alone: 3.03)

Products and attention were chosen so that the model meets steps of three 7B shapes on one H100: it gives 6 % less to 4
% more, vanilla and dropping (playground/RESULTS.md). They are not what each kind takes: the profile has faster products
and slower copies. Other cards are assumed to reach the same shares, and their attention is assumed.

A product also takes whole waves of tiles, which short streams do not fill: that is why time falls by less than its
operations where tokens leave.

NOT in it: what `cost.elementwise` leaves out, gaps between kernels, communication, waiting for data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

from llava_pdrop.cost import elementwise
from llava_pdrop.cost.flops import CountedStep, Product, StepPart, Work, step_parts
from llava_pdrop.errors import UserError, check_name
from llava_pdrop.model.rankers import RANKERS
from llava_pdrop.runtime.device import PEAK_TFLOPS

NOTE = (
    "A model, within 6 % of the steps measured on one H100; no other card was measured (llava_pdrop/cost/step_time.py)."
)

MATRIX_SHARE = 705 / 989.4
"""Of a card's peak, that large products are taken to reach."""

BANDWIDTH_SHARE = 2.75 / 3.35
"""Of a card's bandwidth, that element-wise kernels are assumed to reach."""

TILE = (128, 256)
"""Rows and columns of the tile of a product that a multiprocessor makes at a time."""


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        flops: dense bfloat16 operations a second, the data sheet's.
        bandwidth: bytes a second to its memory, the data sheet's.
        gib: its memory.
        processors: streaming multiprocessors; each makes one tile of a product at a time.
        attention: operations a second that a fused attention kernel is taken to reach, forward and backward.
        source: of the data sheet's numbers.
    """

    flops: float
    bandwidth: float
    gib: float
    processors: int
    attention: tuple[float, float]
    source: str

    def occupied(self, product: Product) -> float:
        """Operations that it could have done during a product: its multiprocessors work in waves, and those without a
        tile in the last one wait for the others."""
        tiles = ceil(product.rows / TILE[0]) * ceil(product.columns / TILE[1])
        waves = ceil(tiles / self.processors)
        return 2.0 * waves * self.processors * TILE[0] * TILE[1] * product.inner * product.times

    def bounds(self, work: Work) -> tuple[float, float]:
        """Seconds that the operations of ``work`` take at its peak, and their bytes at its bandwidth."""
        return work.flops / self.flops, work.bytes / self.bandwidth

    def seconds(self, work: Work) -> float:
        """Seconds that the model predicts for ``work``."""
        products = sum(map(self.occupied, work.products)) / (MATRIX_SHARE * self.flops)
        attention = work.attention / self.attention[0] + work.attention_backward / self.attention[1]
        return products + attention + work.bytes / (BANDWIDTH_SHARE * self.bandwidth)


CARDS: dict[str, Card] = {
    "H100": Card(PEAK_TFLOPS["H100"] * 1e12, 3.35e12, 80, 132, (250e12, 215e12), "NVIDIA H100 data sheet, SXM5 80 GB"),
    "H200": Card(PEAK_TFLOPS["H200"] * 1e12, 4.8e12, 141, 132, (250e12, 215e12), "NVIDIA H200 data sheet, SXM 141 GB"),
    "A100": Card(PEAK_TFLOPS["A100"] * 1e12, 2.039e12, 80, 108, (190e12, 160e12), "NVIDIA A100 data sheet, SXM4 80 GB"),
}
"""Cards by the name that `runtime.device.known_gpu` gives them; a new one is a row here."""


def card_named(name: str) -> Card:
    """The card called ``name``.

    Raises:
        UserError: there is none.
    """
    check_name("--card", name, CARDS)
    return CARDS[name]


def is_modelled(config: Any) -> bool:
    """Whether the element-wise parts of a Hugging Face LLaVA config's decoder and tower are counted."""
    vision = config.vision_config
    known = vision.model_type == "clip_vision_model" and vision.hidden_act == "quick_gelu"
    return known and config.text_config.model_type in elementwise.MODELLED


def timed_parts(step: CountedStep, kernels: str = "eager", split: Collection[int] = ()) -> list[StepPart]:
    """`step_parts`, whose arguments these are, in bfloat16, with the bytes of what lies between the products.

    Args:
        kernels: of norms, rotary embedding and gated product in the decoder, one of `elementwise.KERNELS`.

    Raises:
        UserError: a decoder or tower that is not modelled (`is_modelled`), or unknown kernels.
    """
    text, learns = step.config.text_config, "language_model" in step.trainable
    if not is_modelled(step.config):
        known = " and ".join(elementwise.MODELLED)
        raise UserError(f"the time of a step is modelled for {known} with CLIP, not {text.model_type}")
    found = []
    for part in step_parts(step, split):
        moved, back = elementwise.Moved(0.0, 0.0), bool(part.backward.products)
        match part.kind:
            case "tower":
                moved = elementwise.tower_layer_bytes(step.config.vision_config, part.tokens)
            case "projector":
                moved = elementwise.projector_bytes(text.hidden_size, part.tokens)
            case "layers":
                moved = elementwise.layer_bytes(text, part.tokens, learns, kernels)
            case "ranking":
                back, tokens = bool(step.trainable), pairwise(layout.tokens for layout in step.layouts)
                for name, (before, after) in zip(step.schedule.rankers, tokens):
                    moved += elementwise.drop_bytes(text, before, after, kernels, RANKERS[name].projections is not None)
            case "head":
                moved = elementwise.norm_bytes(text.hidden_size, part.tokens, learns, kernels)
                moved += elementwise.loss_bytes(text.vocab_size, len(step.batch.label_positions))
        forward = part.forward + Work(bytes=part.layers * moved.forward)
        backward = part.backward + Work(bytes=back * (part.layers * moved.backward + part.again * moved.again))
        found.append(replace(part, forward=forward, backward=backward))
    return found
