"""What the ``train:`` section cannot ask for is one line, before anything is trained."""

from __future__ import annotations

import copy
import json
import os
import re
from dataclasses import replace

import pytest
import torch
import transformers
from accelerate.state import PartialState
from packaging.version import Version
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.llama import modeling_llama

from llava_pdrop.config.load import load_config
from llava_pdrop.config.schema import Config, DataSection, ModelSection, TrainSection
from llava_pdrop.errors import ConfigError
from llava_pdrop.model.attention import NEWEST
from llava_pdrop.model.decoder import COVERED
from llava_pdrop.train import checks
from llava_pdrop.train.arguments import given_arguments
from llava_pdrop.train.checks import (
    check_arguments,
    check_decoder_type,
    check_engine,
    check_tf32,
    checked,
    rotary_angles_are_a_product,
)
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.run import train
from tests.engines import CONFIGS, needs_deepspeed
from tests.faults.processes import run_ranks
from tests.messages import says


def complaint(file, *overrides: str) -> str:
    config = load_config(file, overrides)
    with pytest.raises(ConfigError) as error:
        check_arguments(config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "eval_strategy=epoch",
            says("train.eval_strategy", "'epoch'", "evaluates", "llava-pdrop"),
        ),
        ("save_strategy=best", says("train.save_strategy", "'best'", "evaluates")),
        ("load_best_model_at_end=true", says("train.load_best_model_at_end", "True", "evaluates")),
        ("lr_scheduler_type=greedy", says("train.lr_scheduler_type", "'greedy'", "evaluates")),
        (
            "lr_scheduler_type=cosine_with_min_lr",
            says("train.lr_scheduler_type", "cosine_with_min_lr", "min_lr", "min_lr_rate"),
        ),
        ("lr_scheduler_kwargs={speed: 1}", says("train.lr_scheduler_type", "linear", "speed")),
        ("optim=adamw_torch_npu_fused", says("train.optim", "adamw_torch_npu_fused", "FusedAdamW")),
        ("adam_beta1=2", says("train.optim", "adamw_torch_fused", "beta", "2")),
        ("fsdp=true", says("train.fsdp", "several processes")),
        ("neftune_noise_alpha=5", says("train.neftune_noise_alpha", "5", "embeddings")),
        ("label_smoothing_factor=0.1", says("train.label_smoothing_factor", "0.1", "loss")),
        ("auto_find_batch_size=true", says("train.auto_find_batch_size", "True", "order")),
        ("data_seed=3", says("train.data_seed", "3", "seed")),
        ("dataloader_drop_last=true", says("train.dataloader_drop_last", "True", "every sample")),
        ("train_sampling_strategy=group_by_length", says("train.train_sampling_strategy", "'group_by_length'")),
        ("max_steps=0", says("train.max_steps", "-1", "train.num_train_epochs", "0")),
        ("use_liger_kernel=true", says("train.use_liger_kernel", "True")),
        ("include_num_input_tokens_seen=all", says("train.include_num_input_tokens_seen", "'all'")),
        (
            "torch_compile_backend=induktor",
            says("train.torch_compile_backend", "'induktor'", "'inductor'"),
        ),
    ],
)
def test_a_setting_that_cannot_work_is_named(tiny_config, override, line):
    assert re.search("run.yaml: " + line, complaint(tiny_config(), f"train.{override}"))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("dataloader_prefetch_factor=2", says("dataloader_prefetch_factor")),
        ("warmup_steps=-1", says("warmup_steps")),
        ("accelerator_config=no.json", says("'no.json'")),
        ("debug=loud", says("loud", "DebugOption")),
    ],
)
def test_what_transformers_refuses_is_one_line(tiny_config, override, line):
    said = complaint(tiny_config(), f"train.{override}")
    assert re.search("run.yaml: train: " + line, said)


@pytest.mark.parametrize(
    "words",
    [
        ["torch_compile_backend=inductor"],
        ["max_steps=-1", "num_train_epochs=1", "train_sampling_strategy=random"],
        ["label_smoothing_factor=0", "include_num_input_tokens_seen=false"],
        ["lr_scheduler_type=polynomial", "learning_rate=0.1", "lr_scheduler_kwargs={lr_end: 0.01}"],
    ],
)
def test_settings_that_can_work_pass(tiny_config, words):
    check_arguments(load_config(tiny_config(), [f"train.{word}" for word in words]))


def test_a_rate_below_the_one_that_the_schedule_ends_with(tiny_config):
    said = complaint(tiny_config(), "train.lr_scheduler_type=polynomial", "train.learning_rate=1e-8")
    assert re.search(says("train.lr_scheduler_type", "polynomial", "lr_end", "1e-07", "1e-08"), said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_tf32_needs_a_gpu(tiny_config):
    assert re.search(says("run.yaml", "train.tf32", "GPU"), complaint(tiny_config(), "train.tf32=true"))


class RotaryByProduct(torch.nn.Module):
    """As LLaMA's was until transformers 5.18."""

    def __init__(self, config):
        super().__init__()
        self.inv_freq = torch.ones(4)

    def forward(self, x, position_ids):
        freqs = (self.inv_freq[None, :, None] @ position_ids[:, None, :].float()).transpose(1, 2)
        return freqs.cos(), freqs.sin()


@pytest.fixture(params=[True, False], ids=["by product", "number by number"])
def product(request, monkeypatch) -> bool:
    """Whether rotary angles are a matrix product, on a machine whose GPU has TF32."""
    monkeypatch.setattr(checks, "is_torch_tf32_available", lambda: True)
    if request.param:
        monkeypatch.setattr(modeling_llama, "LlamaRotaryEmbedding", RotaryByProduct)
    elif Version(transformers.__version__) < Version("5.19"):
        pytest.skip("this transformers makes them by a product")
    return request.param


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        (["tf32=true"], "train.tf32", "train.tf32=null"),
        (["torch_compile=true", "use_cpu=false", "bf16=true"], "train.torch_compile", "train.tf32=false"),
        (["torch_compile_mode=default", "use_cpu=false"], "train.torch_compile", "train.tf32=false"),
    ],
)
def test_tf32_where_it_would_round_positions(tiny_config, product, words, key, remedy):
    config = load_config(tiny_config(), [f"train.{word}" for word in words])
    if not product:
        return check_tf32(config)
    with pytest.raises(ConfigError) as error:
        check_engine(config)
    said = str(error.value)
    assert re.search(f"run.yaml: {key}" + says("product", remedy, "5.19"), said) and "\n" not in said


@pytest.mark.parametrize("words", [
    ["tf32=false"], ["bf16=true", "use_cpu=false"], ["torch_compile=true"],
    ["torch_compile=true", "use_cpu=false", "tf32=false"], ["torch_compile=true", "use_cpu=false", "fp16=true"],
])  # fmt: skip
def test_without_tf32_positions_are_safe(tiny_config, product, words):
    check_tf32(load_config(tiny_config(), [f"train.{word}" for word in words]))


def test_rotary_angles_of_this_transformers():
    """It is looked at how they are made; this is the version from which on it is number by number."""
    assert rotary_angles_are_a_product() == (Version(transformers.__version__) < Version("5.19"))


def test_a_saving_step_must_come(tiny_config):
    said = complaint(tiny_config(), "train.save_strategy=steps", "train.save_steps=0")
    assert re.search(says("run.yaml", "train.save_steps", "0"), said)


def test_looking_at_them_changes_nothing(tiny_config, monkeypatch):
    """Neither this process nor the config: stage 1 is trained after stage 2 was looked at."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    fsdp = {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "cpu_ram_efficient_loading": True}}
    config = load_config(tiny_config(train={"use_cpu": True, "max_steps": 1, **fsdp}))
    arguments, environment = copy.deepcopy(config.train.arguments), dict(os.environ)
    state = dict(PartialState._shared_state)
    check_arguments(config)
    assert config.train.arguments == arguments and dict(os.environ) == environment
    assert PartialState._shared_state == state and not torch.distributed.is_initialized()
    given_arguments(config)["fsdp_config"].clear()
    assert config.train.arguments == arguments


@pytest.mark.parametrize(
    ("stage2", "line"),
    [
        ({"eval_strategy": "steps"}, says("stage2.yaml", "train.eval_strategy")),
        ({"recompute_layers": 2}, says("stage2.yaml", "train.recompute_layers", "train.gradient_checkpointing=true")),
        ({"optim": "adamw_torch_npu_fused"}, says("stage2.yaml", "train.optim")),
        ({"debug": "loud"}, says("stage2.yaml", "train", "loud")),
    ],
)
def test_stage_1_does_not_begin_where_stage_2_could_not(tiny_config, tmp_path, stage2, line):
    stage1 = tiny_config("stage1")
    section = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", **stage2}
    config = load_config(tiny_config("stage2", train=section, pretrain=str(stage1)))
    with pytest.raises(ConfigError, match=line):
        train(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind",
    ["granite", "gemma2", "phi3", "olmo2", "glm", "gemma3_text", "gpt_oss", "cohere", "qwen3_moe", "nobody_knows"],
)
def test_a_decoder_that_no_test_covers_is_refused_before_anything_is_loaded(tiny_config, tmp_path, monkeypatch, kind):
    """Granite multiplies embeddings, residuals and logits: trained as a LLaMA its logits are off by 5.7."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text(json.dumps({"model_type": kind, "num_hidden_layers": 4}))
    config = load_config(tiny_config(), [f"model.language_model={tmp_path / 'decoder'}"])
    with pytest.raises(ConfigError, match=says("model.language_model", kind, *COVERED)):
        checked(config)


@pytest.mark.parametrize(("config", "said"), [
    ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}, ("hidden size", "64", "7")),
    ({"model_type": 7}, ("type 7", *COVERED)),
    ({"model_type": "llava"}, ("llava", *COVERED)),
    (["model_type"], ("config.json", "object", "list")),
])  # fmt: skip
def test_a_decoder_that_is_none_is_refused_before_it_is_loaded(tiny_config, tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=says(str(tmp_path), *said)):
        checked(load_config(tiny_config(), [f"model.language_model={tmp_path}"]))


def test_positions_with_gaps_and_a_sliding_window_are_refused(tiny_config, tmp_path):
    (tmp_path / "decoder").mkdir()
    config = {"model_type": "mistral", "num_hidden_layers": 4, "sliding_window": 4096, "max_position_embeddings": 32768}
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(config))
    words = [f"model.language_model={tmp_path / 'decoder'}"]
    words += ["pyramid_drop.layers=[2]", "pyramid_drop.ratios=[0.5]", "pyramid_drop.positions=keep"]
    with pytest.raises(ConfigError, match=says("pyramid_drop.positions", "keep", "4096")):
        checked(load_config(tiny_config(), words))
    for more in (["pyramid_drop.positions=renumber"], ["pyramid_drop.layers=[]", "pyramid_drop.ratios=[]"]):
        check_decoder_type(load_config(tiny_config(), words + more))


def test_a_transformers_that_nobody_tried_is_refused(tiny_config, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.25.0")
    with pytest.raises(ConfigError, match=says("transformers", "5.25.0", NEWEST)):
        checked(load_config(tiny_config(), []))


def test_a_run_and_its_stage_1_are_checked_once(tiny_config, monkeypatch):
    looked, check = [], checks.check_arguments
    monkeypatch.setattr(checks, "check_arguments", lambda config: looked.append(config.name) or check(config))
    stage1 = tiny_config("stage1")
    config = load_config(tiny_config("stage2", pretrain=str(stage1)))
    run = checked(config)
    assert run.config is config and run.stage1.config.output_dir == load_config(stage1).output_dir
    assert run.stage1.stage1 is None and not run.finished and len(looked) == 2
    other = replace(config, name="other", output_dir=config.output_dir + "/other", pyramid_drop=None)
    assert run.variant(other).config is other and run.variant(other).stage1 is run.stage1
    assert len(looked) == 2


@pytest.mark.parametrize("place", ["file", "file/below/it"])
def test_a_place_where_nothing_can_be_written_is_said_before_stage_1(tiny_config, tmp_path, place):
    (tmp_path / "file").touch()
    config = load_config(tiny_config("stage2", pretrain=str(tiny_config("stage1"))), [f"output_dir={tmp_path}/{place}"])
    with pytest.raises(ConfigError, match=says("stage2.yaml", "output_dir", f"{tmp_path}/file", "directory")):
        train(config)
    assert not (tmp_path / "out").exists()


def test_a_directory_of_somebody_else_is_said(tiny_config, tmp_path, monkeypatch):
    """The tests may run as root, whom no permission stops."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(tmp_path))
    with pytest.raises(ConfigError, match=says("output_dir", f"{tmp_path}", "written")):
        train(load_config(tiny_config(), [f"output_dir={tmp_path}/a/b"]))


def test_a_finished_stage_1_is_used_where_it_could_not_be_trained(tiny_config, tmp_path, monkeypatch):
    """It was sharded over a cluster, say, and lies where only its owner writes; trained again, it is checked."""
    first = tiny_config("stage1")
    output = train(load_config(first))
    config = load_config(tiny_config("stage2", pretrain=f"{first} train.fsdp=true"))
    monkeypatch.setattr(os, "access", lambda path, mode: not path.startswith(str(output)))
    checked(config)
    again = load_config(first, ["train.fsdp=true", "train.resume=never"])
    with pytest.raises(ConfigError, match=says("stage1.yaml", "train.fsdp", "several processes")):
        train(again)
    (output / FINISHED_FILE).unlink()
    with pytest.raises(ConfigError, match=says("stage1.yaml", "output_dir", "written")):
        checked(config)


def test_data_of_an_unknown_format_are_said_before_stage_1_too(tiny_config, tmp_path):
    config = load_config(tiny_config("stage2", pretrain=str(tiny_config("stage1"))), ["data.format=lava"])
    with pytest.raises(ConfigError, match=says("stage2.yaml", "data.format", "'lava'")):
        train(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="several processes make one run on GPUs without use_cpu")
def test_processes_that_would_each_train_alone_are_refused(tiny_config):
    ended = run_ranks(tiny_config(), "train.use_cpu=false", ranks=2)
    assert ended.codes == [2, 2]
    line = says("2 processes", "alone", "train.use_cpu=true")
    assert all(re.search(line, text) for text in ended.texts)


# ---- DeepSpeed and FSDP ----


@pytest.fixture
def changed(tmp_path):
    """``train.deepspeed=FILE`` with a copy of ``configs/deepspeed/NAME.json`` that has other keys (None: not there)."""

    def write(name: str = "zero3", **changes) -> str:
        content = json.loads((CONFIGS / f"deepspeed/{name}.json").read_text())
        content = {key: value for key, value in {**content, **changes}.items() if value is not None}
        (tmp_path / "ds.json").write_text(json.dumps(content))
        return f"train.deepspeed={tmp_path}/ds.json"

    return write


@needs_deepspeed
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"gradient_clipping": None}, says('"gradient_clipping": "auto"')),
        ({"gradient_accumulation_steps": None}, says('"gradient_accumulation_steps": "auto"')),
        ({"gradient_accumulation_steps": 4}, says("gradient_accumulation_steps=4", "hf")),
        (
            {"train_micro_batch_size_per_gpu": 7},
            says("train_micro_batch_size_per_gpu=7", "hf"),
        ),
        (
            {"optimizer": {"type": "AdamW"}},
            says("'optimizer'", "train.optim"),
        ),
        ({"scheduler": {}}, says("'scheduler'")),
        ({"bf16": True}, says("'bf16'", "mapping", "True")),
        ({"zero_optimization": {"stage": 7}}, says("zero_optimization.stage", "[0, 1, 2, 3]", "7")),
        (
            {"zero_optimization": {"stage": 3}},
            says("zero_optimization.stage3_gather_16bit_weights_on_model_save: true"),
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "auto"}},
            says("zero_optimization.stage3_gather_16bit_weights_on_model_save: true"),
        ),
    ],
)
def test_deepspeed_settings_that_cannot_work_are_named(tiny_config, changed, changes, line):
    said = complaint(tiny_config(), changed(**changes))
    assert re.search(says("run.yaml: train.deepspeed") + line, said)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_the_shipped_deepspeed_settings_pass_and_leave_nothing_behind(tiny_config, name):
    check_arguments(load_config(tiny_config(), [f"train.deepspeed={CONFIGS}/deepspeed/{name}.json"]))
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.parametrize(
    ("text", "line"),
    [("{", says("JSON")), ("[1]", says("mapping", "list")), (None, says("directory"))],
)
def test_settings_that_are_no_json_are_named(tiny_config, tmp_path, monkeypatch, text, line):
    file = tmp_path / "engine.json"
    file.mkdir() if text is None else file.write_text(text)
    said = complaint(tiny_config(), f"train.deepspeed={file}")
    assert re.search(f"run.yaml: train.deepspeed: {file}: {line}", said)
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = complaint(tiny_config(), "train.fsdp=true", f"train.fsdp_config={file}")
    assert re.search(f"run.yaml: train.fsdp_config: {file}: {line}", said)


def test_two_engines_exclude_each_other(tiny_config, changed):
    said = complaint(tiny_config(), "train.fsdp=true", changed())
    assert re.search(says("train.fsdp", "train.deepspeed", "train.engine", "exclude"), said)


def recomputing(tmp_path, **arguments) -> Config:
    model = ModelSection(language_model="llm", vision_tower="tower")
    data = DataSection(train="train.json", samples_per_batch=1)
    train = TrainSection(recompute_layers=2, arguments={"use_cpu": True, **arguments})
    return Config("run", str(tmp_path), model, data, train=train, file="run.yaml")


def test_it_needs_activation_checkpointing(tmp_path):
    with pytest.raises(ConfigError, match=says("train.recompute_layers", "train.gradient_checkpointing=true")):
        check_arguments(recomputing(tmp_path))
    check_arguments(recomputing(tmp_path, gradient_checkpointing=True))


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="train.recompute_layers"):
        replace(TrainSection(), recompute_layers=-1)


def test_a_service_that_is_unknown_or_not_installed_is_one_line(tiny_config, monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    config = load_config(tiny_config(), ["train.report_to=wandb"])
    with pytest.raises(ConfigError, match=says("run.yaml", "train.report_to", "wandb", "installed")):
        checks.check_reporting(config)
    for service, line in (("wanbd", "'wanbd'.*wandb"), ("mlflow", "mlflow.*installed")):
        with pytest.raises(ConfigError, match=rf"run\.yaml: train\.report_to.*{line}"):
            checks.check_reporting(load_config(tiny_config(), [f"train.report_to=[{service}]"]))


def test_the_hub_is_asked_before_the_training(tiny_config):
    """Offline it was a traceback when the Trainer was made."""
    assert re.search(says("train.push_to_hub", "HF_TOKEN", "false"), complaint(tiny_config(), "train.push_to_hub=true"))
