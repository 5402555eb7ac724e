"""Kernels for what lies between a decoder's matrix products: its norms, rotary embedding and gated product.

Hugging Face's layers do these one operation after the other, and each reads and writes the whole stream. `in_force`
puts fused ones in their place, for one thread and as long as it lasts: what runs outside of it, in the same process or
on the same weights (`generate`, an attached model), stays Hugging Face's own.

No module is touched: the classes of the family ask, at every call, what is in force. So names, hooks, pickles, copies
and classes of a model are those that ZeRO, FSDP and peft know.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from importlib import import_module
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_pdrop.errors import UserError, check_name
from llava_pdrop.model import exact

CHOICES = ("auto", "eager", "torch", "liger")
"""``eager``: Hugging Face's own, on a CPU norms, sums and rotary embedding in fewer passes (`exact.py`: no bit
differs). ``torch``: `F.rms_norm`; on CUDA the rotary embedding and the gated product compiled too. ``liger``:
`F.rms_norm` and, of the package liger-kernel, those two (CUDA only). ``auto``: see `AUTO`."""

AUTO: dict[str, tuple[str, ...]] = {"cuda": ("liger", "torch")}
"""Type of device -> what ``auto`` comes to: the first that can run there, else ``eager``. On an H100 a vanilla step of
LLaVA-NeXT-7B that recomputes all layers takes 1,275 ms with ``liger``, 1,316 with ``torch``, 1,595 with ``eager``
(playground/RESULTS.md)."""

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Of the decoders that can be trained: ``model_type`` -> how the names of its classes in transformers begin."""

COMPILER: dict[str, Any] = {"dynamic": True, "fullgraph": True}
"""Of `torch.compile`: the number of tokens is a symbol from the start, so that streams of all lengths share a
program."""


@dataclass(frozen=True)
class Kernels:
    """What stands in; None: Hugging Face's own stays.

    Attributes:
        norm: (x (..., D), weight (D,), epsilon) -> (..., D) in the dtype of both.
        rotary: as ``apply_rotary_pos_emb``: (1, H, T, E), (1, G, T, E), cos and sin (1, T, E) -> the first two.
        product: gate and up, both (..., F) -> ``silu(gate) * up``.
        sum_and_norm: see `exact.sum_and_norm`; for streams in float32, in place of ``norm``.
    """

    norm: Callable[[Tensor, Tensor, float], Tensor] | None = None
    rotary: Callable[..., tuple[Tensor, Tensor]] | None = None
    product: Callable[[Tensor, Tensor], Tensor] | None = None
    sum_and_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]] | None = None


class _OfThisThread(threading.local):
    kernels: Kernels | None = None


_now = _OfThisThread()


def check_kernels(choice: str, key: str = "model.kernels") -> None:
    """Says before the first step what would fail in it. ``key``: where it was given.

    Raises:
        UserError: an unknown choice, or one whose package or device is not there.
    """
    check_name(key, choice, CHOICES)
    if choice == "liger":
        resolve(choice, torch.device("cuda" if torch.cuda.is_available() else "cpu"), key)


def resolve(choice: str, device: torch.device, key: str = "model.kernels") -> str:
    """What ``choice``, given by ``key``, comes to on ``device``: ``eager``, ``torch`` or ``liger``.

    Raises:
        UserError: a package, a compiler or a device is not there.
    """
    if choice == "auto":
        return next((name for name in AUTO.get(device.type, ()) if missing(name, device) is None), "eager")
    if (reason := missing(choice, device)) is not None:
        raise UserError(f"{key}: {choice} {reason}, or set 'auto' or 'eager'")
    return choice


def missing(choice: str, device: torch.device) -> str | None:
    """Why ``choice`` cannot run on ``device``, and the remedy; None where it can. Written to follow its name."""
    if choice == "liger":
        if device.type != "cuda":
            return f"needs a CUDA device, and this is {device.type}: take one"
        if find_spec("liger_kernel") is None:
            return "needs the package liger-kernel: pip install 'llava_pdrop[liger]'"
    if choice in ("torch", "liger") and device.type == "cuda":
        if find_spec("triton") is None:
            return "compiles on CUDA, and triton is not installed: install it"
        if not (which("cc") or which("gcc")):
            return "compiles on CUDA, and triton finds no C compiler: install gcc"
    return None


@contextmanager
def in_force(choice: str, device: torch.device, model_type: str) -> Iterator[None]:
    """As long as it lasts, and in this thread, the decoder layers of a family compute with ``choice``. A layer that
    backward computes anew does so too, where `carry` was told of it.

    Args:
        device: of the stream.
        model_type: of the decoder, a key of `FAMILIES`.

    Raises:
        UserError: see `resolve`.
    """
    kernels = _kernels(resolve(choice, device), device.type, model_type)
    if kernels is None:
        yield
        return
    _install(model_type)
    with _with(kernels):
        yield


@contextmanager
def _with(kernels: Kernels) -> Iterator[None]:
    before, _now.kernels = _now.kernels, kernels
    try:
        yield
    finally:
        _now.kernels = before


# The recomputation of a layer in backward. It happens long after the forward, and on CUDA in a thread of autograd.


@dataclass
class Carrying:
    """A checkpointing function that computes anew with the kernels that were in force the first time."""

    checkpoint: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``checkpoint(function, ...)``."""
        if _now.kernels is not None:
            function = partial(_call_with, _now.kernels, function)
        return self.checkpoint(function, *args, **kwargs)


def _call_with(kernels: Kernels, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _with(kernels):
        return function(*args, **kwargs)


def carry(layer: nn.Module) -> None:
    """Makes the recomputation of ``layer``, by transformers or by torch's ``CheckpointWrapper`` (FSDP), a `Carrying`
    one, where kernels are in force. Whoever enables checkpointing once more replaces it, so this is asked before every
    call of the layer."""
    if _now.kernels is None:
        return
    for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
        function = vars(layer).get(name)
        if function is not None and not isinstance(function, Carrying):
            setattr(layer, name, Carrying(function))


# The kernels.


@cache
def _kernels(name: str, device: str, model_type: str) -> Kernels | None:
    """Of a resolved choice; None: nothing stands in."""
    if device == "cpu":
        if model_type == "qwen3":  # its norms of queries and keys sum gradients in the order of their layout
            return Kernels(rms_norm) if name == "torch" else None
        if name == "torch":
            return Kernels(rms_norm, rotary=exact.rotate_both)
        return Kernels(sum_and_norm=exact.sum_and_norm, rotary=exact.rotate_both)
    if name == "eager":
        return None
    if device != "cuda":
        return Kernels(rms_norm)
    if name == "liger":
        rotary = import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
        return Kernels(rms_norm, rotary, import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply)
    return Kernels(rms_norm, *compiled(model_type))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`F.rms_norm`: on CUDA one kernel where Hugging Face's norm is eight. In half precision it rounds once, where
    theirs rounds before and after the weight. Autocast on CUDA (accelerate's, under FSDP2 too) would make copies in
    float32 of both and leave the output there, so it is off here."""
    if not (x.is_cuda and torch.is_autocast_enabled("cuda")):
        return F.rms_norm(x, weight.shape, weight, epsilon)
    with torch.autocast("cuda", enabled=False):
        return F.rms_norm(x, weight.shape, weight, epsilon)


def compiled(model_type: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]:
    """The family's own rotary embedding and the gated product, each by `torch.compile`.

    Until somebody says how many threads there are, each of PyTorch's libraries asks the machine when it first needs
    some, also while a program is traced, and dynamo raises if the number differs then. (Seen on an H100 with 16 cores
    and torch 2.11.)"""
    torch.set_num_threads(torch.get_num_threads())
    rotary = _install(model_type)
    return torch.compile(rotary, **COMPILER), torch.compile(gated_product, **COMPILER)


def gated_product(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, both (..., F)."""
    return F.silu(gate) * up


# Where the layers of a family ask what is in force.


@cache
def _install(model_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Lets norms, MLPs and the rotary embedding of a family ask, once per process; returns its own embedding."""
    prefix, module = FAMILIES[model_type], import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    layer, norm, mlp = (getattr(module, f"{prefix}{part}") for part in ("DecoderLayer", "RMSNorm", "MLP"))
    own, rotary = module.apply_rotary_pos_emb, "apply_rotary_pos_emb"
    _replace_layer_forward(layer, norm)
    norm.forward, mlp.forward = _asking_norm(norm.forward), _asking_mlp(mlp.forward)
    setattr(module, rotary, _asking_rotary(own))
    return own


def _in_force() -> Kernels | None:
    """None while anybody's `torch.compile` reads the code of a layer: a program must not hold a choice of its time."""
    return None if torch.compiler.is_compiling() else _now.kernels


def _replace_layer_forward(layer: Any, norm: Any) -> None:
    """Newer releases of transformers (5.23) put the recomputation of a layer around the forward of its class: ours goes
    inside, and theirs around it once more."""
    own = layer.forward
    if own.__code__.co_name != "forward_with_checkpointing":
        layer.forward = _asking_layer(own, norm)
        return
    layer.forward = _asking_layer(own.__wrapped__, norm)
    GradientCheckpointingLayer.__init_subclass__.__func__(layer)  # type: ignore[attr-defined]


def _asking_layer(own: Callable[..., Tensor], norm: Any) -> Callable[..., Tensor]:
    """Sums of the stream go with the norms behind them, which are called as modules. Norms that something has wrapped,
    and streams that are not in float32, stay Hugging Face's."""

    @wraps(own)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        kernels = _in_force()
        norms = self.input_layernorm, self.post_attention_layernorm
        plain = all(type(module) is norm and module.weight.dtype == torch.float32 for module in norms)
        fits = plain and hidden_states.dtype == torch.float32 and not args
        if kernels is None or kernels.sum_and_norm is None or not fits:
            return own(self, hidden_states, *args, **named)
        stream, normed = norms[0](hidden_states.contiguous(), None)
        stream, normed = norms[1](stream, self.self_attn(hidden_states=normed, **named)[0])
        return stream + self.mlp(normed)

    return forward


def _asking_norm(own: Callable[[Any, Tensor], Tensor]) -> Callable[..., Any]:
    """Input and weight of two dtypes (norms in float32 around LoRA in bfloat16) stay Hugging Face's: `F.rms_norm` has
    no fused kernel for them, and warns. Our forward of a layer gives ``added`` too, and gets the sum and its norm."""

    @wraps(own)
    def forward(self: Any, hidden_states: Tensor, *added: Any) -> Any:
        kernels = _in_force()
        if added and kernels is not None and kernels.sum_and_norm is not None:
            return kernels.sum_and_norm(hidden_states, added[0], self.weight, self.variance_epsilon)
        if kernels is None or kernels.norm is None or hidden_states.dtype != self.weight.dtype:
            return own(self, hidden_states)
        return kernels.norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _asking_mlp(own: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Projections are called as modules, for the hooks of ZeRO and the adapters of LoRA. A gate that is not SiLU stays
    Hugging Face's."""

    @wraps(own)
    def forward(self: Any, x: Tensor) -> Tensor:
        kernels = _in_force()
        if kernels is None or kernels.product is None or self.config.hidden_act not in ("silu", "swish"):
            return own(self, x)
        return self.down_proj(kernels.product(self.gate_proj(x), self.up_proj(x)))

    return forward


def _asking_rotary(own: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    @wraps(own)
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        kernels = _in_force()
        function = own if kernels is None or kernels.rotary is None else kernels.rotary
        return function(q, k, cos, sin, *rest, **named)

    return apply_rotary_pos_emb
