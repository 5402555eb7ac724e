"""The scripts under data/prepare: reproducible, well formed, and true to the drawing plan."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.messages import says

PREPARE = Path(__file__).resolve().parents[2] / "data" / "prepare"
SMALL = {"pretrain": 2, "train": 3, "eval": 3}


def load(name: str, folder: Path = PREPARE) -> ModuleType:
    """A script of data/prepare as a module (the directory is no package, and one name is also a package's)."""
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


forms = load("forms")
easy_vqa = load("easy_vqa")


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def check_records(directory: Path, name: str) -> list[dict]:
    """Asserts the LLaVA layout: id, an image that opens, turns that alternate, one marker at the very start."""
    records = json.loads((directory / name).read_text())
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert set(record) == {"id", "image", "conversations"}
        with Image.open(directory / record["image"]) as picture:
            assert picture.mode == "RGB"
            picture.load()
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
        assert all(turn["value"].strip() for turn in turns)
    return records


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("forms")
    assert forms.prepare(out, seed=3, grid=16, counts=SMALL, turns=8)
    return out


@pytest.mark.process
def test_forms_seed_reproduces_bytes(pages: Path, tmp_path: Path) -> None:
    forms.prepare(tmp_path / "same", seed=3, grid=16, counts=SMALL, turns=8)
    forms.prepare(tmp_path / "other", seed=4, grid=16, counts=SMALL, turns=8)
    forms.prepare(tmp_path / "shared", seed=3, grid=16, counts=SMALL, turns=8, workers=2)
    assert files(tmp_path / "same") == files(tmp_path / "shared") == files(pages)
    other = files(tmp_path / "other")
    assert other.keys() == files(pages).keys()
    assert all(other[name] != content for name, content in files(pages).items())


def test_forms_records(pages: Path) -> None:
    turns = {"pretrain": 26, "train": 8, "eval": 1}
    for split, count in SMALL.items():
        records = check_records(pages, f"{split}.json")
        assert len(records) == count
        assert all(len(record["conversations"]) == 2 * turns[split] for record in records)
        for record in records:
            with Image.open(pages / record["image"]) as picture:
                assert picture.size == (192, 192)


def test_forms_answers_agree_with_the_drawing_plan(pages: Path) -> None:
    for split in SMALL:
        for number, record in enumerate(json.loads((pages / f"{split}.json").read_text())):
            page, picture, _ = forms.make_page(3, split, number, 16)
            with Image.open(pages / record["image"]) as image:
                assert np.array_equal(np.asarray(image), picture)
            human, gpt = record["conversations"][::2], record["conversations"][1::2]
            assert len({turn["value"].split()[-1] for turn in human}) == len(human)
            for question, answer in zip(human, gpt, strict=True):
                (tile,) = np.flatnonzero(page.words == forms.WORDS.index(question["value"].split()[-1]))
                assert tile % 16 < 15, "a field does not run over the edge of the page"
                assert forms.WORDS[page.words[tile + 1]] == answer["value"]
                assert forms.digit_scans()[1][page.scans[tile + 1]] == int(answer["value"])


def test_forms_train_and_eval_digits_are_disjoint(pages: Path) -> None:
    used = {split: set() for split in SMALL}
    for split in SMALL:
        for number in range(25):
            page = forms.make_page(0, split, number, 16)[0]
            used[split] |= set(page.scans[page.scans >= 0].tolist())
    assert max(used["train"] | used["pretrain"]) < forms.FIRST_EVAL_SCAN <= min(used["eval"])
    assert len(used["train"]) > 1000
    assert len(used["eval"]) > 380


def test_forms_pictures_show_their_scans() -> None:
    rng = np.random.default_rng(0)
    page = forms.plan_page(rng, 16)
    ink = 255 - forms.draw_page(page, rng).astype(int).sum(-1) / 3
    ink = ink.reshape(16, 12, 16, 12).swapaxes(1, 2).reshape(256, 12, 12)
    ink -= ink.min(axis=(1, 2), keepdims=True)
    assert (ink[page.words == forms.BLANK] == 0).all()
    assert (ink[page.words != forms.BLANK].max(axis=(1, 2)) > 0).all()
    for tile in np.flatnonzero(page.scans >= 0):
        scan = forms.digit_scans()[0][page.scans[tile]]
        windows = [ink[tile, y : y + 8, x : x + 8] for y in (1, 2, 3) for x in (1, 2, 3)]
        assert max(np.corrcoef(scan.ravel(), window.ravel())[0, 1] for window in windows) > 0.98


def test_forms_larger_grid(tmp_path: Path) -> None:
    forms.prepare(tmp_path, seed=0, grid=24, counts={"pretrain": 0, "train": 1, "eval": 1}, turns=3)
    records = check_records(tmp_path, "train.json")
    assert len(records[0]["conversations"]) == 6
    with Image.open(tmp_path / records[0]["image"]) as picture:
        assert picture.size == (288, 288)


def test_forms_manifest_skips_and_remakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--train", "2", "--eval", "1", "--pretrain", "1"]
    forms.main(arguments)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert "already there" not in capsys.readouterr().out
    forms.main(arguments)
    assert "already there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == first
    forms.main([*arguments, "--train", "1"])
    assert len(list(tmp_path.glob("images/train_*.png"))) == 1, "pictures of the earlier run are gone"
    assert json.loads((tmp_path / "manifest.json").read_text())["counts"]["train"] == 1


@pytest.mark.parametrize(
    "wrong", [["--grid", "10"], ["--turns", "27"], ["--turns", "0"], ["--eval", "-1"], ["--seed", "-1"]]
)
def test_forms_impossible_arguments(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        forms.main(["--out", str(tmp_path), *wrong])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert wrong[1] in message or "negative" in message


@pytest.mark.parametrize("script", [forms, easy_vqa])
def test_a_place_that_cannot_be_written_to_is_one_line(script: ModuleType, fake_package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--package", str(fake_package)] if script is easy_vqa else []
    with pytest.raises(SystemExit, match=says(str(tmp_path / "file"), "written", "Not a directory")) as stop:
        script.main(["--out", str(tmp_path / "file"), *words])
    assert "\n" not in str(stop.value)


@pytest.fixture
def fake_package(tmp_path: Path) -> Path:
    """A directory laid out like the easy_vqa package, with three pictures per split."""
    for split in ("train", "test"):
        images = tmp_path / "easy_vqa" / "data" / split / "images"
        images.mkdir(parents=True)
        questions = []
        for number in range(3):
            Image.new("RGB", (64, 64), (80 * number, 0, len(split))).save(images / f"{number}.png")
            questions += [[f"is {split} {number} {k}?", ("yes", "no")[k % 2], number] for k in range(5)]
        (images.parent / "questions.json").write_text(json.dumps(questions))
    return tmp_path / "easy_vqa"


def test_easy_vqa_records(fake_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--package", str(fake_package), "--turns", "4", "--train", "2"]
    easy_vqa.main(arguments)
    train, held_out = check_records(out, "train.json"), check_records(out, "eval.json")
    assert [len(r["conversations"]) for r in train] == [8, 8]
    assert [len(r["conversations"]) for r in held_out] == [2, 2, 2], "all the package has, one question each"
    for split, records in (("train", train), ("test", held_out)):
        for record in records:
            number = int(record["id"].split("_")[1])
            source = fake_package / "data" / split / "images" / f"{number}.png"
            assert (out / record["image"]).read_bytes() == source.read_bytes()
            for question, answer in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
                _, about, picture, k = question["value"].removeprefix("<image>\n").rstrip("?").split()
                assert (about, int(picture)) == (split, number)
                assert answer["value"] == ("yes", "no")[int(k) % 2]
    capsys.readouterr()
    before = files(out)
    easy_vqa.main(arguments)
    assert "already there" in capsys.readouterr().out
    assert files(out) == before


def test_easy_vqa_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(PREPARE)])
    with pytest.raises(SystemExit) as stop:
        easy_vqa.main(["--out", str(tmp_path)])
    assert "pip install easy-vqa" in str(stop.value)
    assert "\n" not in str(stop.value)
    with pytest.raises(SystemExit, match="does not exist"):
        easy_vqa.main(["--out", str(tmp_path), "--package", str(tmp_path)])


def test_easy_vqa_installed_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("easy_vqa") is None:
        pytest.skip("the third-party package easy-vqa is not installed")
    easy_vqa.main(["--out", str(tmp_path), "--train", "3", "--eval", "3"])
    check_records(tmp_path, "train.json")
    check_records(tmp_path, "eval.json")


def test_easy_vqa_one_question_a_record_asks_the_same(fake_package: Path, tmp_path: Path) -> None:
    arguments = ["--package", str(fake_package), "--turns", "4"]
    several, single = tmp_path / "several", tmp_path / "single"
    easy_vqa.main(["--out", str(several), *arguments])
    easy_vqa.main(["--out", str(single), *arguments, "--single"])
    assert (several / "eval.json").read_bytes() == (single / "eval.json").read_bytes()
    together, apart = check_records(several, "train.json"), check_records(single, "train.json")
    assert [len(record["conversations"]) for record in apart] == [2] * 12

    def asked(records: list[dict]) -> list[tuple[str, str]]:
        return [(r["image"], turn["value"].removeprefix("<image>\n")) for r in records for turn in r["conversations"]]

    assert asked(together) == asked(apart)


def test_a_directory_with_several_questions_a_record_is_not_taken_for_one_with_single_ones(
    fake_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--package", str(fake_package), "--out", str(tmp_path / "out")]
    easy_vqa.main(arguments)
    assert set(json.loads((tmp_path / "out" / "manifest.json").read_text())) == {"format", "seed", "turns", "counts"}
    easy_vqa.main([*arguments, "--single"])
    assert "already there" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "train.json").read_text())) == 15
