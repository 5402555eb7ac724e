"""``llava-pdrop bench train`` from the command line: its files, and that what is wrong is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from llava_pdrop.__main__ import main
from llava_pdrop.bench import run as bench
from llava_pdrop.bench.run import read_schedules
from llava_pdrop.bench.train_report import modelled_stages, step_bars, tables
from llava_pdrop.bench.train_step import BenchArm
from llava_pdrop.errors import UserError
from llava_pdrop.model.rankers import RANKERS
from llava_pdrop.schedule import Schedule
from tests.messages import says

UNIT = "(?:[mµ]?s|min|[GM]iB)"

CONFIGS = Path(__file__).parents[3] / "configs"

pytestmark = pytest.mark.trains  # the command is chosen by its name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    one = directory / "one.yaml"
    one.write_text("layers: [4]\nratios: [0.25]\n")
    words = ["bench", "train", "--shape", "tiny", "--steps", "2", "--warmup", "1", "--device", "cpu", "--seed", "7"]
    schedules = ["--schedule", str(one), str(CONFIGS / "llava15_7b/finetune_pdrop.yaml")]
    two = directory / "two.yaml"
    two.write_text("layers: [2, 6]\nratios: [0.5, 0]\n")
    schedules[-1] = str(two)
    assert main([*words, *schedules, "--samples", "2", "--compare", "--out", str(directory / "out")]) == 0
    return directory / "out"


@pytest.fixture(scope="module")
def headline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("headline")
    words = ["bench", "train", "--shape", "tiny", "--steps", "1", "--warmup", "0", "--device", "cpu", "--samples", "1"]
    settings = ["--recompute-layers", "all", "auto", "4,0", "--card", "H100", "--images", "full", "mixture"]
    assert main([*words, *settings, "--out", str(out)]) == 0
    return out


def test_every_setting_has_its_pair_and_every_kind_of_pictures_its_report(headline: Path) -> None:
    for images in ("full", "mixture"):
        report = json.loads((headline / f"train-tiny-cpu-{images}.json").read_text())
        assert report["workload"]["images"] == images
        assert [
            (run["name"], run["recompute"] and (run["recompute_layers"], run["recompute_tower"]))
            for run in report["runs"]
        ] == [
            ("vanilla, all recomputed", (None, False)),
            ("PyramidDrop, all recomputed", (None, False)),
            ("vanilla, as memory forces", False),
            ("PyramidDrop, as memory forces", False),
            ("vanilla, 4,0 recomputed", (4, False)),
            ("PyramidDrop, 4,0 recomputed", False),
        ]
        for vanilla, dropping in zip(report["runs"][::2], report["runs"][1::2]):
            flops = [sum(run["steps"]["hardware_flops"]) for run in (vanilla, dropping)]
            assert dropping["predicted_reduction"] == pytest.approx(1 - flops[1] / flops[0])
            assert "predicted_reduction" not in vanilla
        assert report["runs"][5]["predicted_reduction"] > report["runs"][3]["predicted_reduction"]
    text = (headline / "train-tiny-cpu-full.md").read_text()
    assert "\nvanilla, 4,0 recomputed: recomputes 4 decoder layers.\n" in text


def test_a_drop_before_the_decoder_and_a_late_entry_have_their_stages(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("layers: [0, 4]\nratios: [0.5, 0.25]\n")
    (tmp_path / "late.yaml").write_text("inject: 2\nlayers: [4]\nratios: [0.5]\n")
    words = ["bench", "train", "--shape", "tiny", "--steps", "1", "--warmup", "0", "--device", "cpu", "--samples", "1"]
    files = ["--schedule", str(tmp_path / "first.yaml"), str(tmp_path / "late.yaml")]
    assert main([*words, *files, "--card", "H100", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "train-tiny-cpu.json").read_text())
    for run, without in zip(report["runs"], (0, 1, 0)):
        stages, modelled = run["stages"], modelled_stages(run)
        assert len(stages) == len(modelled) == 1 + len(run["schedule"]["layers"])
        assert [bool(stage["seconds"]) for stage in stages] == [bool(stage["share_of_peak"]) for stage in stages]
        assert sum(not ms for ms in modelled) == sum(not stage["seconds"] for stage in stages) == without
        layers = [part["forward_ms"] for part in run["modelled"]["parts"] if part["name"].startswith("layers")]
        assert sum(modelled) == pytest.approx(sum(layers))


def test_pooled_pictures_are_a_run_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("downsample: 9\n")
    words = ["bench", "train", "--shape", "tiny", "--steps", "1", "--warmup", "0", "--device", "cpu", "--samples", "1"]
    assert main([*words, "--schedule", str(tmp_path / "small.yaml"), "--card", "H100", "--out", str(tmp_path)]) == 0
    vanilla, small = json.loads((tmp_path / "train-tiny-cpu.json").read_text())["runs"]
    assert small["schedule"]["downsample"] == 9 and len(small["stages"]) == 1
    assert small["steps"]["image_tokens"][0][0] < vanilla["steps"]["image_tokens"][0][0]
    assert 0 < small["predicted_reduction"] < 1
    assert "pool tiles to at most 9 features" in (tmp_path / "train-tiny-cpu.md").read_text()


def test_every_ranker_has_its_cost(files: Path) -> None:
    report = json.loads((files / "train-tiny-cpu.json").read_text())
    costs = {entry["name"]: entry for entry in report["rankers"]}
    depth = report["shape"]["text"]["num_hidden_layers"]
    assert list(costs) == list(RANKERS)
    for entry in costs.values():
        assert (entry["layer"], entry["kept"], entry["error"]) == (depth // 2, 0.5, None)
        low, median, high = entry["ranking"]
        assert 0 < low <= median <= high and 0 < entry["ranking_share"] < 1
        assert all(entry["step"])
    free = {name for name, entry in costs.items() if not entry["flop"]}
    assert free == {"random", "uniform", "v2drop"}, "what multiplies no matrices"
    assert costs["all_text"]["flop"] > costs["last_instruction"]["flop"] > costs["key_norm"]["flop"]
    table = (files / "train-tiny-cpu.md").read_text().split("Rankers: 50% of the image tokens stay")[1]
    for name in RANKERS:
        assert re.search(rf"^\| {name} \| [\d.,]+ \| [\d.,]+ \[", table, re.MULTILINE), name


def test_like_is_compared_with_like(headline: Path) -> None:
    """Operations are of forward and backward, and so is the time beside them."""
    report = json.loads((headline / "train-tiny-cpu-full.json").read_text())
    vanilla, dropping = report["runs"][:2]
    seconds = [run["steps"]["seconds"] for run in (vanilla, dropping)]
    before, after = (taken["forward"][0] + taken["backward"][0] for taken in seconds)
    assert dropping["compute_reduction"] == pytest.approx(1 - after / before, abs=1e-4)
    whole = 1 - seconds[1]["step"][0] / seconds[0]["step"][0]
    assert dropping["realised_reduction"] == pytest.approx(whole, abs=1e-4)
    assert dropping["realised_over_predicted"] == dropping["compute_reduction"] / dropping["predicted_reduction"]


def test_the_model_stands_beside_and_is_marked_as_one(headline: Path, files: Path) -> None:
    report = json.loads((headline / "train-tiny-cpu-full.json").read_text())
    assert report["model"]["card"] == "H100" and re.search(
        says("model", "H100", "no other card"), report["model"]["note"]
    )
    for run in report["runs"]:
        layers = [part for part in run["modelled"]["parts"] if part["name"].startswith("layers")]
        assert [part["tokens"] for part in layers] == [stage["tokens"] for stage in run["stages"]]
        assert run["modelled"]["forward_backward"]["flop"] == pytest.approx(run["steps"]["hardware_flops"][0])
    text = (headline / "train-tiny-cpu-full.md").read_text()
    assert re.search(rf"^\| step modelled for H100, {UNIT} \|", text, re.MULTILINE)
    assert re.search(rf"\| modelled for H100, {UNIT} \|$", text, re.MULTILINE)
    plain = json.loads((files / "train-tiny-cpu.json").read_text())
    assert plain["model"] is None, "a CPU is no card"
    assert "odelled for" not in (files / "train-tiny-cpu.md").read_text()


def test_variants_recompute_what_their_arms_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first setting; one that is named twice is measured once."""
    seen: list[BenchArm] = []
    monkeypatch.setattr(bench, "compare", lambda trainer, arms: seen.extend(arms) or [])
    words = ["bench", "train", "--shape", "tiny", "--steps", "1", "--warmup", "0", "--device", "cpu", "--samples", "1"]
    assert main([*words, "--recompute-layers", "2,0", "2,0", "1", "--compare", "--out", str(tmp_path)]) == 0
    assert [(bool(arm.recomputed), arm.recomputed.layers) for arm in seen] == [(True, 2), (False, 0)]
    report = json.loads((tmp_path / "train-tiny-cpu.json").read_text())
    assert [run["setting"] for run in report["runs"]] == ["2,0 recomputed"] * 2 + ["1 recomputed"] * 2


def test_three_files_are_written(files: Path) -> None:
    assert sorted(path.name for path in files.iterdir()) == [f"train-tiny-cpu.{end}" for end in ("json", "md", "png")]
    assert (files / "train-tiny-cpu.json").stat().st_size < 200_000
    with Image.open(files / "train-tiny-cpu.png") as picture:
        assert picture.width > 800


def test_the_json_says_all_that_is_needed_to_run_it_again(files: Path) -> None:
    report = json.loads((files / "train-tiny-cpu.json").read_text())
    assert report["environment"]["seed"] == 7
    assert {"device", "torch", "transformers", "commit", "date", "command"} <= set(report["environment"])
    assert report["optimizer"]["kind"] == "adamw"
    assert report["peak_flops"]["per_second"] > 0 and "measured" in report["peak_flops"]["source"]
    assert report["options"]["steps"] == 2
    assert [run["name"] for run in report["runs"]] == ["vanilla", "one", "two"]
    assert report["runs"][1]["schedule"]["layers"] == [4]
    for run in report["runs"]:
        assert {len(values) for values in run["steps"]["seconds"].values()} == {2}
        assert run["steps"]["image_tokens"][0][0] == 2 * 180
        low, median, high = run["quartiles"]["step"]
        assert 0 < low <= median <= high
        assert run["tokens_per_second"] > 0 and run["mfu"] > 0 and run["peak_mib"] > 0
    one = report["runs"][1]
    assert 0 < one["predicted_reduction"] < 1
    assert "optimizer is in neither" in report["compared"]
    ratio = one["compute_reduction"] / one["predicted_reduction"]
    assert one["realised_over_predicted"] == pytest.approx(ratio)
    assert {entry["group"] for entry in report["compare"]} >= {
        "batch",
        "logits",
        "attention",
        "recomputation",
        "kernels",
    }
    assert report["options"]["kernels"] == "eager" == report["runs"][0]["kernels"], "what auto came to"


def test_the_table_has_median_and_spread_of_every_part(files: Path) -> None:
    text = (files / "train-tiny-cpu.md").read_text()
    lines = dict(re.findall(rf"^\| ([^|]+?)(?:, {UNIT})? \|(.+)\|$", text, re.MULTILINE))
    spread = re.compile(r"[\d.,]+ \[[\d.,]+, [\d.,]+\]")
    for part in ("step", "forward", "backward", "optimizer", "tower forward", "tower backward"):
        assert len(spread.findall(lines[part])) == 3, part
    assert len(spread.findall(lines["ranking and dropping"])) == 2, "vanilla ranks nothing"
    for line in ("peak memory", "tokens/s", "MFU", "HFU"):
        assert len(re.findall(r"\d", lines[line])) >= 3, line
    for line in ("operations saved (predicted)", "time saved (realised)", "realised / predicted"):
        assert [bool(cell.strip()) for cell in lines[line].split("|")] == [False, True, True], line
    assert "peak predicted" not in lines, "a CPU has no such count"


def test_what_no_run_spends_time_in_has_no_line(files: Path) -> None:
    """As the backward of a tower that is frozen, in the table and in the picture."""
    report = json.loads((files / "train-tiny-cpu.json").read_text())
    for run in report["runs"]:
        run["quartiles"]["tower_backward"], run["parts"]["tower_backward"] = [0.0] * 3, 0.0
    heads = [row[0].split(",")[0] for row in tables(report)[0].rows]
    assert "tower forward" in heads and "backward" in heads and "tower backward" not in heads
    (legend,) = step_bars(report).legends
    named = [text.get_text() for text in legend.get_texts()]
    assert "tower forward" in named and "backward" in named and "tower backward" not in named


def test_the_json_says_what_its_times_are(files: Path) -> None:
    report = json.loads((files / "train-tiny-cpu.json").read_text())
    assert report["clock"] == "CPU seconds of the process"
    assert set(report["times"]) == {"seconds", "wall"} <= set(report["runs"][0]["steps"])
    assert report["times"]["seconds"].startswith("CPU seconds") and report["times"]["wall"] == "seconds on the clock"


def test_the_markdown_has_a_line_per_run_and_the_picture(files: Path) -> None:
    text = (files / "train-tiny-cpu.md").read_text()
    assert "| median [quartiles] | vanilla | one | two |" in text
    for start in ("| vanilla | 0 |", "| one | 1 |", "| two | 2 |", "| attention | flash_attn |"):
        assert start in text
    assert re.search(says("not available", "CUDA"), text)
    assert "](train-tiny-cpu.png)" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--shape", "tinny"], says("shape", "'tinny'", "tiny")),
        (["--shape", "tiny", "--steps", "0"], says("--steps", "1", "0")),
        (["--shape", "tiny", "--images", "all"], says("images", "'all'")),
        (["--shape", "tiny", "--optimizer", "sgd"], says("--optimizer", "'sgd'")),
        (["--shape", "tiny", "--attention", "eager"], says("--attention", "'eager'")),
        (["--shape", "tiny", "--kernels", "fast"], says("--kernels", "'fast'", "torch")),
        (["--shape", "tiny", "--device", "cpu", "--kernels", "liger"], says("--kernels", "liger", "CUDA")),
        (["--shape", "tiny", "--seed", "-1"], says("--seed", "0", "-1")),
        (["--shape", "tiny", "--seed", "99999999999999999999"], says("--seed", "2**32")),
        (["--shape", "tiny", "--samples", "0"], says("--samples", "1", "0")),
        (["--shape", "tiny", "--warmup", "-1"], says("--warmup", "0", "-1")),
        (["--shape", "tiny", "--out", "/proc/none"], says("--out", "/proc/none", "No such file")),
        (["--shape", "tiny", "--out", f"{CONFIGS}/README.md/deeper"], says("--out", "README.md", "file")),
        (["--shape", "tiny", "--device", "abacus"], says("--device", "'abacus'")),
        (["--shape", "tiny", "--schedule", "nowhere.yaml"], says("--schedule", "nowhere.yaml")),
        (["--shape", "tiny", "--card", "H1000"], says("--card", "'H1000'", "H100")),
        (["--shape", "tiny", "--recompute-layers", "some"], says("--recompute-layers", "'some'", "all", "auto", "8")),
        (["--shape", "tiny", "--recompute-layers", "9"], says("--recompute-layers", "'9'", "8")),
        (["--shape", "tiny", "--recompute-layers", "1,2,3"], says("--recompute-layers", "1,2,3", "2")),
        (["--shape", "tiny", "--recompute-layers", "auto"], says("--recompute-layers", "auto", "--card", "CPU")),
        (
            ["--shape", "tiny", "--no-recompute", "--recompute-layers", "2"],
            says("--no-recompute", "--recompute-layers"),
        ),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(line, error)


def test_a_run_with_a_schedule_and_a_bare_schedule_are_read(tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("layers: [8, 16]\nratios: [0.5, 0.25]\npositions: keep\n")
    run = CONFIGS / "llava15_7b/finetune_pdrop.yaml"
    found = read_schedules([run, tmp_path / "bare.yaml"], 32)
    assert found["finetune_pdrop"] == Schedule((8, 16, 24), (0.5, 0.25, 0.125), positions="renumber")
    assert found["bare"] == Schedule((8, 16), (0.5, 0.25), positions="keep")


def test_a_published_schedule_is_scaled_to_the_depth_of_the_shape() -> None:
    found = read_schedules([CONFIGS / "schedules/hidrop.yaml", CONFIGS / "schedules/divprune.yaml"], 64)
    assert found["hidrop"].layers == (20, 28, 32, 36, 50) and found["hidrop"].inject == 16
    assert found["divprune"].layers == (0,)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("layers: [9]\nratios: [0.5]\n", says("bad.yaml", "layers", "9")),
        ("layers: [4]\nratio: [0.5]\n", says("bad.yaml", "key", "pyramid_drop.ratio")),
        ("layers: [4]\nratios: [1.5]\n", says("bad.yaml", "ratios", "1.5")),
        ("layers: [4\n", says("bad.yaml", "line 2", "YAML")),
        ("only text\n", says("bad.yaml", "'only text'")),
        ("[1, 2]\n", says("bad.yaml", "list")),
        ("name: run\n", says("bad.yaml", "model")),
        ("pyramid_drop: {layers: [4], ratios: [1.5]}\n", says("bad.yaml", "ratios", "1.5")),
        ("layers: [4]\nratios: [0.5]\nranker: nearest\n", says("bad.yaml", "pyramid_drop.ranker", "'nearest'")),
        ("layers: [0]\nratios: [0.5]\nranker: fastv\n", says("bad.yaml", "pyramid_drop.ranker", "fastv", "layer 0")),
        ("depth: 0\nlayers: [4]\nratios: [0.5]\n", says("bad.yaml", "pyramid_drop.depth", "0")),
    ],
)
def test_a_bad_schedule_names_option_and_file(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=line) as caught:
        read_schedules([file], 8)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(f"--schedule: {file}: ") and f"{file}: {file}" not in said


def test_two_schedules_of_one_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "same.yaml"
    file.write_text("layers: [4]\nratios: [0.5]\n")
    with pytest.raises(ValueError, match=says("'same'", "taken")):
        read_schedules([file, file], 8)
