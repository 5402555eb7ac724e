"""Corners of the training model: a projector that overflows, half precision."""

from __future__ import annotations

import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.load import save_pretrained
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.types import PackedBatch
from tests.parity.test_export import sources  # noqa: F401
from tests.tiny import PYRAMID, make_sample, make_tiny_hf


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
