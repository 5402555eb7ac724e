"""Pictures that several questions of a batch show: encoded once, and nothing changes by it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.eval.answering import answer_all, by_length
from llava_pdrop.eval.questions import ask
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.eval.sharing import shared_features
from llava_pdrop.schedule import Schedule

DROP = Schedule((1, 2, 3), (0.5, 0.25, 0.125))
SHOWN = [["a"], ["b"], ["a", "c"], [], ["b"], ["a"]]
"""Pictures of every question; ``c`` is wide and takes more tiles than the others by any resolution."""


GRID = ((48, 96), (96, 48), (144, 48))


@pytest.fixture(scope="module", params=["pad", "anyres"])
def respondent(tiny_files, request):
    torch.manual_seed(0)
    llm, tower = (str(tiny_files / name) for name in ("llm", "tower"))
    parts = build_parts(language_model=llm, vision_tower=tower, aspect=request.param, pinpoints=GRID)
    return LlavaRespondent(parts, TEMPLATES["qa"])


@pytest.fixture
def questions(tmp_path):
    for name, size in (("a", (60, 60)), ("b", (40, 90)), ("c", (150, 50))):
        noise = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.manual_seed(ord(name)))
        Image.fromarray(noise.numpy()).save(tmp_path / f"{name}.png")
    return [
        ask(str(i), f"Which {i}", [tmp_path / f"{name}.png" for name in names], f"q[{i}]", "x")
        for i, names in enumerate(SHOWN)
    ]


def test_the_tower_sees_a_picture_once_and_all_logits_stay(respondent, questions):
    hf, tower = respondent.hf.eval(), []
    prepared = [respondent.prepare(question) for question in questions]
    images = [image for sample in prepared for image in sample.images]
    inputs, _ = respondent.inputs(prepared, Schedule())
    count = hf.model.vision_tower.register_forward_hook(lambda _module, _args, out: tower.append(len(out[0])))
    with torch.inference_mode():
        alone = hf(**inputs).logits
        with respondent.sharing(prepared):
            shared = hf(**inputs).logits
        again = hf(**inputs).logits
    count.remove()
    different = {id(image): len(image.pixels) for image in images}
    assert len(images) == 6 and len(different) == 3
    assert tower == [sum(len(image.pixels) for image in images), sum(different.values()), tower[0]]
    assert torch.equal(again, alone)
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)


def test_answers_are_those_one_by_one(respondent, questions):
    alone, together = (answer_all(respondent, questions, DROP, batch_size=size, max_new_tokens=4) for size in (1, 6))
    assert [answer.text for answer in alone.answers] == [answer.text for answer in together.answers]


def test_questions_about_one_picture_stand_together(respondent, questions):
    shown = [questions[place].record.images for place in by_length(respondent, questions)]
    assert [len(images) for images in shown] == [2, 1, 1, 1, 1, 0], "the longest first"
    names = [images[0].name for images in shown[1:5]]
    assert names in (["a.png", "a.png", "b.png", "b.png"], ["b.png", "b.png", "a.png", "a.png"])


def test_hooks_go_also_where_a_forward_fails(respondent, questions):
    tower, (image,) = respondent.hf.model.vision_tower, respondent.prepare(questions[0]).images
    with pytest.raises(AssertionError, match="other pictures"), shared_features(respondent.hf, [image, image]):
        tower(image.pixels)
    assert not tower._forward_pre_hooks and not respondent.hf.model.multi_modal_projector._forward_hooks
