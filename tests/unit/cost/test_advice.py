"""``llava-pdrop plan CONFIG --gpus 8x80``: what is advised fits, one step less does not, and the line can be pasted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.commands.plan import gpus_of
from llava_pdrop.config.load import load_config
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.advice import (
    ORDER,
    RECIPES,
    Advice,
    AdviceArm,
    AdviceSetting,
    advise,
    overrides,
    run_length,
    with_setting,
)
from llava_pdrop.cost.flops import Recomputed
from llava_pdrop.cost.memory import Parameters
from llava_pdrop.cost.nominal import model_of, recomputed_by, samples_of, states_of
from llava_pdrop.cost.plan import RESERVE, plan_memory, plan_step
from llava_pdrop.report.units import GIB
from tests.messages import says

pytestmark = pytest.mark.slow  # all of them together: a minute and a half

ROOT = Path(__file__).parents[3]
ONE, NEXT = "configs/llava15_7b/finetune_pdrop.yaml", "configs/llava_next_7b/finetune_pdrop.yaml"
VANILLA = "configs/llava_next_7b/finetune.yaml"
LORA = "configs/llava15_7b/finetune_lora_pdrop.yaml"

SMALL = [  # the LLaVA of tests/unit/cost/test_states.py: 3,032 parameters learn, 576 are frozen
    "model.reference_shape={language_model: {model_type: llama, hidden_size: 8, intermediate_size: 16, "
    "num_hidden_layers: 2, num_attention_heads: 2, vocab_size: 36, tie_word_embeddings: false}, vision_tower: "
    "{model_type: clip_vision_model, hidden_size: 4, intermediate_size: 8, num_hidden_layers: 2, "
    "num_attention_heads: 2, image_size: 8, patch_size: 4}}",
    "model.language_model=no/where", "model.vision_tower=no/where", "pyramid_drop.layers=[1]",
    "pyramid_drop.ratios=[0.5]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def total(config: Config, arm: AdviceArm, setting: AdviceSetting, gpus: int, recomputed: int) -> float:
    """Bytes of a GPU by way of what `plan` predicts for any config."""
    changed = with_setting(config, setting)
    (row,) = plan_memory(changed, [recomputed], states_of(changed, gpus))
    return (row.vanilla if arm.name == "vanilla" else row.dropping).total


def chosen(advice: Advice, name: str) -> AdviceSetting:
    (arm,) = (arm for arm in advice.arms if arm.name == name)
    assert arm.setting is not None
    return arm.setting


@pytest.mark.parametrize(("gpus", "gib"), [(8, 80), (8, 24), (1, 80), (2, 6)])
def test_the_advice_fits_and_one_step_less_does_not(gpus, gib):
    config = load_config(NEXT)
    advice = advise(config, gpus, gib)
    assert [arm.name for arm in advice.arms] == ["vanilla", "dropping"]
    for arm in advice.arms:
        setting = arm.setting
        assert setting is not None and setting.samples * setting.accumulation * gpus == 128
        room = (1 - RESERVE) * gib * GIB
        assert setting.total == total(config, arm, setting, gpus, setting.recomputed) <= room
        share = 128 // gpus
        for samples in (n for n in (1, 2, 4, 8, 16) if setting.recomputed and share % n == 0):
            other = AdviceSetting(setting.engine, samples, share // samples, 0, 0, 0)
            assert total(config, arm, other, gpus, setting.recomputed - 1) > room, samples
        for more in (n for n in (2, 4, 8, 16, 32, 64, 128) if n > setting.samples and share % n == 0):
            larger = AdviceSetting(setting.engine, more, share // more, 0, 0, 0)
            assert total(config, arm, larger, gpus, setting.recomputed) > room
        for engine in ORDER[: ORDER.index(setting.engine)]:  # the most frugal way of every preferred engine
            if engine != "fsdp2" or gpus > 1:
                one = AdviceSetting(engine, 1, share, 0, 0, 0)
                assert total(config, arm, one, gpus, 32) > room, engine


def test_next_7b_on_eight_gpus_of_80_gib_is_not_for_ddp():
    config = load_config(NEXT)
    advice = advise(config, 8, 80)
    learning = Parameters.of(model_of(config).config).total(model_of(config).config)
    assert 16 * learning > 112e9  # float32 weights, gradients and moments
    assert chosen(advice, "vanilla").engine == chosen(advice, "dropping").engine == "zero2"
    assert chosen(advice, "dropping").samples > chosen(advice, "vanilla").samples  # dropping leaves room
    assert chosen(advise(config, 8, 300), "vanilla").engine == "ddp"


def test_one_gpu_of_80_gib_offloads_or_trains_adapters():
    setting = chosen(advise(load_config(ONE), 1, 80), "dropping")
    counts = model_of(load_config(ONE)).config
    parameters = Parameters.of(counts)
    learning = parameters.embedding + 32 * parameters.layer + parameters.head + parameters.projector
    assert setting.engine == "zero2_offload"
    assert setting.cpu == (12 + 4 + 2 + 2) * learning  # 20 bytes: it accumulates
    assert chosen(advise(load_config(LORA), 1, 80), "dropping").engine == "ddp"


def test_more_memory_never_makes_it_worse():
    config, before = load_config(NEXT), None
    for gib in (5, 8, 16, 24, 40, 80, 141, 300):
        setting = chosen(advise(config, 8, gib), "vanilla")
        now = (ORDER.index(setting.engine), setting.recomputed, -setting.samples)
        assert before is None or now <= before, gib
        before = now


def test_a_small_shape_by_hand():
    """On two GPUs DDP takes 20 bytes for each parameter that learns and 4 for each that does not, besides activations;
    one byte less than its least total, and the next engine is advised."""
    config = load_config(ONE, [*SMALL, "train.gradient_accumulation_steps=8", "data.samples_per_batch=1"])
    assert model_of(config).config.text_config.vocab_size == 64 + 36 - 36  # rows for <image>, in multiples of 64
    learning, frozen = 2 * 64 * 8 + 2 * 656 + 8 + 5 * 8 + 9 * 8, 2 * 172 + 232
    advice = advise(config, 2, 1)
    setting = chosen(advice, "vanilla")
    assert (setting.engine, setting.recomputed, advice.batch) == ("ddp", 0, 64)
    (row,) = plan_memory(with_setting(config, setting), [0], states_of(with_setting(config, setting), 2))
    assert setting.samples * setting.accumulation == 32
    assert row.vanilla.weights + row.vanilla.optimizer == 4 * frozen + 12 * learning
    least = min(
        total(config, advice.arms[0], AdviceSetting("ddp", n, 32 // n, 0, 0, 0), 2, count)
        for n in (1, 2, 4, 8, 16, 32)
        for count in (0, 1, 2)
    )
    fits, does_not = (advise(config, 2, bytes_ / GIB / (1 - RESERVE)) for bytes_ in (least + 1, least - 1))
    assert chosen(fits, "vanilla").engine == "ddp"
    assert chosen(does_not, "vanilla").engine != "ddp"


@pytest.mark.parametrize(
    ("path", "gpus", "gib", "by_tokens"),
    [(NEXT, 8, 80, False), (NEXT, 8, 24, True), (VANILLA, 4, 40, False), (LORA, 1, 24, False)],
)
def test_the_line_can_be_pasted(path, gpus, gib, by_tokens):
    words = ["data.samples_per_batch=null", "data.tokens_per_batch=14000"] if by_tokens else []
    config = load_config(path, words)
    advice = advise(config, gpus, gib)
    for arm in advice.arms:
        setting = arm.setting
        pasted = load_config(path, [*words, *overrides(config, arm).split()])
        assert samples_of(pasted, model_of(pasted).geometry) == setting.samples
        assert setting.samples * pasted.train.arguments["gradient_accumulation_steps"] * gpus == advice.batch
        assert states_of(pasted, gpus) == states_of(with_setting(config, setting), gpus)
        assert recomputed_by(pasted, 32) == Recomputed.first(setting.recomputed)
        assert bool(pasted.schedule.layers) == (arm.name == "dropping")
    assert len(advice.arms) == (1 if path == VANILLA else 2)


def test_hours_are_operations_at_the_assumed_rate():
    config = load_config(NEXT)
    advice = advise(config, 8, 24, mfu=0.5)
    arm = advice.arms[0]
    step = plan_step(config, (arm.setting.recomputed, 0))  # of 4 samples, each costing the same
    assert arm.flops == pytest.approx(step.vanilla.total / 4)
    assert advice.seconds(arm, 312e12, 1000) == pytest.approx(1000 * arm.flops / (8 * 0.5 * 312e12))
    assert advice.length.samples == 1_017_600


def test_adapters_on_quantised_weights_are_not_sharded():
    for gib in (80, 16, 11):
        advice = advise(load_config(LORA, ["lora.bits=4"]), 8, gib)
        for arm in advice.arms:
            assert (arm.setting or arm.least).engine in ("ddp", "zero2")


# ---- how long a run is ----


def test_the_length_of_a_run(tmp_path):
    data = tmp_path / "two.json"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    data.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(2)]))

    def samples(*words: str) -> float | None:
        return run_length(load_config(ONE, list(words)), 128).samples

    assert samples() == 665_298
    assert samples("train.num_train_epochs=2") == 2 * 665_298
    assert samples("train.max_steps=10") == 1280
    assert samples(f"data.train={data}", f"data.image_root={tmp_path}", "train.num_train_epochs=3") == 6
    assert samples("data.train=mine.json") is None
    assert samples(f"data.train={tmp_path}") is None  # there, and not readable
    assert run_length(load_config("configs/llava15_7b/pretrain.yaml"), 256).samples == 558_128


def test_the_recipes_are_those_of_the_configs():
    named = {Path(load_config(file).data.train).name for file in Path("configs").glob("llava*/*.yaml")}
    assert named == set(RECIPES)


# ---- the command ----


def test_the_table_says_all_of_it_and_that_nothing_was_measured(capsys):
    assert main(["plan", NEXT, "--gpus", "8x80", "--mfu", "0.45"]) == 0
    out = capsys.readouterr().out
    assert out.count("several GPUs together have not been measured") == 1
    assert "Advice for 8 GPUs of 80 GiB" in out and "assumed MFU of 0.45 (--mfu)" in out
    assert "\ndropping: train.engine=zero2 data.samples_per_batch=4 train.gradient_accumulation_steps=4 " in out
    assert re.search(says("Global batch 128", "4 samples", "4 accumulated", "8 GPUs"), out)
    assert main(["plan", NEXT, "--gpus", "8"]) == 0
    assert "Advice" not in capsys.readouterr().out


def test_the_cpus_memory_and_an_unknown_length_are_said(capsys):
    assert main(["plan", NEXT, "--gpus", "1x80", "data.train=mine.json"]) == 0
    out = capsys.readouterr().out
    assert "zero2_offload" in out and "131" in out  # 20 bytes for each of 7.05 billion parameters
    assert re.search(says("1,000 samples", "data.train mine.json"), out)
    assert "Advice for 1 GPU of 80 GiB" in out and re.search(r"A100, 1,000 samples, (s|min)", out)


def test_json_has_it_too(capsys):
    assert main(["plan", NEXT, "--gpus", "8x80", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert advice["global_batch"] == 128 and advice["mfu"] == 0.4
    dropping = advice["arms"]["dropping"]
    assert dropping["setting"]["engine"] == "zero2" and "train.engine=zero2" in dropping["overrides"]
    assert 0 < dropping["hours"]["H100"] < dropping["hours"]["A100"] < advice["arms"]["vanilla"]["hours"]["A100"]
    assert main(["plan", NEXT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"] is None


def test_where_nothing_fits_one_line_says_what_lacks(capsys):
    assert main(["plan", VANILLA, "--gpus", "8x2"]) == 0
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("vanilla: ")]
    assert re.search(says("nothing fits", "zero3_offload", "2 GiB", "1.8", "missing", "LoRA"), line)
    assert main(["plan", VANILLA, "--gpus", "8x2", "--json"]) == 0
    arm = json.loads(capsys.readouterr().out)["advice"]["arms"]["vanilla"]
    assert arm["setting"] is None and arm["hours"] is None and arm["missing_bytes"] > 0 and "missing" in arm["why_not"]


def test_gpus_are_a_number_or_a_number_and_a_size():
    assert gpus_of("8") == (8, None) and gpus_of("8x80") == (8, 80.0) and gpus_of("1x79.5") == (1, 79.5)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", "8x"], says("--gpus", "8x80", "'8x'")),
        (["--gpus", "x80"], says("--gpus", "8x80", "'x80'")),
        (["--gpus", "8x0"], says("--gpus 8x0", "0 GiB")),
        (["--gpus", "8x80", "--memory-budget", "40"], says("--gpus 8x80", "--memory-budget 40")),
        (["--gpus", "6x80"], says("128 samples", "4 samples x 4", "8 GPUs", "6")),
        (["--gpus", "8x80", "--global-batch", "12"], says("12", "--global-batch", "evenly")),
        (["--gpus", "8x80", "--global-batch", "0"], says("--global-batch", "1", "0")),
        (["--gpus", "8x80", "--mfu", "40"], says("--mfu", "0", "1", "40")),
        (["--mfu", "0.4"], says("--mfu", "--gpus 8x80")),
        (["--global-batch", "64"], says("--global-batch", "--gpus 8x80")),
    ],
)
def test_what_is_wrong_is_one_line(words, line, capsys):
    assert main(["plan", NEXT, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(line, error) and error.count("\n") == 1


def test_the_same_memory_may_be_said_twice(capsys):
    assert main(["plan", ONE, "--gpus", "8x40", "--memory-budget", "40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["budget_gib"] == 40
