"""``bench prefill``: what it counts is what ``generate`` did, and what it predicts is what it counts."""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llava_pdrop.bench import prefill as bench
from llava_pdrop.bench import shapes, subjects
from llava_pdrop.bench.prefill import FASTV, generate, measure_prefill
from llava_pdrop.bench.prefill_report import bench_prefill, predicted_cache_bytes, prefill_flops, spread
from llava_pdrop.bench.shapes import shape_named
from llava_pdrop.bench.subjects import TEXT_TOKENS, PrefillCase, Prompt, Subject
from llava_pdrop.commands.bench import add_arguments, run
from llava_pdrop.generate.cache import cache_bytes, cached_tokens
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.schedule import Schedule
from tests.messages import says

CPU = torch.device("cpu")
SHAPE = replace(
    shape_named("tiny"),
    text={
        **shape_named("tiny").text,
        "hidden_size": 32,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
    },
    vision={**shape_named("tiny").vision, "hidden_size": 16, "intermediate_size": 24},
)
NEW = 3
METHODS = {"vanilla": Schedule(), "PyramidDrop": SHAPE.schedule, "FastV": FASTV}


@pytest.fixture(scope="module")
def hf():
    return Subject.of_shape(SHAPE, CPU, 0, "sdpa").hf


@pytest.fixture(scope="module")
def report():
    cases = [(batch, tokens) for tokens in (20, 36) for batch in (1, 2)]
    return bench_prefill("test", Subject.of_shape(SHAPE, CPU, 0, "sdpa"), CPU, cases, NEW, runs=2, seed=0)


def make_prompt(hf, batch: int = 2, image_tokens: int = 50) -> tuple[PrefillCase, Prompt]:
    case = PrefillCase(batch, image_tokens, NEW)
    pixels = torch.randn(batch * 2, 3, 84, 84, generator=torch.Generator().manual_seed(1))
    return case, Prompt.make(hf, case, pixels, seed=0)


def measured(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(["prefill", *words]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_bench_generates_what_generate_does(hf, method, batch):
    _, prompt = make_prompt(hf, batch)
    schedule = METHODS[method]
    run = generate(hf, prompt, schedule, NEW, CPU)
    attach(hf, schedule)
    with prompt.inputs(hf) as inputs:
        plain = hf.generate(**inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    detach(hf)
    assert run.answers == plain.sequences[:, prompt.input_ids.shape[1] :].tolist()
    assert [len(answer) for answer in run.answers] == [NEW] * batch
    assert run.cache_bytes == cache_bytes(plain.past_key_values)
    layers = SHAPE.text["num_hidden_layers"]
    expected = [sum(TEXT_TOKENS) + NEW - 1 + n for n in schedule.tokens_per_layer(50, layers)]
    assert cached_tokens(plain.past_key_values) == expected
    assert (run.ranking.seconds > 0) == bool(schedule.layers)
    assert run.ranking.seconds < run.prefill.seconds


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_takes_no_encoded_pictures_is_given_them_where_it_makes_them(hf, method, monkeypatch):
    """Which is what transformers 5.17 has; attach sees them there too, and keeps its own way of seeing them."""
    _, prompt = make_prompt(hf)
    attach(hf, METHODS[method])
    seeing = vars(hf.model).get("get_image_features")
    try:
        with torch.no_grad(), prompt.inputs(hf) as inputs:
            expected = hf(**inputs).logits
        monkeypatch.setattr(subjects, "inspect", SimpleNamespace(signature=lambda function: inspect.Signature()))
        with torch.no_grad(), prompt.inputs(hf) as inputs:
            assert "pixel_values" in inputs
            assert torch.equal(hf(**inputs).logits, expected)
        assert vars(hf.model).get("get_image_features") is seeing
    finally:
        detach(hf)
    assert "get_image_features" not in vars(hf.model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("batch", "image_tokens"), [(1, 50), (2, 36), (3, 7)])
def test_cache_bytes_are_the_predicted_ones(hf, method, batch, image_tokens):
    case, prompt = make_prompt(hf, batch, image_tokens)
    run = generate(hf, prompt, METHODS[method], NEW, CPU)
    assert run.cache_bytes == predicted_cache_bytes(hf.config, case, METHODS[method], torch.float32)


def test_pooling_cannot_be_measured_where_pictures_come_encoded():
    with pytest.raises(ValueError, match=says("bench prefill", "pyramid_drop.downsample")):
        measured("configs/bench/tiny.yaml", "pyramid_drop.downsample=9", "--device", "cpu")


def test_the_bench_leaves_the_model_as_it_was(hf):
    def hooks() -> list[int]:
        return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in hf.modules()]

    before, rank = hooks(), bench.Prefill.rank
    _, prompt = make_prompt(hf)
    generate(hf, prompt, SHAPE.schedule, NEW, CPU)
    with pytest.raises(ValueError, match="last possible entry"):
        generate(hf, prompt, Schedule((99,), (0.5,)), NEW, CPU)
    assert hooks() == before and bench.Prefill.rank is rank


def test_report(report):
    layers = SHAPE.text["num_hidden_layers"]
    results = report["results"]
    cases = [(tokens, batch, method) for tokens in (20, 36) for batch in (1, 2) for method in METHODS]
    assert [(r["image_tokens"], r["batch"], r["method"]) for r in results] == cases
    for result in results:
        assert not result["out_of_memory"]
        assert result["cache_bytes"] == result["cache_bytes_predicted"]
        assert result["peak_bytes"] is None, "a CPU has no memory counter"
        for key in ("prefill_ms", "prefill_cpu_ms", "ranking_ms", "tower_ms", "decode_tokens_per_s"):
            assert result[key]["q1"] <= result[key]["median"] <= result[key]["q3"], key
        if result["method"] == "vanilla":
            assert result["speedup"] == result["speedup_predicted"] == result["realised_over_predicted"] == 1
            assert result["ranking_share"] == 0
        else:
            assert result["speedup_predicted"] > 1
            assert result["realised_over_predicted"] == result["speedup"] / result["speedup_predicted"]
            assert 0 < result["ranking_share"] < 1
    settings = report["settings"]
    assert settings["schedules"]["FastV"] == FASTV.check(layers).to_dict()
    assert settings["new_tokens"] == NEW and settings["runs"] == 2 and settings["attention"] == "sdpa"
    assert settings["kernels"] == "eager"
    assert report["environment"]["seed"] == 0
    documented = {name for names in settings["times"] for name in names.split(", ")}
    assert documented == {"speedup", "share_of_peak", "ranking_share", "decode_tokens_per_s"} | {
        key for key in results[0] if key.endswith("_ms")
    }


def test_prefill_flops_are_those_of_the_matrix_products(hf):
    """Against torch's counter, which counts the whole square of causal attention."""
    from torch.utils.flop_counter import FlopCounterMode

    case, prompt = make_prompt(hf, 1, 50)
    length = sum(TEXT_TOKENS) + 50
    with FlopCounterMode(display=False) as counter, torch.no_grad(), prompt.inputs(hf) as inputs:
        hf(**inputs, logits_to_keep=1)
    square = SHAPE.text["num_hidden_layers"] * 4 * length**2 * 32
    half = SHAPE.text["num_hidden_layers"] * 4 * (length * (length + 1) // 2) * 32
    attention = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(name))
    assert attention in (0, square)  # the CPU kernel is unknown to the counter of some versions
    rest = counter.get_total_flops() - attention
    rotary = 2 * length * 4  # position times frequency, a product of width 1
    assert prefill_flops(hf.config, case, Schedule(), SHAPE.geometry) == pytest.approx(rest - rotary + half, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 3])
def test_prompts_of_one_length_need_no_mask(hf, monkeypatch, method, batch):
    """A mask would be N x N, and would keep the flash kernels away: at every stage, in prefill and decoding."""
    calls, attention = [], F.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, **options):
        calls.append((query.shape[2], attn_mask is None, options["is_causal"]))
        return attention(query, key, value, attn_mask=attn_mask, **options)

    _, prompt = make_prompt(hf, batch)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    generate(hf, prompt, METHODS[method], NEW, CPU)
    layers = SHAPE.text["num_hidden_layers"]
    assert len(calls) == layers * NEW
    assert all(free for _, free, _ in calls)
    assert [causal for _, _, causal in calls] == [True] * layers + [False] * layers * (NEW - 1)
    kept = METHODS[method].tokens_per_layer(50, layers)
    assert [length for length, _, _ in calls[:layers]] == [sum(TEXT_TOKENS) + image for image in kept]


class Reads(TorchDispatchMode):
    """Operators by which the host waits for a number from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def test_dropping_neither_reads_from_the_device_nor_sends_to_it(hf, monkeypatch):
    """Between the first and the last layer of a prefill. (On CUDA a copy from ordinary memory waits as well.)"""
    _, prompt = make_prompt(hf)
    layers, reads, inside = hf.model.language_model.layers, Reads(), []
    send = torch.from_numpy

    def enter(*_):
        reads.__enter__()
        inside.append(True)

    def leave(*_):
        inside.pop()
        reads.__exit__(None, None, None)

    def refused(array):
        assert not inside, "an index was sent to the device between two layers"
        return send(array)

    monkeypatch.setattr(torch, "from_numpy", refused)
    hooks = [layers[0].register_forward_pre_hook(enter), layers[-1].register_forward_hook(leave)]
    try:
        run = generate(hf, prompt, SHAPE.schedule, NEW, CPU)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(run.answers) == 2 and not inside
    assert reads.found == []


@pytest.mark.parametrize("victim", ["vanilla", "PyramidDrop"])
def test_a_method_that_runs_out_of_memory_leaves_the_others(monkeypatch, victim):
    case, own = PrefillCase(1, 20, NEW), bench.generate

    def tight(hf, prompt, schedule, *rest):
        if schedule == METHODS[victim]:
            raise torch.OutOfMemoryError("no memory")
        return own(hf, prompt, schedule, *rest)

    monkeypatch.setattr(bench, "generate", tight)
    subject = Subject.of_shape(SHAPE, CPU, 0, "sdpa")
    tower, counted = measure_prefill(subject, METHODS, case, 2, CPU)
    assert len(tower) == 2
    assert {method: len(runs) for method, runs in counted.items()} == {m: 2 for m in METHODS if m != victim}
    report = bench_prefill("test", subject, CPU, [(1, 20)], NEW, runs=2, seed=0)
    for result in report["results"]:
        lost = result["method"] == victim
        assert result["out_of_memory"] is lost and (result["prefill_ms"] is None) is lost
        assert (result["speedup"] is None) is (lost or victim == "vanilla")


def test_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "shape_named", {"test": SHAPE}.get)
    out = tmp_path / "new"
    words = ["--shape", "test", "--batch", "1", "--image-tokens", "20", "--new-tokens", "2", "--runs", "1"]
    measured(*words, "--device", "cpu", "--out", str(out))
    report = json.loads((out / "prefill-test-cpu.json").read_text())
    assert [result["method"] for result in report["results"]] == list(METHODS)
    markdown = (out / "prefill-test-cpu.md").read_text()
    assert "| PyramidDrop | 20 | 1 |" in markdown and "prefill-test-cpu.png" in markdown
    assert (out / "prefill-test-cpu.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "FastV" in shown and "predicted" in shown and "…" not in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "tinny"], says("shape", "'tinny'", "tiny")),
        (["--batch", "1", "0"], says("--batch", "1", "0")),
        (["--image-tokens", "0"], says("--image-tokens", "1", "0")),
        (["--new-tokens", "1"], says("--new-tokens", "2", "1")),
        (["--shape", "tiny", "--device", "cpu", "--image-tokens", "999999999"], says("--image-tokens", "16292")),
        (["--shape", "tiny", "--device", "cpu", "--new-tokens", "16324"], says("--new-tokens", "16324")),
        (["--seed", "-1"], says("--seed", "0", "-1")),
        (["--seed", "4294967296"], says("--seed", "2**32")),
        (["--out", f"{__file__}/deeper"], says("--out", "test_prefill.py", "file")),
        (["--runs", "0"], says("--runs", "1", "0")),
        (["--device", "cube"], says("--device", "'cube'")),
        (["--device", "meta"], says("--device", "'meta'", "cpu", "cuda")),
        (["--device", "cuda:99"], says("--device", "'cuda:99'")),
        (["--shape", "tiny", "--device", "cpu", "--attention", "best"], says("--attention", "'best'")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        measured(*words)
    assert "\n" not in str(caught.value)


def test_spread():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0], 10) == {"q1": 20.0, "median": 30.0, "q3": 40.0}
