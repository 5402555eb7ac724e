"""Models whose layers the plug-in does not all reach: they would drop nothing, or at the wrong layers, without a word.
(Where a later drop alone is missed, lengths do not fit and PyTorch says so.)"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_pdrop.generate.plugin import _HANDLE, attach
from tests.messages import says
from tests.parity.generation import inputs, make_hf_model
from tests.tiny import PYRAMID, make_sample


def loses_the_call(layer: nn.Module) -> None:
    """Makes ``layer`` take the plug-in's keyword argument away before its hook sees it, as a decoder does that hands no
    keyword arguments on."""

    def without(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, {name: value for name, value in kwargs.items() if name != _HANDLE}

    layer.register_forward_pre_hook(without, with_kwargs=True)


@pytest.mark.parametrize("lost", [range(6), [2]], ids=["all layers", "first drop"])
def test_a_drop_that_is_never_reached_is_an_error(lost):
    hf = make_hf_model()
    for index in lost:
        loses_the_call(hf.model.language_model.layers[index])
    attach(hf, PYRAMID)
    with pytest.raises(ValueError, match=says("cannot drop", "keyword arguments")):
        hf(**inputs(hf, make_sample(1, (28, 28), 3)))


def test_layers_that_rank_nothing_need_not_be_reached_before_the_first_drop():
    hf, row = make_hf_model(), make_sample(1, (28, 28), 3)
    expected = attach(hf, PYRAMID)(**inputs(hf, row)).logits
    other = make_hf_model()
    loses_the_call(other.model.language_model.layers[0])
    assert torch.equal(attach(other, PYRAMID)(**inputs(other, row)).logits, expected)
