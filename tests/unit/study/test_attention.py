"""How concentrated attention is, and that the probe sees the model's own and drops nothing."""

from __future__ import annotations

from math import log

import pytest
import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.eval.answering import answer_all
from llava_pdrop.eval.questions import ask
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.eval.team import ALONE
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.attention import concentration, look, probe_schedule


@pytest.fixture(scope="module")
def respondent(tiny_files):
    torch.manual_seed(0)
    return LlavaRespondent(
        build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower")), TEMPLATES["qa"]
    )


@pytest.fixture
def questions(tiny_files):
    """Of several lengths, one without a picture, one with two."""
    pictures = sorted((tiny_files / "data/images").glob("*.png"))[:2]
    shown = [pictures[:1], pictures[1:], [], pictures]
    return [ask(str(i), "Which colour is it " * (i + 1), own, f"q[{i}]", "x") for i, own in enumerate(shown)]


def test_even_attention_and_attention_to_one():
    mass, entropy, top = concentration(torch.full((20,), 0.02))
    assert mass == pytest.approx(0.4) and entropy == pytest.approx(1) and top == pytest.approx(0.1)
    assert concentration(torch.tensor([0.0, 0.3, 0.0, 0.0])) == pytest.approx((0.3, 0.0, 1.0))
    half = concentration(torch.tensor([0.1, 0.1, 0.0, 0.0]))
    assert half[1] == pytest.approx(log(2) / log(4))
    assert concentration(torch.zeros(4))[1:] == pytest.approx((1.0, 0.25)) and concentration(torch.ones(1))[1] == 1


def test_the_probe_drops_nothing(respondent, questions):
    options = {"batch_size": 2, "max_new_tokens": 3}
    probed = answer_all(respondent, questions, probe_schedule(0, 4), **options)
    assert [a.text for a in probed.answers] == [a.text for a in answer_all(respondent, questions, **options).answers]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_the_attention_that_the_model_pays(respondent, questions, batch_size):
    """Against the weights that transformers' eager attention returns, question by question."""
    rows = look(respondent, questions, probe_schedule(0, 4), ALONE, batch_size=batch_size)
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    hf, expected = respondent.hf.eval(), [[] for _ in rows]
    implementation = hf.config.text_config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        for question in questions:
            sample = respondent.prepare(question)
            with torch.inference_mode():
                output = hf(**respondent.inputs([sample], Schedule())[0], output_attentions=True, use_cache=False)
            for own, weight_1HQK in zip(expected, output.attentions):
                weight_K = weight_1HQK[0, :, -1].mean(0)
                own += [concentration(weight_K[start:stop]) for start, stop in sample.image_spans]
    finally:
        hf.set_attn_implementation(implementation)
    for row, own in zip(rows, torch.tensor(expected, dtype=torch.float64)):
        assert [row.mass, row.entropy, row.top] == pytest.approx(own.mean(0).tolist(), rel=1e-4)
        assert list(row.errors) == pytest.approx((own.std(0) / len(own) ** 0.5).tolist(), rel=1e-3, abs=1e-7)
