"""`llava-pdrop plan`: the paper's figures from configs, budgets, operations, memory, and what is printed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from llava_pdrop.__main__ import main
from llava_pdrop.config.load import RUN_FILE, load_config, to_yaml
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.lora import adapter_parameters
from llava_pdrop.cost.nominal import full_picture, model_of, nominal_batch, states_of
from llava_pdrop.cost.plan import least_recomputed, make_plan, plan_memory, plan_step, solve
from llava_pdrop.cost.report import PAPER_7B, make_report, paper_note, schedule_yaml
from llava_pdrop.cost.states import States
from llava_pdrop.errors import ConfigError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.report.units import GIB
from llava_pdrop.schedule import Schedule
from tests.messages import says

ROOT = Path(__file__).parents[3]
ONE, NEXT = "configs/llava15_7b/finetune_pdrop.yaml", "configs/llava_next_7b/finetune_pdrop.yaml"
LORA = "configs/llava15_7b/finetune_lora_pdrop.yaml"
NINE_TILES = "model.pinpoints=[[1344,672],[672,1344]]"
DOUBLE_OFF = {(576, (6, 12, 18, 24), (0.5, 0.25, 0.125, 0.0625)): "1.39"}
"""The one figure of the paper that its own formula does not give."""


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def config_for(tokens: int, layers: tuple[int, ...], ratios: tuple[float, ...]) -> Config:
    drops = [f"pyramid_drop.layers={list(layers)}", f"pyramid_drop.ratios={list(ratios)}"]
    if tokens == 576:
        return load_config(ONE, drops)
    return load_config(NEXT, [*drops, NINE_TILES] if tokens == 5184 else drops)


@pytest.mark.parametrize("row", PAPER_7B)
def test_every_row_of_the_paper(row):
    plan = make_plan(config_for(*row))
    assert plan.paper.tokens[0] == row[0]
    assert f"{plan.paper.dropping:#.3g}" == DOUBLE_OFF.get(row, PAPER_7B[row])
    expected = "its table prints 1.38" if row in DOUBLE_OFF else "as in its tables"
    assert expected in paper_note(plan)


def test_a_schedule_that_is_not_in_the_paper():
    assert "no row of its tables" in paper_note(make_plan(config_for(576, (4,), (0.5,))))


def test_stages_of_a_full_picture():
    plan = make_plan(load_config(NEXT))
    assert plan.picture == (672, 672)
    assert [(stage.first, stage.last) for stage in plan.stages] == [(0, 7), (8, 15), (16, 23), (24, 31)]
    assert [stage.image_tokens for stage in plan.stages] == [2928, 1464, 732, 366]  # 576 + 48 rows of 48 and a newline
    assert plan.average_tokens == (2928 + 1464 + 732 + 366) / 4


POOLED = ("pyramid_drop.layers=[]", "pyramid_drop.ratios=[]")
"""No drop, so that pooling is all."""


def test_pooled_pictures_are_planned_with_what_enters():
    plan, vanilla = (make_plan(load_config(ONE, [*POOLED, f"pyramid_drop.downsample={n}"])) for n in (270, 0))
    assert (plan.rows[0].tokens, plan.paper.tokens, vanilla.rows[0].tokens) == ([256], [256], [576])
    assert [(stage.image_tokens, stage.share) for stage in plan.stages] == [(256, 256 / 576)]
    assert (plan.average_tokens, plan.average) == (256, pytest.approx(256 / 576))
    assert plan.paper.vanilla == vanilla.paper.vanilla > plan.paper.dropping
    anyres = load_config(NEXT, ["pyramid_drop.downsample=144"])
    assert [stage.image_tokens for stage in make_plan(anyres).stages] == [144 + 24 * 25, 372, 186, 93]
    assert "720 image tokens after pooling" in paper_note(make_plan(anyres))


def test_a_step_on_pooled_pictures_costs_less_everywhere_behind_the_tower():
    config = load_config(NEXT, [*POOLED, "pyramid_drop.downsample=144"])
    step = plan_step(config)
    assert step.dropping.tower == step.vanilla.tower and step.dropping.head == step.vanilla.head
    assert step.dropping.projector == pytest.approx(step.vanilla.projector / 4) and step.dropping.ranking == 0
    share = (744 + 200) / (2928 + 200)
    assert step.dropping.decoder == pytest.approx(share * step.vanilla.decoder)
    for row in plan_memory(config, (0, 32), States(3, 8)):
        assert row.dropping.activations < 0.5 * row.vanilla.activations
    lora = load_config(LORA, [*POOLED, "pyramid_drop.downsample=144"])
    assert plan_step(lora).reduction > 0.4
    solution = solve(load_config(NEXT, ["pyramid_drop.downsample=144"]), average_tokens=300)
    assert solution.schedule.downsample == 144 and 0 <= 300 - solution.cost < 1


def test_the_full_picture_is_the_squarest_largest_canvas():
    pinpoints = ((336, 1344), (672, 672), (1344, 336), (336, 336))
    assert full_picture(ImageGeometry(336, 14, "anyres", "flat", pinpoints)) == (672, 672)
    assert full_picture(ImageGeometry(336, 14)) == (336, 336)


def test_the_nominal_batch_is_as_large_as_the_config_says():
    config = load_config(NEXT)
    geometry = model_of(config).geometry
    assert nominal_batch(geometry, config).seq_lens == [2928 + 200] * 4
    by_tokens = load_config(NEXT, ["data.samples_per_batch=null", "data.tokens_per_batch=7000"])
    assert nominal_batch(geometry, by_tokens).seq_lens == [2928 + 200] * 2


def test_vocabulary_has_the_rows_that_joining_adds():
    assert model_of(load_config(ONE)).config.text_config.vocab_size == 32064


@pytest.mark.parametrize(("path", "tokens"), [(ONE, 128), (ONE, 192), (NEXT, 1000)])
def test_average_tokens_come_out(path, tokens):
    solution = solve(load_config(path), average_tokens=tokens)
    drops = [f"pyramid_drop.{key}={value}" for key, value in solution.schedule.to_dict().items()]
    assert 0 <= tokens - make_plan(load_config(path, drops)).average_tokens < 1


def test_tflops_are_counted_as_the_paper_does():
    solution = solve(load_config(NEXT), tflop=9.46)
    assert solution.schedule.layers == (8, 16, 24) and solution.ratio == pytest.approx(0.5, abs=0.002)


def test_exactly_one_budget():
    for budget in ({}, {"average_tokens": 128, "tflop": 1}):
        with pytest.raises(ValueError, match=says("--average-tokens", "--tflops")):
            solve(load_config(ONE), **budget)


def test_a_step_counts_recomputation_and_text():
    config = load_config(NEXT)
    step = plan_step(config)
    paper = make_plan(config).paper
    assert 0.4 < step.reduction < 1 - paper.dropping / paper.vanilla  # text, tower and head do not shrink
    without = plan_step(config, (0, 0))
    assert without.vanilla.decoder < 0.8 * step.vanilla.decoder
    mixed = plan_step(config, (32, 0))
    assert (mixed.vanilla, mixed.dropping) == (step.vanilla, without.dropping)


def test_memory_falls_with_recomputation_and_with_dropping():
    rows = plan_memory(load_config(NEXT), (0, 8, 32), States(3, 8))
    for name in ("vanilla", "dropping"):
        totals = [getattr(row, name).total for row in rows]
        assert totals == sorted(totals, reverse=True)
    assert all(row.dropping.total < row.vanilla.total for row in rows)


def test_memory_is_that_of_the_kernels_of_the_config():
    eager, fused = (
        plan_memory(load_config(NEXT, [f"model.kernels={name}"]), (0,), States(3, 8))[0] for name in ("eager", "auto")
    )
    assert fused.vanilla.total < 0.85 * eager.vanilla.total and fused.dropping.total < 0.9 * eager.dropping.total


def test_the_least_recomputation_fits_and_one_layer_less_does_not():
    config, states = load_config(NEXT), States(3, 8)
    vanilla, dropping = least_recomputed(config, states, 80)
    assert vanilla is not None and dropping is not None and dropping < vanilla
    fits, does_not = plan_memory(config, (vanilla, vanilla - 1), states)
    assert fits.vanilla.total <= 0.9 * 80 * GIB < does_not.vanilla.total
    assert least_recomputed(config, States(), 80) == (None, None)  # 16 bytes for each of 7 billion parameters


def test_states_are_read_from_the_config(tmp_path):
    config = load_config(NEXT)
    assert states_of(config, 8) == States(zero=3, gpus=8, accumulate=True)

    def of(*words: str, gpus: int = 8) -> States:
        return states_of(load_config(NEXT, list(words)), gpus)

    plain = States(gpus=8, optimizer=8, accumulate=True, float32=True)
    assert of("train.engine=fsdp2") == replace(plain, zero=3, layerwise=True)
    assert of("train.engine=ddp") == replace(plain, autocast=True, buckets=4)
    assert of("train.engine=ddp", gpus=1) == replace(plain, gpus=1, autocast=True)  # nobody to send gradients to
    assert of("train.engine=ddp", "train.bf16=false") == replace(plain, bytes=4, buckets=4)
    assert of("train.engine=zero2_offload").offloaded == ("optimizer",)
    whole = of("train.engine=zero3_offload", "train.gradient_accumulation_steps=1")
    assert whole == States(zero=3, gpus=8, offloaded=("optimizer", "weights"))


def test_yaml_can_be_pasted_into_a_config():
    schedule = Schedule((2,), (0.25,), ranker="fastv")
    section = yaml.safe_load(schedule_yaml(schedule))["pyramid_drop"]
    assert section == {"layers": [2], "ratios": [0.25], "ranker": "fastv"}
    assert Schedule.from_dict(section) == schedule


def test_vanilla_has_one_stage():
    report = make_report(load_config("configs/llava15_7b/finetune.yaml"))
    assert len(report.plan.stages) == 1 and report.step.reduction == 0
    assert [row.recomputed for row in report.memory] == [0, 32]


def test_json_is_one_object(capsys):
    assert main(["plan", ONE, "--average-tokens", "128", "--gpus", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["pyramid_drop"]["layers"] == [5, 10, 15]
    assert 127 < answer["average_tokens"] <= 128
    assert answer["memory"]["gpus"] == 4 and [p["recomputed_layers"] for p in answer["memory"]["peaks"]] == [0, 5, 32]
    assert 0 < answer["step"]["predicted_reduction"] < 1


@pytest.mark.parametrize(
    ("schedule", "nothing"),
    [
        ("{layers: [], ratios: [], downsample: 5000}", True),
        ("{layers: [], ratios: [], downsample: 575}", False),
        ("{layers: [8], ratios: [], keep: [5000]}", True),
        ("{layers: [8], ratios: [], keep: [575]}", False),
        ("{layers: [8], ratios: [1.0]}", True),
        ("{layers: [8], ratios: [0.99]}", False),
    ],
)
def test_a_schedule_that_drops_nothing_says_so(schedule: str, nothing: bool, capsys) -> None:
    assert main(["plan", ONE, f"pyramid_drop={schedule}"]) == 0
    assert ("drops nothing here" in capsys.readouterr().out) == nothing


def test_tables_show_the_section_and_all_parts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["plan", ONE, "--tflops", "1.0"]) == 0
    out = capsys.readouterr().out
    assert re.match(re.escape("layers [6, 12, 18]: ") + says("[8, 16, 24]", "first drop"), out)
    assert "pyramid_drop:\n  layers: [6, 12, 18]\n  ratios: [0." in out
    for word in ("image tokens", "any size", "ranking", "activations", "decoder layers", "Predicted step time"):
        assert word in out


def test_the_directory_of_a_run_stands_for_its_config(tmp_path, capsys):
    (tmp_path / RUN_FILE).write_text(to_yaml(load_config(NEXT)))
    assert main(["plan", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == "llava_next_7b/finetune_pdrop"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpus", "0"], says("1 GPU", "0")),
        (["--memory-budget", "-5"], says("--memory-budget", "0 GiB", "-5")),
        (["--memory-budget", "nan"], says("--memory-budget", "0 GiB", "nan")),
        (["train.recompute_layers=99"], says("train.recompute_layers", "32", "99")),
        (["train.engine=nowhere.json"], says("train.deepspeed", "nowhere.json")),
    ],
)
def test_what_is_wrong_is_one_line(words, line, capsys):
    assert main(["plan", ONE, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(line, error) and error.count("\n") == 1


def test_an_impossible_budget_is_one_line(capsys):
    assert main(["plan", ONE, "--average-tokens", "600"]) == 2
    assert re.search(says("0", "without drops", "576"), capsys.readouterr().err)


# ---- LoRA ----


def test_adapters_are_counted_as_peft_counts_them():
    from peft import LoraConfig, inject_adapter_in_model

    config = load_config(LORA, ["lora.rank_pattern={q_proj: 8, 'layers\\.0\\.mlp\\.up_proj': 4}"])
    text = model_of(config).config.text_config
    with torch.device("meta"):
        decoder = torch.nn.ModuleDict({"model": LlamaForCausalLM(text)})
        targets = r"model\.model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
        settings = LoraConfig(r=128, target_modules=targets, rank_pattern=dict(config.lora.rank_pattern))
        inject_adapter_in_model(settings, decoder)
    counted = sum(p.numel() for name, p in decoder.named_parameters() if "lora_" in name)
    assert sum(adapter_parameters(text, config.lora)) == counted
    for target in ("attention", "mlp"):
        layer = adapter_parameters(text, replace(config.lora, target=target, rank_pattern={}))[0]
        assert layer == 128 * ({"attention": 4 * 2 * 4096, "mlp": 3 * (4096 + 11008)}[target])


def test_a_frozen_decoder_has_no_weight_gradients():
    whole, lora = plan_step(load_config(ONE), (0, 0)), plan_step(load_config(LORA), (0, 0))
    text = model_of(load_config(LORA)).config.text_config
    matrices = text.num_hidden_layers * (4 * 4096**2 + 3 * 4096 * 11008)
    adapters = sum(adapter_parameters(text, load_config(LORA).lora))
    tokens = 16 * 776
    assert whole.vanilla.decoder == tokens * 6 * matrices  # forward, gradient of the input, gradient of the weight
    assert lora.vanilla.decoder == tokens * (4 * matrices + 6 * adapters)
    assert lora.vanilla.head == pytest.approx(2 / 3 * whole.vanilla.head)
    again = plan_step(load_config(LORA), (32, 0)).vanilla.decoder - lora.vanilla.decoder
    assert again == pytest.approx(tokens * 2 * (matrices + adapters), rel=0.25)  # all but the last product of a layer


def test_only_adapters_projector_and_tower_have_gradients_and_optimizer_states():
    config = load_config(LORA)
    text = model_of(config).config.text_config
    adapters = sum(adapter_parameters(text, config.lora))
    (row,) = plan_memory(config, [32], States(2, 8))
    learning = adapters + 1025 * 4096 + 4097 * 4096  # adapters and projector
    assert row.vanilla.optimizer == 12 * learning / 8 and row.vanilla.gradients == 2 * learning / 8
    (whole,) = plan_memory(load_config(ONE), [32], States(2, 8))
    assert row.vanilla.weights == whole.vanilla.weights + 2 * adapters
    assert row.vanilla.activations == whole.vanilla.activations  # the inputs of adapted matrices are kept as ever


def test_what_is_not_modelled_of_lora_is_said(capsys):
    assert main(["plan", LORA]) == 0
    assert re.search(says("319.8 M parameters", "adapters", "Not modelled"), capsys.readouterr().out)
    assert main(["plan", LORA, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora"]["adapter_parameters"] == 319_815_680
    assert main(["plan", ONE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lora"] is None


def test_a_template_that_is_not_there_is_not_planned_with():
    with pytest.raises(ConfigError, match=says("model.template", "'vicuna'", "did you mean 'vicuna_v1'")):
        make_plan(load_config("configs/llava15_7b/finetune_pdrop.yaml", ["model.template=vicuna"]))
