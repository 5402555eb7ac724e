"""The model classes that `attach` has been proved on, one entry each (``llava-pdrop families`` prints the table; the
one in ``README.md`` beside this file is made from it, see ``tests/unit/generate/test_families.py``).

Queries, keys, masks and positions are taken from the model itself, so an entry only says what cannot be seen there:
what one picture is, since every picture has its own budget, and whether positions can be numbered anew. A class is
added by its entry here and a tiny model of it in ``tests/families.py``, which ``tests/parity/test_families.py`` tries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from llava_pdrop.errors import UserError
from llava_pdrop.model.attention import OLDEST, is_older
from llava_pdrop.model.decoder import COVERED
from llava_pdrop.schedule import Schedule

LLAMA_LIKE = COVERED
"""Text decoders proved in every class that takes any of them."""

OTHERS = (
    "cohere", "cohere2", "gemma", "gemma2", "glm", "glm4", "gpt_oss", "granite", "nemotron", "olmo2", "olmoe", "phi3",
    "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
"""Text decoders proved inside of a LLaVA."""


@dataclass(frozen=True)
class Family:
    """What `attach` has to know of a class.

    Attributes:
        unit: how the placeholders of a prompt are cut into pictures, a key of ``pictures.UNITS``.
        picture: the same in words.
        decoders: ``model_type`` of the text decoders it is proved with.
        clip: how the placeholders of a video are cut into clips; None: the class has no videos apart from pictures.
        positions: what ``positions: auto`` means; with ``keep`` there is nothing to number anew: positions have several
            axes.
        shared: pictures and clips have the same placeholder.
        causal: False where the prompt is not masked causally, so that only the model can make its mask.
        first_drop: the first layer that may drop, given the config.
        since: the first release of transformers where the class itself is right; with an older one it is refused.
    """

    unit: str
    picture: str
    decoders: tuple[str, ...]
    clip: str | None = None
    positions: Literal["renumber", "keep"] = "renumber"
    shared: bool = False
    causal: bool = True
    first_drop: Callable[[Any], int] = lambda config: 0
    since: str = OLDEST


def _behind_deepstack(config: Any) -> int:
    """Qwen3-VL adds features of the tower to the image tokens behind its first layers: none of them may be gone yet."""
    return len(config.vision_config.deepstack_visual_indexes)


def _mrope(decoder: str, **options: Any) -> Family:
    return Family("feature", "an entry of image_grid_thw", (decoder,), clip="feature", positions="keep", **options)


_TILED = "an entry of image_sizes: the whole picture, its tiles and newlines"

ATTACHABLE: dict[str, Family] = {
    "llava": Family("feature", "an entry of pixel_values", (*LLAMA_LIKE, *OTHERS)),
    "llava_next": Family("feature", _TILED, LLAMA_LIKE),
    "llava_next_video": Family("feature", _TILED, LLAMA_LIKE, clip="feature", since="5.18"),
    "llava_onevision": Family("feature", _TILED, LLAMA_LIKE, clip="feature", since="5.18"),
    "video_llava": Family("feature", "an entry of pixel_values_images", LLAMA_LIKE, clip="frames", since="5.21"),
    "vipllava": Family("feature", "an entry of pixel_values", LLAMA_LIKE, since="5.23"),
    "internvl": Family("run", "what stands between <img> and </img>: all its tiles; a frame of a video", LLAMA_LIKE),
    "mistral3": Family("feature", "an entry of image_sizes: all its rows, without their [IMG_BREAK]", LLAMA_LIKE),
    "qwen2_vl": _mrope("qwen2_vl_text"),
    "qwen2_5_vl": _mrope("qwen2_5_vl_text"),
    "qwen3_vl": _mrope("qwen3_vl_text", first_drop=_behind_deepstack),
    "qwen3_vl_moe": _mrope("qwen3_vl_moe_text", first_drop=_behind_deepstack),
    "glm4v": _mrope("glm4v_text", shared=True),
    "glm4v_moe": _mrope("glm4v_moe_text", shared=True),
    "glm46v": _mrope("glm4v_text", shared=True),
    "glm_ocr": _mrope("glm_ocr_text", shared=True),
    "video_llama_3": Family("feature", "an entry of image_grid_thw", LLAMA_LIKE, clip="feature"),
    "got_ocr2": Family("run", "what stands between <img> and </img>: all its tiles", ("qwen2",)),
    "deepseek_vl": Family("feature", "an entry of pixel_values", ("llama",)),
    "janus": Family("feature", "an entry of pixel_values", ("llama",)),
    "smolvlm": Family(
        "marks", "all tiles up to the one marked <global-img>; a frame of a video", LLAMA_LIKE, since="5.21"
    ),
    "idefics3": Family("marks", "all tiles up to the one marked <global-img>", LLAMA_LIKE),
    "gemma3": Family(
        "feature", "an entry of pixel_values (a crop of pan-and-scan too)", ("gemma3_text",), causal=False
    ),
    "paligemma": Family("feature", "an entry of pixel_values", ("gemma", "gemma2"), causal=False),
    "aria": Family(
        "apart", "an entry of pixel_values; not several side by side, which may be crops", ("aria_text",), since="5.20"
    ),
}
"""``model_type`` -> what `attach` has to know."""

DECODERS_SINCE = {"gemma2": "5.21"}
"""Text decoder -> the first release of transformers where it is right."""

HEADERS = ("model_type", "a picture, which has its own budget", "text decoders", "clips", "positions", "transformers")


def rows() -> list[tuple[str, ...]]:
    """The table of `ATTACHABLE`, a row per class, under `HEADERS`."""
    return [
        (
            kind,
            family.picture,
            ", ".join(family.decoders),
            "one picture each" if family.clip else "",
            "keep" if family.positions == "keep" else "renumber (default), keep",
            f"from {family.since} on",
        )
        for kind, family in ATTACHABLE.items()
    ]


UNCHECKED = Family("apart", "a run of placeholders, one per feature map of the tower", ())
"""What is taken for granted of a class that nobody has tried (``attach(..., unchecked=True)``)."""


def family_of(model: nn.Module, decoder: nn.Module, unchecked: bool) -> Family:
    """The entry of ``model``, whose text decoder is ``decoder``.

    Raises:
        UserError: the class, or the class with this decoder, has no entry, and ``unchecked`` is False.
    """
    config: Any = model.config
    kind, text = config.model_type, decoder.config.model_type  # type: ignore[union-attr]
    own = any(base.__module__.startswith(f"transformers.models.{kind}.") for base in type(model).__mro__)
    family = ATTACHABLE.get(kind) if own else None
    if unchecked:
        return family or UNCHECKED
    if family is None:
        raise UserError(
            f"attach() has not been proved on {type(model).__name__} (model_type {kind}): `llava-pdrop families` lists "
            "the classes it has been proved on; unchecked=True tries it all the same"
        )
    if text not in family.decoders:
        raise UserError(
            f"attach() has not been proved on {type(model).__name__} with a text decoder of type {text}, only with "
            f"{', '.join(family.decoders)}; unchecked=True tries it all the same"
        )
    for what, since in ((type(model).__name__, family.since), (text, DECODERS_SINCE.get(text, OLDEST))):
        if is_older(since):
            raise UserError(
                f"attach() takes {what} from transformers {since} on, which computes it otherwise than older releases: "
                f"pip install 'transformers>={since}'"
            )
    return family


def resolved(schedule: Schedule, family: Family, model: nn.Module) -> Schedule:
    """``schedule`` with the positions of ``family`` where it leaves them open.

    Raises:
        UserError: it asks for what has no meaning in this family, or drops too early.
    """
    name = type(model).__name__
    if family.positions == "keep" and schedule.positions == "renumber":
        raise UserError(
            f"pyramid_drop.positions: renumber has no meaning in {name}, whose positions have several axes: set "
            "'keep' or leave it out"
        )
    first = family.first_drop(model.config)
    if schedule.layers and schedule.layers[0] < first:
        raise UserError(
            f"pyramid_drop.layers holds {schedule.layers[0]}, but {name} adds features to its image tokens in its "
            f"first {first} layers: the first possible entry is {first}"
        )
    if schedule.inject and first:
        raise UserError(
            f"pyramid_drop.inject must be 0: {name} adds features to its image tokens in its first {first} layers"
        )
    return schedule.at(family.positions)
