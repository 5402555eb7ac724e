"""`llava-pdrop doctor`: exit status, files, what it says about cost, and what training makes of its index."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.config.load import load_config
from llava_pdrop.config.paths import check_paths
from llava_pdrop.cost.nominal import make_encoder
from llava_pdrop.data.images import image_size
from llava_pdrop.doctor import cost
from llava_pdrop.doctor import report as doctor_report
from llava_pdrop.doctor.cost import Cost, rate_of, stage_tokens
from llava_pdrop.errors import ConfigError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.run import build_dataset, load_parts
from tests.messages import says

DROPS = {"layers": [1, 2], "ratios": [0.5, 0.25]}


def doctor(*words: Any) -> int:
    """The exit status."""
    try:
        return main(["doctor", *map(str, words), "--workers", "0"])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def spoilt(tiny_files: Path, tmp_path: Path) -> Path:
    """The tiny training records, the second without an answer, the fourth without its picture."""
    records = json.loads((tiny_files / "data/train.json").read_text())
    records[1]["conversations"] = records[1]["conversations"][:1]
    records[3]["image"] = "gone.png"
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(records))
    return path


def test_a_good_data_set(tiny_config, tmp_path, capsys):
    file = tiny_config(pyramid_drop=DROPS)
    assert doctor(file, "--eval") == 0
    out = tmp_path / "out/run/doctor"
    report = json.loads((out / "doctor.json").read_text())
    assert set(report) == {"name", "config", "verdict", "training", "clean_index", "data", "cost"}
    assert set(report["data"]) == {"train", "eval"} and report["data"]["eval"]["usable"] == 6
    assert report["training"]["would_start"] and report["training"]["would_use_every_record"]
    assert report["cost"]["image_tokens_per_stage"] == {
        "images": 12, "total": [192, 96, 48], "mean_per_image": [16.0, 8.0, 4.0]
    }  # fmt: skip
    assert 0 < report["cost"]["step"]["predicted_reduction"] < 1
    for found in report["data"].values():
        assert all((out / file).stat().st_size > 1000 for file in found["figures"].values())
        assert set(found["figures"]) == {"lengths", "image_sizes"}
    text = (out / "doctor.md").read_text()
    assert "use every record" in text and "| after drop 2 | 4.0 | 48 |" in text
    assert re.search(says("would start", "every record"), capsys.readouterr().out)


def test_adapters_cost_less_than_training_the_decoder(tiny_config, tmp_path):
    """LoRA: no gradients of the decoder's own matrices, and two small products beside each."""
    file, costs = tiny_config(pyramid_drop=DROPS), []
    for number, words in enumerate(([], ["lora.r=2"])):
        assert doctor(file, *words, "--out", tmp_path / str(number)) == 0
        report = json.loads((tmp_path / str(number) / "doctor.json").read_text())
        costs.append(report["cost"]["step"]["tflop_per_record"])
    whole, adapted = costs
    assert 0.5 * whole["vanilla"] < adapted["vanilla"] < 0.9 * whole["vanilla"]
    assert adapted["dropping"] < 0.9 * whole["dropping"]


def test_a_spoilt_one(tiny_config, spoilt, tmp_path, capsys):
    file = tiny_config()
    assert doctor(file, f"data.train={spoilt}", "--out", tmp_path / "report") == 1
    report = json.loads((tmp_path / "report/doctor.json").read_text())
    problems = report["data"]["train"]["problems"]
    assert {kind: e["records"] for kind, e in problems.items() if e["refused"]} == {
        "no_supervised_token": 1, "missing_image": 1
    }  # fmt: skip
    assert report["training"]["refused_records"] == 2 and not report["training"]["would_start"]
    assert re.search(says("2 of 12 records", "data.on_invalid: stop", "not start"), capsys.readouterr().out)
    assert doctor(file, f"data.train={spoilt}", "data.on_invalid=skip", "data.max_invalid=0.2") == 1
    skipping = json.loads((tmp_path / "out/run/doctor/doctor.json").read_text())["training"]
    assert skipping["would_start"] and not skipping["would_use_every_record"]


def test_records_without_pictures_and_records_without_use(tiny_config, tmp_path, capsys):
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a cat"}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": 1, "conversations": talk}] * 3))
    file, out = tiny_config(), tmp_path / "out/run/doctor"
    assert doctor(file, f"data.train={tmp_path / 'text.json'}") == 0
    report = json.loads((out / "doctor.json").read_text())
    assert report["cost"]["image_tokens_per_stage"] == {"images": 0, "total": [0], "mean_per_image": [0.0]}
    assert report["cost"]["step"]["records"] == 3 and list(report["data"]["train"]["figures"]) == ["lengths"]

    (tmp_path / "text.json").write_text(json.dumps([{"id": 1, "conversations": talk[:1]}] * 3))
    assert doctor(file, f"data.train={tmp_path / 'text.json'}") == 1
    report = json.loads((out / "doctor.json").read_text())
    assert report["data"]["train"]["usable"] == 0 and report["cost"]["step"] is None
    assert "data.index" not in report["verdict"] and "no tokens were counted" in (out / "doctor.md").read_text()


def test_a_histogram_that_cannot_be_drawn_is_in_no_report(tiny_config, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(doctor_report, "size_histogram", broken)
    assert doctor(tiny_config()) == 0
    out = tmp_path / "out/run/doctor"
    figures = json.loads((out / "doctor.json").read_text())["data"]["train"]["figures"]
    assert figures == {"lengths": "train_lengths.png"}
    text = (out / "doctor.md").read_text()
    assert "train_lengths.png" in text and "image_sizes.png" not in text


def test_evaluation_data_count_too(tiny_config, spoilt, capsys):
    assert doctor(tiny_config(), "--eval", f"data.eval={spoilt}") == 1
    assert re.search(says("every record", "2 of 12 records of data.eval"), capsys.readouterr().out)


@pytest.mark.process
def test_data_are_made_where_the_config_says_how(tiny_config, tiny_files, tmp_path):
    train = tmp_path / "made.json"
    (tmp_path / "make.py").write_text(
        f"import shutil\nshutil.copy({str(tiny_files / 'data/train.json')!r}, {str(train)!r})"
    )
    data = {"train": str(train), "image_root": str(tiny_files / "data/images"), "samples_per_batch": 2}
    assert doctor(tiny_config(data=data | {"prepare": [str(tmp_path / "make.py")]})) == 0 and train.is_file()


def test_structure_without_any_model(tiny_config, spoilt, tmp_path, capsys):
    file = tiny_config(model={"language_model": "nobody/none", "vision_tower": "nobody/none", "template": "qa"})
    assert doctor(file, f"data.train={spoilt}") == 2
    assert re.search(says("tokenizer", "nobody/none", "--tokenizer", "--no-tokens"), capsys.readouterr().err)
    assert doctor(file, f"data.train={spoilt}", "--no-tokens") == 1
    report = json.loads((tmp_path / "out/run/doctor/doctor.json").read_text())
    assert report["data"]["train"]["tokens"] is None and report["cost"]["step"] is None
    assert "tokens were not counted" in report["verdict"]


def test_a_tokenizer_and_the_shape_are_enough(tiny_config, tiny_files, tmp_path):
    """The same lengths as with the model's own files."""
    shape = {
        "language_model": json.loads((tiny_files / "llm/config.json").read_text()),
        "vision_tower": json.loads((tiny_files / "tower/config.json").read_text()),
    }
    parts = {"language_model": "nobody/none", "vision_tower": "nobody/none", "template": "qa"}
    file = tiny_config("bare", model={**parts, "reference_shape": shape})
    assert doctor(file, "--tokenizer", tiny_files / "llm") == 0 and doctor(tiny_config()) == 0
    bare, whole = (json.loads((tmp_path / f"out/{name}/doctor/doctor.json").read_text()) for name in ("bare", "run"))
    assert bare["data"]["train"]["tokens"] == whole["data"]["train"]["tokens"]
    assert bare["cost"] == whole["cost"]


def test_training_uses_exactly_the_clean_records(tiny_config, spoilt, tmp_path):
    file = tiny_config()
    assert doctor(file, f"data.train={spoilt}") == 1
    words = [f"data.train={spoilt}", f"data.index={tmp_path / 'out/run/doctor/clean_index.json'}"]
    config = load_config(file, words)
    parts = load_parts(config)
    dataset = build_dataset(config, parts)
    assert [dataset[i].id for i in range(len(dataset))] == [f"train{i}" for i in range(12) if i not in (1, 3)]
    sizes = [[image_size(image) for image in record.images] for record in dataset.records]
    assert make_encoder(config).lengths(dataset.records, sizes) == dataset.lengths()
    assert doctor(file, *words) == 1  # the doctor looks at all records whatever index is named

    spoilt.write_text(spoilt.read_text().replace("Which", "What "))
    with pytest.raises(ValueError, match=says("data.index", "clean_index.json", "other data")):
        build_dataset(config, parts)
    with pytest.raises(ConfigError, match=says("data.index", "none.json")):
        check_paths(load_config(file, ["data.index=none.json"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=none.json"], says("none.json", "data")),
        (["--eval", "data.eval=null"], says("data.eval")),
        (["model.template=v11"], says("model.template", "'v11'")),
        (["--out", __file__], says("test_doctor.py", "directory")),
        (["--listed", "-1"], says("--listed", "-1")),
        (["--measured", "none.json"], says("none.json", "bench")),
    ],
)
def test_mistakes_are_one_line(tiny_config, capsys, words, message):
    assert doctor(tiny_config(), *words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_stage_tokens_weigh_pictures_by_how_often_they_are_shown():
    anyres = ImageGeometry(56, 14, "anyres", "flat", ((56, 112), (112, 112)))
    sizes, times = np.array([[30, 60], [112, 112], [30, 60]]), np.array([2, 1, 3])
    tokens = stage_tokens(sizes, times, anyres, Schedule((1, 2), (0.5, 0.1)))
    tall, square = 48, 80
    assert tokens["images"] == 6
    assert tokens["total"] == [5 * tall + square, 5 * tall // 2 + square // 2, 5 * int(tall * 0.1) + int(square * 0.1)]


COST = Cost(batches=1, records=1, vanilla=2e12, dropping=1e12, reduction=0.5)


def test_hours_by_a_stated_rate(tiny_config):
    config = load_config(tiny_config())
    stated = rate_of(config, COST, None, 10.0)
    assert COST.hours(stated) == (1000 * 2 / 10 / 3600, 1000 * 1 / 10 / 3600) and stated.unit == "GPU hours"
    assumed = rate_of(config, COST, None, None)
    assert assumed.vanilla == cost.DEFAULT_TFLOPS * 1e12 and "assumed" in assumed.source


def test_hours_from_the_run_itself(tiny_config, tmp_path):
    config = load_config(tiny_config())
    run = tmp_path / "out/run"
    run.mkdir(parents=True)
    rows = [{"step": i, "loss": 1.0, "samples": 4, "step_seconds": 9.0 if i == 0 else 2.0} for i in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for measured in (None, run):
        rate = rate_of(config, COST, measured, None)
        assert COST.hours(rate)[0] == pytest.approx(1000 * 0.5 / 3600)  # 2 seconds for 4 records
        assert "measured" in rate.source and rate.unit == "hours on the devices of that run"
    assert rate_of(config, COST, None, 10.0).unit == "GPU hours"
    with pytest.raises(ValueError, match=says("metrics.jsonl")):
        rate_of(config, COST, tmp_path, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"step": 1, "loss": 2.0}\n',
        '{"step": 1, "samples": 2, "step_seconds": "x"}\n',
        '{"step": 1, "samples": 2, "step_seconds": NaN}\n',
        "[3]\n",
        "\udcff",
    ],
)
def test_a_run_that_died_early_takes_no_report_away(tiny_config, tmp_path, text):
    """The speed of the run in output_dir is an extra; only who asks for it (--measured) is refused."""
    file = tiny_config()
    run = tmp_path / "out/run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    rate = rate_of(load_config(file), COST, None, None)
    assert rate.vanilla == cost.DEFAULT_TFLOPS * 1e12 and "not measured" in rate.source
    assert doctor(file) == 0
    assert "not measured" in (run / "doctor/doctor.md").read_text()
    if not text or "loss" in text:
        with pytest.raises(ValueError, match=says("metrics.jsonl", "timed")):
            rate_of(load_config(file), COST, run, None)


def test_a_run_whose_settings_are_broken_takes_none_either(tiny_config, tmp_path):
    run = tmp_path / "out/run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "samples": 2, "step_seconds": 1.0}\n')
    (run / "llava_pdrop.yaml").write_text("modle: {}\n")
    assert "not measured" in rate_of(load_config(tiny_config()), COST, None, None).source


def test_hours_from_a_bench(tiny_config, tmp_path):
    config = load_config(tiny_config(pyramid_drop=DROPS))
    arms = [({"layers": []}, 0.5), ({"layers": [1], "ratios": [0.5]}, 0.3), (config.schedule.to_dict(), 0.4)]
    report = {
        "peak_flops": {"per_second": 100e12},
        "runs": [{"schedule": schedule, "hfu": hfu} for schedule, hfu in arms],
        "environment": {"device": "a GPU"},
        "shape": {"name": "tiny"},
    }
    (tmp_path / "bench.json").write_text(json.dumps(report))
    rate = rate_of(config, COST, tmp_path / "bench.json", None)
    assert (rate.vanilla, rate.dropping) == (50e12, 40e12) and "a GPU" in rate.source
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ValueError, match=says("bench.json", "llava-pdrop bench train")):
        rate_of(config, COST, tmp_path / "bench.json", None)


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "--no-tokens" in capsys.readouterr().out


def test_records_beyond_the_positions_of_the_decoder_are_said(tiny_config, tiny_files, tmp_path, capsys):
    """As training says it: the verdict was that it would start."""
    llm = tmp_path / "llm"
    shutil.copytree(tiny_files / "llm", llm)
    settings = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 20}))
    words = [f"model.language_model={llm}"]
    assert doctor(tiny_config(), *words) == 1
    assert re.search(says("would not start", "20 positions", "data.max_length=20"), capsys.readouterr().out)
    assert doctor(tiny_config(), *words, "model.beyond_positions=allow") == 0
    assert doctor(tiny_config(), *words, "--no-tokens") == 0
