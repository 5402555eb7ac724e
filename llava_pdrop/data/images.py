"""Pictures -> `ImageInput`: RGB, then one padded square (LLaVA-1.5) or whole picture plus tiles (LLaVA-NeXT).

How many tiles and tokens come out is decided by `llava_pdrop.geometry` alone. Resizing is PIL's and the last step the
Hugging Face processor's, so pixels are bit for bit those of LLaVA's `process_images`.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers import BaseImageProcessor

from llava_pdrop.errors import MissingFileError, UserError, clip
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import ImageInput, ImageSource

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

LONGEST_SIDE = 65_535
"""Pixels of the longer side of a picture that is taken, the most that a JPEG can have. Together with PIL's limit on all
pixels it bounds the memory that a picture needs: its own pixels, and a few hundred bytes for each row of a square."""

BAND = 1 << 22
"""Pixels of a padded square that are there at a time."""

READ_ERRORS = (
    Image.DecompressionBombError,
    EOFError,
    IndexError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What PIL and its decoders raise for files that are no pictures, cut short or broken."""


def load_image(source: str | Path | ImageSource) -> Image.Image:
    """The picture in a file, upright, as RGB; the first frame of an animation.

    Two things differ from LLaVA's ``Image.open(path).convert("RGB")``: pictures are turned as their EXIF orientation
    says, and 16-bit greys are scaled to 8 bits instead of clipped at 255. Transparency is ignored as there: the colours
    below it are used.

    Raises:
        MissingFileError: no such file.
        UserError: the file cannot be read as a picture, has more pixels than PIL accepts (twice
            ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million) or a longer side than `LONGEST_SIDE`, is larger than the memory
            that is left, or has values that are no colours; the message names it.
    """
    with _opened(source) as image:
        return _upright(image)


def upright(picture: Image.Image, name: str = "the picture") -> Image.Image:
    """`load_image` of a picture that somebody has opened, of an animation the frame where it stands. It stays open.

    Raises:
        UserError: as `load_image`; the message calls it ``name``. Also where it is closed.
    """
    with _named(name):
        try:
            _check_sides(picture)
            picture.load()  # so that EXIF behind the pixels of a PNG counts at the first look as it does at the next
            return _upright(picture)
        except (AssertionError, AttributeError):  # what PIL meets where it looks for the file
            raise UserError("cannot be read as an image, its file is closed; open it again") from None


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    image.load()
    kind = "I;16" if image.format == "PPM" and image.mode == "I" else image.mode  # PIL scales them to 65535
    return _to_rgb(image.transpose(TURNS[orientation]) if orientation in TURNS else image, kind)


def image_size(source: str | Path | ImageSource) -> tuple[int, int]:
    """(width, height) `load_image` will return, from the file's header alone.

    Raises:
        MissingFileError, UserError: as `load_image`, as far as the header tells.
    """
    return image_header(source)[0]


def image_header(source: str | Path | ImageSource) -> tuple[tuple[int, int], str]:
    """`image_size`, and PIL's mode of the picture as it is stored."""
    with _opened(source) as image:
        width, height = image.size
        turned = _orientation(image) in (5, 6, 7, 8)
        return ((height, width) if turned else (width, height)), image.mode


@contextmanager
def _opened(source: str | Path | ImageSource) -> Iterator[Image.Image]:
    """The picture with its header read; errors in the body of the ``with`` statement name the source too."""
    source = Path(source) if isinstance(source, str) else source
    with _named(clip(source), source), source.open("rb") as file, Image.open(file) as image:
        _check_sides(image)
        yield image


def _check_sides(image: Image.Image) -> None:
    if max(image.size) > LONGEST_SIDE:
        raise Image.DecompressionBombError(
            f"a side of {max(image.size):,} pixels, and at most {LONGEST_SIDE:,} are taken"
        )


@contextmanager
def _named(name: str, source: ImageSource | None = None) -> Iterator[None]:
    """What goes wrong with a picture in the body of the ``with`` statement as a `UserError` that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except MemoryError:
        raise UserError(
            f"{name}: cannot be read as an image, memory does not suffice for it; make it smaller"
        ) from None
    except FileNotFoundError:
        raise MissingFileError(f"{name}: no such image; check the image root") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: cannot be read as an image, it is too large ({error}); make it smaller") from None
    except UnidentifiedImageError as error:
        reason = _reason(error) if source is None else _contents(source)
        raise UserError(f"{name}: cannot be read as an image ({reason}); replace or remove it") from None
    except READ_ERRORS as error:
        raise UserError(f"{name}: cannot be read as an image ({_reason(error)}); replace or remove it") from None


def _reason(error: BaseException) -> str:
    """What a decoder says; what the system says of a file repeats its name, which may be long."""
    return clip(error.strerror if isinstance(error, OSError) and error.strerror is not None else error)


def _contents(source: ImageSource) -> str:
    with source.open("rb") as file:
        return "its format is unknown" if file.read(1) else "the file is empty"


def preprocess(image: Image.Image, geometry: ImageGeometry, processor: BaseImageProcessor) -> ImageInput:
    """A picture as the tower wants it: `geometry.num_tiles` tiles of (3, tile, tile).

    Raises:
        UserError: the processor's output is not of the geometry's tile size, or memory does not suffice.
    """
    try:
        pixels = process_tiles(_pictures(image, geometry, processor), processor)
    except MemoryError:
        width, height = image.size
        raise UserError(f"memory does not suffice for a picture of {width}x{height} pixels; make it smaller") from None
    if pixels.shape[-2:] != (geometry.tile, geometry.tile):
        raise UserError(
            f"the image processor makes tiles of {pixels.shape[-1]}x{pixels.shape[-2]} pixels, the model's geometry "
            f"wants {geometry.tile}x{geometry.tile}; use the processor that belongs to the vision tower"
        )
    return ImageInput(pixels=pixels, size=image.size)


def _pictures(image: Image.Image, geometry: ImageGeometry, processor: BaseImageProcessor) -> list[Image.Image]:
    """The tiles as the processor is given them."""
    if geometry.aspect == "anyres":
        # PIL's default filter, spelled out: the tiles must not change if PIL changes its mind
        whole = image.resize((geometry.tile, geometry.tile), Image.Resampling.BICUBIC)
        return [whole, *_tiles(fit_to_canvas(image, geometry.canvas(image.size)), geometry.tile)]
    colour = tuple(int(255 * mean) for mean in processor.image_mean)
    size = dict(processor.size)
    sides = {side for name, side in size.items() if name in ("shortest_edge", "height", "width") and side}
    if not processor.do_resize or len(sides) != 1:
        return [pad_to_square(image, colour)]
    return [resized_square(image, colour, sides.pop(), processor.resample)]


def process_tiles(tiles: list[Image.Image], processor: BaseImageProcessor) -> torch.Tensor:
    """RGB pictures through the tower's processor, each on its own: (tiles, 3, height, width) float32.

    They go in as arrays whose layout is stated, because a picture 1 or 3 pixels high would be taken for channels first.
    """
    arrays = [np.asarray(tile) for tile in tiles]
    return processor(arrays, input_data_format="channels_last", return_tensors="pt")["pixel_values"].float()


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture centred on a square of its longer side."""
    side = max(image.size)
    return _centred(image, (side, side), colour)


def _centred(image: Image.Image, canvas: tuple[int, int], colour: tuple[int, ...]) -> Image.Image:
    result = Image.new("RGB", canvas, colour)
    result.paste(image, ((canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2))
    return result


def resized_square(image: Image.Image, colour: tuple[int, ...], side: int, resample: Image.Resampling) -> Image.Image:
    """``pad_to_square(image, colour).resize((side, side), resample)`` to the bit, without the square, which of a long
    picture is many times its own pixels.

    PIL resizes the rows first, each for itself, and then the columns. So rows are padded and resized band by band;
    those that hold no part of the picture keep their colour.
    """
    width, height = image.size
    longer = max(width, height)
    left, top = (longer - width) // 2, (longer - height) // 2
    rows, step = Image.new("RGB", (side, longer), colour), max(1, BAND // longer)
    for start in range(0, height, step):
        stop = min(height, start + step)
        band = Image.new("RGB", (longer, stop - start), colour)
        band.paste(image.crop((0, start, width, stop)), (left, 0))
        rows.paste(band.resize((side, stop - start), resample), (0, top + start))
    return rows.resize((side, side), resample)


def fit_to_canvas(image: Image.Image, canvas: tuple[int, int]) -> Image.Image:
    """The picture scaled to touch the edges of ``canvas`` (width, height), centred on black."""
    width, height = image.size
    by_width, by_height = canvas[0] / width, canvas[1] / height
    if by_width < by_height:
        fitted = canvas[0], min(math.ceil(height * by_width), canvas[1])
    else:
        fitted = min(math.ceil(width * by_height), canvas[0]), canvas[1]
    return _centred(image.resize(fitted, Image.Resampling.BICUBIC), canvas, (0, 0, 0))


def _tiles(canvas: Image.Image, side: int) -> list[Image.Image]:
    """The canvas cut into squares, row by row."""
    columns, rows = canvas.width // side, canvas.height // side
    return [
        canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(rows) for x in range(columns)
    ]


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened, not yet decoded picture; 1 (upright) where the tag is missing or unreadable.
    Of a PNG only what stands before the pixels counts: PIL would have to decode all of it to look behind them, and
    header and picture must agree. A TIFF is turned by PIL itself, in the size of its header too."""
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except READ_ERRORS:  # a broken tag says nothing about the picture, which viewers show as it is
        return 1


def _to_rgb(image: Image.Image, kind: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these at 255
        image = Image.fromarray(_grey(np.asarray(image), kind))
    if image.mode == "P":  # by way of the palette's own alpha, which PIL otherwise warns about
        image = image.convert("RGBA")
    return image.convert("RGB")


def _grey(values: np.ndarray, mode: str) -> np.ndarray:
    """Greys of 16 or 32 bits as 8 bits: 0 to 65535 where the format says so or a value above 255 shows it, 0 to 1 for
    fractions none of which is above 1, else 0 to 255.
    """
    low, high = values.min(), values.max()  # NaN where there is one
    if not (low >= 0 and high <= 65535) or (mode == "F" and 1 < high < 2):
        raise UserError(
            f"cannot be read as an image, its greys go from {low:g} to {high:g}: scale them to 0 to 1, 0 to 255 or "
            "0 to 65535"
        )
    if mode.startswith("I;16") or high > 255:
        scale = 255 / 65535
    else:
        scale = 255.0 if mode == "F" and high <= 1 else 1.0
    scaled, rows = np.empty(values.shape, np.uint8), max(1, BAND // values.shape[1])
    for start in range(0, len(values), rows):  # in 64 bits the whole picture would be eight times as large
        scaled[start : start + rows] = (values[start : start + rows] * np.float64(scale)).round()
    return scaled
