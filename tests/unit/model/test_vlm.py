"""Corners of the training model: nothing left before an answer, overflow, half precision, settings we do not have."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.load import save_pretrained
from llava_pdrop.checkpoint.original import original_geometry
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.pyramid_drop import Instruction, attention_score
from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch, Sample
from tests.parity.test_export import sources  # noqa: F401
from tests.tiny import PAD, PYRAMID, make_sample, make_tiny_hf

TO_NOTHING = Schedule((2, 4), (0.5, 0.0))


def without_bos(sample: Sample) -> Sample:
    spans = tuple((start - 1, stop - 1) for start, stop in sample.image_spans)
    return Sample(sample.id, sample.input_ids[1:], sample.labels[1:], sample.images, spans)


@pytest.mark.parametrize("images", [1, 2])
def test_an_image_that_alone_predicts_the_answer_keeps_a_token(images):
    first = without_bos(make_sample(*[(28, 28)] * images, "3", seed=1))
    others = [make_sample(4, (28, 28), 3, "2", seed=2), make_sample(5, "4", seed=3)]
    model = PyramidLlava(make_tiny_hf(), TO_NOTHING)
    alone = model(PackedBatch.pack([first])).loss
    for before in (others[:1], others):
        batch = PackedBatch.pack([*before, first])
        rest = model(PackedBatch.pack(before)).loss
        torch.testing.assert_close(model(batch).loss - rest, alone, atol=1e-4, rtol=1e-5)
        check_rows_lie_in_their_sample(batch)
    check_rows_lie_in_their_sample(PackedBatch.pack([first, *others]))


def check_rows_lie_in_their_sample(batch: PackedBatch) -> None:
    plan = StreamPlan.build(batch, TO_NOTHING, PAD, torch.device("cpu"))
    original_ends = list(accumulate(batch.seq_lens))
    owners = [sum(end <= position for end in original_ends) for position in batch.label_positions]
    for stage in plan.stages:
        ends = list(accumulate(stage.layout.seq_lens))
        spans = [(end - length, end) for end, length in zip(ends, stage.layout.seq_lens)]
        queries = [sample for sample, starts in enumerate(batch.answer_starts) for _ in starts]
        for row, sample in zip(stage.query_Q.tolist(), queries, strict=True):
            assert spans[sample][0] <= row < spans[sample][1]
        for position, sample in zip(stage.layout.label_positions, owners, strict=True):
            assert spans[sample][0] <= position - 1 < spans[sample][1]
    expected = [position - 1 for position in plan.stages[-1].layout.label_positions]
    assert plan.predict_row.tolist() == expected


def test_autocast_does_not_touch_the_score():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 8, generator=generator), torch.randn(20, 2, 8, generator=generator)
    instruction = Instruction(query, key, torch.tensor([12, 18]), [20], [2], 8**-0.5)
    plain = attention_score(instruction)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_score(instruction), plain)


def test_a_text_only_batch_ignores_a_projector_that_overflows():
    model = PyramidLlava(make_tiny_hf(), PYRAMID)
    projector = model.hf.model.multi_modal_projector
    with torch.no_grad():
        projector.linear_2.bias.fill_(1e38)
    output = model(PackedBatch.pack([make_sample(5, "3")]))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_half_precision_keeps_rotary_frequencies(sources, tmp_path):  # noqa: F811
    parts = build_parts(**sources, dtype=torch.bfloat16)
    assert parts.hf.dtype == torch.bfloat16
    assert parts.hf.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    save_pretrained(parts.hf, parts.processor(), tmp_path)
    again = build_parts(str(tmp_path), dtype=torch.bfloat16)
    sample = make_sample(9, "9")
    first, second = (PyramidLlava(p.hf).logits(PackedBatch.pack([sample])) for p in (parts, again))
    assert torch.equal(first, second)


@pytest.mark.parametrize("setting", [{"aspect": "square"}, {"merge": "maxpool"}, {"rounding": "up"}])
def test_unknown_image_settings(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^unknown image {name} [^\n]*$"):
        ImageGeometry(28, 7, **setting)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_projector_type", "linear"),
        ("image_aspect_ratio", "anyres_max_9"),
        ("image_aspect_ratio", "square"),
        ("image_aspect_ratio", None),
    ],
)
def test_original_settings_we_do_not_have(key, value):
    config = {"image_aspect_ratio": "pad", key: value}
    with pytest.raises(ValueError, match=f"^[^\n]*{key} {value!r} is not supported[^\n]*$"):
        original_geometry(config, SimpleNamespace(image_size=28, patch_size=7))


def test_attention_dropout_is_refused_in_training():
    model = PyramidLlava(make_tiny_hf(), PYRAMID).train()
    for layer in model.hf.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        model(PackedBatch.pack([make_sample(3, (28, 28), 5, "4")]))
