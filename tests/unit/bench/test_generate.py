"""``bench generate``: it times what ``generate`` did, token by token, and the hooks on equal caches."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llava_pdrop.bench import generate as bench
from llava_pdrop.bench import shapes
from llava_pdrop.bench.generate import DROPPING, answer, hook_cost, measure_answers, paired
from llava_pdrop.bench.generate_report import bench_generate, overhead
from llava_pdrop.bench.subjects import QUESTION, TEXT_TOKENS, Noise, Subject, without_drops
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.commands.bench import add_arguments, run
from llava_pdrop.data.images import image_size, load_image
from llava_pdrop.generate.cache import cache_bytes, cached_tokens
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.model.attention import is_older
from llava_pdrop.runtime.clock import Span
from llava_pdrop.schedule import Schedule
from tests.messages import says
from tests.unit.bench.test_prefill import SHAPE

CPU = torch.device("cpu")
NEW = 4


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of_shape(SHAPE, CPU, 0, "sdpa")


@pytest.fixture(scope="module")
def report(subject: Subject) -> dict[str, Any]:
    return bench_generate("test", subject, CPU, [(1, 36), (2, 20)], NEW, runs=2, seed=0)


def measured(*words: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(["generate", *words]))


@pytest.mark.parametrize("schedule", [Schedule(), SHAPE.schedule], ids=["vanilla", DROPPING])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_token_is_timed_and_the_model_left_as_it_was(subject: Subject, schedule: Schedule, batch: int) -> None:
    given, hf = subject.give(batch, 36), subject.hf
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in hf.modules()]
    found = answer(hf, given, schedule, NEW, CPU)
    assert len(found.steps) == NEW - 1 and all(step.seconds > 0 for step in found.steps)
    assert found.tower is not None and found.first.seconds > found.prefill.seconds + found.tower.seconds
    assert found.whole.seconds == pytest.approx(found.first.seconds + sum(step.seconds for step in found.steps))
    assert (found.ranking.seconds > 0) == bool(schedule.layers) and found.peak_bytes is None
    attach(hf, schedule)
    with given.inputs(hf) as inputs:
        plain = hf.generate(**inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    detach(hf)
    assert found.cache_bytes == cache_bytes(plain.past_key_values)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in hf.modules()] == hooks


def test_report(report: dict[str, Any]) -> None:
    results = report["results"]
    cases = [(tokens, batch, m) for batch, tokens in ((1, 36), (2, 20)) for m in ("vanilla", DROPPING)]
    assert [(r["image_tokens"], r["batch"], r["method"]) for r in results] == cases
    for result in results:
        assert result["cache_bytes"] == result["cache_bytes_predicted"] and result["peak_bytes"] is None
        assert (result["text_tokens"], result["new_tokens"]) == (sum(TEXT_TOKENS), NEW)
        for key in ("first_token_ms", "prefill_ms", "prefill_cpu_ms", "tower_ms", "token_ms", "tokens_per_s"):
            assert 0 < result[key]["q1"] <= result[key]["median"] <= result[key]["q3"], key
        dropping = result["method"] == DROPPING
        assert (result["prefill_speedup_predicted"] > 1) is dropping and (result["ranking_share"] > 0) is dropping
        assert dropping or set(result["speedup"].values()) == {1.0}
        ratio = result["speedup"]["prefill"] / result["prefill_speedup_predicted"]
        assert result["prefill_realised_over_predicted"] == ratio
    assert [(own["batch"], own["image_tokens"]) for own in report["hooks"]] == [(1, 36), (2, 20)]
    told = report["settings"]
    assert told["weights"] == "random" and told["schedules"][DROPPING] == SHAPE.schedule.to_dict()
    documented = {name for names in told["times"] for name in names.split(", ")}
    assert documented == {"speedup", "ranking_share", "hooks", "tokens_per_s"} | {
        key for key in results[0] if key.endswith("_ms")
    }


def test_hooks_are_timed_on_caches_of_the_same_tokens(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[bool, list[list[int]]] = {False: [], True: []}
    step = bench._step

    def watched(model: Any, cache: Any, *rest: Any) -> Span:
        held[hasattr(model, "_pyramid_drop")].append(cached_tokens(cache))
        return step(model, cache, *rest)

    monkeypatch.setattr(bench, "_step", watched)
    cost = hook_cost(subject, subject.give(2, 20), CPU, steps=3)
    assert cost is not None and len(cost.plain) == len(cost.attached) == 3
    layers = SHAPE.text["num_hidden_layers"]
    lengths = [[sum(TEXT_TOKENS) + 20 + step] * layers for step in range(3 + bench.COLD_STEPS)]
    assert held == {False: lengths, True: lengths}
    assert not hasattr(subject.hf, "_pyramid_drop")


def test_what_hooks_add_is_taken_step_by_step() -> None:
    def spans(*milliseconds: float) -> list[Span]:
        return [Span(ms, ms / 1e3) for ms in milliseconds]

    cost = bench.HookCost(spans(10, 20, 40), spans(11, 22, 40))
    assert paired(cost) == pytest.approx([0.001, 0.002, 0])
    found = overhead(cost, 1)
    assert found["share"] == pytest.approx(0.05) and found["plain_ms"]["median"] == pytest.approx(20)
    assert found["added_ms"]["median"] == pytest.approx(1) and found["steps"] == 3


def test_without_drops_everything_stays() -> None:
    given = Schedule((1, 2), keep=(9, 1), inject=1, merge="nearest", ranker="dart")
    assert without_drops(given) == Schedule((1, 2), (1.0, 1.0), "dart")


@pytest.mark.parametrize("victim", ["vanilla", DROPPING])
def test_a_method_that_runs_out_of_memory_leaves_the_other(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    own = bench.answer

    def tight(hf: Any, given: Any, schedule: Schedule, *rest: Any) -> Any:
        if bool(schedule.layers) == (victim == DROPPING):
            raise torch.OutOfMemoryError("no memory")
        return own(hf, given, schedule, *rest)

    monkeypatch.setattr(bench, "answer", tight)
    assert set(measure_answers(subject, subject.give(1, 20), NEW, 1, CPU)) == {"vanilla", DROPPING} - {victim}
    found = bench_generate("test", subject, CPU, [(1, 20)], NEW, runs=1, seed=0)["results"]
    for result in found:
        lost = result["method"] == victim
        assert result["out_of_memory"] is lost and (result["token_ms"] is None) is lost
        assert (result["speedup"]["token"] is None) is (lost or victim == "vanilla")


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "shape_named", {"test": SHAPE}.get)
    words = ["--shape", "test", "--batch", "1", "--image-tokens", "20", "--new-tokens", "2", "--runs", "1"]
    measured(*words, "--device", "cpu", "--out", str(tmp_path))
    report = json.loads((tmp_path / "generate-test-cpu.json").read_text())
    assert [result["method"] for result in report["results"]] == ["vanilla", DROPPING]
    markdown = (tmp_path / "generate-test-cpu.md").read_text()
    assert "| PyramidDrop | 20 | 1 |" in markdown and "generate-test-cpu.png" in markdown
    assert (tmp_path / "generate-test-cpu.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "hooks" in shown and "first token" in shown and "…" not in shown


@pytest.fixture(scope="module")
def directories(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaVA, and a model of another family, in directories of their own."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("models")
    parts = build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))
    processor = parts.processor()
    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    found = {"llava": place / "llava", "vip": place / "vip"}
    parts.hf.save_pretrained(found["llava"])
    config = transformers.VipLlavaConfig(
        text_config=parts.hf.config.text_config,
        vision_config=parts.hf.config.vision_config,
        image_token_index=parts.hf.config.image_token_id,
        vision_feature_layers=[-2, -1],
        tie_word_embeddings=False,
    )
    transformers.VipLlavaForConditionalGeneration(config).save_pretrained(found["vip"])
    for directory in found.values():
        processor.save_pretrained(directory)
    return found


@pytest.mark.parametrize("kind", ["llava", "vip"])
def test_a_directory_is_asked_with_its_own_weights(directories: dict[str, Path], kind: str, tmp_path: Path) -> None:
    drop = "pyramid_drop={layers: [1, 2], ratios: [0.5, 0.25]}"
    words = ["--device", "cpu", "--batch", "1", "2", "--new-tokens", "3", "--runs", "1", "--out", str(tmp_path)]
    if kind == "vip" and is_older("5.23"):
        with pytest.raises(ValueError, match=says("VipLlavaForConditionalGeneration", "from transformers 5.23 on")):
            measured(str(directories[kind]), drop, *words)
        return
    measured(str(directories[kind]), drop, *words)
    report = json.loads((tmp_path / f"generate-{kind}-cpu.json").read_text())
    assert report["settings"]["weights"] == "its own"
    assert [(r["batch"], r["image_tokens"]) for r in report["results"]] == [(1, 16), (1, 16), (2, 16), (2, 16)]
    per_token = 2 * 2 * 8 * 4  # keys and values, two heads of 8, float32
    for result in report["results"]:
        held = result["text_tokens"] + 3 - 1
        kept = (16, 16, 16, 16) if result["method"] == "vanilla" else (16, 8, 4, 4)
        assert result["cache_bytes"] == result["batch"] * per_token * sum(held + tokens for tokens in kept)
        assert result["tower_ms"] is None and result["prefill_speedup_predicted"] is None
    assert [own["batch"] for own in report["hooks"]] == [1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["DIR"], says("DIR", "schedule", "pyramid_drop=configs/schedules/pyramiddrop.yaml")),
        (["DIR", "--image-tokens", "9"], says("--image-tokens", "DIR")),
        (["DIR", "--shape", "tiny"], says("--shape", "tiny", "DIR")),
        (["--shape", "tiny", "--new-tokens", "1"], says("--new-tokens", "2", "1")),
        (["--shape", "tiny", "--batch", "0"], says("--batch", "1", "0")),
        (["--shape", "tiny", "--image-tokens", "16293"], says("--image-tokens", "16324", "16293")),
        (["--shape", "tiny", "--attention", "best"], says("--attention", "'best'")),
        (["configs/bench/tiny.yaml", "pyramid_drop=null"], says("schedule", "pyramid_drop")),
        (["configs/bench/tiny.yaml", "pyramid_drop.downsample=4"], says("bench generate", "pyramid_drop.downsample")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_line(directories: dict[str, Path], words: list[str], message: str) -> None:
    directory = str(directories["llava"])
    pattern = message.replace("DIR", directory.replace("-", r"\-"))
    with pytest.raises(ValueError, match=pattern) as caught:
        measured(*(directory if word == "DIR" else word for word in words), "--device", "cpu")
    assert "\n" not in str(caught.value)


def test_noise_is_a_picture_as_any_other() -> None:
    noise = Noise((30, 20), 1)
    assert image_size(noise) == load_image(noise).size == (30, 20)
    assert noise == Noise((30, 20), 1) and replace(noise, seed=2) != noise and QUESTION.endswith("?")
