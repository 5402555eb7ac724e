"""LoRA: where adapters sit and learn, what they do to the ranking, and the way of a run to the disk and back."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.convert import convert
from llava_pdrop.checkpoint.lora import ADAPTER
from llava_pdrop.config.load import load_config, to_yaml
from llava_pdrop.config.schema import LoraSection
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.evaluate import evaluate_config
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.adapters import (
    adapt,
    attach_adapters,
    base_left_out,
    fingerprint_of_base,
    halve_frozen,
    load_adapters,
    quantise,
    save_adapters,
)
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics
from llava_pdrop.train.optim import freeze, parameter_groups, part_of, trainable_table
from llava_pdrop.train.run import train
from llava_pdrop.types import PackedBatch
from tests.messages import meant, says
from tests.tiny import ANYRES, LAYERS, PAD, PYRAMID, make_tiny_hf, mixed_samples

DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
LORA = {"r": 4, "alpha": 8, "dropout": 0.1}
PLAIN = LoraSection(r=4, alpha=8, dropout=0.0)
SAVING = {"max_steps": 6, "save_steps": 2, "save_strategy": "steps", "use_cpu": True, "disable_tqdm": True}
LEARNING = ("projector", "language_model")


def adapted(section: LoraSection = PLAIN, schedule: Schedule = PYRAMID, trainable=LEARNING, wide=True, geometry=PAD):
    """A tiny model with adapters, whose second matrices are made random where ``wide``."""
    model = PyramidLlava(make_tiny_hf("llama_gqa", geometry), schedule)
    attach_adapters(model.hf, section, "base")
    freeze(model, trainable)
    if wide:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.2)
    return model


def ranks(model: PyramidLlava) -> dict[str, int]:
    """Rank of every adapted module of the first decoder layer, by its last name."""
    marked = "layers.0."
    return {
        name.split(".lora_A")[0].split(marked)[1]: len(parameter)
        for name, parameter in model.named_parameters()
        if ".lora_A." in name and marked in name
    }


# ---- where adapters sit, and what learns ----


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("attention", {"self_attn.q_proj": 2, "self_attn.k_proj": 4, "self_attn.v_proj": 4, "self_attn.o_proj": 4}),
        ("mlp", {"mlp.gate_proj": 4, "mlp.up_proj": 4, "mlp.down_proj": 7}),
    ],
)
def test_targets_and_ranks(target, expected):
    pattern = {"q_proj": 2} if target == "attention" else {r"mlp\.down_proj": 7}
    model = adapted(replace(PLAIN, target=target, rank_pattern=pattern))
    assert ranks(model) == expected
    count = sum(".lora_A." in name for name, _ in model.named_parameters())
    assert count == LAYERS * len(expected)
    assert all("language_model" in name for name, _ in model.named_parameters() if ADAPTER.search(name))


def test_new_adapters_change_nothing():
    batch = PackedBatch.pack(mixed_samples())
    before = PyramidLlava(make_tiny_hf("llama_gqa"), PYRAMID).logits(batch)
    assert torch.equal(adapted(wide=False).eval().logits(batch), before)


@pytest.mark.parametrize("trainable", [LEARNING, ("language_model",), ("projector", "language_model", "vision_tower")])
def test_gradients_are_where_they_should_be(trainable):
    model = adapted(trainable=trainable)
    model(PackedBatch.pack(mixed_samples())).loss.backward()
    learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learnt == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(ADAPTER.search(name) for name in learnt if "language_model" in name or "lm_head" in name)
    parts = {"projector": "multi_modal_projector", "vision_tower": "vision_tower", "language_model": "language_model"}
    for part, mark in parts.items():
        assert any(mark in name for name in learnt) == (part in trainable)
    for name in learnt:
        assert model.get_parameter(name).grad.abs().max() > 0, name


def test_groups_and_table():
    model = adapted()
    rates = {"language_model": 2e-4, "projector": 2e-5, "vision_tower": 0.0}
    groups = parameter_groups(model, rates, weight_decay=0.1)
    adapters = {id(parameter) for name, parameter in model.named_parameters() if ADAPTER.search(name)}
    assert {id(parameter) for parameter in groups[0]["params"]} == adapters
    assert (groups[0]["lr"], groups[0]["weight_decay"], groups[1]["lr"]) == (2e-4, 0.1, 2e-5)
    first, *_ = trainable_table(model, rates).rows
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if ADAPTER.search(name))
    assert (first[0], first[2]) == ("language_model (LoRA)", f"{count:,}")


# ---- with dropping ----


@pytest.mark.parametrize("geometry", [PAD, ANYRES], ids=["pad", "anyres"])
def test_packed_equals_one_by_one(geometry):
    model = adapted(geometry=geometry)
    samples = mixed_samples(geometry)
    together = model(PackedBatch.pack(samples)).loss
    alone = sum(model(PackedBatch.pack([sample])).loss for sample in samples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_ratio_one_is_vanilla_lora():
    batch = PackedBatch.pack(mixed_samples())
    vanilla = adapted(schedule=Schedule())
    kept = adapted(schedule=replace(PYRAMID, ratios=(1.0, 1.0, 1.0)))
    losses = [model(batch).loss for model in (vanilla, kept)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, one), two in zip(vanilla.named_parameters(), kept.parameters()):
        assert (one.grad is None and two.grad is None) or torch.equal(one.grad, two.grad), name


@pytest.mark.parametrize("ranker", ["last_instruction", "fastv"])
def test_the_ranking_sees_the_adapters_but_not_their_dropout(ranker):
    """Adapters that add something only from the ranked layer on: the states before it are free of dropout, so that
    scores can differ by the ranking's own dropout alone."""
    schedule = Schedule(layers=(2,), ratios=(0.5,), ranker=ranker)
    batch = PackedBatch.pack(mixed_samples())
    model = adapted(replace(PLAIN, dropout=0.5), schedule)
    ranked = 2 if ranker == "last_instruction" else 1  # FastV scores by the layer before the drop
    layers = model.hf.model.language_model.layers
    with torch.no_grad():
        for name, parameter in layers.named_parameters():
            if ".lora_B." in name and int(name.split(".")[0]) < ranked:
                parameter.zero_()

    def run(mode: bool):
        trace: list = []
        return model.train(mode)(batch, trace).loss, trace[0]

    calm_loss, calm = run(False)
    for seed in range(3):
        torch.manual_seed(seed)
        loss, noisy = run(True)
        assert torch.equal(noisy.score_V, calm.score_V) and torch.equal(noisy.index_K, calm.index_K)
        assert not torch.equal(loss, calm_loss)  # outside the ranking dropout is on
    assert all(part.training for part in layers.modules() if isinstance(part, nn.Dropout))
    trace: list = []
    PyramidLlava(make_tiny_hf("llama_gqa"), schedule)(batch, trace)
    assert not torch.allclose(trace[0].score_V, calm.score_V)


# ---- memory ----


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the frozen tower
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("trainable", [("language_model",), LEARNING])
def test_activation_checkpointing_gives_the_same_gradients(trainable, reentrant):
    batch = PackedBatch.pack(mixed_samples())
    models = [adapted(trainable=trainable).train() for _ in range(2)]
    models[1].activation_checkpointing_enable({"use_reentrant": reentrant})
    for model in models:
        model(batch).loss.backward()
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters()):
        if one.requires_grad:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_frozen_weights_in_half_precision_give_the_numbers_of_autocast():
    batch = PackedBatch.pack(mixed_samples()[:2])
    models = [adapted(), adapted()]
    halve_frozen(models[1], torch.bfloat16)
    decoder = models[1].hf.model.language_model
    assert decoder.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in models[1].parameters() if p.requires_grad} == {torch.float32}
    losses = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(batch).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters()):
        assert one.grad is None or torch.equal(one.grad, two.grad), name


def test_a_head_that_is_the_embedding_is_not_halved():
    model = adapted()
    model.hf.lm_head.weight = model.hf.get_input_embeddings().weight
    halve_frozen(model, torch.bfloat16)
    assert model.hf.lm_head.weight.dtype == torch.float32


def test_quantised_layers_are_made_of_the_weights(monkeypatch):
    """A stand-in notes what bitsandbytes is asked for."""
    asked = []

    class Linear4bit(nn.Linear):
        def __init__(self, inputs, outputs, bias, **options):
            super().__init__(inputs, outputs, bias)
            asked.append(options)

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(nn=SimpleNamespace(Linear4bit=Linear4bit)))
    batch = PackedBatch.pack(mixed_samples())
    before = PyramidLlava(make_tiny_hf("llama_gqa"), PYRAMID).logits(batch)
    hf = make_tiny_hf("llama_gqa")
    layers = hf.model.language_model.layers
    quantise(layers, replace(PLAIN, bits=4, double_quant=False), torch.device("cpu"), torch.bfloat16)
    assert isinstance(layers[0].self_attn.q_proj, Linear4bit) and len(asked) == 7 * LAYERS
    assert asked[0] == {"compute_dtype": torch.bfloat16, "compress_statistics": False, "quant_type": "nf4"}
    assert torch.equal(PyramidLlava(hf, PYRAMID).eval().logits(batch), before)


@pytest.mark.parametrize(("bits", "kind"), [(4, torch.uint8), (8, torch.int8)])
def test_adapters_learn_on_quantised_weights(bits, kind, tmp_path):
    """By the slow CPU kernels that newer bitsandbytes have; on CUDA: tests/gpu/test_lora.py."""
    pytest.importorskip("bitsandbytes", minversion="0.46", reason="bitsandbytes is not installed")
    model, batch = PyramidLlava(make_tiny_hf("llama_gqa"), PYRAMID), PackedBatch.pack(mixed_samples())
    before = model(batch).loss.item()
    attach_adapters(model.hf, replace(PLAIN, bits=bits), "base", half=torch.float32)
    freeze(model, LEARNING)
    assert model.hf.model.language_model.layers[0].mlp.up_proj.base_layer.weight.dtype == kind
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(5):
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(before, rel=0.1) and losses[-1] < 0.9 * losses[0]
    save_adapters(model.hf, None, tmp_path, tower=False)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


# ---- files ----


def test_adapters_come_back_and_others_are_refused(tmp_path):
    first, second = adapted(), adapted(wide=False)
    save_adapters(first.hf, None, tmp_path, tower=False)
    load_adapters(second.hf, tmp_path)
    batch = PackedBatch.pack(mixed_samples())
    assert torch.equal(first.eval().logits(batch), second.eval().logits(batch))
    save_adapters(adapted(replace(PLAIN, target="attention", r=3)).hf, None, tmp_path, tower=False)
    with pytest.raises(ValueError, match=r"missing: .*up_proj.*wrong shape: .*q_proj"):
        load_adapters(second.hf, tmp_path)


@pytest.fixture
def lora_config(tiny_config):
    """Writes the YAML of a LoRA run with dropping."""

    def write(name: str = "run", lora: dict = LORA, **sections):
        return tiny_config(name, lora=lora, pyramid_drop=DROP, **sections)

    return write


def trained_model(output, config) -> PyramidLlava:
    """The model a LoRA run ended with: base and adapters, not merged."""
    parts = build_parts(
        language_model=config.model.language_model, vision_tower=config.model.vision_tower, path=config.model.path
    )
    model = PyramidLlava(parts.hf, config.schedule, parts.geometry)
    attach_adapters(model.hf, config.lora, "base")
    load_adapters(model.hf, output)
    return model.eval()


def test_a_run_is_small_and_merges_to_its_own_logits(lora_config, tmp_path):
    trainable = {"trainable": ["projector", "language_model", "vision_tower"]}
    file = lora_config()
    whole = file.with_name("whole.yaml")
    whole.write_text(f"base: {file.name}\nmodel: {trainable}\ntrain: {{learning_rate: 0.05}}\n")
    config = load_config(whole)
    output = train(config)
    names = {path.name for path in output.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "projector.safetensors", "llava_pdrop.yaml"}
    assert names >= {"config.json", "preprocessor_config.json", "tokenizer.json", "non_lora_trainables.safetensors"}
    assert not any(name.startswith("model") for name in names)
    assert all("lora_" in name for name in load_file(output / "adapter_model.safetensors"))
    base = load_file(f"{config.model.vision_tower}/model.safetensors")
    tower = {
        name.removeprefix("model.vision_tower.vision_model.").removeprefix("model.vision_tower."): tensor
        for name, tensor in load_file(output / "non_lora_trainables.safetensors").items()
    }
    assert tower.keys() == {name.removeprefix("vision_model.") for name in base}
    assert any(not torch.equal(tensor, tower[name.removeprefix("vision_model.")]) for name, tensor in base.items())

    batch = PackedBatch.pack(build_samples(config))
    expected = trained_model(output, config).logits(batch)
    assert not torch.allclose(expected, untrained(config).logits(batch), atol=1e-2)
    convert(str(output), tmp_path / "hf", "llava-hf")
    convert(str(output), tmp_path / "llava", "llava")
    for directory in (output, tmp_path / "hf", tmp_path / "llava"):
        parts = build_parts(path=str(directory))
        assert parts.schedule == config.schedule
        logits = PyramidLlava(parts.hf, parts.schedule, parts.geometry).logits(batch)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(evaluate_config(config).predictions) == 6

    moved = Path(config.model.vision_tower).rename(tmp_path / "tower")
    try:
        with pytest.raises(FileNotFoundError, match="tower"):
            convert(str(output), tmp_path / "moved", "llava-hf")
        convert(str(output), tmp_path / "moved", "llava-hf", vision_tower=str(moved))
    finally:
        moved.rename(config.model.vision_tower)
    assert (tmp_path / "moved/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_a_run_on_a_whole_model_is_one_that_peft_reads(lora_config, tiny_config, tmp_path):
    base = train(load_config(tiny_config("base")))
    file = lora_config("lora", {**LORA, "target": "attention", "rank_pattern": {"k_proj": 2}})
    model = {"path": str(base), "language_model": None, "vision_tower": None, "trainable": ["language_model"]}
    over = file.with_name("over.yaml")
    over.write_text(f"base: {file.name}\nmodel: {json.dumps(model)}\ntrain: {{learning_rate: 0.05}}\n")
    config = load_config(over)
    output = train(config)
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    peft = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), output)
    assert isinstance(peft.peft_config["default"], LoraConfig)
    merged = peft.merge_and_unload().state_dict()
    ours = build_parts(path=str(output)).hf.state_dict()
    assert merged.keys() == ours.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    assert any(not torch.equal(ours[name], tensor) for name, tensor in load_hf(base).items())


def test_resuming_equals_never_having_stopped(lora_config):
    whole = train(load_config(lora_config("whole", train=SAVING)))
    file = lora_config("parts", train=SAVING)
    stopped = train(load_config(file))
    size = sum(path.stat().st_size for path in (stopped / "checkpoint-4").glob("*.safetensors"))
    assert size < 150_000  # adapters and projector; the whole model has more than 300,000 bytes
    for name in ("run.json", "checkpoint-4", "checkpoint-6"):  # as if killed after step 3
        (stopped / name).rename(stopped.parent / f"gone-{name}")
    resumed = train(load_config(file))
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        one, two = load_file(whole / name), load_file(resumed / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    losses = [[row["loss"] for row in read_metrics(d / METRICS_FILE) if "loss" in row] for d in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert json.loads((resumed / "run.json").read_text())["resumed_from"].endswith("checkpoint-2")


@pytest.mark.parametrize("trainable", [LEARNING, ("language_model", "vision_tower")])
def test_the_base_is_left_out_and_not_missed_and_nothing_else(lora_config, trainable):
    config = load_config(lora_config(), [f"model.trainable=[{','.join(trainable)}]"])
    model = untrained(config)
    adapt(model, config, SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False, fsdp=None, deepspeed=None))
    whole = model.state_dict()
    with base_left_out(model):
        small = model.state_dict()
    assert model.state_dict().keys() == whole.keys()
    left = {name for name in small if not ADAPTER.search(name)}
    parts = {"projector", *trainable} - {"language_model"}
    assert left == {name for name in whole if "language_model" not in name and part_of(name) in parts}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} <= small.keys()
    model.load_state_dict(small)
    learning = next(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    with pytest.raises(RuntimeError, match=f"Missing key.*{learning}"):
        model.load_state_dict({name: tensor for name, tensor in small.items() if name != learning})
    with pytest.raises(RuntimeError, match="Unexpected key.*nobodys"):
        model.load_state_dict({**small, "nobodys": torch.zeros(1)})


def test_a_fingerprint_is_of_the_frozen_weights_alone():
    model = adapted()
    before = fingerprint_of_base(model)
    assert fingerprint_of_base(adapted(replace(PLAIN, r=2), wide=False)) == before
    with torch.no_grad():
        model.hf.model.multi_modal_projector.linear_1.weight.add_(1)
        assert fingerprint_of_base(model) == before
        model.hf.model.language_model.layers[2].mlp.up_proj.base_layer.weight.mul_(1.01)
    assert fingerprint_of_base(model) != before


def test_adapters_of_another_base_do_not_go_on(lora_config, tmp_path):
    """The weights are those of the files, and these can have changed since."""
    base = tmp_path / "llm"
    file = lora_config(train={**SAVING, "max_steps": 2})
    shutil.copytree(load_config(file).model.language_model, base)
    words = [f"model.language_model={base}"]
    output = train(load_config(file, words))
    weights = load_file(base / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=says("checkpoint-2", "adapters", "base model")):
        train(load_config(file, [*words, "train.max_steps=4"]))
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    train(load_config(file, [*words, "train.max_steps=4"]))
    assert (output / "checkpoint-4").is_dir()


def test_a_base_that_was_moved_is_the_same_base(lora_config, tmp_path):
    """What counts is its weights. The run was stopped before its end."""
    file = lora_config(train={**SAVING, "max_steps": 4})
    config = load_config(file)
    reference = train(config)
    losses = [row.get("loss") for row in read_metrics(reference / METRICS_FILE)]
    shutil.rmtree(reference / "checkpoint-4")
    (reference / FINISHED_FILE).unlink()
    shutil.copytree(config.model.language_model, tmp_path / "moved")
    output = train(load_config(file, [f"model.language_model={tmp_path / 'moved'}"]))
    assert json.loads((output / FINISHED_FILE).read_text())["resumed_from"] == str(output / "checkpoint-2")
    assert [row.get("loss") for row in read_metrics(output / METRICS_FILE)] == losses


def test_the_disk_needs_room_for_what_is_saved_only(lora_config, monkeypatch):
    """The first checkpoint: the weights alone would not fit."""
    config = load_config(lora_config(train={**SAVING, "max_steps": 2}))
    whole = sum(4 * parameter.numel() for parameter in untrained(config).parameters())
    monkeypatch.setattr("llava_pdrop.train.checkpoints.free_bytes", lambda directory: whole)
    assert (train(config) / "checkpoint-2").is_dir()
    monkeypatch.setattr("llava_pdrop.train.checkpoints.free_bytes", lambda directory: whole // 20)
    with pytest.raises(ValueError, match=says("checkpoint-2", "not written", "GiB")):
        train(replace(config, output_dir=f"{config.output_dir}_full"))


def test_a_whole_run_in_the_place_of_a_lora_run_is_whole(lora_config):
    file = lora_config()
    output = train(load_config(file))
    operations = read_metrics(output / METRICS_FILE)[-1]["total_flos"]
    train(load_config(file, ["lora=null", "train.resume=never"]))
    assert 0.6 < operations / read_metrics(output / METRICS_FILE)[-1]["total_flos"] < 0.8  # no gradients of the weights
    assert (output / "model.safetensors").is_file() and not (output / "adapter_config.json").exists()
    train(load_config(file, ["train.resume=never"]))
    assert (output / "adapter_config.json").is_file() and not (output / "model.safetensors").exists()


# ---- what can be wrong ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.r=0", says("lora.r", "1", "0")),
        ("lora.target=head", says("lora.target", "'head'", "'attention'")),
        ("lora.dropout=1.0", says("lora.dropout", "0", "1")),
        ("lora.bits=3", says("lora.bits", "3", "4", "8")),
        ("lora.rank_pattern.q_proj=0", says("lora.rank_pattern.q_proj", "1", "0")),
        ("lora.rang=8", says("'lora.rang'", meant("lora.r"))),
        ("model.trainable=[projector]", says("lora", "language_model", "model.trainable")),
    ],
)
def test_wrong_settings_are_one_line(lora_config, override, message):
    with pytest.raises(ConfigError, match=f"^[^\n]*{message}[^\n]*$"):
        load_config(lora_config(), [override])


def test_settings_are_written_back(lora_config, tmp_path):
    config = load_config(lora_config(), ["lora.rank_pattern.q_proj=2"])
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_without_cuda_are_one_line(lora_config, bits, monkeypatch):
    config = load_config(lora_config(), [f"lora.bits={bits}"])
    with pytest.raises(ConfigError, match=says("run.yaml", "lora.bits", f"{bits}-bit", "CUDA")):
        train(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config(lora_config(train={"max_steps": 1}), [f"lora.bits={bits}"])
    with pytest.raises(ConfigError, match=says("lora.bits", "bitsandbytes", "installed")):
        train(config)


def test_quantised_weights_are_not_sharded(lora_config, monkeypatch):
    config = load_config(lora_config(), ["lora.bits=4"])
    monkeypatch.setattr("llava_pdrop.train.adapters.is_deepspeed_zero3_enabled", lambda: True)
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False, fsdp=None, deepspeed="zero3.json")
    with pytest.raises(ConfigError, match=says("lora.bits", "4-bit", "sharded")):
        adapt(untrained(config), config, args)


def test_a_rank_for_nothing_is_one_line(lora_config):
    config = load_config(lora_config(), ["lora.target=attention", "lora.rank_pattern.up_proj=2"])
    with pytest.raises(ConfigError, match=says("lora.rank_pattern", "'up_proj'", "k_proj", "o_proj")):
        train(config)
    config = load_config(lora_config("other", {**LORA, "rank_pattern": {"(": 2}}))
    with pytest.raises(ConfigError, match=says("other.yaml", "lora.rank_pattern", "missing )")):
        train(config)


# ---- helpers of the tests of runs ----


def build_samples(config):
    from llava_pdrop.train.run import build_dataset, load_parts

    dataset = build_dataset(config, load_parts(config))
    return [dataset[index] for index in range(4)]


def untrained(config) -> PyramidLlava:
    torch.manual_seed(0)
    parts = build_parts(language_model=config.model.language_model, vision_tower=config.model.vision_tower)
    return PyramidLlava(parts.hf, config.schedule, parts.geometry)


def load_hf(directory) -> dict[str, torch.Tensor]:
    return build_parts(path=str(directory)).hf.state_dict()
