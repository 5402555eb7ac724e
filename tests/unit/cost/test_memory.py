"""The predicted peak against the bytes torch itself keeps alive in a step, at the real shapes, with nothing allocated.

Under `FakeTensorMode` every operation runs on shapes alone. `LiveBytes` adds up the storages that are alive, so the
peak contains all that autograd saves and every temporary tensor that the program makes. Attention is the fused kernel
of CPUs, which keeps query, key, value, output and logsumexp, as the varlen kernel on a GPU does; a test makes sure.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_pdrop.bench.shapes import Shape, shape_named
from llava_pdrop.checkpoint.hf_models import make_hf_model
from llava_pdrop.cost.flops import ALL_LAYERS, CountedStep, Recomputed
from llava_pdrop.cost.memory import Parameters, predicted_peak
from llava_pdrop.cost.states import States
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model import kernels
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.report.units import GIB
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.optim import freeze
from llava_pdrop.types import ImageInput, PackedBatch, Sample
from tests.gpu.test_bench import HALF_BILLION
from tests.messages import says

DECODER = ("projector", "language_model")
ALL_PARTS = (*DECODER, "vision_tower")
PAPER = shape_named("llava-next-7b").schedule
DROP_4 = Schedule((1, 2, 3), (0.5, 0.25, 0.125))
LATE_4, EARLY_4 = Schedule((3,), (0.25,), inject=2, positions="keep"), Schedule((0, 2), (0.5, 0.25))
NO_OPTIMIZER = States(optimizer=0)


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch):
    """Eager kernels are Hugging Face's operations there; on a CPU `exact` takes fewer, and keeps less of them."""
    monkeypatch.setattr(kernels, "_kernels", lambda *_: None)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages alive that it has seen (``now``), their highest number (``peak``), and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.add(str(func))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Traced:
    weights: int
    peak: int
    operations: set[str]


def batch_of(geometry: ImageGeometry, samples: int, size: tuple[int, int], text: int = 200) -> PackedBatch:
    image, tiles = geometry.num_tokens(size), geometry.num_tiles(size)
    labels = torch.full((image + text,), -100)
    labels[-text // 2 :] = 5
    pixels = torch.zeros(tiles, 3, geometry.tile, geometry.tile)
    one = Sample("s", torch.full((image + text,), 5), labels, (ImageInput(pixels, size),), ((1, 1 + image),))
    return PackedBatch.pack([one] * samples)


def traced_step(
    shape: Shape,
    batch: PackedBatch,
    schedule: Schedule,
    trainable: tuple[str, ...],
    recompute: bool,
    first: int | None,
    autocast: bool = False,
) -> Traced:
    """Forward and backward of one step in bfloat16, on shapes alone; or in float32 weights under autocast, whose lists
    of operations for the CPU and for CUDA agree in all that matters here."""
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32 if autocast else torch.bfloat16)
        try:
            hf = make_hf_model(shape.text_config(), shape.vision_config(), shape.geometry, image_token_id=32062)
        finally:
            torch.set_default_dtype(default)
        model = PyramidLlava(hf, schedule, shape.geometry, recompute_layers=first).train()
        freeze(model, trainable)
        if recompute:
            model.activation_checkpointing_enable()
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        weights = live.now
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(batch).loss
            loss.backward()
    return Traced(weights, live.peak, live.operations)


def again(recompute: bool, first: int | None = None) -> Recomputed:
    return Recomputed(first, True) if recompute else Recomputed()


def shape_with(name: str, layers: int) -> Shape:
    """The shape with so many layers in decoder and tower, of the real widths."""
    shape, depth = shape_named(name), {"num_hidden_layers": layers}
    return replace(shape, text=shape.text | depth, vision=shape.vision | depth)


def config_of(shape: Shape) -> Any:
    with torch.device("meta"):
        return make_hf_model(shape.text_config(), shape.vision_config(), shape.geometry, image_token_id=32062).config


CASES = (
    [
        ("llava-next-7b", schedule, trainable, recompute, first)
        for schedule, trainable, recompute, first in (
            (Schedule(), ALL_PARTS, False, None),
            (DROP_4, ALL_PARTS, False, None),
            (DROP_4, ALL_PARTS, True, None),
            (DROP_4, ALL_PARTS, True, 1),
            (Schedule(), DECODER, False, None),
            (Schedule(), DECODER, True, None),
            (Schedule(), ("projector",), False, None),
            (DROP_4, ("projector",), True, None),
        )
    ]
    + [
        ("llava15-7b", LATE_4, DECODER, False, None),
        ("llava15-7b", LATE_4, DECODER, True, None),
        ("llava15-7b", EARLY_4, DECODER, False, None),
    ]
    + [("llava15-13b", DROP_4, DECODER, recompute, None) for recompute in (False, True)]
)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_tower_that_is_not_recomputed_keeps_what_it_keeps_without_checkpointing(recompute):
    """With no decoder layer recomputed that is the step without checkpointing, whose peak is traced below."""
    shape, batch = shape_with("llava-next-7b", 4), batch_of(shape_named("llava-next-7b").geometry, 4, (672, 672))
    config, options = config_of(shape), (DROP_4, shape.geometry, ALL_PARTS)
    whole, kept = (
        predicted_peak(CountedStep(config, batch, *options, Recomputed(0, recompute and tower)), NO_OPTIMIZER).total
        for tower in (True, False)
    )
    assert kept == predicted_peak(CountedStep(config, batch, *options), states=NO_OPTIMIZER).total
    assert (kept > whole) == recompute


@pytest.mark.parametrize("trainable", [DECODER, ("projector",)], ids=["decoder learns", "decoder frozen"])
def test_fused_kernels_keep_less(trainable):
    """A token of a layer less: two float32 copies of the stream where a norm keeps bfloat16, and the activation of the
    gate; where nothing is normalised twice, nothing else."""
    shape, batch = shape_with("llava-next-7b", 4), batch_of(shape_named("llava-next-7b").geometry, 1, (672, 672))
    hidden, mlp = shape.text["hidden_size"], shape.text["intermediate_size"]
    options = (config_of(shape), batch, Schedule(), shape.geometry, trainable)
    held = {
        kernels: predicted_peak(
            CountedStep(*options), states=States(optimizer=0, accumulate=True), kernels=kernels
        ).activations
        for kernels in ("eager", "fused")
    }
    learns = "language_model" in trainable
    norms = 2 * ((4 + 2 * learns) - 2) * hidden  # the normalised stream before its weight stays where that learns
    assert held["eager"] - held["fused"] == pytest.approx(4 * len(batch.input_ids) * (norms + 2 * mlp), rel=0.02)
    autocast = [
        predicted_peak(CountedStep(*options), states=AUTOCAST, kernels=kernels).total for kernels in ("eager", "fused")
    ]
    assert autocast[0] == autocast[1], "not modelled, so what eager kernels keep is an upper bound"


@pytest.mark.parametrize(("name", "schedule", "trainable", "recompute", "first"), CASES)
def test_peak_of_four_layers_at_the_real_widths(name, schedule, trainable, recompute, first):
    shape = shape_with(name, layers=4)
    size = (672, 672) if shape.geometry.aspect == "anyres" else (640, 480)
    batch = batch_of(shape.geometry, 4 if shape.geometry.aspect == "anyres" else 16, size)
    traced = traced_step(shape, batch, schedule, trainable, recompute, first)
    predicted = predicted_peak(
        CountedStep(config_of(shape), batch, schedule, shape.geometry, trainable, again(recompute, first)), NO_OPTIMIZER
    )
    assert predicted.weights == pytest.approx(traced.weights, rel=1e-4)  # buffers are not parameters
    assert predicted.total - predicted.weights == pytest.approx(traced.peak - traced.weights, rel=0.07)


AUTOCAST = States(optimizer=0, float32=True, autocast=True)


@pytest.mark.parametrize(
    ("schedule", "trainable", "recompute", "first"),
    [
        (Schedule(), DECODER, False, None),
        (Schedule(), DECODER, True, None),
        (Schedule(), DECODER, True, 2),
        (DROP_4, ALL_PARTS, False, None),
        (DROP_4, ALL_PARTS, True, None),
        (Schedule(), ("projector",), False, None),
        (Schedule(), ("projector",), True, None),
    ],
)
def test_peak_of_four_layers_under_autocast(schedule, trainable, recompute, first):
    shape = shape_with("llava-next-7b", layers=4)
    batch = batch_of(shape.geometry, 4, (672, 672))
    traced = traced_step(shape, batch, schedule, trainable, recompute, first, autocast=True)
    predicted = predicted_peak(
        CountedStep(config_of(shape), batch, schedule, shape.geometry, trainable, again(recompute, first)), AUTOCAST
    )
    assert predicted.weights == pytest.approx(traced.weights, rel=1e-4)
    assert predicted.total - predicted.weights == pytest.approx(traced.peak - traced.weights, rel=0.07)


def test_the_whole_7b_under_autocast_holds_the_casts_of_all_weights():
    """With everything recomputed its peak is the end of the forward: 2 bytes for each weight that learns."""
    shape = shape_named("llava-next-7b")
    config, batch = config_of(shape), batch_of(shape.geometry, 1, (672, 672))
    traced = traced_step(shape, batch, PAPER, DECODER, recompute=True, first=None, autocast=True)
    kept = replace(AUTOCAST, accumulate=True)
    alone, later = (
        predicted_peak(CountedStep(config, batch, PAPER, shape.geometry, DECODER, ALL_LAYERS), states)
        for states in (AUTOCAST, kept)
    )
    assert alone.total == pytest.approx(traced.peak, rel=0.03)
    learning = later.gradients / 4
    assert later.activations > 2 * (learning - 32064 * 4096)  # all but the embedding, which is not cast


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("schedule", [Schedule(), HALF_BILLION.schedule], ids=["vanilla", "dropping"])
def test_peak_at_the_shape_of_the_gpu_tests(schedule, recompute):
    """Of what tests/gpu allow the allocator to differ, the prediction itself takes 3 %."""
    batch = batch_of(HALF_BILLION.geometry, HALF_BILLION.samples, (672, 672))
    traced = traced_step(HALF_BILLION, batch, schedule, HALF_BILLION.trainable, recompute, None)
    options = (HALF_BILLION.geometry, HALF_BILLION.trainable, again(recompute))
    predicted = predicted_peak(CountedStep(config_of(HALF_BILLION), batch, schedule, *options), states=NO_OPTIMIZER)
    assert predicted.total == pytest.approx(traced.peak, rel=0.03)


def test_one_more_layer_costs_exactly_what_it_says():
    """Without recomputation, the difference of two depths is a layer's saved activations, its weights and nothing
    else."""
    batch = batch_of(shape_named("llava-next-7b").geometry, 4, (672, 672))
    traced, predicted = [], []
    for layers in (2, 3):
        shape = shape_with("llava-next-7b", layers)
        traced.append(traced_step(shape, batch, Schedule(), DECODER, False, None).peak)
        predicted.append(
            predicted_peak(
                CountedStep(config_of(shape), batch, Schedule(), shape.geometry, DECODER), states=NO_OPTIMIZER
            ).total
        )
    assert predicted[1] - predicted[0] == pytest.approx(traced[1] - traced[0], rel=1e-4)


def test_the_whole_7b_with_the_papers_schedule():
    shape = shape_named("llava-next-7b")
    batch = batch_of(shape.geometry, 4, (672, 672))
    traced = traced_step(shape, batch, PAPER, ALL_PARTS, recompute=True, first=None)
    predicted = predicted_peak(
        CountedStep(config_of(shape), batch, PAPER, shape.geometry, ALL_PARTS, ALL_LAYERS), states=NO_OPTIMIZER
    )
    assert predicted.total == pytest.approx(traced.peak, rel=0.03)
    assert "aten._scaled_dot_product_flash_attention_for_cpu.default" in traced.operations  # no T x T matrix is kept
    assert not any("attention_math" in operation for operation in traced.operations)


@pytest.mark.parametrize("name", ["tiny", "small-cpu", "llava15-7b", "llava15-13b", "llava-next-7b"])
def test_parameters_are_those_of_the_model(name):
    shape = shape_named(name)
    with torch.device("meta"):
        hf = make_hf_model(shape.text_config(), shape.vision_config(), shape.geometry, image_token_id=5)
    assert Parameters.of(hf.config).total(hf.config) == sum(p.numel() for p in hf.parameters())


def test_sixteen_bytes_for_every_trainable_parameter_and_two_for_the_others():
    shape = shape_named("llava15-7b")
    config, batch = config_of(shape), batch_of(shape.geometry, 16, (640, 480))
    with torch.device("meta"):
        model = PyramidLlava(make_hf_model(shape.text_config(), shape.vision_config(), shape.geometry, 32062))
    freeze(model, DECODER)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - learning

    def states(zero: int, gpus: int):
        kept = States(zero, gpus, accumulate=True)
        memory = predicted_peak(CountedStep(config, batch, Schedule(), shape.geometry, DECODER, Recomputed()), kept)
        assert memory.activations > 0  # the peak is in backward, not in the optimizer step
        return memory.weights + memory.gradients + memory.optimizer

    assert states(0, 8) == 16 * learning + 2 * frozen
    assert states(2, 8) == pytest.approx(2 * (learning + frozen) + 14 * learning / 8)
    assert states(3, 8) == pytest.approx((16 * learning + 2 * frozen) / 8)
    assert states(3, 1) == states(0, 1)


def test_gradients_that_are_not_kept_grow_while_activations_shrink():
    shape = shape_named("llava-next-7b")
    config, batch = config_of(shape), batch_of(shape.geometry, 4, (672, 672))
    once, kept = (
        predicted_peak(
            CountedStep(config, batch, Schedule(), shape.geometry, ALL_PARTS, Recomputed()),
            States(accumulate=accumulate),
        )
        for accumulate in (False, True)
    )
    assert once.gradients < kept.gradients and once.total < kept.total
    assert kept.activations / GIB > 70  # 12,512 tokens, nothing recomputed


def test_the_optimizer_step_copies_gradients_to_float32():
    """With next to no activations the step is the peak: 16 bytes a trainable parameter, and 4 for the copy."""
    shape = shape_named("llava15-7b")
    config, batch = config_of(shape), batch_of(shape.geometry, 1, (640, 480), text=2)
    counts = Parameters.of(config)
    learning = counts.total(config) - counts.tower_stem - 24 * counts.tower_layer

    def peak(states: States) -> float:
        memory = predicted_peak(CountedStep(config, batch, Schedule(), shape.geometry, DECODER, ALL_LAYERS), states)
        return memory.total - memory.weights

    assert peak(States()) == (2 + 12 + 4) * learning
    assert peak(States(optimizer=12 / 8)) == (2 + 12 / 8 + 4 / 8) * learning  # of one of 8 ranks
    assert peak(States(bytes=4, optimizer=8)) == pytest.approx((4 + 8) * learning, rel=1e-4)  # float32 has no copy


def test_impossible_states():
    with pytest.raises(ValueError, match=says("ZeRO", "1")):
        States(zero=1)
    with pytest.raises(ValueError, match="at least 1 GPU"):
        States(gpus=0)
