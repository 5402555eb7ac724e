"""A grown decoder says what the small one says, at the layers where that one says it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava_pdrop.checkpoint.grow import grow_decoder, grow_projector
from tests.messages import says


@pytest.fixture(scope="module")
def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    decoder = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=4, initializer_range=0.2, **shape))
    decoder.generation_config.eos_token_id = [2, 7]
    return decoder.eval()


IDS = torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize(("layers", "hidden"), [(4, 32), (8, 32), (12, 32), (4, 64), (12, 128)])
def test_without_noise_nothing_changes(small, layers, hidden):
    grown = grow_decoder(small, layers, hidden, noise=0.0, seed=0).eval()
    with torch.no_grad():
        before, after = (model(IDS, output_hidden_states=True) for model in (small, grown))
    torch.testing.assert_close(after.logits, before.logits, atol=2e-4, rtol=1e-4)
    share, ways = layers // 4, hidden // 32
    for layer in range(4):  # what enters an old layer enters its copy, and what leaves it passes through the new ones
        old, new = before.hidden_states[layer], after.hidden_states[layer * share]
        torch.testing.assert_close(new, old.repeat(1, 1, ways), atol=2e-4, rtol=1e-4)
    assert grown.config.num_attention_heads == 4 * ways and grown.config.num_key_value_heads == 2 * ways
    assert grown.generation_config.eos_token_id == [2, 7]


def test_new_layers_learn(small):
    """They add nothing at first, but have a gradient that lets them."""
    grown = grow_decoder(small, 8, 32, noise=0.0, seed=0)
    grown(IDS, labels=IDS).loss.backward()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert grown.get_submodule(f"model.layers.1.{name}").weight.grad.abs().max() > 0


def test_noise_tells_copies_apart_and_comes_from_the_seed(small):
    first, again, other = (grow_decoder(small, 4, 64, noise=0.3, seed=seed) for seed in (0, 0, 1))
    weight, old = (model.model.layers[1].mlp.up_proj.weight for model in (first, small))
    assert not torch.equal(weight[:48], weight[48:])
    added = weight - old.repeat(2, 2) / 2
    assert added.std().item() == pytest.approx(0.3 * old.std().item(), rel=0.05)
    assert torch.equal(weight, again.model.layers[1].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(first.model.norm.weight, torch.ones(64))


def test_projector_into_copied_features():
    torch.manual_seed(0)
    names = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    shapes = ((6, 5), (6,), (6, 6), (6,))
    tensors = {f"model.multi_modal_projector.{n}": torch.randn(shape) for n, shape in zip(names, shapes)}

    def project(tensors, x):
        first, bias, second, last = tensors.values()
        return torch.nn.functional.gelu(x @ first.T + bias) @ second.T + last

    grown, x = grow_projector(tensors, 3), torch.randn(4, 5)
    torch.testing.assert_close(project(grown, x), project(tensors, x).repeat(1, 3))


@pytest.mark.parametrize(
    ("layers", "hidden", "noise", "message"),
    [
        (6, 32, 0.0, says("num_hidden_layers 6", "multiple", "4")),
        (4, 48, 0.0, says("hidden_size 48", "multiple", "32")),
        (4, 16, 0.0, says("hidden_size 16", "32")),
        (4, 32, -1.0, says("noise", "0", "-1")),
    ],
)
def test_what_cannot_be(small, layers, hidden, noise, message):
    with pytest.raises(ValueError, match=message):
        grow_decoder(small, layers, hidden, noise, 0)
