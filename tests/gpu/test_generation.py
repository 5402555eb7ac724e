"""The plug-in on the GPU: the tokens and logits of the CPU, in float32."""

from __future__ import annotations

import copy

import pytest
import torch

from llava_pdrop.generate.plugin import attach
from tests.parity.generation import ONE, TWO, answers, inputs, make_hf_model, rows_of_all_kinds, run
from tests.tiny import ANYRES, PAD, PYRAMID, make_sample

GEOMETRIES = {"pad": PAD, "anyres": ANYRES}
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "llava_pdrop"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_generate_equals_the_cpu(geometry, cache, implementation):
    geometry = GEOMETRIES[geometry]
    hf = attach(make_hf_model(geometry=geometry, implementation=implementation), PYRAMID)
    batch = inputs(hf, *rows_of_all_kinds(geometry))
    theirs = run(hf, **batch, **CACHES[cache])
    ours = run(hf.cuda(), **{name: tensor.cuda() for name, tensor in batch.items()}, **CACHES[cache])
    assert answers(ours) == answers(theirs)
    for one, two in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(one.cpu(), two, atol=1e-4, rtol=1e-4)


def test_bfloat16_prunes_the_cache_to_the_same_lengths():
    hf = attach(make_hf_model(), PYRAMID)
    row = make_sample(*ONE)
    theirs = run(hf, **inputs(hf, row))
    half = copy.deepcopy(hf).cuda().bfloat16()
    ours = run(attach(half, PYRAMID), **{name: tensor.cuda() for name, tensor in inputs(hf, row).items()})
    lengths = [[layer.keys.shape[2] for layer in output.past_key_values.layers] for output in (ours, theirs)]
    assert lengths[0] == lengths[1] and lengths[0][0] > lengths[0][-1]


def test_two_images_without_text_between_them():
    hf = attach(make_hf_model(), PYRAMID)
    batch = inputs(hf, make_sample(*TWO))
    theirs = answers(run(hf, **batch))
    assert answers(run(hf.cuda(), **{name: tensor.cuda() for name, tensor in batch.items()})) == theirs
