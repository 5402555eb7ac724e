"""`ablate`: what an ablation file says, what is wrong with one, and a whole ablation in miniature."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_pdrop.__main__ import main
from llava_pdrop.compare import candidates
from llava_pdrop.compare.ablate import plan
from llava_pdrop.compare.budgets import Budget, average_tokens
from llava_pdrop.compare.candidates import missing_lines
from llava_pdrop.compare.rows import table
from llava_pdrop.compare.variants import load_ablation
from llava_pdrop.config.load import load_config
from llava_pdrop.errors import ConfigError
from llava_pdrop.runtime.preemption import PREEMPTED_EXIT
from llava_pdrop.train.trainer import PyramidTrainer
from tests.benchmark_sets import write_pope
from tests.messages import meant, says

ROOT = Path(__file__).parents[3]
DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
LAMBDAS = {
    "vanilla": {"pyramid_drop": None},
    "lambda_04": {"pyramid_drop.ratios": [0.4, 0.16, 0.064]},
    "lambda_05": {"pyramid_drop": {"ratios": [0.5, 0.25, 0.125]}},
}


@pytest.fixture
def write(tiny_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes an ablation of a tiny run beside the config of that run."""
    tiny_config("base", pyramid_drop=DROP)

    def write(**content: object) -> Path:
        file = tmp_path / "ablation.yaml"
        file.write_text(json.dumps({"base": "base.yaml", "name": "ab", "output_dir": str(tmp_path / "ab"), **content}))
        return file

    return write


def complaint(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_ablation(file, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_variants_change_single_keys(write) -> None:
    ablation = load_ablation(write(variants=LAMBDAS), ["seed=3"])
    vanilla, low, same = (variant.config for variant in ablation.variants)
    assert vanilla.pyramid_drop is None and low.schedule.ratios == (0.4, 0.16, 0.064)
    assert same.schedule.layers == (1, 2, 3) and same.schedule.ratios == (0.5, 0.25, 0.125)
    assert {config.seed for config in (vanilla, low, same)} == {3}
    assert low.name == "ab/lambda_04" and Path(low.output_dir) == ablation.output_dir / "lambda_04"


def test_words_of_a_variant_are_a_run(write) -> None:
    for variant in load_ablation(write(variants=LAMBDAS), ["train.learning_rate=2e-05"]).variants:
        file, *words = variant.words
        assert load_config(file, words) == variant.config and variant.config.train.arguments["learning_rate"] == 2e-5


def test_variants_take_presets(write) -> None:
    presets = [f"configs/schedules/{name}.yaml" for name in ("pyramiddrop", "uniform")]
    few = {"pyramid_drop": presets[0], "pyramid_drop.keep": [5, 2, 1], "pyramid_drop.ratios": []}
    variants = {"a": {"pyramid_drop": presets[0]}, "b": {"pyramid_drop": presets[1]}, "c": few}
    one, other, kept = (variant.config.schedule for variant in load_ablation(write(variants=variants)).variants)
    assert one.layers == other.layers == (1, 2, 3) and other.ranker == "uniform" and kept.keep == (5, 2, 1)
    grid = load_ablation(write(grid={"pyramid_drop": presets})).variants
    assert [variant.config.schedule.ranker for variant in grid] == ["last_instruction", "uniform"]


def test_a_grid_is_every_combination(write) -> None:
    grid = {"pyramid_drop.ratios": [[0.5, 0.25, 0.125], [0.6, 0.36, 0.216]], "pyramid_drop.ranker": ["fastv", "random"]}
    ablation = load_ablation(write(grid=grid))
    assert [variant.name for variant in ablation.variants] == [
        "ratios_0.5_0.25_0.125-ranker_fastv",
        "ratios_0.5_0.25_0.125-ranker_random",
        "ratios_0.6_0.36_0.216-ranker_fastv",
        "ratios_0.6_0.36_0.216-ranker_random",
    ]
    last = ablation.variants[-1].config.schedule
    assert last.ratios == (0.6, 0.36, 0.216) and last.ranker == "random" and last.layers == (1, 2, 3)


def test_a_config_as_it_stands_is_its_own_run(write, tiny_config) -> None:
    """So that a run which several ablations share is trained once."""
    other = tiny_config("other", pyramid_drop={"layers": [2], "ratios": [0.5]})
    file = write(variants={"other": "other.yaml", "here": {}, "changed": {"base": "other.yaml", "seed": 1}})
    one, here, changed = (variant.config for variant in load_ablation(file).variants)
    assert one == load_config(other) and here == load_config(other.with_name("base.yaml"))
    assert changed.output_dir.endswith("/ab/changed") and changed.schedule == one.schedule
    assert load_ablation(file, ["train.logging_steps=5"]).variants[0].config.output_dir.endswith("/ab/other")


def test_vanilla_stays_vanilla(write) -> None:
    """Keys below one that is taken away would bring the section of the base back."""
    vanilla, low, _ = load_ablation(write(variants=LAMBDAS), ["pyramid_drop.ranker=fastv"]).variants
    assert vanilla.config.pyramid_drop is None and low.config.schedule.ranker == "fastv"
    anew = {"pyramid_drop": None, "pyramid_drop.layers": [2], "pyramid_drop.ratios": [0.5]}
    assert load_ablation(write(variants={"anew": anew})).variants[0].config.schedule.layers == (2,)
    grid = {"pyramid_drop": [None, DROP], "pyramid_drop.ranker": ["fastv", "random"]}
    said = says("pyramid_drop_null-ranker_fastv", "pyramid_drop_null-ranker_random", "same")
    assert re.search(said, complaint(write(grid=grid)))


def test_own_keys_on_the_command_line(write, tmp_path: Path) -> None:
    ablation = load_ablation(write(variants=LAMBDAS), [f"output_dir={tmp_path}/else", "name=mine"])
    assert ablation.name == "mine" and ablation.variants[0].config.output_dir == f"{tmp_path}/else/vanilla"
    file = write(variants=LAMBDAS, checkpoint="nowhere")
    assert load_ablation(file, ["checkpoint=null"]).checkpoint is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, says("variants", "grid")),
        ({"variants": {}, "grid": {}}, says("variants", "grid")),
        (
            {"variants": {"a": {"pyramid_drop.ration": 1}}},
            says("a", "'pyramid_drop.ration'", meant("pyramid_drop.ratios'")),
        ),
        ({"variants": {"a": {"pyramid_drop.ratios": [0.5]}}}, says("a", "pyramid_drop.layers", "3 entries", "1")),
        ({"variants": {"a": {"pyramid_drop.layers": [1, 2, 9]}}}, says("a", "pyramid_drop.layers", "9")),
        ({"variants": {"a": {"train.max_steps": "many"}}}, says("a", "train.max_steps", "'many'")),
        ({"variants": {"a": {"name": "x"}}}, says("variants.a.name")),
        ({"variants": {"a": 3}}, says("variants.a", "keys")),
        ({"variants": {"a/b": {"seed": 1}}}, says("'a/b'", "directory")),
        ({"variants": {"a": {"seed": 1}, "b": {"seed": 1}}}, says("a and b", "same")),
        ({"variants": {"a": "nowhere.yaml"}}, says("a", "nowhere.yaml")),
        ({"variants": {"seed_1": {"seed": 1}}, "grid": {"seed": [1]}}, says("two", "'seed_1'")),
        ({"grid": {"seed": []}}, says("grid.seed", "list", "[]")),
        ({"grid": {"name": ["a", "b"]}}, says("grid.name", "variants")),
        ({"grid": {"base": ["a.yaml"]}}, says("grid.base", "variants")),
        ({"grid": {"seed": 3}}, says("grid.seed", "list", "3")),
        ({"variants": LAMBDAS, "base": "nowhere.yaml"}, says("base", "nowhere.yaml")),
        ({"variants": LAMBDAS, "base": 3}, says("base", "text", "3")),
        ({"varaints": {}, "grid": {"seed": [1]}}, says("'varaints'", meant("variants'"))),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(write, content: dict, expected: str) -> None:
    file = write(**content)
    assert re.match(re.escape(f"{file}: ") + expected, complaint(file))


def test_a_file_that_is_none(tmp_path: Path, write) -> None:
    file = write(variants=LAMBDAS)
    assert "did you mean" in complaint(file.with_name("ablatoin.yaml"))
    file.write_text("base: base.yaml\nvariants:\n  a: {seed: 1}\n  a: {seed: 2}\n")
    assert complaint(file).startswith(f"{file} line ") and "duplicate key a" in complaint(file)
    file.write_text("- a\n")
    assert re.match(re.escape(f"{file}: ") + says("ablation", "list"), complaint(file))
    file.write_text("3\n")
    assert re.match(re.escape(f"{file}: ") + says("YAML", "int"), complaint(file))
    file.write_text("variants: {a: {seed: 1}}\n")
    assert re.match(re.escape(f"{file}: ") + says("base", "missing"), complaint(file))


def test_a_wrong_word_on_the_command_line_is_said_once(write) -> None:
    assert re.match("command line: " + says("'seeed'"), complaint(write(variants=LAMBDAS), "seeed=1"))


def test_a_checkpoint_is_evaluated_with_other_schedules_only(write, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    file = write(variants={**LAMBDAS, "longer": {"train.max_steps": 9}}, checkpoint=str(tmp_path / "model"))
    assert re.search(says("longer", "train", "vanilla"), complaint(file))


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "ablations").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_ablations(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant can be planned; where the paper has it, the cost of its image tokens is the paper's."""
    monkeypatch.chdir(ROOT)
    ablation = load_ablation(file.relative_to(ROOT))
    shown = table(plan(ablation), "")
    head, lines = shown.head, shown.rows
    assert len(lines) == len(ablation.variants) > 3 and lines[0][1] == "-"
    rows = [dict(zip(head, line)) for line in lines]
    ours = file.stem in ("tiny", "presets", "lab", "easy_vqa", "easy_vqa_single")
    assert ("paper: TFLOP" in head) == (not ours)
    for row in () if ours else rows:
        printed = "1.39" if row["variant"] == "stages_5" else row["paper: TFLOP"]  # Table 9 is off by a digit there
        assert row["TFLOP"] == printed
    dropping = [row for row in rows if row["after layers"] != "-"]
    assert len(dropping) > 2 and all(float(row["saved, predicted"].rstrip("%")) > 10 for row in dropping)


def test_the_shipped_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every preset is a variant, or is refused by 4 layers and named with its reason; at the budget all have 120
    tokens, a pooled picture the 100 of the largest square."""
    monkeypatch.chdir(ROOT)
    file = Path("configs/ablations/presets.yaml")
    ablation, text = load_ablation(file), file.read_text()
    assert ablation.also_training_free
    for preset in sorted(Path("configs/schedules").glob("*.yaml")):
        if f"{preset}" in text:
            continue
        assert f"#   {preset.stem}: " in text
        with pytest.raises(ConfigError):
            load_config("configs/tiny/finetune_pdrop.yaml", [f"pyramid_drop={preset}", "compare.training_free=null"])
    equal = {run.row: run for run in ablation.variants if Budget(120.0) in run.budgets}
    averages = {name: average_tokens(run.config) for name, run in equal.items()}
    assert averages.pop("vanilla") == 256 and averages.pop("downsample") == 100
    assert len(averages) == 8 and all(119 <= tokens <= 120 for tokens in averages.values())
    baselines = {"vanilla", "pyramiddrop", "random", "uniform", "downsample"}
    best = {"pyramiddrop_lambda04", "pyramiddrop_lambda06", "duet", "divprune", "sparsevlm_128", "sparsevlm_192"}
    repeated = {run.row.removesuffix("-at_120") for run in ablation.variants if run.config.seed == 2}
    assert repeated == baselines | best


@pytest.fixture
def questions(tiny_files: Path) -> int:
    return len(json.loads((tiny_files / "data/eval.json").read_text()))


def pictures_of(tiny_files: Path) -> list[Path]:
    return sorted((tiny_files / "data/images").glob("*.png"))[:2]


def results(directory: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((directory / "ablation.json").read_text())["variants"]}


def test_a_whole_ablation_interrupted_once(
    write, tmp_path: Path, tiny_files: Path, questions: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Started again with the same words: what is finished is passed over, what was told to stop goes on."""
    compute_loss = PyramidTrainer.compute_loss

    def told_to_stop(self, *args, **kwargs):
        if "lambda_04" in self.args.output_dir and self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_loss(self, *args, **kwargs)

    words = ["benchmarks=pope", f"eval.root={write_pope(tmp_path / 'sets', pictures_of(tiny_files))}"]
    file = write(variants=LAMBDAS)
    with monkeypatch.context() as patch:
        patch.setattr(PyramidTrainer, "compute_loss", told_to_stop)
        with pytest.raises(SystemExit) as end:
            main(["ablate", str(file), *words])
    printed = capsys.readouterr().out
    assert "variant 2 of 3: lambda_04" in printed and "variant 3" not in printed and "finished before" not in printed
    assert end.value.code == PREEMPTED_EXIT and not (tmp_path / "ab" / "ablation.md").exists()

    read, load_benchmarks = [], candidates.load_benchmarks
    monkeypatch.setattr(
        candidates, "load_benchmarks", lambda *args, **options: read.append(1) or load_benchmarks(*args, **options)
    )
    assert main(["ablate", str(file), *words]) == 0
    assert len(read) == 1, "variants that ask the same share the questions"
    printed = capsys.readouterr().out
    said = "".join(printed.split())
    assert said.count("ab/vanilla:finishedbeforewiththesamesettings") == 1 == said.count("finishedbefore")
    assert f"resumingfrom{tmp_path}/ab/lambda_04/checkpoint-2" in said

    rows = results(tmp_path / "ab")
    assert list(rows) == list(LAMBDAS)
    assert rows["lambda_04"]["image_tokens"] == [16, 6, 2, 1] and rows["vanilla"]["image_tokens"] == [16]
    assert rows["lambda_04"]["average_tokens"] == 25 / 4
    assert rows["vanilla"]["predicted"] is None and rows["vanilla"]["realised"] is None
    assert 0 < rows["lambda_05"]["predicted"] < rows["lambda_04"]["predicted"] < 1
    for name in ("lambda_04", "lambda_05"):
        saving = rows[name]["saving"]
        assert rows[name]["realised"] == saving["realised"] == statistics.median(saving["pairs"])
        assert saving["steps"] == [0, 1, 2] and len(saving["quartiles"]) == 2
    assert rows["vanilla"]["saving"] is None
    assert {row["evaluation"]["questions"] for row in rows.values()} == {questions}
    assert rows["lambda_04"]["evaluation"]["image_tokens"] == [16, 6, 2, 1]
    assert {name: row["benchmarks"][0]["column"] for name, row in rows.items()} == {name: name for name in LAMBDAS}
    text = (tmp_path / "ab" / "ablation.md").read_text()
    head = next(line for line in text.splitlines() if line.startswith("| variant |"))
    assert "| POPE | lambda_05 |" in text and "| POPE |" in head and "took turns" in text
    assert "16 → 6 → 2 → 1" in text and "16 → 6 → 2 → 1" in printed
    assert f"{rows['lambda_04']['evaluation']['accuracy']:.1%}" in text
    with Image.open(tmp_path / "ab" / "ablation.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.process
def test_one_checkpoint_with_every_schedule(write, tmp_path: Path, tiny_files: Path, questions: int, capsys) -> None:
    train = {"variants": {"vanilla": {"pyramid_drop": None}}}
    assert main(["ablate", str(write(**train))]) == 0
    made = sorted(path.name for path in (tmp_path / "ab").iterdir())
    words = ["benchmarks=pope", f"eval.root={write_pope(tmp_path / 'sets', pictures_of(tiny_files))}"]
    assert main(["ablate", str(write(variants=LAMBDAS)), f"checkpoint={tmp_path}/ab/vanilla", *words]) == 0
    rows = results(tmp_path / "ab")
    assert [row["benchmarks"][0]["column"] for row in rows.values()] == list(LAMBDAS)
    assert rows["lambda_04"]["benchmarks"][0]["image_tokens"] == [16, 6, 2, 1]
    assert "| POPE | lambda_04 |" in (tmp_path / "ab" / "ablation.md").read_text()
    assert not (tmp_path / "ab" / "lambda_04").exists() and "vanilla" in made
    assert rows["lambda_04"]["evaluation"]["image_tokens"] == [16, 6, 2, 1]
    assert rows["lambda_05"]["evaluation"]["questions"] == questions and rows["lambda_05"]["seconds"] > 0
    assert rows["lambda_05"]["realised"] == pytest.approx(1 - rows["lambda_05"]["seconds"] / rows["vanilla"]["seconds"])
    assert 0 < rows["lambda_05"]["predicted"] < rows["lambda_04"]["predicted"] < 1
    assert "Nothing was trained" in (tmp_path / "ab" / "ablation.md").read_text()
    assert len(list((tmp_path / "ab/benchmarks/pope").iterdir())) == len(LAMBDAS)

    other, picture = tmp_path / "other", next((tmp_path / "sets/pope/val2014").iterdir())
    shutil.copytree(tmp_path / "ab/vanilla", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(SystemExit) as end:
        main(["ablate", str(write(variants=LAMBDAS)), f"checkpoint={other}", *words])
    assert end.value.code == 1, "a picture that cannot be read costs the exit status here too"
    assert all(row["benchmarks"][0]["unread"] for row in results(tmp_path / "ab").values())
    assert len(list((tmp_path / "ab/benchmarks/pope").iterdir())) == 2 * len(LAMBDAS), "another model answers anew"
    capsys.readouterr()
    assert main(["ablate", str(write(variants=LAMBDAS)), f"checkpoint={tmp_path}/nowhere"]) == 2
    assert re.search(says("checkpoint", f"{tmp_path}/nowhere"), capsys.readouterr().err)


def test_what_the_table_will_lack_is_said(write) -> None:
    def lines_of(*overrides: str, **content: object) -> list[str]:
        return missing_lines([variant.config for variant in load_ablation(write(**content), overrides).variants])

    assert lines_of(variants=LAMBDAS) == []
    lines = lines_of("data.eval=null", grid={"seed": [1]})
    assert len(lines) == 2
    assert re.search(says("without drops", "no realised"), lines[0])
    assert re.search(says("data.eval", "null", "no accuracy"), lines[1])


def test_plan_starts_nothing(write, tmp_path: Path, capsys) -> None:
    assert main(["ablate", str(write(variants=LAMBDAS)), "--plan"]) == 0
    assert "lambda_04" in capsys.readouterr().out and not (tmp_path / "ab").exists()


def test_all_variants_are_checked_before_the_first_starts(write, tmp_path: Path, capsys) -> None:
    variants = {**LAMBDAS, "last": {"eval.scorer": "exact"}}
    assert main(["ablate", str(write(variants=variants))]) == 2
    assert re.search(says("eval.scorer", "'exact'"), capsys.readouterr().err) and not (tmp_path / "ab").exists()
    variants = {**LAMBDAS, "last": {"train.report_to": "wandbb"}}
    assert main(["ablate", str(write(variants=variants))]) == 2
    assert re.search(says("train.report_to", "'wandbb'"), capsys.readouterr().err) and not (tmp_path / "ab").exists()
    variants = {**LAMBDAS, "last": {"data.image_root": "nowhere"}}
    assert main(["ablate", str(write(variants=variants))]) == 2
    assert re.search(says("data.image_root", "nowhere"), capsys.readouterr().err) and not (tmp_path / "ab").exists()
