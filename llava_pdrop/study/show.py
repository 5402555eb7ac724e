"""``llava-pdrop show``: which patches of a picture keep their image token through the drops, for one question."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from pathlib import Path

import numpy as np
from PIL import Image

from llava_pdrop.compare.survivors import Example, Sight, example, llava_sight, surviving_tokens
from llava_pdrop.data.images import load_image
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.eval.evaluate import AnswerSettings, finished, respondent_in
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.respondent import LlavaRespondent, ProcessorRespondent
from llava_pdrop.eval.subject import subject_config
from llava_pdrop.report.console import say
from llava_pdrop.report.pictures import save_picture
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import ImageSource

DRAWN = (".png", ".pdf", ".svg")
"""Endings of files that are drawn. (Without one, matplotlib adds its own.)"""


def show(
    run: str | Path,
    picture: str | Path,
    question: str,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Example:
    """Asks a model about a picture and shows which image tokens survive every stage of its schedule.

    Args:
        run: config or directory of a finished run, or the directory of any model that `attach` knows.
        picture: a file.
        out: where the drawing goes; None: nowhere.
        overrides: as on the command line; ``pyramid_drop=FILE`` gives another schedule.

    Returns:
        the answer, the picture as the model sees it, and its surviving patches (rows, columns) by stage.

    Raises:
        ConfigError: there is no finished run, or no schedule. UserError: the picture cannot be read, its tokens lie on
            no grid that this knows, or nothing can be drawn as ``out``.
    """
    file = None if out is None else Path(out)
    if file is not None and (file.suffix.lower() not in DRAWN or file.is_dir()):
        raise UserError(f"{file}: nothing is drawn: name a file that ends in .png, .pdf or .svg")
    config = subject_config(Path(run), list(overrides), asks=False)
    if config.schedule.vanilla:
        raise ConfigError(
            f"{config.file}: pyramid_drop: drops nothing, so all tokens survive: give a schedule, such as "
            "pyramid_drop=configs/schedules/pyramiddrop.yaml"
        )
    respondent = respondent_in(finished(config, writes=False), config)
    asked = ask("question", question, [Path(picture)], str(picture), gold="")

    def see(source: ImageSource, tokens: int) -> Sight:
        if isinstance(respondent, LlavaRespondent):
            return llava_sight(respondent, source)
        assert isinstance(respondent, ProcessorRespondent), "there are two kinds"
        return processor_sight(respondent, asked, tokens)

    found = example(AnswerSettings.of(config), respondent, asked, config.schedule, see)
    stages = " -> ".join(str(int(kept.sum())) for kept in found.kept)
    say(f"{question!r}: {found.answer!r}; patches that survive {config.schedule.amounts_text}: {stages}")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not save_picture(file, lambda: surviving_tokens([found]), facecolor="white"):
            raise UserError(f"{file}: nothing is drawn, as the line above says")
        say(f"picture: {file}")
    return found


def processor_sight(respondent: ProcessorRespondent, question: Question, tokens: int) -> Sight:
    """How a model with its own processor sees the picture of ``question``: one grid of patches, as the processor says
    (``image_grid_thw``), or a square one over its pixels.

    Raises:
        UserError: it is cut into tiles, or its ``tokens`` lie otherwise.
    """
    inputs, _ = respondent.inputs([respondent.prepare(question)], Schedule())
    images, pixels = respondent.processor.image_processor, inputs.get("pixel_values")
    rows = columns = isqrt(tokens)
    patch, seen = 0, None
    if "image_grid_thw" in inputs:
        merge = getattr(images, "merge_size", 1)
        rows, columns = (int(side) // merge for side in inputs["image_grid_thw"][0][1:])
        patch = merge * images.patch_size
        seen = load_image(question.record.images[0]).resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
    elif pixels is not None and pixels.ndim == 4 and len(pixels) == 1:
        patch, seen = pixels.shape[-1] // columns, unnormalised(pixels[0].numpy(), images)
    if rows * columns != tokens or seen is None:
        raise UserError(
            f"{question.record.origin}: its {tokens} image tokens lie on no single grid of patches, as "
            f"{type(respondent.processor).__name__} cuts it: show draws LLaVAs, and models that see a picture whole"
        )

    def grid(kept: Sequence[int]) -> np.ndarray:
        return np.isin(np.arange(tokens), kept).reshape(rows, columns)

    return Sight(seen, patch, grid)


def unnormalised(pixels: np.ndarray, images: object) -> Image.Image:
    """The picture of which an image processor made ``pixels`` (3, height, width)."""
    mean, std = (np.asarray(getattr(images, name, None) or 0.5) for name in ("image_mean", "image_std"))
    shown = pixels.transpose(1, 2, 0) * std + mean
    return Image.fromarray((255 * shown.clip(0, 1)).round().astype(np.uint8))
