"""When image tokens are dropped and how many: the schedule, its validation and its token counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from llava_pdrop.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """A dropping schedule.

    After ``layers[k]`` decoder layers have run, every image keeps ``int(n * ratios[k])`` of its ``n`` ORIGINAL tokens
    (float truncation, as the official code counts). No layers means a vanilla model.

    Source: paper section 3.2; `image_token_ratio_list` and `layer_list` of the official `pdrop_train.py`, without
    their leading 1.0.
    """

    layers: tuple[int, ...] = ()
    """Drop after this many decoder layers: strictly growing, each from 1 to the number of layers - 1. The layer with
    that index ranks."""
    ratios: tuple[float, ...] = ()
    """Share of the ORIGINAL image tokens that stays after each drop: one per layer, in [0, 1], never growing."""
    ranker: str = "last_instruction"
    """What ranks the tokens: a key of ``RANKERS`` in ``llava_pdrop/model/rankers.py``."""
    positions: Literal["auto", "renumber", "keep"] = "auto"
    """Position ids of the survivors: ``renumber`` closes the gaps (the paper), ``keep`` leaves them. ``auto`` is
    ``renumber``, and ``keep`` where positions have several axes (Qwen-VL)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        if len(self.layers) != len(self.ratios):
            raise UserError(
                f"pyramid_drop.layers has {len(self.layers)} entries and pyramid_drop.ratios has {len(self.ratios)}: "
                "give one ratio per layer (the leading 1.0 of the official scripts is not written)"
            )
        if any(low >= high for low, high in zip(self.layers, self.layers[1:])):
            raise UserError(f"pyramid_drop.layers must grow from entry to entry, got {list(self.layers)}")
        if any(layer < 1 for layer in self.layers):
            raise UserError(f"pyramid_drop.layers must be at least 1, got {list(self.layers)}")
        if any(not 0.0 <= ratio <= 1.0 for ratio in self.ratios):
            raise UserError(f"pyramid_drop.ratios must lie in [0, 1], got {list(self.ratios)}")
        if any(low < high for low, high in zip(self.ratios, self.ratios[1:])):
            raise UserError(
                f"pyramid_drop.ratios must not grow (they count from the original tokens), got {list(self.ratios)}"
            )
        if self.positions not in ("auto", "renumber", "keep"):
            raise UserError(f"pyramid_drop.positions must be 'auto', 'renumber' or 'keep', got {self.positions!r}")

    @property
    def rankers(self) -> tuple[str, ...]:
        """The ranker of every drop."""
        return (self.ranker,) * len(self.layers)

    def at(self, positions: Literal["renumber", "keep"]) -> Schedule:
        """The schedule with ``positions`` in the place of ``auto``."""
        return replace(self, positions=positions) if self.positions == "auto" else self

    def check(self, num_layers: int) -> Schedule:
        """Returns the schedule itself if it fits a decoder of ``num_layers`` layers.

        Raises:
            UserError: a drop would come after the last layer.
        """
        if self.layers and self.layers[-1] >= num_layers:
            raise UserError(
                f"pyramid_drop.layers holds {self.layers[-1]}, but the decoder has {num_layers} layers: "
                f"the last possible entry is {num_layers - 1}"
            )
        return self

    def kept(self, image_tokens: int, stage: int) -> int:
        """Tokens an image of ``image_tokens`` has left after drop number ``stage``."""
        return int(image_tokens * self.ratios[stage])

    def tokens_per_layer(self, image_tokens: int, num_layers: int) -> list[int]:
        """Image tokens that enter each of the ``num_layers`` decoder layers."""
        tokens, now = [], image_tokens
        for layer in range(num_layers):
            if layer in self.layers:
                now = self.kept(image_tokens, self.layers.index(layer))
            tokens.append(now)
        return tokens

    def average_ratio(self, num_layers: int) -> float:
        """Mean share of image tokens over the layers (0.469 for the paper's schedule)."""
        edges = (*self.layers, num_layers)
        shares = (1.0, *self.ratios)
        spans = [edges[0], *(high - low for low, high in zip(edges, edges[1:]))]
        return sum(share * span for share, span in zip(shares, spans)) / num_layers

    def single_drop(self, layer: int, num_layers: int, ranker: str) -> Schedule:
        """A schedule with one drop after ``layer`` layers and the same average share of image tokens, e.g. FastV.

        Raises:
            UserError: so many tokens have passed before ``layer`` that no ratio >= 0 gives that average.
        """
        ratio = (self.average_ratio(num_layers) * num_layers - layer) / (num_layers - layer)
        if ratio < 0:
            raise UserError(
                f"a single drop after layer {layer} of {num_layers} cannot average "
                f"{self.average_ratio(num_layers):.3f} of the image tokens"
            )
        return replace(self, layers=(layer,), ratios=(ratio,), ranker=ranker)

    def to_dict(self) -> dict[str, Any]:
        """The ``pyramid_drop`` section of a config.json or YAML file."""
        return {**asdict(self), "layers": list(self.layers), "ratios": list(self.ratios)}

    @staticmethod
    def from_dict(section: Mapping[str, Any] | None) -> Schedule:
        """The inverse of `to_dict`; ``None`` is the vanilla schedule."""
        return Schedule(**section) if section else Schedule()


def image_tokens_by_stage(totals: Sequence[int], schedule: Schedule) -> list[int]:
    """Image tokens of a set of images before any drop and after each one."""
    return [sum(totals), *(sum(schedule.kept(n, k) for n in totals) for k in range(len(schedule.layers)))]
