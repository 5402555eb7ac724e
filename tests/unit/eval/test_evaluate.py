"""Evaluation by generation: inputs, what it leaves of the model, independence of the batch size, and the command."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava_pdrop.__main__ import main
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.load import save_pretrained
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.data.chat import jinja_of
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.images import load_image
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.evaluate import chance_of, evaluate, evaluate_config, load_questions
from llava_pdrop.eval.generation import generating
from llava_pdrop.eval.questions import llava_json
from llava_pdrop.eval.respondent import LlavaRespondent, model_inputs
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.run import train
from llava_pdrop.types import ImageInput, Sample
from tests.messages import says

DROP = Schedule((1, 2, 3), (0.5, 0.25, 0.125))


@pytest.fixture(scope="module")
def parts(tiny_files):
    torch.manual_seed(0)
    return build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))


@pytest.fixture
def questions(tiny_files):
    return llava_json(tiny_files / "data/eval.json", tiny_files / "data/images")


def run(parts, questions, schedule=DROP, **options):
    return evaluate(LlavaRespondent(parts, TEMPLATES["qa"]), questions, schedule, **{"max_new_tokens": 3, **options})


def test_answers_do_not_depend_on_the_batch_size(parts, questions):
    one, all_at_once = (run(parts, questions, batch_size=size) for size in (1, 6))
    assert one.predictions == all_at_once.predictions
    assert one.image_tokens == [16, 8, 4, 2]
    assert one.chance == pytest.approx(1 / 3)
    assert [entry.gold for entry in one.predictions] == ["red", "green", "blue"] * 2
    assert one.predictions[0].question == "Which colour is it"


def test_chance_is_that_of_the_answers_own_distribution():
    assert chance_of(["yes", "Yes", "no", "yes."]) == pytest.approx(0.75**2 + 0.25**2)


def test_the_model_is_left_as_it_was(parts, questions):
    parts.hf.train()
    torch.manual_seed(5)
    state, hooks = torch.get_rng_state(), len(parts.hf.model._forward_pre_hooks)
    run(parts, questions, Schedule((1,), (0.25,), ranker="random"))
    assert parts.hf.training and torch.equal(state, torch.get_rng_state())
    assert len(parts.hf.model._forward_pre_hooks) == hooks
    again = [run(parts, questions, Schedule((1,), (0.25,), ranker="random"), seed=3).predictions for _ in range(2)]
    assert again[0] == again[1]


def test_the_model_is_left_as_it_was_where_the_device_refuses_the_precision(parts, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Current device does not support bfloat16")

    monkeypatch.setattr(torch, "autocast", refuse)
    parts.hf.train()
    before = vars(parts.hf).keys()
    with (
        pytest.raises(RuntimeError, match="bfloat16"),
        generating(parts.hf, Schedule((1,), (0.25,)), None, torch.bfloat16),
    ):
        pytest.fail("it is refused before anything is asked")
    assert parts.hf.training and vars(parts.hf).keys() == before


def test_trace_says_which_tokens_survive(parts, questions):
    result = run(parts, questions[:2], trace=True, max_new_tokens=1)
    for drop, count in enumerate((8, 4, 2)):
        kept = result.steps[0].kept(drop)
        assert [len(image) for image in kept] == [count, count]
    assert set(result.steps[0].kept(2)[0]) < set(result.steps[0].kept(0)[0])


def test_no_questions_and_unknown_scorers_are_refused(parts, questions):
    with pytest.raises(ValueError, match="no questions"):
        run(parts, [])
    with pytest.raises(ValueError, match=says("eval.scorer", "'bleu'")):
        run(parts, questions, scorer="bleu")


def test_inputs_are_padded_on_the_left(parts):
    def sample(length: int, images: int) -> Sample:
        picture = ImageInput(torch.rand(1, 3, 48, 48), (48, 48))
        return Sample("s", torch.arange(1, length + 1), torch.full((length,), -100), (picture,) * images)

    inputs = model_inputs([sample(2, 1), sample(4, 2)], parts.tokenizer, parts.hf)
    assert inputs["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert inputs["input_ids"][0].tolist() == [parts.tokenizer.pad_token_id] * 2 + [1, 2]
    assert inputs["pixel_values"].shape == (3, 3, 48, 48)
    assert "pixel_values" not in model_inputs([sample(3, 0)], parts.tokenizer, parts.hf)


def test_llava_next_batches_hold_images_of_different_tiles(tiny_files, tmp_path):
    """Pages of different shapes in one batch, dropped per image, give what they give alone."""
    pinpoints = ((48, 96), (96, 48), (96, 96))
    torch.manual_seed(0)
    parts = build_parts(
        language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"), aspect="anyres",
        merge="spatial_unpad", pinpoints=pinpoints,
    )  # fmt: skip
    assert parts.geometry == ImageGeometry(48, 12, "anyres", "spatial_unpad", pinpoints)
    from PIL import Image

    sizes = [(48, 100), (100, 40), (90, 90)]
    entries = []
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (40 * i, 90, 120)).save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat"}, {"from": "gpt", "value": "x"}]
        entries.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (tmp_path / "q.json").write_text(json.dumps(entries))
    questions = llava_json(tmp_path / "q.json", tmp_path)
    one, together = (run(parts, questions, batch_size=size) for size in (1, 3))
    assert one.predictions == together.predictions
    totals = [parts.geometry.num_tokens(size) for size in sizes]
    assert one.image_tokens[1] == pytest.approx(sum(int(n * 0.5) for n in totals) / 3)
    pooled = replace(DROP, downsample=9)
    one, together = (run(parts, questions, pooled, batch_size=size) for size in (1, 3))
    assert one.predictions == together.predictions
    totals = [parts.geometry.num_tokens(size, 9) for size in sizes]
    assert one.image_tokens[:2] == pytest.approx([sum(totals) / 3, sum(int(n * 0.5) for n in totals) / 3])


def test_a_record_without_answer_is_refused(tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "Why"}]}]))
    with pytest.raises(ValueError, match=says("q.json[0]", "(id a)", "answer")):
        llava_json(tmp_path / "q.json")


def test_eval_of_a_run_by_config_and_by_directory(tiny_config, capsys):
    section = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
    config = load_config(tiny_config(pyramid_drop=section), ["eval.limit=4"])
    with pytest.raises(ConfigError, match=says("finished", "train")):
        evaluate_config(config)
    output = train(config)
    capsys.readouterr()
    first = evaluate_config(config)
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"{first.accuracy:.1%}" in printed
    assert re.search(says("16 -> 8 -> 4 -> 2", "layers [1, 2, 3]", "own schedule)"), printed)
    assert len((output / "predictions.jsonl").read_text().splitlines()) == 4
    again = evaluate_config(load_config(output / RUN_FILE))
    assert again.predictions == first.predictions
    vanilla = evaluate_config(load_config(output / RUN_FILE, ["pyramid_drop=null"]))
    assert vanilla.image_tokens == [16]
    assert re.search(says("16 (no dropping", "own schedule", "layers [1, 2, 3]"), capsys.readouterr().out)
    assert len(load_questions(config)) == 4


def test_a_run_that_cannot_keep_the_answers_is_said_first(tiny_config, monkeypatch):
    """The tests may run as root, whom no permission stops."""
    config = load_config(tiny_config())
    output = train(config)
    monkeypatch.setattr(os, "access", lambda path, mode: path != output)
    with pytest.raises(ConfigError, match=says(str(output), "answers", "written")):
        evaluate_config(config)
    assert not (output / "predictions.jsonl").exists()


def test_what_is_served_is_what_is_evaluated(tiny_files, questions, tmp_path):
    """The ids that a saved processor makes of a chat are those of our prompts, images expanded."""
    parts = build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))
    parts.tokenizer.chat_template = jinja_of("qa")
    save_pretrained(parts.hf, parts.processor(), tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    for question in questions:
        own = LlavaRespondent(parts, TEMPLATES["qa"]).prepare(question)
        chat = [{"role": "user", "content": question.record.turns[0].text}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        images = [load_image(path) for path in question.record.images]
        assert images and processor(images=images, text=text).input_ids[0] == own.input_ids.tolist()


def test_eval_of_a_directory_without_tokenizer_is_one_line(tiny_config, tiny_files, tmp_path, capsys):
    config = load_config(tiny_config())
    parts = build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))
    save_pretrained(parts.hf, parts.processor(), tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    words = [f"data.eval={config.data.eval}", f"data.image_root={config.data.image_root}"]
    assert main(["eval", str(tmp_path / "model"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(says(str(tmp_path / "model"), "tokenizer.json", "copy"), error) and "\n" not in error


def test_eval_of_adapters_that_peft_saved(tiny_config, tiny_files, tmp_path, capsys):
    """They have no config.json: model, tokenizer and schedule are those of their base."""
    config = load_config(tiny_config())
    base = tmp_path / "base"
    parts = build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))
    parts.hf.config.pyramid_drop = Schedule((1, 2), (0.5, 0.25)).to_dict()
    save_pretrained(parts.hf, parts.processor(), base)
    adapted = get_peft_model(LlavaForConditionalGeneration.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapters")
    words = [f"data.eval={config.data.eval}", f"data.image_root={config.data.image_root}", "eval.limit=2"]
    assert main(["eval", str(tmp_path / "adapters"), *words, "model.template=qa", "train.use_cpu=true"]) == 0
    assert re.search(says("16 -> 8 -> 4", "own schedule)"), capsys.readouterr().out)
    assert (tmp_path / "adapters" / "predictions.jsonl").is_file()


def test_eval_of_a_directory_that_was_not_trained_here(tiny_config, tmp_path, capsys):
    """It has no config of ours; its schedule stands in its config.json."""
    section = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
    config = load_config(tiny_config(pyramid_drop=section), ["eval.limit=4"])
    other = tmp_path / "downloaded"
    shutil.copytree(train(config), other, ignore=shutil.ignore_patterns(RUN_FILE, "checkpoint-*"))
    assert main(["eval", str(other)]) == 2
    assert re.search(says("data.eval=FILE", "data.image_root=DIR"), capsys.readouterr().err)
    words = [f"data.eval={config.data.eval}", f"data.image_root={config.data.image_root}", "eval.limit=4"]
    words += [f"model.template={config.model.template}", "eval.batch_size=2"]
    assert main(["eval", str(other), *words]) == 0
    assert re.search(says("16 -> 8 -> 4 -> 2", "layers [1, 2, 3]", "own schedule)"), capsys.readouterr().out)
    assert main(["eval", str(other), *words, "pyramid_drop.ratios=[0.75,0.5,0.25]"]) == 0
    said = says("16 -> 12 -> 8 -> 4", "layers [1, 2, 3];", "own schedule")
    assert re.search(said, capsys.readouterr().out)
    original = tmp_path / "original"
    assert main(["convert", str(other), str(original), "--to", "llava"]) == 0
    assert main(["eval", str(original), *words]) == 0
    assert re.search(says("16 -> 8 -> 4 -> 2", "layers [1, 2, 3]", "own schedule)"), capsys.readouterr().out)
    assert main(["eval", str(other), *words, "pyramid_drop=null"]) == 0
    assert json.loads((other / "evaluation.json").read_text())["image_tokens"] == [16]
