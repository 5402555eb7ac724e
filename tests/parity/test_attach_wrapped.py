"""`attach` on models that are wrapped, offloaded, compiled, pickled or saved, and on those that it refuses."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from dataclasses import replace

import accelerate
import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, DynamicCache

from llava_pdrop.generate.cache import cached_tokens
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.generate.unhook import HANDLE
from llava_pdrop.model import attention
from llava_pdrop.schedule import Schedule
from tests.families import FAMILIES, collate, make_row
from tests.messages import says
from tests.parity.generation import ONE, answers, generate, inputs, make_hf_model, rows_of_all_kinds, same
from tests.tiny import LAYERS, PYRAMID, make_sample

FASTV = replace(PYRAMID, ranker="fastv")
KEPT = PYRAMID.tokens_per_layer(16, LAYERS)


def logits(hf, *rows):
    with torch.no_grad():
        return hf(**inputs(hf, *(rows or rows_of_all_kinds()))).logits


@pytest.mark.parametrize("decoder", ["llama", "llama_gqa", "mistral_window", "qwen2", "qwen3"])
@pytest.mark.parametrize("schedule", [PYRAMID, FASTV], ids=["last_instruction", "fastv"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_probed_layer_ranks_like_its_projections(decoder, schedule, implementation):
    """The cheap way of the training forward, and the way that needs no knowledge of the decoder."""
    hf, cheap, probed = make_hf_model(decoder, implementation=implementation), [], []
    want = logits(attach(hf, schedule, cheap))
    attach(hf, schedule, probed)
    vars(hf)[HANDLE].cheap = False
    got = logits(hf)
    assert cheap[0].survivors == probed[0].survivors and len(probed[0].survivors) == 3
    assert torch.equal(got, want)
    config = hf.model.language_model.config
    assert all(layer.self_attn.config is config for layer in hf.model.language_model.layers)
    assert config._attn_implementation == implementation


def test_a_probe_leaves_no_trace_behind_an_error(monkeypatch):
    hf = attach(make_hf_model(), PYRAMID)
    vars(hf)[HANDLE].cheap = False
    layer = hf.model.language_model.layers[PYRAMID.layers[1]]
    monkeypatch.setattr(layer.self_attn.k_proj, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(hf)
    monkeypatch.undo()
    assert layer.self_attn.config is hf.model.language_model.config
    same(logits(hf), logits(attach(make_hf_model(), PYRAMID)), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload", "dispatch"])
@pytest.mark.parametrize("schedule", [PYRAMID, FASTV], ids=["last_instruction", "fastv"])
def test_weights_that_accelerate_looks_after(place, schedule, tmp_path):
    hf, rows = make_hf_model(), rows_of_all_kinds()
    want = generate(attach(hf, schedule), *rows)
    detach(hf)
    layers = hf.model.language_model.layers
    if place == "cpu_offload":
        accelerate.cpu_offload(hf, torch.device("cpu"))
    elif place == "disk_offload":
        accelerate.disk_offload(hf, tmp_path, torch.device("cpu"))
    else:  # as from_pretrained(device_map=...) does: whole layers, some in memory and some on disk
        device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
        device_map |= {f"model.language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
        device_map |= {f"model.language_model.layers.{i}": "disk" if i in (2, 3) else "cpu" for i in range(LAYERS)}
        accelerate.dispatch_model(hf, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    offloaded = layers[2].self_attn.q_proj.weight.device.type
    assert offloaded == "meta", "the weights were meant to be elsewhere"
    got = generate(attach(hf, schedule), *rows)
    assert answers(got) == answers(want)
    same(torch.stack(got.logits), torch.stack(want.logits), 0.0)
    assert layers[2].self_attn.q_proj.weight.device.type == "meta"


@pytest.mark.slow
def test_a_compiled_model():
    hf, row = make_hf_model(), make_sample(*ONE)
    want, plain = generate(attach(hf, PYRAMID), row), logits(hf, row)
    detach(hf)
    compiled = torch.compile(hf, backend="eager")
    assert attach(compiled, PYRAMID) is compiled
    got = compiled.generate(
        **inputs(hf, row), max_new_tokens=len(want.logits), do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert answers(got) == answers(want)
    with torch.no_grad():
        same(compiled(**inputs(hf, row)).logits, plain)
    detach(compiled)
    assert logits(hf, row).shape[1] == 21


@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_a_copy_is_attached_and_its_vanilla_self(how):
    hf, row = make_hf_model(), make_sample(*ONE)
    vanilla = generate(hf, row)
    want = generate(attach(hf, replace(PYRAMID, positions="keep")), row)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(hf))
    elif how == "torch.save":
        torch.save(hf, file := io.BytesIO())
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        twin = copy.deepcopy(hf)
    assert twin is not hf and twin.lm_head.weight is not hf.lm_head.weight
    got = generate(twin, row)
    same(torch.cat(got.logits), torch.cat(want.logits), 0.0)
    assert [tokens - 10 for tokens in cached_tokens(got.past_key_values)] == KEPT
    bare = detach(twin)
    same(torch.cat(generate(bare, row).logits), torch.cat(vanilla.logits), 0.0)
    assert {*vars(bare)} == {*vars(make_hf_model())}
    same(torch.cat(generate(hf, row).logits), torch.cat(want.logits), 0.0)


def test_pickles_of_earlier_versions_open():
    """They name this function of the plug-in, and give it these arguments."""
    made, (bare, schedule, unchecked), *_ = attach(make_hf_model(), PYRAMID).__reduce_ex__(2)
    assert (made.__module__, made.__qualname__) == ("llava_pdrop.generate.plugin", "_again")
    assert schedule == PYRAMID and unchecked is False
    got = generate(made(bare, schedule, unchecked), make_sample(*ONE))
    assert [tokens - 10 for tokens in cached_tokens(got.past_key_values)] == KEPT


def test_a_saved_model_restores_its_schedule(tmp_path):
    hf, row = attach(make_hf_model(), PYRAMID), make_sample(*ONE)
    want = generate(hf, row)
    hf.save_pretrained(tmp_path)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert cached_tokens(generate(opened, row).past_key_values) == [26] * LAYERS
    got = generate(attach(opened), row)
    same(torch.cat(got.logits), torch.cat(want.logits))
    assert [tokens - 10 for tokens in cached_tokens(got.past_key_values)] == KEPT


def test_models_that_share_a_config():
    first = make_hf_model()
    second = type(first)(first.config)
    attach(first, PYRAMID), attach(second, FASTV)
    detach(first), detach(second)
    assert HANDLE not in vars(second)
    detach(second)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (Schedule((LAYERS,), (0.5,)), says("pyramid_drop.layers", "6", "5")),
        (Schedule((2,), (0.5,), "best"), says("pyramid_drop.ranker", "'best'")),
    ],
)
def test_a_bad_schedule_leaves_the_old_one(bad, said):
    hf, row = attach(make_hf_model(), PYRAMID), make_sample(*ONE)
    want = logits(hf, row)
    with pytest.raises(ValueError, match=said):
        attach(hf, bad)
    same(logits(hf, row), want, 0.0)


def test_labels_are_refused_wherever_they_stand():
    hf, row = attach(make_hf_model(), PYRAMID), inputs(make_hf_model(), make_sample(*ONE))
    names = list(inspect.signature(hf.forward).parameters)
    values = [row.get(name) for name in names[: names.index("labels")]]
    with pytest.raises(ValueError, match=says("labels")):
        hf(*values, row["input_ids"])


def test_a_prompt_is_not_cached_before_its_question():
    hf = attach(make_hf_model(), PYRAMID)
    row = inputs(hf, make_sample(2, (28, 28)))
    for cached in ({"past_key_values": DynamicCache(config=hf.config.text_config)}, {"use_cache": True}):
        with pytest.raises(ValueError, match=says("attach()", "row 0", "question")):
            hf(**row, **cached)
    assert hf(**row, use_cache=False).logits.shape[1] == 3 + KEPT[-1]
    assert hf.generate(**row, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] == 21


def test_holes_in_the_mask_are_not_closed():
    hf, row = make_hf_model(), inputs(make_hf_model(), make_sample(*ONE))
    row["attention_mask"][0, -2] = 0
    attach(hf, PYRAMID)
    with pytest.raises(ValueError, match=says("pyramid_drop.positions", "attention_mask", "'keep'")):
        hf(**row)
    with torch.no_grad():
        want = detach(hf)(**row).logits
        attach(hf, Schedule((2, 4), (1.0, 1.0), positions="keep"))
        got = hf(**row).logits
    real = row["attention_mask"].bool()
    same(got[:, -int(real.sum()) :], want[real][None], 1e-4)


@pytest.mark.parametrize("schedule", [(2,), {"layers": [2], "ratios": [0.5]}, "paper"])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match=says("attach()", "Schedule")):
        attach(make_hf_model(), schedule)


# ---- what has not been proved is refused


@pytest.mark.parametrize("version", ["5.16.1", "5.25.0", "6.0.0.dev0", "4.57.6"])
def test_a_version_that_nobody_tried_is_refused(version, monkeypatch):
    hf = make_hf_model()
    monkeypatch.setattr(attention.transformers, "__version__", version)
    with pytest.raises(ValueError, match=says(version, attention.OLDEST, attention.NEWEST)):
        attach(hf, PYRAMID)
    assert HANDLE not in vars(hf)


@pytest.mark.parametrize("version", ["5.17.0", "5.24.9", "5.23.0.dev0"])
def test_a_version_in_the_range_is_not(version, monkeypatch):
    monkeypatch.setattr(attention.transformers, "__version__", version)
    attach(make_hf_model(), PYRAMID)


def test_a_class_outside_of_the_table_is_refused_by_name():
    config = transformers.Blip2Config()
    assert config.model_type not in FAMILIES
    with torch.device("meta"):
        hf = transformers.Blip2ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=says("Blip2ForConditionalGeneration")):
        attach(hf, PYRAMID)


def test_a_text_decoder_outside_of_the_table_is_refused_by_name():
    hf = make_hf_model()
    hf.model.language_model.config.model_type = "phimoe"
    try:
        with pytest.raises(ValueError, match=says("LlavaForConditionalGeneration", "phimoe", "unchecked=True")):
            attach(hf, PYRAMID)
        want = logits(attach(hf, PYRAMID, unchecked=True))
    finally:
        del hf.model.language_model.config.model_type
    same(want, logits(attach(make_hf_model(), PYRAMID)), 0.0)


def test_an_unchecked_class_is_compared_at_its_first_prompt(monkeypatch):
    hf, rows = make_hf_model(), rows_of_all_kinds()
    attach(hf, PYRAMID, unchecked=True)
    rotary, made = hf.model.language_model.rotary_emb.forward, []

    def wrong_behind_a_drop(x, position_ids):
        made.append(position_ids)
        return rotary(x, position_ids if len(made) < 3 else position_ids * 0)  # vanilla asks once, and so do we before

    monkeypatch.setattr(hf.model.language_model.rotary_emb, "forward", wrong_behind_a_drop)
    for _ in range(2):  # a refused prompt is no permission for the next
        made.clear()
        with pytest.raises(ValueError, match=says("LlavaForConditionalGeneration", "logits")):
            generate(hf, *rows)
    monkeypatch.undo()
    want = generate(attach(hf, PYRAMID), *rows)
    got = generate(attach(hf, PYRAMID, unchecked=True), *rows)
    same(torch.stack(got.logits), torch.stack(want.logits), 0.0)


def test_an_unchecked_model_is_read_back_after_its_first_prompt(monkeypatch):
    hf, row = make_hf_model(), make_sample(*ONE)
    monkeypatch.setattr(hf.model.language_model.config, "model_type", "phimoe", raising=False)
    want = logits(attach(hf, PYRAMID, unchecked=True), row)
    same(logits(pickle.loads(pickle.dumps(hf)), row), want, 0.0)


def test_an_unchecked_model_without_a_head_drops_at_its_first_prompt():
    trace, row = [], inputs(make_hf_model(), make_sample(*ONE))
    base = attach(make_hf_model().model, PYRAMID, trace, unchecked=True)
    with torch.no_grad():
        assert base(**row).last_hidden_state.shape[1] == 5 + KEPT[-1]
    assert len(trace) == 1 and len(trace[0].survivors) == 3


@pytest.mark.parametrize("name", ["llava", "internvl", "idefics3"])
def test_placeholders_without_pictures_are_text(name):
    """As an assistant model gets them from `generate`."""
    family = FAMILIES[name]
    hf = family.make()
    prompt = collate(family, make_row(family, hf, 2, family.sizes[0], 3))
    text = {key: prompt[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        want = hf(**text).logits
    vanilla = hf.generate(**prompt, **options)
    assistant = attach(copy.deepcopy(hf), PYRAMID)
    with torch.no_grad():
        same(assistant(**text).logits, want, 0.0)
    assert torch.equal(hf.generate(**prompt, **options, assistant_model=assistant), vanilla)


def test_qwen_keeps_its_positions():
    family = FAMILIES["qwen2_5_vl"]
    hf = family.make()
    with pytest.raises(ValueError, match=says("pyramid_drop.positions", "renumber", "'keep'")):
        attach(hf, Schedule((2,), (0.5,), positions="renumber"))
    attach(hf, Schedule((2,), (0.5,)))
    row = make_row(family, hf, 2, family.sizes[0], 3)
    with torch.no_grad():
        whole = collate(family, row)["input_ids"].shape[1]
        assert hf(**collate(family, row)).logits.shape[1] < whole
    detach(hf)


def test_qwen3_drops_behind_its_deepstack():
    hf = FAMILIES["qwen3_vl"].make()
    first = len(hf.config.vision_config.deepstack_visual_indexes)
    assert first > 1
    with pytest.raises(ValueError, match=says("pyramid_drop.layers", str(first - 1), str(first))):
        attach(hf, Schedule((first - 1,), (0.5,)))
    detach(attach(hf, Schedule((first,), (0.5,))))
