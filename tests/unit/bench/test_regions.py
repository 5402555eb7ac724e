"""Compiled regions: the same numbers, under the same names, from a handful of programs for streams of all lengths."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from llava_pdrop.bench.train_step import compile_regions
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.types import PackedBatch
from tests.tiny import PYRAMID, make_sample, make_tiny_hf, mixed_samples


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_loss_and_gradients_are_those_of_eager_mode():
    results = []
    for compiled in (False, True):
        model = PyramidLlava(make_tiny_hf("llama_gqa"), PYRAMID).train()
        if compiled:
            compile_regions(model.hf.model.language_model, backend="aot_eager")  # inductor's C++ takes a minute
        output = model(PackedBatch.pack(mixed_samples()))
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.loss.detach(), gradients, list(model.state_dict())))
    (eager, eager_gradients, eager_names), (loss, gradients, names) = results
    torch.testing.assert_close(loss, eager, atol=1e-4, rtol=1e-5)
    assert names == eager_names and gradients.keys() == eager_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, eager_gradients[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_streams_of_all_lengths_share_a_handful_of_programs(checkpointing):
    model = PyramidLlava(make_tiny_hf("llama_gqa"), PYRAMID).train()
    counter = CompileCounter()
    compile_regions(model.hf.model.language_model, backend=counter)
    if checkpointing:
        model.activation_checkpointing_enable()
    compiled, tokens = [], set()
    for size in range(6):
        samples = [make_sample(3 + size, (28, 28), 5, "4"), make_sample((28, 28), "6")][: 1 + size % 2]
        output = model(PackedBatch.pack(samples))
        output.loss.backward()
        tokens |= set(output.tokens)
        compiled.append(counter.frame_count)
    assert len(tokens) > 10
    assert 0 < compiled[0] == compiled[-1] <= 6  # norm and MLP, and what ranks or runs again in another gradient mode
