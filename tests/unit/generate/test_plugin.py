"""Models whose layers the plug-in does not all reach: they would drop nothing, or at the wrong layers, without a word.
(Where a later drop alone is missed, lengths do not fit and PyTorch says so.)"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_pdrop.generate.plugin import attach
from tests.messages import says
from tests.parity.generation import inputs, make_hf_model
from tests.tiny import PYRAMID, make_sample


def runs_without_hooks(layer: nn.Module) -> None:
    """Makes a decoder run ``layer`` past its hooks."""

    def forward(self: nn.Module, *args, **kwargs):
        return self.forward(*args, **kwargs)

    layer.__class__ = type("Silent", (type(layer),), {"__call__": forward})


@pytest.mark.parametrize("lost", [range(6), [2, 3, 5]], ids=["all layers", "all drops"])
def test_a_drop_that_is_never_reached_is_an_error(lost):
    hf = make_hf_model()
    for index in lost:
        runs_without_hooks(hf.model.language_model.layers[index])
    attach(hf, PYRAMID)
    with pytest.raises(ValueError, match=says("attach()", "LlavaModel", "layers")):
        hf(**inputs(hf, make_sample(1, (28, 28), 3)))


def test_layers_that_rank_nothing_need_not_be_reached_before_the_first_drop():
    hf, row = make_hf_model(), make_sample(1, (28, 28), 3)
    expected = attach(hf, PYRAMID)(**inputs(hf, row)).logits
    other = make_hf_model()
    runs_without_hooks(other.model.language_model.layers[0])
    assert torch.equal(attach(other, PYRAMID)(**inputs(other, row)).logits, expected)
