"""A slow reference for dropping inside any model of transformers: it never removes a token, it only masks.

Every forward runs over all tokens, without a cache. From the drop layer on, the keys of dropped tokens are hidden from
everybody; what the dropped tokens themselves compute is seen by nobody. Attention is written out here in plain
operations on queries and keys as the model gives them; the mask is the one that the model made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from llava_pdrop.schedule import Schedule

Pictures = Sequence[Sequence[Sequence[int]]]
"""Per row, per picture: the columns of its tokens among the real tokens of the row."""

MASKS = {"eager": ("reference_eager", eager_mask), "sdpa": ("reference_sdpa", sdpa_mask)}


@dataclass
class Reference:
    """Logits (B, N, V) of all columns; which of them (B, N) are real and survive all drops; and per drop, row and
    picture the surviving tokens among 0..n-1. ``gap`` is the smallest distance, relative to the kept score, between
    the scores of a kept and a dropped token of one picture: far above rounding, or the choice would be a coin's.
    ``windows`` are the sliding windows of the layers where one hides a real token from a later one."""

    logits: Tensor
    alive: Tensor
    kept: list[list[list[list[int]]]]
    gap: float
    windows: dict[int, int]

    def row(self, index: int) -> Tensor:
        """Logits (survivors, V) of one row."""
        return self.logits[index, self.alive[index]]


@dataclass
class _Run:
    """One forward. ``hidden`` maps a layer to the columns (B, N) dropped from there on; ``probe`` is the layer whose
    attention is scored for the queries ``asking`` (B,), against the keys that ``real`` and ``hidden`` leave."""

    real: Tensor
    hidden: dict[int, Tensor]
    renumber: bool
    probe: int | None = None
    asking: Tensor | None = None
    scores: Tensor | None = None
    windows: dict[int, int] = field(default_factory=dict)

    def dropped(self, layer: int) -> Tensor:
        """(B, N) bool, what no query of the layer sees."""
        gone = torch.zeros_like(self.real)
        for start, columns in self.hidden.items():
            if layer >= start:
                gone = gone | columns
        return gone

    def places(self, layer: int) -> Tensor:
        """(B, N) the number of surviving tokens of the row before each column."""
        alive = (self.real & ~self.dropped(layer)).long()
        return alive.cumsum(1) - alive


_RUN: list[_Run] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention of one decoder layer: scores, softcap, mask, hidden keys, sinks, softmax."""
    (run,) = _RUN
    layer, tokens = module.layer_idx, query.shape[2]
    assert query.shape[2] == key.shape[2] == run.real.shape[1], "the reference runs over all tokens, without a cache"
    assert query.dtype == torch.float32 and not module.training
    unknown = {name for name, given in kwargs.items() if given is not None} - IGNORED
    assert not unknown, f"arguments the reference knows nothing of: {sorted(unknown)}"

    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("bhqe,bhke->bhqk", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    column = torch.arange(tokens)
    causal = column[None, :] <= column[:, None]
    if layer == run.probe:
        gone = run.dropped(layer - 1)
        for row, last in enumerate(run.asking.tolist()):
            seen = run.real[row] & ~gone[row] & causal[last]
            logits = scores[row, :, last].masked_fill(~seen, -torch.inf)
            if s_aux is not None:
                logits = torch.cat([logits, s_aux[:, None]], dim=-1)
            weights = logits.softmax(dim=-1)[:, :tokens]
            run.scores = torch.zeros(run.real.shape) if run.scores is None else run.scores
            run.scores[row] = weights.mean(0)

    if attention_mask is None:
        allowed = causal[None, None].expand(len(query), 1, -1, -1)
    else:
        mask = attention_mask[..., : key.shape[2]]
        allowed = mask if mask.dtype == torch.bool else mask == 0
        assert mask.dtype == torch.bool or bool((allowed | (mask <= -1e30)).all()), "a bias, not a mask"
    if sliding_window is not None:
        if (causal & run.real[:, None, :] & run.real[:, :, None] & ~allowed[:, 0]).any():
            run.windows[layer] = sliding_window
        if run.renumber and run.dropped(layer).any():
            places = run.places(layer)
            near = places[:, :, None] - places[:, None, :] < sliding_window
            allowed = allowed | (causal & near & run.real[:, None, :])[:, None]
    allowed = allowed & ~run.dropped(layer)[:, None, None, :]
    # A query that sees nothing (padding, a dropped token) must not become NaN: nobody sees it either.
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    sinks = s_aux if s_aux is not None else getattr(module, "sinks", None)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :tokens]
    return torch.einsum("bhqk,bhke->bqhe", weights, value).contiguous(), weights


IGNORED = {"is_causal", "pixel_values", "use_cache", "position_ids", "logits_to_keep", "output_router_logits"}
"""Arguments that some families hand down to the attention function and that change nothing in it."""

for _name, _mask in MASKS.values():
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)


def decoder_of(model: nn.Module) -> Any:
    """The text decoder: the one module with embeddings and as many layers as the text config says."""
    layers = model.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList)
        and len(module.layers) == layers
        and isinstance(getattr(module, "embed_tokens", None), nn.Embedding)
    ]
    assert len(found) == 1, f"{len(found)} text decoders in {type(model).__name__}"
    return found[0]


def reference_logits(
    model: nn.Module,
    inputs: dict[str, Tensor],
    pictures: Pictures,
    schedule: Schedule,
    positions: str,
    prompt_columns: Sequence[int] | None = None,
) -> Reference:
    """Logits of a detached model under a schedule.

    Args:
        inputs: keyword arguments of the model, padded anywhere.
        pictures: the columns of every picture among the real tokens of its row.
        positions: "keep", or "renumber" for models with 1-D positions.
        prompt_columns: real tokens of the prompt in every row, of which the last ranks; default: all.
    """
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    columns = [real_N.nonzero()[:, 0] for real_N in real]
    prompts = prompt_columns or [len(each) for each in columns]
    asking = torch.stack([each[prompt - 1] for each, prompt in zip(columns, prompts)])
    spans = [[columns[row][list(picture)] for picture in of_row] for row, of_row in enumerate(pictures)]
    left = [[list(range(len(span))) for span in of_row] for of_row in spans]

    hidden: dict[int, Tensor] = {}
    kept, gap = [], float("inf")
    for layer, ratio in zip(schedule.layers, schedule.ratios):
        run = _Run(real, dict(hidden), positions == "renumber", layer, asking)
        _forward(model, inputs, run)
        assert run.scores is not None, f"layer {layer} did not attend"
        gone = torch.zeros_like(real)
        for row, of_row in enumerate(spans):
            for picture, span in enumerate(of_row):
                score = run.scores[row, span]
                best = sorted(left[row][picture], key=lambda token: (-float(score[token]), token))
                count = int(len(span) * ratio)
                if 0 < count < len(best):
                    low, high = float(score[best[count]]), float(score[best[count - 1]])
                    gap = min(gap, (high - low) / high)
                left[row][picture] = sorted(best[:count])
                gone[row, span[sorted(best[count:])]] = True
        hidden[layer] = gone
        kept.append([[list(tokens) for tokens in of_row] for of_row in left])
    run = _Run(real, hidden, positions == "renumber")
    logits = _forward(model, inputs, run)
    alive = real & ~run.dropped(max(schedule.layers, default=0))
    return Reference(logits, alive, kept, gap, run.windows)


def _forward(model: nn.Module, inputs: dict[str, Tensor], run: _Run) -> Tensor:
    """One forward over all tokens under the reference's attention."""
    decoder = decoder_of(model)
    _RUN.append(run)
    try:
        with torch.no_grad(), _switched(model, decoder), _renumbered(decoder, run):
            return model(**inputs, use_cache=False).logits
    finally:
        _RUN.pop()


@contextmanager
def _switched(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """The decoder's attention is the reference's; its masks are made as for the implementation it had."""
    configs = {id(module.config): module.config for module in decoder.modules() if hasattr(module, "config")}
    text = model.config.get_text_config()
    configs[id(text)] = text
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for key, config in configs.items():
            config._attn_implementation = MASKS[before[key]][0]
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


@contextmanager
def _renumbered(decoder: Any, run: _Run) -> Iterator[None]:
    """From the first drop on, layers are given the rotary embeddings of positions that count survivors."""

    types = getattr(decoder.config, "layer_types", None) or []
    typed = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters

    def before_layer(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if any(layer >= start for start in run.hidden):
            given, places = kwargs["position_embeddings"], run.places(layer)
            more = {"layer_type": types[layer]} if typed else {}
            embeddings = decoder.rotary_emb(args[0], places, **more)
            assert [part.shape[1:] for part in embeddings] == [part.shape[1:] for part in given]
            kwargs = {**kwargs, "position_embeddings": embeddings, "position_ids": places}
        return args, kwargs

    handles = [
        layer.register_forward_pre_hook(functools.partial(before_layer, index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
        if run.renumber
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
