"""Pictures: equal to the official preprocessing bit for bit, and readable whatever their format."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from llava_pdrop.data.images import (
    fit_to_canvas,
    image_size,
    load_image,
    pad_to_square,
    preprocess,
    process_tiles,
)
from llava_pdrop.geometry import PAPER_PINPOINTS_5_TILES, ImageGeometry

TINY_PINPOINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
PAD = ImageGeometry(56, 14)
ANYRES = ImageGeometry(56, 14, "anyres", "spatial_unpad", TINY_PINPOINTS)


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


@pytest.mark.parametrize("index", [0, 1, 2])
def test_pixels_equal_the_official_ones(golden, index):
    if not (golden / "preprocess" / "pixels.safetensors").exists():
        pytest.skip("pixels.safetensors is not in this reference directory")
    small = AutoImageProcessor.from_pretrained(golden / "models" / "clip56")
    large = AutoImageProcessor.from_pretrained(
        golden / "models" / "clip56", size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    expected = {
        key.partition(".")[2]: value
        for key, value in load_file(golden / "preprocess" / "pixels.safetensors").items()
        if key.startswith(f"img{index}.")
    }
    path = next((golden / "preprocess" / "images").glob(f"img{index}_*.png"))
    image = load_image(path)
    paper = ImageGeometry(336, 14, "anyres", "spatial_unpad", PAPER_PINPOINTS_5_TILES)
    background = tuple(int(255 * mean) for mean in small.image_mean)

    def array(picture):
        return torch.from_numpy(np.asarray(picture).copy())

    ours = {
        "rgb": array(image),
        "square56": process_tiles([image], small)[0],
        "pad56": preprocess(image, PAD, small).pixels[0],
        "anyres56": preprocess(image, ANYRES, small).pixels,
        "pad336_every6": preprocess(image, ImageGeometry(336, 14), large).pixels[0, :, ::6, ::6],
        "anyres336_every12": preprocess(image, paper, large).pixels[:, :, ::12, ::12],
        "expand2square_rgb": array(pad_to_square(image, background)),
        "resize_and_pad56_rgb": array(fit_to_canvas(image, ANYRES.canvas(image.size))),
    }
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert torch.equal(value, expected[name]), name
    assert image_size(path) == image.size


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 50), (50, 1), (1, 50), (1000, 3), (57, 131)])
@pytest.mark.parametrize("geometry", [PAD, ANYRES], ids=["pad", "anyres"])
def test_every_shape_gives_the_tiles_the_geometry_says(processor, geometry, size):
    sample = preprocess(Image.new("RGB", size, (250, 10, 10)), geometry, processor)
    assert sample.size == size
    assert sample.pixels.shape == (geometry.num_tiles(size), 3, 56, 56)
    middle = sample.pixels[0, :, 28, 28]
    assert middle[0] > middle[1]  # red stayed red: rows were not taken for channels


def test_a_processor_of_another_size_is_refused(processor):
    with pytest.raises(ValueError, match="makes tiles of 56x56 pixels, the model's geometry wants 112x112"):
        preprocess(Image.new("RGB", (9, 9)), ImageGeometry(112, 14), processor)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_modes_become_rgb(tmp_path, mode):
    grey = Image.linear_gradient("L").resize((20, 30))
    suffix = {"CMYK": "tif", "YCbCr": "jpg"}.get(mode, "png")
    path = tmp_path / f"picture.{suffix}"
    if mode == "I;16":
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(path)
    elif mode == "LA":
        grey.convert("LA").save(path)
    else:
        grey.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    image = load_image(path)
    assert (image.mode, image.size, image_size(path)) == ("RGB", (20, 30), (20, 30))
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(grey.convert("RGB"), dtype=int))
    assert difference.max() <= (255 if mode == "1" else 8)


def test_transparent_palette_and_first_frame(tmp_path, recwarn):
    frames = [Image.new("P", (8, 6), colour) for colour in (1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.png", transparency=bytes([0, 255, 128]))
    for name in ("a.gif", "a.png"):
        assert load_image(tmp_path / name).getpixel((3, 3)) == (200, 0, 0)
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.linear_gradient("L").resize((40, 20)).rotate(10).convert("RGB").save(path, exif=exif)
    image = load_image(path)
    assert image.size == image_size(path) == ((20, 40) if orientation > 4 else (40, 20))
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(image), np.asarray(ImageOps.exif_transpose(opened).convert("RGB")))


def test_unreadable_files_are_named(tmp_path, picture):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    short = tmp_path / "short.jpg"
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    short.write_bytes(buffer.getvalue()[:700])
    for path in (text, short, tmp_path):
        with pytest.raises(ValueError, match="cannot be read as an image") as error:
            load_image(path)
        assert str(path) in str(error.value)
    for read in (load_image, image_size):
        with pytest.raises(FileNotFoundError, match=r"none\.png: no such image"):
            read(tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"text\.png: cannot be read"):
        image_size(text)
