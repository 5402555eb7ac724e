"""Tiling arithmetic and pixels of the golden directories: every recorded size, every recorded tensor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava_pdrop.data.images import fit_to_canvas, image_size, load_image, pad_to_square, preprocess, process_tiles
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.vision import load_image_processor
from tests.golden.cases import directories, other_pixels

RECORDED = [file for directory in directories() if (file := directory / "preprocess" / "geometry.json").is_file()]
MERGES = ("spatial_unpad", "spatial", "flat")
ABOUT = {"pictures", "tensors", "tensor_meaning"}
"""Keys of geometry.json beside the models'."""

UNSCALED = {"rgb", "expand2square_rgb"}
"""Recorded tensors of a picture at its own size: the same whatever the version of Pillow."""

PIXELS = [file for file in RECORDED if json.loads(file.read_text())["tensors"]]
"""Those that record pixels too: the subset in this repository has the sizes only."""


def identify(file: Path) -> str:
    return file.parents[1].name


def geometry_of(recorded: dict, merge: str = "spatial_unpad") -> ImageGeometry:
    tile, pinpoints = recorded["tile"], tuple(map(tuple, recorded["pinpoints"]))
    return ImageGeometry(tile, tile // recorded["patches_per_side"], "anyres", merge, pinpoints)


@pytest.mark.parametrize("file", RECORDED, ids=identify)
def test_every_recorded_size(file: Path, record_property) -> None:
    models = {name: entry for name, entry in json.loads(file.read_text()).items() if name not in ABOUT}
    compared = 0
    for name, recorded in models.items():
        assert recorded.keys() == {"pinpoints", "tile", "patches_per_side", "items"}, f"{name}: not compared"
        geometry = geometry_of(recorded)
        assert recorded["items"]
        for item in recorded["items"]:
            size = tuple(item["size_wh"])
            ours = measured(geometry, size)
            if "first_row" not in item:  # nothing of the grid is left
                assert ours["unpadded_rows"] <= 0 or ours["unpadded_cols"] <= 0
                del ours["first_row"], ours["first_col"]
            assert ours == item, f"{name}, {size[0]}x{size[1]}"
            compared += len(item) - 1
    assert compared
    record_property("golden_preprocess", ("picture sizes", sum(len(model["items"]) for model in models.values())))
    print(f"\n{file}: {compared} numbers of {sum(len(m['items']) for m in models.values())} picture sizes compared")


def measured(geometry: ImageGeometry, size: tuple[int, int]) -> dict:
    """What geometry.json says about a size, computed by us."""
    canvas, (rows, columns) = geometry.canvas(size), geometry.unpadded(size)
    counts = {f"n_image_tokens_{merge}": replace(geometry, merge=merge).num_tokens(size) for merge in MERGES}
    return {
        "size_wh": list(size),
        "best_resolution_wh": list(canvas),
        "grid_w": canvas[0] // geometry.tile,
        "grid_h": canvas[1] // geometry.tile,
        "n_tiles_incl_base": geometry.num_tiles(size),
        "unpadded_rows": rows.stop - rows.start,
        "unpadded_cols": columns.stop - columns.start,
        "first_row": rows.start,
        "first_col": columns.start,
        **counts,
    }


@pytest.mark.parametrize("file", PIXELS, ids=identify)
def test_every_recorded_tensor(file: Path, record_property) -> None:
    """Pixels bit for bit, and the statistics recorded beside them."""
    info = json.loads(file.read_text())
    stored = load_file(file.parent / "pixels.safetensors")
    processors = {}
    for side in (info["tiny"]["tile"], info["real"]["tile"]):
        processors[side] = load_image_processor(str(file.parents[1] / "models" / "clip56"), side)
    seen, different = set(), []
    for picture in info["pictures"]:
        path = file.parent / picture["file"]
        image = load_image(path)
        assert [*image.size] == picture["size_wh"] == [*image_size(path)]
        prefix = path.name.partition("_")[0]
        tensors, facts = ours(image, info, processors)
        assert tensors.keys() == {name.partition(".")[2] for name in stored if name.startswith(f"{prefix}.")}
        for name, tensor in tensors.items():
            assert tensor.dtype == stored[f"{prefix}.{name}"].dtype
            if not torch.equal(tensor, stored[f"{prefix}.{name}"]):
                different.append(f"{prefix}.{name}")
            seen.add(f"{prefix}.{name}")
        assert facts.keys() == picture.keys() - {"file", "size_wh"}
        for name, value in facts.items():
            if value != pytest.approx(picture[name], abs=1e-5):
                different.append(f"{prefix} {name}")
    assert seen == stored.keys() == info["tensors"].keys() and seen, (
        f"recorded but not compared: {sorted(stored.keys() - seen)}"
    )
    assert not [name for name in different if name.partition(".")[2] in UNSCALED], different
    if different:
        other_pixels(f"{', '.join(different)} have other numbers")
    record_property("golden_preprocess", ("pixel tensors", len(seen)))
    numbers = sum(tensor.numel() for tensor in stored.values())
    print(f"\n{file.parent}: {len(seen)} tensors of {len(info['pictures'])} pictures, {numbers} numbers, compared")


def ours(image: Image.Image, info: dict, processors: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the statistics that are recorded of a picture, made by us."""
    tiny, real = (geometry_of(info[name]) for name in ("tiny", "real"))
    small, large = processors[tiny.tile], processors[real.tile]
    background = tuple(int(255 * mean) for mean in small.image_mean)
    square, canvas = pad_to_square(image, background), fit_to_canvas(image, tiny.canvas(image.size))
    tiles = preprocess(image, real, large).pixels
    padded = preprocess(image, replace(real, aspect="pad", merge="flat", pinpoints=()), large).pixels[0]
    tensors = {
        "rgb": array(image),
        "square56": process_tiles([image], small)[0],
        "pad56": preprocess(image, replace(tiny, aspect="pad", merge="flat", pinpoints=()), small).pixels[0],
        "anyres56": preprocess(image, tiny, small).pixels,
        "pad336_every6": padded[:, ::6, ::6],
        "anyres336_every12": tiles[:, :, ::12, ::12],
        "expand2square_rgb": array(square),
        "resize_and_pad56_rgb": array(canvas),
    }
    facts = {
        "anyres336_shape": [*tiles.shape],
        "anyres336_mean": tiles.mean().item(),
        "anyres336_std": tiles.std().item(),
        "expand2square_background": [*background],
        "expand2square_size": [*square.size],
        "pad336_mean": padded.mean().item(),
        "best_resolution56": [*canvas.size],
    }
    return tensors, facts


def array(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture))
