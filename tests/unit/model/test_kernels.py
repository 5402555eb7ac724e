"""Kernels of a decoder's element-wise work: where they hold, where they must not, what they change, what is refused."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.models.llama import modeling_llama

from llava_pdrop.config.schema import LoraSection
from llava_pdrop.generate.plugin import attach
from llava_pdrop.model import kernels
from llava_pdrop.model.kernels import Kernels, check_kernels, in_force, resolve
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train.adapters import attach_adapters
from llava_pdrop.types import PackedBatch
from tests.messages import says
from tests.tiny import DECODERS, LAYERS, PYRAMID, make_tiny_hf, mixed_samples

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DROPS = len(PYRAMID.layers)
NORMS = 2 * LAYERS + DROPS + 1
"""Of a forward: two per layer, that of every ranking, and the last."""


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """As on a GPU: `torch` means all three, here stand-ins, and `eager` none; how often each was called."""
    calls: Counter = Counter()

    def counting(name, function):
        def call(*values):
            calls[name] += 1
            return function(*values)

        return call

    def stand_ins(name, device, model_type):
        if name == "eager":
            return None
        own = kernels._install(model_type)
        functions = {"norm": kernels.rms_norm, "rotary": own, "product": kernels.gated_product}
        return Kernels(**{part: counting(part, function) for part, function in functions.items()})

    monkeypatch.setattr(kernels, "_kernels", stand_ins)
    return calls


def stepped(model: PyramidLlava) -> dict:
    """Loss and gradients of one step."""
    model.zero_grad()
    output = model(PackedBatch.pack(mixed_samples()))
    output.loss.backward()
    return {"loss": output.loss.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(one: dict, other: dict, **tolerance) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


BITS = {"atol": 0, "rtol": 0}


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_part_of_every_family_is_replaced_and_changes_nothing(decoder, counted):
    eager = stepped(PyramidLlava(make_tiny_hf(decoder), PYRAMID))
    assert not counted
    fused = stepped(PyramidLlava(make_tiny_hf(decoder), PYRAMID, kernels="torch"))
    heads = 2 * LAYERS if decoder == "qwen3" else 0  # norms of queries and keys, and of the rankings' likewise
    assert counted["rotary"] == counted["product"] == LAYERS
    assert counted["norm"] == NORMS + heads + (2 * DROPS if heads else 0)
    assert_same(fused, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("thread", [False, True], ids=["same", "other"])
def test_what_is_computed_anew_is_computed_alike(reentrant, thread, counted):
    """Also in another thread, as autograd does it on CUDA: bit for bit, with the same kernels, as often again."""
    plain = stepped(PyramidLlava(make_tiny_hf("llama_gqa"), PYRAMID, kernels="torch").train())
    model = PyramidLlava(make_tiny_hf("llama_gqa"), PYRAMID, kernels="torch").train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    once = counted.copy()
    counted.clear()
    output = model(PackedBatch.pack(mixed_samples()))
    if thread:
        backward = threading.Thread(target=output.loss.backward)
        backward.start()
        backward.join()
    else:
        output.loss.backward()
    again = {"loss": output.loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(again, plain, **BITS)
    assert counted == {name: 2 * count - (DROPS + 1 if name == "norm" else 0) for name, count in once.items()}


def test_layers_that_torch_wraps_compute_anew_alike(counted):
    """As FSDP does with its own activation checkpointing."""
    plain = stepped(PyramidLlava(make_tiny_hf(), PYRAMID, kernels="torch"))
    model = PyramidLlava(make_tiny_hf(), kernels="torch")
    model.schedule = PYRAMID
    layers = model.hf.model.language_model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    counted.clear()
    again = stepped(model)
    assert counted["rotary"] == counted["product"] == 2 * LAYERS
    assert_same({name.replace("._checkpoint_wrapped_module", ""): grad for name, grad in again.items()}, plain, **BITS)


def test_where_nothing_stands_in_checkpointing_is_left_as_it_is(counted):
    model = PyramidLlava(make_tiny_hf(), PYRAMID).train()
    model.activation_checkpointing_enable()
    stepped(model)
    layer = model.hf.model.language_model.layers[0]
    assert not isinstance(layer._gradient_checkpointing_func, kernels.Carrying)
    model.kernels = "torch"
    stepped(model)
    assert isinstance(layer._gradient_checkpointing_func, kernels.Carrying)


def test_other_models_of_the_process_stay_eager(counted):
    """The same weights outside of the decoder's run, another model, `generate` with one that is attached; another
    thread while the kernels are in force."""
    hf, other = make_tiny_hf(), attach(make_tiny_hf(seed=1).eval(), PYRAMID)
    batch = mixed_samples()[0]
    inputs = {"input_ids": batch.input_ids[None], "pixel_values": torch.cat([image.pixels for image in batch.images])}
    with torch.no_grad():
        before = hf(**inputs).logits, other.generate(**inputs, max_new_tokens=3, do_sample=False)
    model = PyramidLlava(hf, PYRAMID, kernels="torch")
    hf.set_attn_implementation("sdpa")
    stepped(model)
    used = counted.copy()
    assert used
    with torch.no_grad():
        after = hf(**inputs).logits, other.generate(**inputs, max_new_tokens=3, do_sample=False)
        with in_force("torch", CPU, "llama"):
            elsewhere = threading.Thread(target=lambda: hf(**inputs))
            elsewhere.start()
            elsewhere.join()
    assert counted == used
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_an_error_ends_what_was_in_force(counted, monkeypatch):
    model = PyramidLlava(make_tiny_hf(), PYRAMID, kernels="torch")
    monkeypatch.setattr(model.hf.model.language_model.layers[3].mlp.down_proj, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stepped(model)
    counted.clear()
    model.hf.model.language_model.norm(torch.randn(2, 32))
    assert not counted


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_and_pickles_compute_alike(way, counted):
    model = PyramidLlava(make_tiny_hf(), PYRAMID, kernels="torch").train()
    if way == "copy":  # transformers' own hook of checkpointing cannot be pickled
        model.activation_checkpointing_enable({"use_reentrant": False})
    first = stepped(model)
    names = [type(module) for module in model.modules()]
    counted.clear()
    other = copy.deepcopy(model) if way == "copy" else pickle.loads(pickle.dumps(model))
    assert_same(stepped(other), first, **BITS)
    assert counted["product"] == LAYERS * (2 if way == "copy" else 1)
    assert [type(module) for module in other.modules()] == names


def test_adapters_are_called(counted):
    """The product is computed between the projections, which are modules with adapters."""
    results = []
    for name in ("eager", "torch"):
        model = PyramidLlava(make_tiny_hf(), PYRAMID, kernels=name)
        attach_adapters(model.hf, LoraSection(r=4, alpha=8, dropout=0.0), "base")
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                torch.nn.init.normal_(parameter, std=0.2)
        results.append(stepped(model))
    assert counted["product"] == LAYERS
    assert any(".lora_A." in name and grad.abs().sum() > 0 for name, grad in results[1].items())
    assert_same(results[1], results[0], atol=1e-4, rtol=1e-3)


def test_two_dtypes_stay_hugging_faces(counted):
    """Norms in float32 around bfloat16, as LoRA has them: F.rms_norm has no fused kernel for that, and warns."""
    norm = make_tiny_hf().model.language_model.norm
    x = torch.randn(3, 32).bfloat16()
    expected = norm(x)
    with in_force("torch", CPU, "llama"), warnings.catch_warnings(record=True) as seen:
        assert torch.equal(norm(x), expected) and not counted
        assert norm(x.float()).dtype == torch.float32 and counted["norm"] == 1
    assert not seen


def test_autocast_does_not_take_the_norm_to_float32():
    """CUDA's would, for the weights in bfloat16 that FSDP2 leaves under it. With tensors that only say they are
    there."""
    with FakeTensorMode():
        x, weight = (torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in ((3, 32), (32,)))
        before = torch.is_autocast_enabled("cuda")
        torch.set_autocast_enabled("cuda", True)
        try:
            assert F.rms_norm(x, (32,), weight, 1e-5).dtype == torch.float32
            assert kernels.rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
            assert torch.is_autocast_enabled("cuda"), "it holds again behind the norm"
        finally:
            torch.set_autocast_enabled("cuda", before)


def test_the_warning_of_the_unfused_kernel_is_an_error_in_tests():
    with pytest.raises(UserWarning, match="Mismatch dtype between input and weight"):
        F.rms_norm(torch.randn(3, 32).bfloat16(), (32,), torch.ones(32), 1e-5)


def test_a_gate_other_than_silu_stays_hugging_faces(counted):
    hf = make_tiny_hf()
    for layer in hf.model.language_model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    hf.config.text_config.hidden_act = "gelu"
    eager = stepped(PyramidLlava(hf, PYRAMID))
    fused = stepped(PyramidLlava(hf, PYRAMID, kernels="torch"))
    assert counted["rotary"] == LAYERS and not counted["product"]
    assert_same(fused, eager, atol=1e-4, rtol=1e-4)


def test_no_program_of_others_holds_a_choice(counted):
    """Whoever compiles a layer gets Hugging Face's, whatever is in force meanwhile."""
    norm, x = make_tiny_hf().model.language_model.norm, torch.randn(3, 32)
    kernels._install("llama")
    program = torch.compile(norm.forward, backend="eager", fullgraph=True)
    with in_force("torch", CPU, "llama"):
        program(x)
    assert not counted
    torch._dynamo.reset()


@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_is_as_near_to_float32_as_eager(seed):
    """Vanilla, since near-tied tokens may be dropped differently. Logits at every token, root of the mean square."""
    batch, distances = PackedBatch.pack(mixed_samples()), {}
    exact = PyramidLlava(make_tiny_hf("llama_gqa", seed=seed), kernels="eager").logits(batch)
    for name in ("eager", "torch"):
        model = PyramidLlava(make_tiny_hf("llama_gqa", seed=seed).bfloat16(), kernels=name)
        distances[name] = (model.logits(batch).float() - exact).square().mean().sqrt().item()
    assert 0 < distances["torch"] <= 1.1 * distances["eager"]


def test_bfloat16_losses_are_as_near_to_float32_as_eager():
    """Over several seeds, with dropping: the mean distance."""
    batch, distances = PackedBatch.pack(mixed_samples()), Counter()
    for seed in range(12):
        exact = PyramidLlava(make_tiny_hf(seed=seed), PYRAMID)(batch).loss
        for name in ("eager", "torch"):
            half = PyramidLlava(make_tiny_hf(seed=seed).bfloat16(), PYRAMID, kernels=name)
            distances[name] += abs(half(batch).loss - exact).item()
    assert 0 < distances["torch"] <= 1.1 * distances["eager"]


@pytest.fixture
def programs(monkeypatch) -> Iterator[list]:
    """Compiled by AOTAutograd without a back end, as inductor's C++ takes a minute; a program made, an entry."""
    torch._dynamo.reset()
    made: list = []

    def counting(graph, inputs):
        made.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setitem(kernels.COMPILER, "backend", counting)
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize("decoder", ["llama_gqa", "qwen3"])
def test_the_compiled_rotary_embedding(decoder, programs):
    """One program for streams of all lengths."""
    kind = make_tiny_hf(decoder).config.text_config.model_type
    own, (rotary, _) = kernels._install(kind), kernels.compiled(kind)
    for tokens in (7, 12, 31, 64):
        tensors = [torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2)]
        cos, sin = torch.randn(2, 1, tokens, 8)
        results = []
        for function in (own, rotary):
            out = function(*tensors, cos, sin)
            results.append([*out, *torch.autograd.grad(out[0].square().sum() + out[1].square().sum(), tensors)])
        torch.testing.assert_close(results[1], results[0])
    assert len(programs) == 1


def test_the_compiled_product(programs):
    _, product = kernels.compiled("llama")
    for tokens in (7, 12, 31, 64):
        gate, up = torch.randn(2, 1, tokens, 48, requires_grad=True)
        results = [[out := f(gate, up), *torch.autograd.grad(out.square().sum(), (gate, up))]
                   for f in (lambda gate, up: F.silu(gate) * up, product)]  # fmt: skip
        torch.testing.assert_close(results[1], results[0])
    assert len(programs) == 1


def test_a_step_with_compiled_parts(programs, monkeypatch):
    """As on CUDA, recomputation included."""
    parts = kernels.compiled("llama")
    monkeypatch.setattr(
        kernels, "_kernels", lambda name, *_: None if name == "eager" else Kernels(kernels.rms_norm, *parts)
    )
    eager = stepped(PyramidLlava(make_tiny_hf("llama_gqa"), PYRAMID))
    model = PyramidLlava(make_tiny_hf("llama_gqa"), PYRAMID, kernels="torch").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(stepped(model), eager, atol=1e-4, rtol=1e-3)
    assert 2 <= len(programs) <= 4


def test_what_auto_comes_to(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "which", lambda name: name)
    assert [resolve("auto", device) for device in (CPU, CUDA)] == ["eager", "liger"]
    monkeypatch.setattr(kernels, "find_spec", lambda name: None if name == "liger_kernel" else name)
    assert resolve("auto", CUDA) == "torch"
    monkeypatch.setattr(kernels, "find_spec", lambda name: None if name == "triton" else name)
    assert resolve("auto", CUDA) == "eager", "liger's kernels are Triton's too"
    with pytest.raises(ValueError, match=says("model.kernels", "torch", "triton", "'eager'")):
        resolve("torch", CUDA)
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels, "which", lambda name: None)
    for choice in ("torch", "liger"):
        with pytest.raises(ValueError, match=says("model.kernels", choice, "gcc", "'eager'")):
            resolve(choice, CUDA)
    assert resolve("auto", CUDA) == "eager"
    assert resolve("torch", CPU) == "torch"


def test_liger_that_is_not_there_is_one_line_before_the_first_step(monkeypatch):
    with pytest.raises(ValueError, match=says("model.kernels", "liger", "CUDA", "cpu", "'auto'")) as error:
        PyramidLlava(make_tiny_hf(), kernels="liger")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=says("model.kernels", "liger", "liger-kernel", "pip install", "'auto'")):
        check_kernels("liger")
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)
    check_kernels("liger")


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=says("model.kernels", "'triton'", "liger")):
        check_kernels("triton")


def test_liger_is_its_rotary_embedding_and_its_product(monkeypatch):
    """With a stand-in for the package, at the names that 0.8 has."""
    rope = SimpleNamespace(liger_rotary_pos_emb=lambda q, k, cos, sin: ("rotary", q, k))
    swiglu = SimpleNamespace(LigerSiLUMulFunction=SimpleNamespace(apply=lambda gate, up: ("product", gate, up)))
    for name, module in {"transformers.rope": rope, "ops.swiglu": swiglu}.items():
        monkeypatch.setitem(sys.modules, f"liger_kernel.{name}", module)
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    made = kernels._kernels.__wrapped__("liger", "cuda", "llama")
    assert made.norm is kernels.rms_norm
    assert made.product(1, 2) == ("product", 1, 2)
    with kernels._with(made):
        kernels._install("llama")
        assert modeling_llama.apply_rotary_pos_emb(1, 2, 3, 4) == ("rotary", 1, 2)
