"""Fused element-wise work around the matrix products of a decoder, by torch.compile: a variant of the bench."""

from __future__ import annotations

from typing import Any

from torch import nn


def compile_regions(decoder: nn.Module, **options: Any) -> None:
    """Compiles, in place, the norms and the gated MLP of every layer of ``decoder``.

    Around their products each becomes one or two fused kernels, where eager mode reads and writes the stream once per
    operation. Names and parameters stay as they are; hooks of modules inside an MLP may not fire (layers share one
    program), so this is for the bench and not for DeepSpeed. The number of tokens is a symbol from the start and layers
    of one kind share a program, so streams of all lengths compile a handful of programs at the first step. The last
    norm is left out: it runs once per step, on the shortest stream.

    Args:
        options: of `torch.compile` (``backend``).
    """
    for layer in decoder.layers:
        for region in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            region.compile(dynamic=True, **options)
