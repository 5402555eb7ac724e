"""Which patches survive, for one question: our own models, and others by their processors."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image

import llava_pdrop
from llava_pdrop.__main__ import main
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.compare.survivors import shade
from llava_pdrop.config.load import load_config
from llava_pdrop.errors import UserError
from llava_pdrop.eval.questions import ask
from llava_pdrop.eval.respondent import ProcessorRespondent
from llava_pdrop.generate.plugin import attach
from llava_pdrop.generate.unhook import plugin_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.show import processor_sight, show, show_run, source_of, unnormalised
from llava_pdrop.train.run import train
from tests.messages import says

DROP = "pyramid_drop={layers: [1, 2, 3], ratios: [0.5, 0.25, 0.125]}"
QUESTION = "Which colour is it"


@pytest.fixture
def run(tiny_config) -> Path:
    return train(load_config(tiny_config(), ["train.max_steps=1"]))


@pytest.fixture
def picture(tiny_files: Path) -> Path:
    return sorted((tiny_files / "data/images").glob("*.png"))[0]


def test_what_survives_is_drawn(run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "drawn.png"
    assert main(["show", str(run), str(picture), QUESTION, DROP, "--out", str(out)]) == 0
    assert re.search(says("16 -> 8 -> 4 -> 2", QUESTION), capsys.readouterr().out)
    assert Image.open(out).size > (500, 100)
    found = show_run(run, picture, QUESTION, overrides=[DROP])
    assert found.tokens == found.drawn == [16, 8, 4, 2] and [kept.sum() for kept in found.kept] == [16, 8, 4, 2]
    assert all((later <= earlier).all() for earlier, later in zip(found.kept, found.kept[1:]))
    assert found.picture.size == (48, 48) and found.kept[0].shape == (4, 4) and not found.gold


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], says("pyramid_drop", "configs/schedules/pyramiddrop.yaml")),
        ([DROP, "--out", "drawn.xyz"], says("drawn.xyz", ".png")),
        ([DROP, "--out", "drawn"], says("drawn", ".png")),
        ([DROP, "--out", "."], says(".png")),
        (["pyramid_drop=configs/schedules/pyramiddropp.yaml"], says("pyramiddropp.yaml")),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    run: Path, picture: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", str(run), str(picture), QUESTION, *words]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_a_picture_or_a_run_that_is_not_there_is_one_line(run: Path, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says("gone.png")):
        show_run(run, tmp_path / "gone.png", QUESTION, overrides=[DROP])
    with pytest.raises(UserError, match=says(str(tmp_path), "llava_pdrop.yaml", "config.json")):
        show_run(tmp_path, picture, QUESTION)


def test_another_family_is_drawn_by_its_processor(vip: Path, picture: Path) -> None:
    found = show_run(vip, picture, QUESTION, overrides=[DROP])
    assert [kept.sum() for kept in found.kept] == [16, 8, 4, 2] and found.picture.size == (48, 48)
    centre = np.asarray(found.picture)[24, 24].astype(int)
    assert abs(centre - Image.open(picture).convert("RGB").getpixel((20, 24))).max() <= 1, "as it was drawn, one colour"


def test_pooled_patches_are_drawn_whole(run: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pools = "pyramid_drop={layers: [2], ratios: [0.5], downsample: 4}"
    found = show_run(run, picture, QUESTION, overrides=[pools])
    assert found.tokens == [4, 2] and [int(kept.sum()) for kept in found.kept] == [16, 8]
    assert re.search(says("4 -> 2"), capsys.readouterr().out)
    model, processor = opened(run)
    attach(model, Schedule((2,), (0.5,), downsample=4))
    figure = show(model, processor, picture, QUESTION)
    assert [axes.get_title() for axes in figure.axes] == ["all: 4 tokens", "after drop 1: 2 tokens"]
    for axes, kept in zip(figure.axes, found.kept):
        drawn = np.asarray(axes.images[0].get_array())
        assert (drawn == shade(np.asarray(found.picture), kept, found.patch)).all()


def opened(directory: Path) -> tuple[Any, Any]:
    """As somebody opens it who has Hugging Face's classes only."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory)
    return model, transformers.AutoProcessor.from_pretrained(directory)


@pytest.mark.parametrize("family", ["run", "vip"])
def test_an_attached_model_is_drawn_and_left_as_it_was(family: str, picture: Path, request, tmp_path: Path) -> None:
    """Our own models and others: the figure says what the command writes."""
    directory = request.getfixturevalue(family)
    model, processor = opened(directory)
    schedule, trace = Schedule((1, 2, 3), (0.5, 0.25, 0.125)), list[Any]()
    attach(model, schedule, trace)
    figure = llava_pdrop.show(model, processor, picture, QUESTION)
    assert llava_pdrop.show is show and isinstance(figure, Figure)
    expected = ["all: 16 tokens", "after drop 1: 8 tokens", "after drop 2: 4 tokens", "after drop 3: 2 tokens"]
    assert [axes.get_title() for axes in figure.axes] == expected
    dropped = np.asarray(figure.axes[3].images[0].get_array())
    own = show_run(directory, picture, QUESTION, overrides=[DROP])
    assert (dropped == shade(np.asarray(own.picture), own.kept[3], own.patch)).all()
    figure.savefig(tmp_path / "shown.png")
    assert Image.open(tmp_path / "shown.png").size > (500, 100)
    plugin = plugin_of(model)
    assert plugin.given == schedule and plugin.trace is trace and not trace
    with Image.open(picture) as open_picture:
        again = show(model, processor, open_picture, QUESTION)
    assert (np.asarray(again.axes[3].images[0].get_array()) == dropped).all()


def test_processor_and_modes_are_left_as_they_were(vip: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody trains with them: on the right, and a frozen tower in evaluation mode."""
    model, processor = opened(vip)
    processor.tokenizer.padding_side = "right"
    model.train()
    model.get_submodule("model.vision_tower").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    attach(model, Schedule((2,), (0.5,)))
    show(model, processor, picture, QUESTION)
    assert processor.tokenizer.padding_side == "right"
    assert {name: module.training for name, module in model.named_modules()} == modes
    monkeypatch.setattr(type(processor), "__call__", broken)
    with pytest.raises(UserError, match=says(type(processor).__name__, "out of order")):
        show(model, processor, picture, QUESTION)
    assert processor.tokenizer.padding_side == "right"
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("given", [
    None, b"bytes", 7, np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4), [], {}, Image.Image,
], ids=lambda given: type(given).__name__)  # fmt: skip
def test_what_is_no_picture_is_one_line(given: Any, vip: Path) -> None:
    model, processor = opened(vip)
    attach(model, Schedule((2,), (0.5,)))
    with pytest.raises(UserError, match=says("picture must be", type(given).__name__)):
        show(model, processor, given, QUESTION)
    with pytest.raises(UserError, match=says("picture must be", "list")):
        show(model, processor, [Image.new("RGB", (9, 9))], QUESTION)


@pytest.mark.parametrize("url", ["http://x/y.png", "https://x/y.png", "s3://x/y.png", "data:image/png;base64,AAAA"])
def test_an_address_is_not_fetched(url: str, vip: Path) -> None:
    model, processor = opened(vip)
    attach(model, Schedule((2,), (0.5,)))
    with pytest.raises(UserError, match=says(url, "URLs are not fetched")):
        show(model, processor, url, QUESTION)
    with pytest.raises(UserError, match=says("URLs are not fetched")):
        show_run(vip, Path(url), QUESTION, overrides=[DROP])


def test_a_file_may_be_called_like_an_address(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data:picture.png").write_bytes(picture.read_bytes())
    assert source_of("data:picture.png") == Path("data:picture.png")
    for name in ("C:/picture.png", "no/such:/picture.png"):
        assert source_of(name) == Path(name), "whether it is there is said where it is read"


@pytest.mark.parametrize("size", [(0, 0), (0, 5)])
def test_a_picture_without_pixels_is_one_line(size: tuple[int, int], vip: Path) -> None:
    model, processor = opened(vip)
    attach(model, Schedule((2,), (0.5,)))
    with pytest.raises(UserError, match=says("the picture", "cannot be read")):
        show(model, processor, Image.new("RGB", size), QUESTION)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (None, says("question must be", "NoneType")),
        (7, says("question must be", "int")),
        (["a"], says("question must be", "list")),
        ("", says("nothing is asked")),
        (" \n", says("nothing is asked")),
        ("what <image> is", says("<image>")),
        ("colour " * 3000, says("the model takes", "tokens")),
    ],
    ids=["None", "int", "list", "empty", "blank", "marker", "long"],
)
def test_what_cannot_be_asked_is_one_line(question: Any, message: str, run: Path, vip: Path, picture: Path) -> None:
    model, processor = opened(vip)
    schedule = Schedule((2,), (0.5,))
    attach(model, schedule)
    with pytest.raises(UserError, match=message):
        show(model, processor, picture, question)
    assert plugin_of(model).given == schedule
    with pytest.raises(UserError, match=message):
        show_run(run, picture, question, overrides=[DROP])


def test_an_answer_ends_where_the_positions_do(vip: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt with one place behind it is asked, and one without a place is not."""
    model, processor = opened(vip)
    attach(model, Schedule((2,), (0.5,)))
    tokens = list[int]()
    real = ProcessorRespondent.inputs

    def counted(*args: Any) -> Any:
        found = real(*args)
        tokens.append(found[0]["input_ids"].shape[1])
        return found

    monkeypatch.setattr(ProcessorRespondent, "inputs", counted)
    show(model, processor, picture, QUESTION)
    model.config.get_text_config().max_position_embeddings = tokens[0] + 1
    show(model, processor, picture, QUESTION)
    model.config.get_text_config().max_position_embeddings = tokens[0]
    with pytest.raises(UserError, match=says(str(tokens[0]), "the model takes")):
        show(model, processor, picture, QUESTION)


def test_what_is_no_processor_is_one_line(vip: Path, picture: Path) -> None:
    model, processor = opened(vip)
    attach(model, Schedule((2,), (0.5,)))
    processor.tokenizer.chat_template = processor.chat_template
    for wrong in (processor.tokenizer, processor.image_processor, None, str(vip)):
        with pytest.raises(UserError, match=says("processor", type(wrong).__name__, "AutoProcessor")):
            show(model, wrong, picture, QUESTION)
    processor.chat_template = "{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}"
    with pytest.raises(UserError, match=says("chat template", "for texts alone")):
        show(model, processor, picture, QUESTION)


def broken(*args: Any, **kwargs: Any) -> None:
    raise ValueError("out of order")


@pytest.mark.parametrize("kind", ["turned.jpg", "grey.png"])
def test_an_opened_picture_is_drawn_as_its_file(kind: str, vip: Path, tmp_path: Path) -> None:
    """Upright, and 16-bit greys scaled and not clipped."""
    model, processor = opened(vip)
    attach(model, Schedule((2,), (0.5,)))
    exif, file = Image.Exif(), tmp_path / kind
    exif[0x0112] = 6
    grey = np.linspace(0, 65535, 48 * 36).astype(np.uint16).reshape(36, 48)
    shown = Image.fromarray(grey) if kind == "grey.png" else Image.fromarray((grey // 257).astype(np.uint8))
    shown.save(file, **({"exif": exif} if kind == "turned.jpg" else {}))
    expected = [np.asarray(axes.images[0].get_array()) for axes in show(model, processor, file, QUESTION).axes]
    with Image.open(file) as open_picture:
        found = [np.asarray(axes.images[0].get_array()) for axes in show(model, processor, open_picture, QUESTION).axes]
    assert expected[0].std() > 30 and all((one == other).all() for one, other in zip(expected, found))


def test_what_show_cannot_draw_is_one_line(run: Path, picture: Path, tmp_path: Path) -> None:
    model, processor = opened(run)
    with pytest.raises(UserError, match=says("takes a model", "llava-pdrop show")):
        show(str(run), str(picture), QUESTION, "out.png")
    with pytest.raises(UserError, match=says("attach", "LlavaForConditionalGeneration")):
        show(model, processor, picture, QUESTION)
    attach(model, Schedule())
    with pytest.raises(UserError, match=says("drops nothing")):
        show(model, processor, picture, QUESTION)
    attach(model, Schedule((2,), (0.5,)))
    with pytest.raises(UserError, match=says("gone.png")):
        show(model, processor, str(tmp_path / "gone.png"), QUESTION)
    assert plugin_of(model).given == Schedule((2,), (0.5,)), "attached again"
    processor.chat_template = None
    with pytest.raises(UserError, match=says("chat_template")):
        show(model, processor, picture, QUESTION)


def test_tiles_of_a_llava_next_are_drawn(tiny_files: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = build_parts(
        language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"), aspect="anyres",
        merge="spatial_unpad", pinpoints=((48, 96), (96, 48), (96, 96)),
    )  # fmt: skip
    parts.hf.save_pretrained(tmp_path / "next")
    processor = parts.processor()
    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor.save_pretrained(tmp_path / "next")
    model, processor = opened(tmp_path / "next")
    attach(model, Schedule((2,), (0.5,)))
    figure = show(model, processor, Image.new("RGB", (90, 40), (200, 30, 30)), QUESTION)
    assert [axes.images[0].get_array().shape for axes in figure.axes] == [(48, 96, 3)] * 2
    first, later = (" ".join(axes.get_title().split()) for axes in figure.axes)
    assert first == "all: 52 tokens, 32 drawn", "16 of the whole picture and 4 newlines show no patch"
    assert re.fullmatch(r"after drop 1: 26 tokens, \d+ drawn", later)


def respondent(images: SimpleNamespace, kind: str = "vipllava", **inputs: object) -> SimpleNamespace:
    """What `processor_sight` asks of a model with its own processor."""
    processor = SimpleNamespace(image_processor=images)
    return SimpleNamespace(
        processor=processor,
        hf=SimpleNamespace(config=SimpleNamespace(model_type=kind)),
        prepare=lambda question: question,
        inputs=lambda prepared, schedule: (inputs, [[0]]),
    )


def test_a_square_is_drawn_as_the_processor_made_it(picture: Path) -> None:
    images = SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.2])
    shown = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    pixels = torch.tensor((shown / 255 - images.image_mean) / images.image_std).permute(2, 0, 1)
    sight = processor_sight(respondent(images, pixel_values=pixels[None]), ask("q", "?", [picture], "q", ""), 16)
    assert sight.patch == 7 and (np.asarray(sight.picture) == shown).all()
    assert np.argwhere(sight.grid([0, 5, 15])).tolist() == [[0, 0], [1, 1], [3, 3]]
    assert unnormalised(np.zeros((3, 2, 2)), SimpleNamespace()).getpixel((0, 0)) == (128, 128, 128)


def test_a_grid_is_as_the_processor_says(picture: Path) -> None:
    images = SimpleNamespace(merge_size=2, patch_size=14)
    given = respondent(images, "qwen2_vl", image_grid_thw=torch.tensor([[1, 4, 6]]), pixel_values=torch.zeros(24, 5))
    sight = processor_sight(given, ask("q", "?", [picture], "q", ""), 6)
    assert sight.picture.size == (84, 56) and sight.patch == 28
    assert np.argwhere(sight.grid([4])).tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "shape", [(5, 3, 28, 28), (1, 5, 3, 28, 28), (1, 3, 28, 28)], ids=["tiles", "rows", "15 tokens"]
)
def test_tiles_are_refused(picture: Path, shape: tuple[int, ...]) -> None:
    given = respondent(SimpleNamespace(), pixel_values=torch.zeros(shape))
    with pytest.raises(UserError, match=says("q", "image tokens", "SimpleNamespace")):
        processor_sight(given, ask("q", "?", [picture], "q", ""), 15 if shape == (1, 3, 28, 28) else 16)
