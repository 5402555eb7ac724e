"""Hosts without weights: what is initialised in them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava_pdrop.checkpoint.hosts import empty_host
from llava_pdrop.checkpoint.layouts import is_projector
from tests.tiny import ANYRES, PAD, make_tiny_host


class Drawn(TorchDispatchMode):
    """Precision and device of all random numbers drawn under it."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: set[tuple[torch.dtype, str]] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            self.kinds.add((args[0].dtype, args[0].device.type))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("geometry", [PAD, ANYRES], ids=["pad", "anyres"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_new_projector_is_the_same_in_every_precision(dtype, geometry):
    """Only rounded. Torch draws other numbers in half precision than in float32 (2.11), and on GPUs than on CPUs."""
    config = make_tiny_host(geometry=geometry).config
    hosts = {}
    for precision in (torch.float32, dtype):
        torch.manual_seed(5)
        with Drawn() as drawn:
            hosts[precision] = empty_host(config, precision)
        assert drawn.kinds == {(torch.float32, "cpu")}
    own = dict(hosts[dtype].named_parameters())
    new = {name: values for name, values in hosts[torch.float32].named_parameters() if is_projector(name)}
    assert len(new) == (5 if geometry is ANYRES else 4)
    for name, values in new.items():
        assert own[name].dtype == dtype
        assert torch.equal(own[name], values.to(dtype)), name
    weight = new["model.multi_modal_projector.linear_1.weight"]
    assert weight.std().item() == pytest.approx(config.text_config.initializer_range, rel=0.1)
