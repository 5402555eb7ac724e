"""Image tokens are drawn where they belong: what changes in a patch changes its own token most, in every family that
`show` draws; the others are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from llava_pdrop.errors import UserError
from llava_pdrop.eval.questions import ask
from llava_pdrop.generate.families import ATTACHABLE
from llava_pdrop.study.show import GRIDS, processor_sight
from tests.families import FAMILIES
from tests.messages import says
from tests.parity.test_families import model_of

WHOLE = [name for name in FAMILIES if GRIDS.get("llava" if name == "pixtral" else name) is not None]
SIZES = {"mistral3": (16, 40), "pixtral": (16, 40), "llava_next": (30, 50)}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (50, 30), (200, 30, 30)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def shown_by(name: str, model: Any, size: tuple[int, int] | None = None) -> tuple[dict[str, Tensor], int]:
    """The inputs of one picture, and how many image tokens it has."""
    family = FAMILIES[name]
    size = size or SIZES.get(name, family.sizes[0] if family.sizes[0] == (1, 1) else family.sizes[-1])
    shown = family.show(model, size, torch.Generator().manual_seed(0))
    return shown.inputs, sum(map(len, shown.pictures))


def sight_by(model: Any, inputs: dict[str, Tensor], tokens: int, picture: Path) -> Any:
    images = SimpleNamespace(merge_size=2, patch_size=4)
    respondent: Any = SimpleNamespace(
        hf=model,
        processor=SimpleNamespace(image_processor=images),
        prepare=lambda question: question,
        inputs=lambda prepared, schedule: (inputs, [[tokens]]),
    )
    return processor_sight(respondent, ask("q", "?", [picture], "q", ""), tokens)


def features(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """(N, D), as they enter the decoder."""
    own = model if hasattr(model, "get_image_features") else model.model
    with torch.no_grad():
        found = own.get_image_features(**inputs).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in found])


def changed(inputs: dict[str, Tensor], sight: Any, row: int, column: int) -> dict[str, Tensor]:
    """The inputs of the same picture with one patch drawn anew."""
    pixels, patch = inputs["pixel_values"].clone(), sight.patch
    place = slice(row * patch, (row + 1) * patch), slice(column * patch, (column + 1) * patch)
    if "image_grid_thw" in inputs:  # blocks of 2 by 2 patches, row by row (the test below)
        cell = row * sight.token_RC.shape[1] + column
        part = pixels[4 * cell : 4 * cell + 4]
    elif pixels.ndim == 5:  # the whole picture, then its tiles row by row
        side, columns = pixels.shape[-1], sight.picture.width // pixels.shape[-1]
        tile = 1 + place[0].start // side * columns + place[1].start // side
        inside = (slice(own.start % side, own.start % side + patch) for own in place)
        part = pixels[0, tile][:, *inside]
    else:
        part = pixels[0][:, *place]
    part += 3 * torch.randn(part.shape, generator=torch.Generator().manual_seed(1))
    return inputs | {"pixel_values": pixels}


@pytest.mark.parametrize("name", WHOLE)
def test_a_patch_changes_its_own_token_most(name: str, picture: Path) -> None:
    model = model_of(name)
    inputs, tokens = shown_by(name, model)
    sight, before = sight_by(model, inputs, tokens, picture), features(model, inputs)
    assert len(before) == tokens and sight.token_RC.max() < tokens
    drawn = np.argwhere(sight.token_RC >= 0).tolist()
    assert len(drawn) == tokens or name == "llava_next"
    found = [(features(model, changed(inputs, sight, *place)) - before).norm(dim=1) for place in drawn]
    most = [int(change.argmax()) for change in found]
    assert most == [int(sight.token_RC[row, column]) for row, column in drawn]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WHOLE])
def test_a_family_without_a_proof_is_refused(name: str, picture: Path) -> None:
    """Aria's tokens are learned queries; they may be a square number. GOT-OCR2's overlap by strided convolutions."""
    model = model_of(name)
    assert model.config.model_type == name
    with pytest.raises(UserError, match=says("nothing is drawn", name, type(model).__name__)):
        sight_by(model, {"pixel_values": torch.zeros(1, 3, 28, 28)}, 16, picture)


def test_every_family_is_either_drawn_or_refused() -> None:
    assert set(ATTACHABLE) <= set(FAMILIES) and set(GRIDS) <= set(ATTACHABLE)
    assert set(ATTACHABLE) - set(GRIDS) == {
        "llava_next_video", "llava_onevision", "video_llava", "smolvlm", "idefics3", "got_ocr2", "aria",
    }  # fmt: skip


@pytest.mark.parametrize("size", [(32, 128), (72, 128), (24, 24), (8, 16)])
def test_the_sides_of_the_pixels_say_the_grid(size: tuple[int, int], picture: Path) -> None:
    """A square number of tokens is no square: 4 rows of 16 patches are 64."""
    model = model_of("pixtral")
    inputs, tokens = shown_by("pixtral", model, size)
    sight = sight_by(model, inputs, tokens, picture)
    assert sight.patch == 8 and sight.token_RC.shape == (size[0] // 8, size[1] // 8)
    assert sight.picture.size == size[::-1]


def test_what_was_added_beside_a_picture_is_not_drawn(picture: Path) -> None:
    model = model_of("pixtral")
    inputs, tokens = shown_by("pixtral", model, (16, 40))
    inputs["pixel_values"] = torch.nn.functional.pad(inputs["pixel_values"], (0, 24, 0, 48))
    assert sight_by(model, inputs, tokens, picture).token_RC.shape == (2, 5)


@pytest.mark.parametrize(("size", "tokens"), [((32, 128), 8), ((30, 40), 12), ((32, 32), 64), ((32, 32), 17)])
def test_other_numbers_of_tokens_are_refused(size: tuple[int, int], tokens: int, picture: Path) -> None:
    """8 are no squares, 64 would be half patches of the tower, 17 are one more than its patches."""
    model = model_of("pixtral")
    with pytest.raises(UserError, match=says("image tokens", "no single grid")):
        sight_by(model, {"pixel_values": torch.zeros(1, 3, *size)}, tokens, picture)


@pytest.mark.parametrize("kind", ["Qwen2VL", "Glm4v", "Glm46V", "VideoLlama3"])
def test_processors_lay_out_a_grid_in_blocks(kind: str) -> None:
    """Row by row, each block the patches that become one token."""
    images = getattr(transformers, f"{kind}ImageProcessorPil")(
        patch_size=4, merge_size=2, do_resize=False, do_normalize=False
    )
    for row, column in ((0, 0), (1, 2), (2, 1)):
        shown = np.zeros((24, 32, 3), np.uint8)
        shown[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 255
        inputs = images(Image.fromarray(shown), return_tensors="pt")
        assert inputs["image_grid_thw"].tolist() == [[1, 6, 8]]
        lit = (inputs["pixel_values"] > 0.5).all(1).nonzero()[:, 0].tolist()
        first = 4 * (4 * row + column)
        assert lit == [first, first + 1, first + 2, first + 3]
