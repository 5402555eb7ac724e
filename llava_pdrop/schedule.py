"""When image tokens are dropped and how many: the schedule, its validation and its token counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

from llava_pdrop.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """A dropping schedule.

    After ``layers[k]`` decoder layers have run, every image keeps ``int(n * ratios[k])`` of its ``n`` ORIGINAL tokens
    (float truncation, as the official code counts), or what ``keep[k]`` says. No layers means a vanilla model.

    Source: paper section 3.2; `image_token_ratio_list` and `layer_list` of the official `pdrop_train.py`, without
    their leading 1.0.
    """

    layers: tuple[int, ...] = ()
    """Drop after this many decoder layers: strictly growing, each from 0 (before the decoder) to the number of layers -
    1. The layer with that index ranks."""
    ratios: tuple[float, ...] = ()
    """Share of the ORIGINAL image tokens that stays after each drop: one per layer, in [0, 1], never growing. 0 is an
    early exit: the layers behind it see text only."""
    ranker: str | tuple[str, ...] = "last_instruction"
    """What ranks the tokens: a key of ``RANKERS`` in ``llava_pdrop/model/rankers.py``, or a list with one per drop."""
    positions: Literal["auto", "renumber", "keep"] = "auto"
    """Position ids of the survivors: ``renumber`` closes the gaps (the paper), ``keep`` leaves them. ``auto`` is
    ``renumber``, and ``keep`` where positions have several axes (Qwen-VL)."""
    keep: tuple[int | float, ...] = ()
    """Instead of ``ratios``: a whole number is a count of tokens per picture (all where it has fewer), a number with a
    point a share of the original ones. ``1`` is one token, ``1.0`` all."""

    inject: int = 0
    """The first so many decoder layers see text only, then the image tokens enter (HiDrop). At most the first of
    ``layers``. ``positions: auto`` is ``keep`` then."""

    merge: Literal["none", "nearest"] = "none"
    """What becomes of dropped tokens: nothing (``none``), or each is averaged into the survivor of its picture that is
    ``nearest`` to it, by the cosine of hidden states. The survivor keeps its position."""

    downsample: int = 0
    """Features of every tile are averaged, before the projector, to the largest square grid of at most so many
    (576 to 16x16 for 270); 0: they are not. ``ratios`` and ``keep`` count from what is left. Needs no ``layers``."""

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        object.__setattr__(self, "keep", tuple(int(x) if isinstance(x, Integral) else float(x) for x in self.keep))
        if not isinstance(self.ranker, str):
            object.__setattr__(self, "ranker", tuple(self.ranker))
        if self.keep and self.ratios:
            raise UserError(
                "pyramid_drop.keep takes the place of pyramid_drop.ratios: give one, not both ([] takes the other away)"
            )
        self._check_layers()
        self._check_amounts("keep" if self.keep else "ratios")
        if self.positions not in ("auto", "renumber", "keep"):
            raise UserError(f"pyramid_drop.positions must be 'auto', 'renumber' or 'keep', got {self.positions!r}")
        if self.merge not in ("none", "nearest"):
            raise UserError(f"pyramid_drop.merge must be 'none' or 'nearest', got {self.merge!r}")
        if self.downsample < 0:
            raise UserError(
                f"pyramid_drop.downsample must be a number of features a tile, or 0 for all: got {self.downsample}"
            )

    def _check_types(self) -> None:
        """Of what a program gives; NumPy's numbers are as good as Python's. (A config has been checked before.)"""
        kinds: dict[str, tuple[type, str]] = {
            "layers": (Integral, "whole numbers"),
            "ratios": (Real, "numbers"),
            "keep": (Real, "numbers"),
            "ranker": (str, "names"),
        }
        for name, (kind, words) in kinds.items():
            given = getattr(self, name)
            if name == "ranker" and isinstance(given, str):
                continue
            entries = [*given] if isinstance(given, Iterable) else [None]
            if any(not isinstance(entry, kind) or isinstance(entry, bool) for entry in entries):
                one = " (or one name)" if name == "ranker" else ""
                raise UserError(f"pyramid_drop.{name} must be a list of {words}{one}, got {given!r}")
        for name in ("inject", "downsample"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise UserError(f"pyramid_drop.{name} must be a whole number, got {value!r}")

    def _check_layers(self) -> None:
        one_each: dict[str, tuple[Any, ...]] = {"keep" if self.keep else "ratios": self.amounts}
        if not isinstance(self.ranker, str):
            one_each["ranker"] = self.ranker
        for name, entries in one_each.items():
            if len(self.layers) != len(entries):
                official = " (the leading 1.0 of the official scripts is not written)" if name == "ratios" else ""
                raise UserError(
                    f"pyramid_drop.layers has {len(self.layers)} entries and pyramid_drop.{name} has {len(entries)}: "
                    f"give one {name.removesuffix('s')} per layer{official}"
                )
        if any(low >= high for low, high in zip(self.layers, self.layers[1:])):
            raise UserError(f"pyramid_drop.layers must grow from entry to entry, got {list(self.layers)}")
        if any(layer < 0 for layer in self.layers):
            raise UserError(f"pyramid_drop.layers must be at least 0, got {list(self.layers)}")
        if self.inject < 0 or (self.inject and self.inject > (*self.layers, -1)[0]):
            raise UserError(
                f"pyramid_drop.inject must be from 0 to the first of pyramid_drop.layers {list(self.layers)}, got "
                f"{self.inject}: image tokens enter before the first drop (keep: [1.0] is one that drops nothing)"
            )

    def _check_amounts(self, name: str) -> None:
        shares = [amount for amount in self.amounts if isinstance(amount, float)]
        counts = [amount for amount in self.amounts if not isinstance(amount, float)]
        if any(not 0.0 <= share <= 1.0 for share in shares):
            hint = "" if name == "ratios" else "; a count is a whole number, without a point"
            raise UserError(f"pyramid_drop.{name}: a share must lie in [0, 1], got {list(self.amounts)}{hint}")
        if any(count < 0 for count in counts):
            raise UserError(f"pyramid_drop.{name}: a count must be at least 0, got {list(self.amounts)}")
        for alike in (shares, counts):
            if any(low < high for low, high in zip(alike, alike[1:])):
                raise UserError(
                    f"pyramid_drop.{name} must not grow (they count from the original tokens), got {list(self.amounts)}"
                )

    @property
    def vanilla(self) -> bool:
        """Whether every layer sees all tokens."""
        return not self.layers and not self.downsample

    @property
    def shortening(self) -> tuple[int, ...]:
        """The layers before which a prompt loses image tokens: `layers`, and before these where pooled ones enter."""
        return (self.inject,) * bool(self.downsample) + self.layers

    @property
    def stage_starts(self) -> list[int]:
        """The layers before which a stage of a prompt begins: those in `shortening`, and where image tokens enter late
        the first one, which sees text alone, and the one before which they do."""
        return sorted((*self.shortening, *((0, self.inject) if self.inject else ())))

    @property
    def amounts(self) -> tuple[int | float, ...]:
        """What stays after each drop: shares of the original tokens, and counts where they are whole numbers."""
        return self.keep or self.ratios

    @property
    def amounts_text(self) -> str:
        """The same in words."""
        return ", ".join(f"{amount:.1%}" if isinstance(amount, float) else str(amount) for amount in self.amounts)

    @property
    def told(self) -> str:
        """Where tokens leave, in words."""
        pools = f"pools tiles to at most {self.downsample} features" if self.downsample else ""
        drops = f"drops after layers {list(self.layers)}" if self.layers or not pools else ""
        return " and ".join(filter(None, (pools, drops)))

    @property
    def rankers(self) -> tuple[str, ...]:
        """The ranker of every drop."""
        return (self.ranker,) * len(self.layers) if isinstance(self.ranker, str) else self.ranker

    def at(self, positions: Literal["renumber", "keep"]) -> Schedule:
        """The schedule with ``positions`` in the place of ``auto``; ``keep`` where image tokens enter late."""
        if self.positions != "auto":
            return self
        return replace(self, positions="keep" if self.inject else positions)

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

    def scaled_to(self, num_layers: int, depth: int = 32) -> Schedule:
        """A schedule written for ``depth`` decoder layers (the presets' 32) in one of ``num_layers``: it drops after
        ``round(l * num_layers / depth)`` instead of l layers (halves go to the even number).

        Raises:
            UserError: two drops would come at one layer, or one before a layer that is not there or cannot have it.
        """
        inject, *layers = (round(layer * num_layers / depth) for layer in (self.inject, *self.layers))
        written = f"pyramid_drop.layers {list(self.layers)}, written for {depth} layers"
        moved = f"{written}, would be {layers} of {num_layers}"
        remedy = f"set pyramid_drop.layers of {num_layers}, and pyramid_drop.depth=null"
        if len(set(layers)) < len(layers):
            raise UserError(f"{moved}: two drops at one layer; {remedy}")
        try:
            return replace(self, layers=tuple(layers), inject=inject).check(num_layers)
        except UserError as error:
            raise UserError(f"{moved}: {error}; {remedy}") from None

    def kept(self, image_tokens: int, stage: int) -> int:
        """Tokens an image of ``image_tokens`` has left after drop number ``stage``."""
        amounts = self.amounts[: stage + 1]
        return min(int(image_tokens * x) if isinstance(x, float) else min(x, image_tokens) for x in amounts)

    def stage(self, layer: int) -> int:
        """How many drops come before layer number ``layer``."""
        return sum(drop <= layer for drop in self.layers)

    def tokens_per_layer(self, image_tokens: int, num_layers: int) -> list[int]:
        """Image tokens that enter each of the ``num_layers`` decoder layers."""
        stages = [image_tokens, *(self.kept(image_tokens, drop) for drop in range(len(self.layers)))]
        return [stages[self.stage(layer)] if layer >= self.inject else 0 for layer in range(num_layers)]

    def average_ratio(self, num_layers: int, image_tokens: int | None = None) -> float:
        """Mean share of image tokens over the layers (0.469 for the paper's schedule), of an image of ``image_tokens``
        where the schedule counts tokens.

        Raises:
            UserError: it counts tokens, and ``image_tokens`` is not given.
        """
        shares = [1.0]
        for amount in self.amounts:
            if not isinstance(amount, float) and image_tokens is None:
                raise UserError(
                    f"pyramid_drop.keep {list(self.keep)} counts tokens, so what it averages depends on the picture: "
                    "give shares, such as 0.5"
                )
            share = amount if isinstance(amount, float) else min(1.0, amount / max(1, image_tokens or 0))
            shares.append(min(shares[-1], share))
        edges = (*self.layers, num_layers)
        spans = [edges[0] - self.inject, *(high - low for low, high in zip(edges, edges[1:]))]
        return sum(share * span for share, span in zip(shares, spans)) / num_layers

    def single_drop(self, layer: int, num_layers: int, ranker: str | tuple[str, ...]) -> Schedule:
        """A schedule with one drop after ``layer`` layers and the same average share of image tokens, e.g. FastV.

        Raises:
            UserError: so many tokens have passed before ``layer`` that no ratio >= 0 gives that average, or the
                schedule counts tokens.
        """
        ratio = (self.average_ratio(num_layers) * num_layers - layer) / (num_layers - layer)
        if ratio < 0:
            raise UserError(
                f"a single drop after layer {layer} of {num_layers} cannot average "
                f"{self.average_ratio(num_layers):.3f} of the image tokens"
            )
        ranker = ranker if isinstance(ranker, str) else ranker[:1]
        return replace(self, layers=(layer,), ratios=(ratio,), ranker=ranker, keep=(), inject=0)

    def to_dict(self) -> dict[str, Any]:
        """The ``pyramid_drop`` section of a config.json or YAML file. Of the keys that came later only those are in it
        that are used: older schedules are written as they were."""
        section = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        unused = {"keep": [], "inject": 0, "merge": "none", "downsample": 0}
        return {name: value for name, value in section.items() if name not in unused or value != unused[name]}

    @staticmethod
    def from_dict(section: Mapping[str, Any] | None) -> Schedule:
        """The inverse of `to_dict`; ``None`` is the vanilla schedule."""
        return Schedule(**section) if section else Schedule()


def image_tokens_by_stage(totals: Sequence[int], schedule: Schedule) -> list[int]:
    """Image tokens of a set of images before any drop and after each one."""
    return [sum(totals), *(sum(schedule.kept(n, k) for n in totals) for k in range(len(schedule.layers)))]
