"""What `llava-pdrop plan` says of a step's time: figures, units, and what it refuses to say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.config.load import load_config
from llava_pdrop.cost.elementwise import optimizer_bytes
from llava_pdrop.cost.memory import Parameters
from llava_pdrop.cost.nominal import model_of
from llava_pdrop.cost.step_time import BANDWIDTH_SHARE, CARDS
from llava_pdrop.cost.time_report import TimeModel, plan_time, time_json
from llava_pdrop.model.kernels import AUTO
from llava_pdrop.report.units import digits
from tests.messages import says

ROOT = Path(__file__).parents[3]
ONE, NEXT = "configs/llava15_7b/finetune_pdrop.yaml", "configs/llava_next_7b/finetune_pdrop.yaml"
LORA = "configs/llava15_7b/finetune_lora_pdrop.yaml"


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def modelled(path: str, *words: str, gpus: int = 8, **options: str) -> TimeModel:
    time = plan_time(load_config(path, words), gpus, **options)
    assert isinstance(time, TimeModel)
    return time


def test_json_gives_both_bounds_and_the_time_of_every_stage(capsys):
    assert main(["plan", NEXT, "--json"]) == 0
    time = json.loads(capsys.readouterr().out)["time"]
    assert (time["card"], time["kernels"], time["peak_flops"]) == ("H100", "fused", 989.4e12)
    assert re.search(says("model", "H100", "no other card"), time["note"]) and "data sheet" in time["source"]
    for name, arm in time["arms"].items():
        whole = arm["forward_backward"]
        for key in ("flop", "bytes", "flop_bound_ms", "bandwidth_bound_ms", "ms"):
            assert sum(part[key] for part in arm["parts"]) == pytest.approx(whole[key], rel=1e-9)
        for part in (*arm["parts"], whole):
            assert part["flop_bound_ms"] == pytest.approx(1000 * part["flop"] / 989.4e12)
            assert part["bandwidth_bound_ms"] == pytest.approx(1000 * part["bytes"] / 3.35e12)
            assert part["ms"] > part["flop_bound_ms"] + part["bandwidth_bound_ms"]
        assert arm["step_ms"] == pytest.approx(whole["ms"] + arm["optimizer_ms"])
        stages = [part["name"] for part in arm["parts"] if part["name"].startswith("layers")]
        assert stages == ["layers 0-7", "layers 8-15", "layers 16-23", "layers 24-31"], name
    vanilla, dropping = time["arms"]["vanilla"], time["arms"]["dropping"]
    assert time["saved"]["step"] == pytest.approx(1 - dropping["step_ms"] / vanilla["step_ms"])
    assert 0.4 < dropping["mfu"] < vanilla["mfu"] < 0.5
    assert [part["name"] for part in dropping["parts"] if part not in vanilla["parts"]][-2] == "ranking, dropping"


def test_the_table_is_marked_as_a_model(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["plan", NEXT, "--card", "A100", "--kernels", "fused"]) == 0
    out = capsys.readouterr().out
    assert re.search(says("Modelled, not measured", "A100", "fused kernels", "s"), out)
    assert re.search(says("less time", "without the optimizer"), out)
    assert re.search(says("model", "H100", "no other card"), out)
    arms = modelled(NEXT, card="A100", kernels="fused").arms
    (row,) = re.findall(r"^ *layers 8-15 +(.+)$", out, re.MULTILINE)
    expected = []
    for arm in arms.values():
        (part,) = (part for part in arm.figures("A100")["parts"] if part["name"] == "layers 8-15")
        expected += [digits(part[key] / 1000) for key in ("flop_bound_ms", "bandwidth_bound_ms", "ms")]
    assert row.split() == expected


def test_kernels_are_the_configs_unless_others_are_named(monkeypatch):
    words = {"auto": "fused", "torch": "fused", "liger": "fused", "eager": "eager"}
    times = {word: modelled(NEXT, f"model.kernels={word}") for word in words}
    assert {word: time.kernels for word, time in times.items()} == words
    assert times["auto"].arms == times["torch"].arms != times["eager"].arms
    assert modelled(NEXT, "model.kernels=eager", kernels="fused").arms == times["auto"].arms
    assert modelled(NEXT, kernels="eager").arms == times["eager"].arms
    monkeypatch.setitem(AUTO, "cuda", ())
    assert modelled(NEXT).kernels == "eager", "as a run on a GPU would have it"


def test_vanilla_alone_saves_nothing(capsys):
    time = modelled("configs/llava15_7b/finetune.yaml")
    assert list(time.arms) == ["vanilla"] and time_json(time)["saved"] is None
    assert main(["plan", "configs/llava15_7b/finetune.yaml"]) == 0
    out = capsys.readouterr().out
    assert "Modelled, not measured" in out and "less time," not in out


def test_the_optimizer_is_a_gpus_share_of_one_step_for_several_micro_batches():
    config = model_of(load_config(ONE)).config
    learns = Parameters.of(config)
    mine = 32 * learns.layer + learns.embedding + learns.head + learns.projector

    def moved(*words: str, gpus: int = 8) -> float:
        return modelled(ONE, *words, gpus=gpus).arms["vanilla"].optimizer

    assert moved("train.engine=zero2") == optimizer_bytes(mine / 8)
    assert moved("train.engine=zero2", gpus=4) == optimizer_bytes(mine / 4)
    assert moved("train.engine=zero2", "train.gradient_accumulation_steps=4") == optimizer_bytes(mine / 8) / 4
    assert moved("train.engine=fsdp2") == optimizer_bytes(mine / 8, master=False)
    assert moved("train.engine=zero2_offload") == 0
    figures = modelled(ONE, "train.engine=zero2").arms["vanilla"].figures("H100")
    assert figures["optimizer_ms"] == pytest.approx(
        1000 * optimizer_bytes(mine / 8) / (BANDWIDTH_SHARE * CARDS["H100"].bandwidth)
    )


@pytest.mark.parametrize(
    ("path", "words", "why"),
    [
        (LORA, [], says("adapters", "lora:")),
        (ONE, ["train.engine=ddp"], says("bfloat16", "train.engine", "zero2")),
        (ONE, ["train.engine=zero2", "train.bf16=false"], says("bfloat16", "train.engine")),
    ],
)
def test_what_is_not_counted_is_said(path, words, why, capsys):
    assert re.search(why, plan_time(load_config(path, words), 8))
    assert main(["plan", path, *words]) == 0
    assert "not modelled: " in capsys.readouterr().out
    assert main(["plan", path, *words, "--json"]) == 0
    assert re.search(why, json.loads(capsys.readouterr().out)["time"]["not_modelled"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--card", "V100"], says("--card", "'V100'", "H100")),
        (["--kernels", "quick"], says("kernels", "'quick'", "eager")),
    ],
)
def test_what_is_wrong_is_one_line(words, line, capsys):
    assert main(["plan", ONE, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(line, error) and error.count("\n") == 1
