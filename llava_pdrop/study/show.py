"""Which patches of a picture keep their image token through the drops, for one question: `show` for a model that
`attach` has been applied to, `show_run` behind ``llava-pdrop show``."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from math import isqrt
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from PIL import Image
from torch import Tensor, nn

from llava_pdrop.compare.survivors import Example, Sight, as_seen, llava_sight, seen_in, surviving_tokens, token_grid
from llava_pdrop.data.images import load_image, upright
from llava_pdrop.errors import ConfigError, UserError, clip
from llava_pdrop.eval.evaluate import MAX_NEW_TOKENS, AnswerSettings, answer, evaluate, finished, respondent_in
from llava_pdrop.eval.questions import Question, ask, check_asked
from llava_pdrop.eval.respondent import LlavaRespondent, ProcessorRespondent, Respondent, check_chat
from llava_pdrop.eval.subject import subject_config
from llava_pdrop.generate.plugin import attach
from llava_pdrop.generate.unhook import plugin_of
from llava_pdrop.model.vlm import geometry_of
from llava_pdrop.report.console import say
from llava_pdrop.report.pictures import figure_of, save_picture
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.fit import positions_of
from llava_pdrop.types import ImageSource

DRAWN = (".png", ".pdf", ".svg")
"""Endings of files that are drawn. (Without one, matplotlib adds its own.)"""

URL = re.compile(r"data:|[A-Za-z][A-Za-z0-9+.-]+:/")
"""How an address begins; that of a file on Windows has one letter. (`Path` leaves one of two slashes.)"""

GRIDS = {
    family: kind
    for kind, families in {
        "pixels": "llava vipllava mistral3 internvl deepseek_vl janus gemma3 paligemma",
        "tiles": "llava_next",
        "thw": "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe glm4v glm4v_moe glm46v glm_ocr video_llama_3",
    }.items()
    for family in families.split()
}
"""``model_type`` -> what says its grid of patches. Only those whose image tokens are proved to be patches row by row
(``tests/parity/test_sight.py``): the tokens of others may be learned queries, as Aria's are, or overlap, as those of
GOT-OCR2 do behind strided convolutions."""


@dataclass(frozen=True, eq=False)
class Given:
    """A picture in memory as an `ImageSource`, equal to itself only."""

    picture: Image.Image

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """The picture as a file: upright and in 8 bits, as `load_image` makes it of its own file."""
        file = BytesIO()
        plain = Image.fromarray(np.asarray(upright(self.picture)))  # without what would turn it again
        plain.save(file, "PNG")
        file.seek(0)
        return file

    def __str__(self) -> str:
        return "the picture"


class Attached(ProcessorRespondent):
    """An attached model with its processor: that one lays out all tokens, and hooks pool what is to be pooled."""

    def inputs(
        self, prepared: Sequence[tuple[str, list[Any]]], schedule: Schedule
    ) -> tuple[dict[str, Tensor], list[list[int]]]:
        return super().inputs(prepared, replace(schedule, downsample=0))


def show(model: Any, processor: Any, picture: str | Path | ImageSource | Image.Image, question: str) -> Any:
    """Asks an attached model about a picture and draws which image tokens survive every stage of its schedule.

    Args:
        model: of Hugging Face, after `attach(model, schedule)`; it is left as it was. processor: its own, with a chat
            template.
        picture: a file, or a picture that is open.

    Returns:
        the `matplotlib.figure.Figure`: question and answer, the picture as the model sees it, and what is left of it
        after every drop. ``figure.savefig("survivors.png")`` writes it.

    Raises:
        UserError: nothing is attached, or a schedule that drops nothing; the processor has no chat template, or is
            none; nothing is asked, or more than the model takes; the picture is none or cannot be read, or its tokens
            lie on no grid that this knows.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"show(model, processor, picture, question) takes a model; llava-pdrop show takes {clip(model)!r}"
        )
    plugin = plugin_of(model)
    if plugin is None:
        raise UserError(
            f"show() draws what attach() drops: attach(model, Schedule(...)) to {type(model).__name__} first"
        )
    if plugin.given.vanilla:
        raise UserError("show(): the attached schedule drops nothing, so all tokens survive: attach another one")
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(
            f"show() takes the model's processor, for text and pictures, and not a {type(processor).__name__}: "
            "AutoProcessor.from_pretrained opens it"
        )
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"show() asks by the processor's chat template, and {type(processor).__name__} has none: set chat_template"
        )
    check_chat(processor, type(processor).__name__)
    respondent = Attached(model, processor, plugin.given)
    asked = asked_of(picture, question)
    try:  # which attaches the schedule and a trace of its own, and detaches
        room = room_for(respondent, asked, plugin.given, MAX_NEW_TOKENS)
        result = evaluate(respondent, [asked], plugin.given, trace=True, max_new_tokens=room)
    finally:
        attach(model, plugin.given, plugin.trace, unchecked=plugin.unchecked)
    found = seen_in(result, sight_of(respondent, asked, len(result.steps[0].pictures[0]), plugin.given))
    return figure_of(lambda: surviving_tokens([found]))


def show_run(
    run: str | Path,
    picture: str | Path,
    question: str,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Example:
    """The same of a model in a directory, as ``llava-pdrop show`` does it.

    Args:
        run: config or directory of a finished run, or the directory of any model that `attach` knows.
        picture: a file.
        out: where the drawing goes; None: nowhere.
        overrides: as on the command line; ``pyramid_drop=FILE`` gives another schedule.

    Returns:
        the answer, the picture as the model sees it, and its surviving patches (rows, columns) by stage.

    Raises:
        ConfigError: there is no finished run, or no schedule. UserError: nothing is asked, or more than the model
            takes; the picture cannot be read, its tokens lie on no grid that this knows, or nothing can be drawn as
            ``out``.
    """
    file = None if out is None else Path(out)
    if file is not None and (file.suffix.lower() not in DRAWN or file.is_dir()):
        raise UserError(f"{file}: nothing is drawn: name a file that ends in .png, .pdf or .svg")
    asked = asked_of(picture, question)
    config = subject_config(Path(run), list(overrides), asks=False)
    schedule = config.schedule
    if schedule.vanilla:
        raise ConfigError(
            f"{config.file}: pyramid_drop: drops nothing, so all tokens survive: give a schedule, such as "
            "pyramid_drop=configs/schedules/pyramiddrop.yaml"
        )
    respondent = respondent_in(finished(config, writes=False), config)
    settings = AnswerSettings.of(config)
    room = room_for(respondent, asked, schedule, settings.max_new_tokens or MAX_NEW_TOKENS)
    result = answer(replace(settings, max_new_tokens=room), respondent, [asked], schedule, None, trace=True)
    found = seen_in(result, sight_of(respondent, asked, len(result.steps[0].pictures[0]), schedule))
    stages, drawn = (" -> ".join(map(str, counts)) for counts in (found.tokens, found.drawn))
    rest = "" if found.drawn == found.tokens else f", of which are drawn {drawn}"
    say(f"{question!r}: {found.answer!r}; image tokens that survive {schedule.amounts_text}: {stages}{rest}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not save_picture(file, lambda: surviving_tokens([found]), facecolor="white"):
            raise UserError(f"{file}: nothing is drawn, as the line above says")
        say(f"picture: {file}")
    return found


def asked_of(picture: object, question: object) -> Question:
    """A question about a picture, as somebody gave both.

    Raises:
        UserError: they are of other kinds, a URL, or nothing is asked.
    """
    if not isinstance(question, str):
        raise UserError(f"show: question must be a text, got a {type(question).__name__}")
    check_asked(question)
    source = source_of(picture)
    return ask("question", question, [source], clip(source), gold="")


def source_of(picture: object) -> ImageSource:
    """Where the bytes of ``picture`` lie: a file, a picture that is open, or what is an `ImageSource` already.

    Raises:
        UserError: it is none of these, or a URL, which is not fetched.
    """
    if isinstance(picture, Image.Image):
        return Given(picture)
    if isinstance(picture, (str, Path)):
        if URL.match(str(picture)) and not Path(picture).exists():
            raise UserError(f"{clip(picture)}: URLs are not fetched: save the picture and give a file or a PIL picture")
        return Path(picture)
    if isinstance(picture, type) or not callable(getattr(picture, "open", None)) or not isinstance(picture, Hashable):
        raise UserError(f"show: picture must be one file or one PIL picture, got a {type(picture).__name__}")
    return cast(ImageSource, picture)


def room_for(respondent: Respondent, question: Question, schedule: Schedule, wanted: int) -> int:
    """How many tokens of an answer, at most ``wanted``, fit behind the prompt.

    Raises:
        UserError: none does: the prompt alone is as long as the model takes.
    """
    most = positions_of(respondent.hf.config.get_text_config())
    if most is None:
        return wanted
    inputs, _ = respondent.inputs([respondent.prepare(question)], schedule)
    tokens = inputs["input_ids"].shape[1]
    if tokens >= most:
        raise UserError(
            f"{question.record.origin}: the question and its picture have {tokens} tokens, and the model takes {most} "
            "with the answer: ask a shorter one"
        )
    return min(wanted, most - tokens)


def sight_of(respondent: Respondent, question: Question, tokens: int, schedule: Schedule) -> Sight:
    """How ``respondent`` sees the first picture of ``question``, which has ``tokens`` image tokens before any drop.

    Raises:
        UserError: as `processor_sight`.
    """
    if isinstance(respondent, LlavaRespondent):
        return llava_sight(respondent, question.record.images[0], schedule.downsample)
    assert isinstance(respondent, ProcessorRespondent), "there are two kinds"
    return processor_sight(respondent, question, tokens, schedule.downsample)


def processor_sight(respondent: ProcessorRespondent, question: Question, tokens: int, budget: int = 0) -> Sight:
    """How a model with its own processor sees the picture of ``question``: one grid of patches over its pixels or as
    the processor says (``image_grid_thw``), or the tiles of a LLaVA-NeXT.

    Args:
        budget: as `token_grid` takes it.

    Raises:
        UserError: the model is none of `GRIDS`, the picture is cut into tiles, or its ``tokens`` lie otherwise.
    """
    config = respondent.hf.config
    kind = GRIDS.get(config.model_type)
    if kind is None:
        raise UserError(
            f"{question.record.origin}: nothing is drawn, as nobody has proved which patch an image token of "
            f"{type(respondent.hf).__name__} (model_type {config.model_type}) shows: show draws {', '.join(GRIDS)}"
        )
    inputs, _ = respondent.inputs([respondent.prepare(question)], Schedule())
    images, source = respondent.processor.image_processor, question.record.images[0]
    if kind == "tiles":
        geometry, picture = geometry_of(config), load_image(source)
        if geometry.num_tokens(picture.size) == tokens:
            return Sight(as_seen(geometry, picture, ()), geometry.patch, token_grid(geometry, picture.size, budget))
    elif kind == "pixels" and (found := _over_pixels(inputs, tokens, config)):
        rows, columns, patch, pixels = found
        seen = unnormalised(pixels, images)
        if budget:  # only LLaVAs are pooled
            return Sight(seen, patch, token_grid(geometry_of(config), seen.size, budget))
        return Sight(seen, patch, np.arange(tokens).reshape(rows, columns))
    elif kind == "thw":
        merge = int(inputs["image_merge_sizes"][0]) if "image_merge_sizes" in inputs else images.merge_size
        frames, rows, columns = (int(side) for side in inputs["image_grid_thw"][0])
        rows, columns, patch = rows // merge, columns // merge, merge * images.patch_size
        if frames == 1 and rows * columns == tokens:
            seen = load_image(source).resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
            return Sight(seen, patch, np.arange(tokens).reshape(rows, columns))
    raise UserError(
        f"{question.record.origin}: its {tokens} image tokens lie on no single grid of patches, as "
        f"{type(respondent.processor).__name__} cuts it: show draws LLaVAs, and models that see a picture whole"
    )


def _over_pixels(inputs: Mapping[str, Tensor], tokens: int, config: Any) -> tuple[int, int, int, np.ndarray] | None:
    """Rows, columns, pixels of a patch's side, and the picture (3, height, width), if ``tokens`` square patches lie
    over all of it; else None. The sides say the grid: 144 tokens of 128x72 pixels are 9 rows of 16, and not 12 of 12.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.ndim != 4 or len(pixels) != 1 or not tokens:
        return None
    picture = pixels[0].float().cpu().numpy()
    if "image_sizes" in inputs:  # of Pixtral: what lies beside and below was added for other pictures
        height, width = (int(side) for side in inputs["image_sizes"][0])
        picture = picture[:, :height, :width]
    _, height, width = picture.shape
    patch = isqrt(height * width // tokens)
    if not patch or height % patch or width % patch or height // patch * (width // patch) != tokens:
        return None
    tower = getattr(getattr(config, "vision_config", None), "patch_size", None) or patch
    own = set(tower if isinstance(tower, (list, tuple)) else [tower])
    if any(patch % side for side in own):  # towers may merge whole patches, and cut none
        return None
    return height // patch, width // patch, patch, picture


def unnormalised(pixels: np.ndarray, images: object) -> Image.Image:
    """The picture of which an image processor made ``pixels`` (3, height, width)."""
    mean, std = (np.asarray(getattr(images, name, None) or 0.5) for name in ("image_mean", "image_std"))
    shown = pixels.transpose(1, 2, 0) * std + mean
    return Image.fromarray((255 * shown.clip(0, 1)).round().astype(np.uint8))
