"""Pictures of every shape and format, and refusals that name the file. (Pixels equal to the official ones:
tests/golden/test_preprocess.py.)"""

from __future__ import annotations

import io
import struct
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil

from llava_pdrop.data import images
from llava_pdrop.data.images import image_size, load_image, preprocess, upright
from llava_pdrop.errors import UserError
from llava_pdrop.geometry import ImageGeometry
from tests.messages import says
from tests.properties import cases, one_line

TINY_PINPOINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
PAD = ImageGeometry(56, 14)
ANYRES = ImageGeometry(56, 14, "anyres", "spatial_unpad", TINY_PINPOINTS)


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 50), (50, 1), (1, 50), (1000, 3), (57, 131)])
@pytest.mark.parametrize("geometry", [PAD, ANYRES], ids=["pad", "anyres"])
def test_every_shape_gives_the_tiles_the_geometry_says(processor, geometry, size):
    sample = preprocess(Image.new("RGB", size, (250, 10, 10)), geometry, processor)
    assert sample.size == size
    assert sample.pixels.shape == (geometry.num_tiles(size), 3, 56, 56)
    middle = sample.pixels[0, :, 28, 28]
    assert middle[0] > middle[1]  # red stayed red: rows were not taken for channels


def test_a_processor_of_another_size_is_refused(processor):
    with pytest.raises(ValueError, match=says("56x56", "112x112")):
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


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
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


def test_a_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = load_image(tmp_path / "print.jpg").getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


def test_sixteen_bits_keep_their_darkness(tmp_path):
    """A dark 16-bit picture stays dark: the scale is that of the format, not of what is in it."""
    path = tmp_path / "dark.png"
    Image.fromarray(np.full((4, 4), 250, np.uint16)).save(path)
    assert load_image(path).getpixel((0, 0)) == (1, 1, 1)


def test_transparency_shows_the_colours_below_it(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (5, 4), (10, 200, 30, 0)).save(path)
    assert load_image(path).getpixel((2, 2)) == (10, 200, 30)


def test_a_broken_exif_block_does_not_turn_the_picture(tmp_path, picture):
    path = picture(40, 20, "odd.jpg", exif=b"Exif\0\0 this is no TIFF header")
    assert load_image(path).size == image_size(path) == (40, 20)


def test_a_picture_of_one_pixel(tmp_path, processor):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    image = load_image(tmp_path / "dot.png")
    assert image.size == image_size(tmp_path / "dot.png") == (1, 1)
    assert preprocess(image, ANYRES, processor).pixels.shape == (ANYRES.num_tiles((1, 1)), 3, 56, 56)


def test_a_gigantic_picture_is_refused_by_its_header(tmp_path):
    """A few bytes that would decode to 10 gigapixels: refused before a pixel is read."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    for read in (load_image, image_size):
        with pytest.raises(ValueError, match=says("bomb.png", "too large")) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_unreadable_files_are_named(tmp_path, picture):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    short = tmp_path / "short.jpg"
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    short.write_bytes(buffer.getvalue()[:700])
    empty = tmp_path / "empty.jpg"
    empty.touch()
    torn = picture(name="torn.avif")  # its decoder raises what no other does
    torn.write_bytes(torn.read_bytes().replace(b"infe", b"infx"))
    for path in (text, short, empty, torn, tmp_path):
        with pytest.raises(ValueError, match=says("read", "image")) as error:
            load_image(path)
        assert str(path) in str(error.value)
    for read in (load_image, image_size):
        with pytest.raises(FileNotFoundError, match=says("none.png", "no such")):
            read(tmp_path / "none.png")
    with pytest.raises(ValueError, match=says("text.png", "read")):
        image_size(text)
    with pytest.raises(ValueError, match=says("empty.jpg", "empty")):
        image_size(empty)


SIZES = [
    (1, 1),
    (2, 1),
    (1, 90),
    (90, 1),
    (56, 56),
    (55, 57),
    (640, 480),
    (480, 640),
    (333, 1000),
    (1242, 200),
    (7, 900),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("band", [1, 1000, images.BAND])
def test_a_resized_square_has_the_pixels_of_the_square_resized(monkeypatch, size, resample, band):
    monkeypatch.setattr(images, "BAND", band)
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture, colour = Image.fromarray(noise), (122, 116, 104)
    whole = images.pad_to_square(picture, colour)
    for side in (14, 56, whole.width, 91):
        expected = whole.resize((side, side), resample)
        assert np.array_equal(np.asarray(images.resized_square(picture, colour, side, resample)), np.asarray(expected))


@pytest.mark.parametrize("size", [(48_000, 400), (3, 12_000), (1242, 12_000), (65_535, 1), (2, 9_000)], ids=str)
@pytest.mark.parametrize("geometry", [PAD, ANYRES], ids=["pad", "anyres"])
def test_no_picture_takes_much_more_memory_than_its_own_pixels(monkeypatch, processor, geometry, size):
    """The padded square of the first one has 2.3 gigapixels."""
    made, new = [], Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: made.append(size) or new(mode, size, *rest))
    picture = Image.new("RGB", size)
    assert preprocess(picture, geometry, processor).pixels.shape[0] == geometry.num_tiles(size)
    pixels = [width * height for width, height in made]
    assert max(pixels) <= max(size[0] * size[1], images.BAND, 56 * max(size))


@pytest.mark.parametrize("size", [(65_536, 1), (1, 70_000)], ids=str)
def test_a_side_that_no_picture_has_is_refused_by_the_header(tmp_path, size):
    Image.new("L", size).save(tmp_path / "strip.png")
    for read in (load_image, image_size):
        with pytest.raises(UserError, match=says("strip.png", "65,535", f"{max(size):,}")):
            read(tmp_path / "strip.png")


def test_a_picture_that_memory_does_not_hold_is_a_bad_one(tmp_path, picture, processor, monkeypatch):
    path = picture(40, 20, "large.png")
    image = load_image(path)

    def no_memory(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", no_memory)
        with pytest.raises(UserError, match=says("large.png", "memory")):
            load_image(path)
    monkeypatch.setattr(images, "resized_square", no_memory)
    with pytest.raises(UserError, match=says("40x20", "memory")):
        preprocess(image, PAD, processor)


@pytest.mark.parametrize(
    ("values", "mode", "expected"),
    [
        ([0.0, 0.5, 1.0], "F", [0, 128, 255]),
        ([0.0, 0.25, 0.75], "F", [0, 64, 191]),
        ([0.0, 100.4, 255.0], "F", [0, 100, 255]),
        ([0.0, 32767.5, 65535.0], "F", [0, 128, 255]),
        ([0, 1, 1], "I", [0, 1, 1]),
        ([0, 128, 255], "I", [0, 128, 255]),
        ([0, 257, 65535], "I", [0, 1, 255]),
    ],
)
def test_greys_of_other_ranges(tmp_path, values, mode, expected):
    """Fractions go from 0 to 1, whole numbers to 255, or to 65535 where one is above 255."""
    kind = np.float32 if mode == "F" else np.int32
    Image.fromarray(np.array([values], kind)).save(tmp_path / "grey.tiff")
    with Image.open(tmp_path / "grey.tiff") as opened:
        assert opened.mode == mode
    assert np.asarray(load_image(tmp_path / "grey.tiff"))[0, :, 0].tolist() == expected


def test_sixteen_bits_of_a_pgm_file_are_scaled_however_dark(tmp_path):
    for number, values in enumerate(([0, 100, 200], [0, 257, 65535])):
        path = tmp_path / f"{number}.pgm"
        path.write_bytes(b"P5 3 1 65535\n" + np.array(values, ">u2").tobytes())
        assert np.asarray(load_image(path))[0, :, 0].tolist() == [round(value / 257) for value in values]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.5, 1.001, 70_000.0])
def test_values_that_are_no_greys_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0.5, value, 0.25]], np.float32)).save(tmp_path / "depth.tiff")
    with pytest.raises(UserError, match=says("depth.tiff", "65535")):
        load_image(tmp_path / "depth.tiff")


def test_a_name_as_long_as_a_picture_is_no_line_as_long(tmp_path):
    """A path where the system refuses the name itself, and one where it only finds nothing."""
    for name in ("x" * 845_000, "y/" * 2000 + "a.png"):
        with pytest.raises(ValueError, match=says("image")) as error:
            image_size(tmp_path / name)
        assert len(str(error.value)) < 400


@hypothesis.given(st.data())
@cases
def test_any_file_is_a_picture_or_one_line(tmp_path_factory, data):
    """Pictures of all kinds, cut short, with bytes changed, taken out or put in: header and pixels agree, or the file
    is named."""
    mode, suffix = data.draw(
        st.sampled_from(
            [("RGB", "png"), ("RGB", "jpg"), ("P", "gif"), ("L", "bmp"), ("RGB", "webp"), ("F", "tiff"),
             ("I;16", "tiff"), ("RGBA", "png"), ("CMYK", "tiff"), ("1", "png"), ("LA", "png"), ("RGB", "ppm")]
        )
    )  # fmt: skip
    width, height = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    written = io.BytesIO()
    Image.new(mode, (width, height)).save(written, {"jpg": "jpeg"}.get(suffix, suffix))
    content = bytearray(written.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, max(0, len(content) - 1)))
        how = data.draw(st.sampled_from(["change", "cut", "put in", "take out"]))
        if how == "cut":
            del content[place:]
        elif how == "put in":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        elif how == "take out":
            del content[place : place + data.draw(st.integers(1, 8))]
        elif content:
            content[place] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    file.write_bytes(content)
    found = []
    for read in (image_size, load_image):
        try:
            found.append(read(file))
        except UserError as error:
            one_line(error, str(file))
            found.append(None)
    size, picture = found
    if picture is not None:
        assert picture.mode == "RGB" and picture.size == size
        if max(size) <= 200:
            pixels = preprocess(picture, PAD, CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56)).pixels
            assert pixels.shape == (1, 3, 56, 56) and bool(pixels.isfinite().all())


@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_an_opened_picture_is_that_of_its_file(tmp_path, orientation, suffix):
    path, exif = tmp_path / f"picture.{suffix}", Image.Exif()
    if orientation:
        exif[images.EXIF_ORIENTATION] = orientation
    Image.linear_gradient("L").resize((20, 30)).convert("RGB").save(path, exif=exif)
    expected = load_image(path)
    assert expected.size == ((30, 20) if orientation in (5, 6, 8) else (20, 30))
    with Image.open(path) as opened:
        assert (np.asarray(upright(opened)) == np.asarray(expected)).all()
        assert (np.asarray(upright(opened)) == np.asarray(expected)).all(), "not turned in place"
    with Image.open(path) as opened:
        pass
    with pytest.raises(UserError, match=says("own name", "cannot be read")):
        upright(opened, "own name")  # closed before its pixels were read


def test_greys_of_an_opened_picture_are_scaled_as_those_of_its_file(tmp_path):
    values = (np.arange(600, dtype=np.uint16) * 109).reshape(30, 20)
    Image.fromarray(values).save(tmp_path / "grey.png")
    expected = np.asarray(load_image(tmp_path / "grey.png"))
    assert expected.max() == 254 and len(np.unique(expected)) > 200
    with Image.open(tmp_path / "grey.png") as opened:
        assert (np.asarray(upright(opened)) == expected).all()
    assert (np.asarray(upright(Image.fromarray(values))) == expected).all()
