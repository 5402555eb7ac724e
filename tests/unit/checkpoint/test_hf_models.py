"""Models without weights: what is initialised in them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llava_pdrop.checkpoint.hf_models import empty_hf_model
from llava_pdrop.checkpoint.layouts import is_projector
from llava_pdrop.model.vlm import PyramidLlava
from tests.tiny import ANYRES, PAD, make_tiny_hf


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
    config = make_tiny_hf(geometry=geometry).config
    models = {}
    for precision in (torch.float32, dtype):
        torch.manual_seed(5)
        with Drawn() as drawn:
            models[precision] = empty_hf_model(config, precision)
        assert drawn.kinds == {(torch.float32, "cpu")}
    own = dict(models[dtype].named_parameters())
    new = {name: values for name, values in models[torch.float32].named_parameters() if is_projector(name)}
    assert len(new) == (5 if geometry is ANYRES else 4)
    for name, values in new.items():
        assert own[name].dtype == dtype
        assert torch.equal(own[name], values.to(dtype)), name
    weight = new["model.multi_modal_projector.linear_1.weight"]
    assert weight.std().item() == pytest.approx(config.text_config.initializer_range, rel=0.1)


def test_the_names_that_sharded_checkpoints_hold_stay():
    """DeepSpeed and FSDP write the state of the whole `PyramidLlava` and find it again by these names."""
    model = PyramidLlava(make_tiny_hf())
    assert list(model.state_dict()) == [f"host.{name}" for name in model.hf.state_dict()]
