"""Image files -> `ImageInput`: RGB, then one padded square (LLaVA-1.5) or whole picture plus tiles (LLaVA-NeXT).

How many tiles and tokens come out is decided by `llava_pdrop.geometry` alone. Resizing is PIL's and the last step the
Hugging Face processor's, so pixels are bit for bit those of LLaVA's `process_images`.
"""

from __future__ import annotations

import math
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import ImageInput

EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the picture upright; 5 to 8 swap width and height."""

READ_ERRORS = (
    Image.DecompressionBombError,
    EOFError,
    IndexError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What PIL and its decoders raise for files that are no pictures, cut short or broken."""


def load_image(path: str | Path) -> Image.Image:
    """The picture in a file, upright, as RGB; the first frame of an animation.

    Transparency is ignored (the colours below it are used, as LLaVA does); 16-bit greys are scaled to 8 bits.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            orientation = _orientation(image)
            image.load()
            return _to_rgb(image.transpose(TURNS[orientation]) if orientation in TURNS else image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; check the image root") from None
    except READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None


@lru_cache(maxsize=1 << 20)
def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) `load_image` will return, from the file's header alone.

    Raises:
        FileNotFoundError, ValueError: as `load_image`, as far as the header tells.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; check the image root") from None
    except READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None


def preprocess(image: Image.Image, geometry: ImageGeometry, processor: BaseImageProcessor) -> ImageInput:
    """A picture as the tower wants it: `geometry.num_tiles` tiles of (3, tile, tile).

    Raises:
        ValueError: the processor's output is not of the geometry's tile size.
    """
    if geometry.aspect == "anyres":
        # PIL's default filter, spelled out: the tiles must not change if PIL changes its mind
        whole = image.resize((geometry.tile, geometry.tile), Image.Resampling.BICUBIC)
        tiles = [whole, *_tiles(fit_to_canvas(image, geometry.canvas(image.size)), geometry.tile)]
    else:
        tiles = [pad_to_square(image, tuple(int(255 * mean) for mean in processor.image_mean))]
    pixels = process_tiles(tiles, processor)
    if pixels.shape[-2:] != (geometry.tile, geometry.tile):
        raise ValueError(
            f"the image processor makes tiles of {pixels.shape[-1]}x{pixels.shape[-2]} pixels, the model's geometry "
            f"wants {geometry.tile}x{geometry.tile}; use the processor that belongs to the vision tower"
        )
    return ImageInput(pixels=pixels, size=image.size)


def process_tiles(tiles: list[Image.Image], processor: BaseImageProcessor) -> torch.Tensor:
    """RGB pictures through the tower's processor, each on its own: (tiles, 3, height, width) float32.

    They go in as arrays whose layout is stated, because a picture 1 or 3 pixels high would be taken for channels first.
    """
    arrays = [np.asarray(tile) for tile in tiles]
    return processor(arrays, input_data_format="channels_last", return_tensors="pt")["pixel_values"].float()


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture centred on a square of its longer side."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def fit_to_canvas(image: Image.Image, canvas: tuple[int, int]) -> Image.Image:
    """The picture scaled to touch the edges of ``canvas`` (width, height), centred on black."""
    width, height = image.size
    by_width, by_height = canvas[0] / width, canvas[1] / height
    if by_width < by_height:
        fitted = canvas[0], min(math.ceil(height * by_width), canvas[1])
    else:
        fitted = min(math.ceil(width * by_height), canvas[0]), canvas[1]
    result = Image.new("RGB", canvas, (0, 0, 0))
    corner = (canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2
    result.paste(image.resize(fitted, Image.Resampling.BICUBIC), corner)
    return result


def _tiles(canvas: Image.Image, side: int) -> list[Image.Image]:
    """The canvas cut into squares, row by row."""
    columns, rows = canvas.width // side, canvas.height // side
    return [
        canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(rows) for x in range(columns)
    ]


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened, not yet decoded picture. Of a PNG only what stands before the pixels counts:
    PIL would have to decode all of it to look behind them, and header and picture must agree."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these at 255
        grey = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if grey.max() > 255 else 1.0
        image = Image.fromarray((grey * scale).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # by way of the palette's own alpha, which PIL otherwise warns about
        image = image.convert("RGBA")
    return image.convert("RGB")
