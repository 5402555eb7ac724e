"""Pictures of a task of lmms-eval, beside the same in files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from llava_pdrop.data.images import image_size, load_image
from llava_pdrop.errors import UserError
from llava_pdrop.eval.lmms.pictures import Unshown, pictures_of
from tests.messages import says


def values(shape, most, kind):
    return np.random.default_rng(0).integers(0, most, shape).astype(kind)


def picture(mode: str) -> Image.Image:
    """5 wide and 3 high."""
    if mode in ("I;16", "I", "F"):
        return Image.fromarray(values((3, 5), 60_000, {"I;16": "uint16", "I": "int32", "F": "float32"}[mode]))
    if mode == "turned":
        image = Image.fromarray(values((3, 5, 3), 256, "uint8"))
        image.getexif()[0x0112] = 6
        return image
    return Image.fromarray(values((3, 5, 4), 256, "uint8"), "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "turned"])
def test_it_is_what_the_file_would_be(tmp_path, mode):
    """Also a picture that its task has not turned as its camera says."""
    image, file = picture(mode), tmp_path / ("x.tif" if mode in ("CMYK", "I", "F") else "x.png")
    image.save(file, exif=image.getexif())
    with Image.open(file) as stored:
        (found,) = pictures_of("t test[0]", lambda: [stored])
        assert image_size(found) == image_size(file) == ((3, 5) if mode == "turned" else (5, 3))
        assert np.array_equal(np.asarray(load_image(found)), np.asarray(load_image(file)))
        assert load_image(found).mode == "RGB"


def test_exif_behind_the_pixels_counts_at_every_look():
    """PNG allows it there; Pillow knows of it once the pixels are read."""
    file = io.BytesIO()
    turned = picture("turned")
    turned.save(file, "PNG", exif=turned.getexif())
    content = file.getvalue()
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4])
    end = content.index(b"IEND") - 4
    moved = content[:start] + content[stop:end] + content[start:stop] + content[end:]
    with Image.open(io.BytesIO(moved)) as stored:
        (found,) = pictures_of("t test[0]", lambda: [stored])
        expected = np.asarray(turned.transpose(Image.Transpose.ROTATE_270))
        assert image_size(found) == (3, 5)
        for _ in range(2):
            assert np.array_equal(np.asarray(load_image(found)), expected)


def test_its_size_costs_no_second_look_and_pixels_one():
    looks = []
    (found,) = pictures_of("t test[0]", lambda: looks.append(0) or [picture("RGB")])
    assert image_size(found) == (5, 3) and len(looks) == 1
    load_image(found)
    assert len(looks) == 2


def test_equal_pixels_are_one_picture():
    first, second = pictures_of("t test[0]", lambda: [picture("RGB"), picture("RGB")])
    (other,) = pictures_of("t test[1]", lambda: [picture("RGB").rotate(180)])
    (tall,) = pictures_of("t test[2]", lambda: [picture("RGB").transpose(Image.Transpose.ROTATE_90)])
    assert first == second and hash(first) == hash(second) and len({first, other, tall}) == 3
    assert str(second) == "t test[0], picture 2"


@pytest.mark.parametrize("nothing", [None, []])
def test_there_may_be_none(nothing):
    assert pictures_of("t test[0]", lambda: nothing) == ()


def test_what_is_no_picture_or_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=says("t test[3]", "film.mp4", "str")):
        pictures_of("t test[3]", lambda: ["film.mp4"])
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(Unshown, match=says("t test[3]", "x.png")):
        pictures_of("t test[3]", lambda: [Image.open(tmp_path / "x.png")])
    picture("RGB").resize((64, 64)).save(tmp_path / "y.png")
    whole = (tmp_path / "y.png").read_bytes()
    (tmp_path / "y.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Unshown, match=says("t test[4]", "truncated")):
        pictures_of("t test[4]", lambda: [Image.open(tmp_path / "y.png")])
