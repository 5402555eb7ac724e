"""The packed training path against vanilla transformers and against itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llava_pdrop.model import kernels
from llava_pdrop.model.rankers import RANKERS
from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, PackedBatch
from tests.messages import says
from tests.reference import slow_reference
from tests.tiny import ANYRES, DECODERS, IMAGE, LAYERS, PAD, PYRAMID, make_sample, make_tiny_hf, mixed_samples

GEOMETRIES = {"pad": PAD, "anyres": ANYRES}


@pytest.fixture(autouse=True, params=["eager", "torch"])
def kernels_on_a_cpu(request, monkeypatch):
    """Everything below, with Hugging Face's kernels and with the fused ones."""
    monkeypatch.setitem(kernels.AUTO, "cpu", (request.param,))


TOLERANCE = 2e-5  # float32, logits of order 1: sums in another order


def logits_by_sample(model, samples):
    batch = PackedBatch.pack(samples)
    plan = StreamPlan.build(batch, model.schedule, model.geometry, model.device)
    return model.logits(batch).split(plan.stages[-1].layout.seq_lens)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("schedule", [Schedule(), replace(PYRAMID, ratios=(1.0, 1.0, 1.0))], ids=["none", "ratio1"])
def test_without_dropping_it_is_vanilla_transformers(decoder, schedule):
    hf = make_tiny_hf(decoder)
    samples = [make_sample(3, (28, 28), 5, "4", seed=1), make_sample((28, 28), 4, (28, 28), "3", seed=2)]
    ours = logits_by_sample(PyramidLlava(hf, schedule), samples)
    hf.set_attn_implementation("eager")
    for sample, logits in zip(samples, ours):
        pixels = torch.cat([image.pixels for image in sample.images])
        with torch.no_grad():
            theirs = hf(input_ids=sample.input_ids[None], pixel_values=pixels).logits[0]
        torch.testing.assert_close(logits, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("size", [(28, 28), (50, 20), (20, 60), (55, 56)])
def test_anyres_features_lie_where_transformers_puts_them(size):
    hf = make_tiny_hf(geometry=ANYRES)
    sample = make_sample(3, size, 5, "4", geometry=ANYRES)
    (ours,) = logits_by_sample(PyramidLlava(hf), [sample])
    sizes = torch.tensor([[size[1], size[0]]])
    with torch.no_grad():
        theirs = hf(
            input_ids=sample.input_ids[None], pixel_values=sample.images[0].pixels[None], image_sizes=sizes
        ).logits[0]
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("ranker", [name for name in RANKERS if name != "random"])
@pytest.mark.parametrize("positions", ["renumber", "keep"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_packed_equals_one_by_one(geometry, positions, ranker):
    schedule = replace(PYRAMID, positions=positions, ranker=ranker)
    samples = mixed_samples(GEOMETRIES[geometry])
    model = PyramidLlava(make_tiny_hf("llama_gqa", GEOMETRIES[geometry]), schedule)
    together = logits_by_sample(model, samples)
    for sample, logits in zip(samples, together):
        (alone,) = logits_by_sample(model, [sample])
        torch.testing.assert_close(logits, alone, atol=TOLERANCE, rtol=TOLERANCE)


SCHEDULES = {
    "paper": PYRAMID,
    "keep_positions": replace(PYRAMID, positions="keep"),
    "nothing_left": replace(PYRAMID, ratios=(0.5, 0.25, 0.0)),
    "before_the_decoder": replace(PYRAMID, layers=(0, 1, 4)),
    "counts": replace(PYRAMID, ratios=(), keep=(0.8, 7, 2)),
    "merged": replace(PYRAMID, merge="nearest"),
    "injected": replace(PYRAMID, inject=2, positions="keep"),
    "injected_earlier_and_renumbered": replace(PYRAMID, inject=1, positions="renumber"),
}


@pytest.mark.parametrize("query", ["answers", "last"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_packed_equals_a_slow_reference(decoder, schedule, query):
    model = PyramidLlava(make_tiny_hf(decoder), SCHEDULES[schedule])
    for sample in mixed_samples():
        ours = model.logits(PackedBatch.pack([sample], query))
        theirs, _ = slow_reference(model, sample, query)
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_positions_can_be_kept():
    sample = make_sample(3, (28, 28), 5, "4")
    hf = make_tiny_hf()
    renumbered, kept = (PyramidLlava(hf, replace(PYRAMID, positions=p)) for p in ("renumber", "keep"))
    (a,), (b,) = logits_by_sample(renumbered, [sample]), logits_by_sample(kept, [sample])
    assert a.shape == b.shape and not torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(("first", "tower_again"), [(None, 1), (0, 1), (3, 1), (LAYERS, 1), (3, 0)])
def test_checkpointing_changes_nothing_and_runs_again_what_was_asked(first, tower_again):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = PyramidLlava(
            make_tiny_hf("llama_gqa"), PYRAMID, recompute_layers=first, recompute_tower=bool(tower_again)
        ).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        tower, decoder = model.hf.model.vision_tower.encoder.layers, model.hf.model.language_model.layers
        calls.append([0] * (len(tower) + len(decoder)))
        for index, layer in enumerate([*tower, *decoder]):
            layer.self_attn.register_forward_hook(partial(count_call, calls[-1], index))
        output = model(PackedBatch.pack(mixed_samples()))
        (output.loss / output.labels).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    again = [tower_again, 0] + [int(first is None or index < first) for index in range(LAYERS)]
    assert calls[0] == [1, 0] + [1] * LAYERS  # the tower's last layer leads nowhere
    assert [after - before for before, after in zip(*calls)] == again
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=0, rtol=0, msg=name)


def count_call(calls, index, *_):
    calls[index] += 1


@pytest.mark.parametrize("first", [-1, LAYERS + 1])
def test_layers_to_recompute_must_exist(first):
    with pytest.raises(ValueError, match=says("train.recompute_layers", f"0 to {LAYERS}", str(first))):
        PyramidLlava(make_tiny_hf(), recompute_layers=first)


def test_loss_is_the_sum_over_labels():
    model = PyramidLlava(make_tiny_hf(), PYRAMID)
    samples = mixed_samples()
    batch = PackedBatch.pack(samples)
    output = model(batch)
    assert output.labels == len(batch.label_positions) == sum((s.labels != IGNORE_INDEX).sum() for s in samples)
    expected = 0.0
    for sample, logits in zip(samples, logits_by_sample(model, samples)):
        text = sample.labels[-len(logits) :] if not sample.image_spans else surviving_labels(sample, len(logits))
        expected += F.cross_entropy(logits[:-1], text[1:], reduction="sum", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(output.loss, expected.detach(), atol=1e-4, rtol=1e-5, check_dtype=False)


def surviving_labels(sample, length):
    """Labels once images have shrunk: only image tokens go, and they carry no label."""
    is_image = sample.input_ids == IMAGE
    lost = len(sample.input_ids) - length
    keep = torch.ones(len(is_image), dtype=torch.bool)
    keep[is_image.nonzero()[:lost, 0]] = False
    return sample.labels[keep]


@pytest.mark.parametrize(
    "schedule",
    [
        PYRAMID,
        replace(PYRAMID, inject=2, ranker=("visual_attention", "dart", "cdpruner")),
        replace(PYRAMID, layers=(0, 3, 5), ranker=("divprune", "all_text", "v2drop")),
        replace(PYRAMID, downsample=9),
    ],
    ids=["paper", "injected", "from layer 0", "pooled"],
)
def test_text_only_batch_runs_every_module_and_has_every_gradient(schedule):
    """All ranks must run the same modules and touch the same parameters, whatever their data."""

    def calls_and_gradients(samples):
        model = PyramidLlava(make_tiny_hf(geometry=ANYRES), schedule)
        calls: list[int] = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
        output = model(PackedBatch.pack(samples))
        output.loss.backward()
        return calls, {name for name, p in model.named_parameters() if p.grad is not None}, output

    text = calls_and_gradients([make_sample(5, "3", seed=7), make_sample(4, "2", seed=8)])
    three = calls_and_gradients([make_sample((28, 28), (50, 20), 3, (20, 60), 2, "3", geometry=ANYRES, seed=9)])
    silent = calls_and_gradients([make_sample(5, (28, 28), 3, geometry=ANYRES, seed=10)])
    assert text[0] == three[0] == silent[0]
    assert text[1] == three[1] == silent[1]
    assert text[2].image_tokens == [0, 0, 0, 0] and text[2].loss > 0
    assert silent[2].labels == 0 and silent[2].loss == 0


def test_a_text_only_batch_between_image_batches_changes_nothing():
    model = PyramidLlava(make_tiny_hf(), PYRAMID)
    picture, text = [make_sample(3, (28, 28), 5, "4")], [make_sample(6, "3")]
    before = model.logits(PackedBatch.pack(picture))
    model.logits(PackedBatch.pack(text))
    assert torch.equal(before, model.logits(PackedBatch.pack(picture)))


class CountSyncs(TorchDispatchMode):
    """Counts what makes the host wait for the device (or would, on a GPU): operators by their name, and methods of
    tensors that bring numbers to the host without one."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
    METHODS = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __enter__(self):
        self.originals = {name: getattr(torch.Tensor, name) for name in self.METHODS}
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, self.counted(name, original))
        return super().__enter__()

    def __exit__(self, *error):
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, original)
        return super().__exit__(*error)

    def counted(self, name, original):
        def method(tensor, *args, **kwargs):
            self.found.append(name)
            return original(tensor, *args, **kwargs)

        return method

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(f"aten.{operator}" in name for operator in self.OPERATORS):
            self.found.append(name)
        by_index = name.startswith(("aten.index.Tensor", "aten.index_put"))
        if by_index and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "more", [{}, {"inject": 1, "merge": "nearest"}, {"downsample": 9}], ids=["", "late and merged", "pooled"]
)
@pytest.mark.parametrize("ranker", RANKERS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_dropping_never_waits_for_the_device(geometry, ranker, more):
    geometry = GEOMETRIES[geometry]
    batch = PackedBatch.pack(mixed_samples(geometry))
    found = {}
    for name, schedule in (("vanilla", Schedule()), ("dropping", replace(PYRAMID, ranker=ranker, **more))):
        model = PyramidLlava(make_tiny_hf(geometry=geometry), schedule).train()
        with CountSyncs() as counter:
            output = model(batch)
        found[name] = counter.found
        assert output.tokens[-1] < output.tokens[0] or not schedule.layers
    assert found["dropping"] == found["vanilla"] == []


@pytest.mark.parametrize("batch", ["ragged", "equal"])
@pytest.mark.parametrize("schedule", [Schedule(), PYRAMID], ids=["vanilla", "dropping"])
def test_no_gradient_is_laid_into_zeros(schedule, batch):
    """``x[0]`` of a (1, ...) tensor would, backward, fill a tensor of its size with zeros and copy the gradient there:
    four times a layer; squeezing is a view both ways."""
    samples = mixed_samples() if batch == "ragged" else [make_sample(3, (28, 28), 5, "4", seed=seed) for seed in (1, 2)]
    model = PyramidLlava(make_tiny_hf("llama_gqa"), schedule).train()
    names = graph_of(model(PackedBatch.pack(samples)).loss)
    assert not {name for name in names if name.startswith("Select")}
    assert "SqueezeBackward1" in names and "IndexSelectBackward0" in names  # the decoder is in it


def graph_of(result: torch.Tensor) -> set[str]:
    """The names of all operations that a backward pass from ``result`` runs."""
    todo, seen = [result.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


class CountCopies(TorchDispatchMode):
    """Counts tensors that go from the host to another device."""

    def __init__(self):
        super().__init__()
        self.copied: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = [value.device.type for value in args if isinstance(value, torch.Tensor)]
        if "cpu" in before and isinstance(result, torch.Tensor) and result.device.type != "cpu":
            self.copied.append(result.dtype)
        return result


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("schedule", [Schedule(), replace(PYRAMID, ranker="uniform")], ids=["vanilla", "dropping"])
def test_a_micro_batch_is_two_copies(schedule, geometry):
    """Pixels, which the loader thread can send ahead, and one row of integers: ids, labels and the whole plan. The
    meta device stands for a GPU (which no autocast knows, hence no ranking by attention)."""
    geometry = GEOMETRIES[geometry]
    model = PyramidLlava(make_tiny_hf(geometry=geometry).to("meta"), schedule).train()
    batch = PackedBatch.pack(mixed_samples(geometry))
    with CountCopies() as counter:
        output = model(batch.to("meta"))
    assert counter.copied == [torch.float32, torch.int64]
    assert output.loss.device.type == "meta"


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: bool(x[0]),
        lambda x: range(x[1]),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.clone().__setitem__(x > 1, 0),
    ],
)
def test_the_counter_sees_what_it_looks_for(wait):
    with CountSyncs() as counter:
        wait(torch.arange(4))
    assert counter.found


@pytest.mark.parametrize("stage", range(3))
def test_every_image_keeps_its_own_share(stage):
    samples = mixed_samples(ANYRES)
    model = PyramidLlava(make_tiny_hf(geometry=ANYRES), PYRAMID)
    batch = PackedBatch.pack(samples)
    plan = StreamPlan.build(batch, PYRAMID, ANYRES, model.device)
    spans = plan.stages[stage + 1].layout.image_spans
    silent = samples[3].image_spans  # the sample without answer passes whole
    for i, ((start, stop), (first, last)) in enumerate(zip(spans, batch.image_spans)):
        whole = last - first
        assert stop - start == (whole if i == 3 else int(whole * PYRAMID.ratios[stage])), silent


def test_layers_are_named_in_the_error():
    with pytest.raises(ValueError, match=says("pyramid_drop.layers", "6", str(LAYERS - 1))):
        PyramidLlava(make_tiny_hf(), Schedule(layers=(2, 6), ratios=(0.5, 0.25)))
    with pytest.raises(ValueError, match=says("pyramid_drop.ranker", "'best'")):
        PyramidLlava(make_tiny_hf(), replace(PYRAMID, ranker="best"))
