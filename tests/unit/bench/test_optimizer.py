"""Which optimizer fits, and what an eighth of it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from llava_pdrop.bench import optimizer
from llava_pdrop.bench.shapes import make_model, shape_named
from tests.messages import says
from tests.unit.cost.test_memory import LiveBytes

CPU = torch.device("cpu")


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    return list(make_model(shape_named("tiny"), CPU).parameters())


def test_a_shard_is_about_an_eighth_made_of_whole_parameters(parameters: list[nn.Parameter]) -> None:
    chosen = optimizer.shard(parameters)
    total = sum(p.numel() for p in parameters)
    assert sum(p.numel() for p in chosen) == pytest.approx(total / 8, rel=0.05)
    assert len({id(p) for p in chosen}) == len(chosen) < len(parameters)


def test_one_parameter_is_its_own_shard() -> None:
    only = nn.Parameter(torch.ones(3))
    assert optimizer.shard([only]) == [only]


@pytest.mark.parametrize(("room", "kind"), [(16.0, "adamw"), (5.0, "sharded"), (1.0, "none")])
def test_auto_takes_the_most_that_fits(monkeypatch: pytest.MonkeyPatch, room: float, kind: str) -> None:
    weights = [nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))]
    monkeypatch.setattr(optimizer, "free_bytes", lambda device: room * 1000 / optimizer.HEADROOM)
    assert optimizer.choose("auto", weights, CPU) == kind


def test_bytes_beside_the_weights() -> None:
    half = [nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))]
    assert optimizer.extra_bytes("adamw", half) == 14_000  # 16 a parameter, two of which are there
    assert optimizer.extra_bytes("sharded", half) == 2_000 + 12_000 / 8
    assert optimizer.extra_bytes("none", half) == 2_000


@pytest.mark.parametrize("kind", ["adamw", "sharded", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_model_is_told_what_the_optimizer_holds(kind: str, dtype: torch.dtype) -> None:
    weights = [nn.Parameter(torch.ones(80, dtype=dtype)) for _ in range(16)]
    adamw = optimizer.make(kind, weights)
    held = 0
    if adamw is not None:
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        adamw.step()
        own = {id(weight) for weight in weights}
        held = sum(master.nbytes for master in adamw.masters if id(master) not in own)
        held += sum(t.nbytes for state in adamw.adamw.state.values() for t in state.values() if t.numel() > 1)
    states = optimizer.states(kind, dtype)
    assert states.bytes == dtype.itemsize and not states.zero
    assert states.optimizer * 80 * 16 == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_shard_is_updated_and_in_float32(dtype: torch.dtype) -> None:
    weights = [nn.Parameter(torch.ones(10, dtype=dtype)) for _ in range(16)]
    adamw = optimizer.make("sharded", weights)
    assert adamw is not None
    for _ in range(200):  # 2e-5 a step is too little for one step of bfloat16 near 1, not for the float32 copy
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        adamw.step()
    moved = [bool((weight < 1).all()) for weight in weights]
    assert sum(moved) == 2
    assert all(master.dtype == torch.float32 for master in adamw.masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_clipped_together_as_in_training(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrainingArguments().max_grad_norm == optimizer.MAX_GRAD_NORM
    weights = [nn.Parameter(torch.ones(4, dtype=dtype)) for _ in range(2)]
    adamw = optimizer.make("adamw", weights)
    assert adamw is not None
    given: list[torch.Tensor] = []
    monkeypatch.setattr(adamw.adamw, "step", lambda: given.extend(master.grad.clone() for master in adamw.masters))
    for scale, weight in zip((3.0, 4.0), weights):
        weight.grad = torch.full_like(weight, scale)
    adamw.step()
    assert torch.cat(given).tolist() == pytest.approx([0.3] * 4 + [0.4] * 4, rel=1e-5)  # of norm 10
    assert {gradient.dtype for gradient in given} == {torch.float32}


def test_a_wrong_name_is_said() -> None:
    with pytest.raises(ValueError, match=says("--optimizer", "'sgd'")):
        optimizer.choose("sgd", [], CPU)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 0), (torch.bfloat16, 4)])
def test_a_fused_step_makes_no_tensors_but_float32_gradients(monkeypatch, dtype, copies) -> None:
    """On a GPU, where AdamW is fused: the peak of a step is what `cost.memory` says, with nothing on top."""
    original = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda masters, lr, **_: original(masters, lr=lr, fused=True))
    weights = [nn.Parameter(torch.ones(100_000, dtype=dtype)) for _ in range(8)]
    adamw = optimizer.MasterAdamW(weights)
    for _ in range(2):  # the first step makes the moments
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with LiveBytes() as live:
            adamw.step()
    assert live.peak == pytest.approx(copies * 800_000, rel=0.01, abs=1000)
