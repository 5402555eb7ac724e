"""Which image tokens an answer attended to: weights of all its tokens in all layers, recorded in one forward over the
prompt and the finished answer, with the tokens dropped that were dropped when it was written."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llava_pdrop.compare.survivors import Sight, shade
from llava_pdrop.errors import UserError
from llava_pdrop.eval.generation import generating
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.respondent import Respondent
from llava_pdrop.generate.cache import sliding_window
from llava_pdrop.generate.plugin import SAME
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.generate.probe import Attended, probe
from llava_pdrop.generate.unhook import plugin_of
from llava_pdrop.model.pyramid_drop import Projections, Rows, attention_weights
from llava_pdrop.schedule import Schedule

GLOW = np.array((255.0, 196.0, 60.0))
"""Colour of the patches with the largest weight."""


@dataclass(frozen=True)
class AnswerAttention:
    """Weights ``weight_QLN`` (tokens of the answer, decoder layers, image tokens of the picture before any drop),
    float32, the mean over heads, of 1 for all that a token sees; and which image tokens are ``alive_LN`` (layers, image
    tokens) there: the others have no weight.

    The row of a token is that of the position which wrote it: the one before it, as the model goes on from there.
    """

    weight_QLN: Tensor
    alive_LN: Tensor

    def mean(self, token: int, layers: Sequence[int]) -> Tensor:
        """(N,) weights of a token, averaged over ``layers``; a layer in which an image token is gone counts as 0."""
        return self.weight_QLN[token, list(layers)].mean(0)


def attention_of(
    respondent: Respondent, question: Question, ids: Sequence[int], schedule: Schedule, dtype: torch.dtype | None = None
) -> AnswerAttention:
    """What the answer ``ids`` to a ``question`` with one picture attended to under ``schedule``. One forward.

    Args:
        ids: tokens that the model has written greedily, at least one.
        dtype: half precision to run in by autocast; None: the weights' own.

    Raises:
        UserError: weights would be those of something else, since an answer that is given at once would be seen before
            it is written, or is not what the model would write then; or as `probe`.
    """
    inputs, _ = respondent.inputs([respondent.prepare(question)], schedule)
    return recorded(respondent.hf, inputs, ids, schedule, dtype, pad_token_id=respondent.tokenizer.pad_token_id)


def recorded(
    hf: Any,
    inputs: Mapping[str, Tensor],
    ids: Sequence[int],
    schedule: Schedule,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> AnswerAttention:
    """`attention_of` the answer to a prompt that ``inputs`` of one row hold; ``options`` are of ``generate``."""
    steps, logits, found = list[ForwardStep](), list[Tensor](), list[Tensor]()
    device = next(hf.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    with generating(hf, schedule, steps, dtype), ExitStack() as hooks:
        plugin = plugin_of(hf)
        for index, layer in enumerate(plugin.decoder.layers):  # behind those of `attach`: these see what is left
            before = functools.partial(_before_layer, found, plugin, index, len(ids))
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        feed = functools.partial(_fed_at_once, list(ids), logits)
        hf.generate(**inputs, do_sample=False, max_new_tokens=len(ids) + 1, custom_generate=feed, **options)
        image_token = plugin.image_token
    _check_written(logits[0], ids)
    step, length = steps[0], inputs["input_ids"].shape[1] + len(ids) - 1
    places = step.pictures[0] if step.pictures else (inputs["input_ids"][0] == image_token).nonzero()[:, 0].tolist()
    number = {place: number for number, place in enumerate(places)}
    alive_LN = torch.zeros(len(found), len(places), dtype=torch.bool)
    weight_QLN = torch.zeros(len(ids), *alive_LN.shape)
    for layer, weight_QK in enumerate(found):
        stream = _stream(schedule, step, layer, length, set(places))
        columns = [column for column, place in enumerate(stream) if place in number]
        numbers = [number[stream[column]] for column in columns]
        alive_LN[layer, numbers] = True
        weight_QLN[:, layer, numbers] = weight_QK[:, columns]
    return AnswerAttention(weight_QLN, alive_LN)


def _stream(schedule: Schedule, step: ForwardStep, layer: int, length: int, pictured: set[int]) -> Sequence[int]:
    """Where the tokens that ``layer`` sees stood in the prompt and answer of ``length`` tokens."""
    if layer < schedule.inject:
        return [place for place in range(length) if place not in pictured]
    if drops := schedule.stage(layer):
        return step.survivors[drops - 1]
    return range(length) if step.entered is None else step.entered


def _fed_at_once(
    ids: list[int],
    logits: list[Tensor],
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **kwargs: Any,
) -> Tensor:
    """A decoding method of ``generate`` that feeds the prompt and all of ``ids`` but the last in one forward, as
    assisted decoding does with guessed tokens: the end of the prompt ranks. Notes the ``logits`` (Q, vocabulary)."""
    whole = torch.cat([input_ids, input_ids.new_tensor([ids[:-1]])], 1)
    for _ in ids[:-1]:  # masks and kinds of tokens grow as they do while an answer is written
        kwargs = model._update_model_kwargs_for_generation({}, kwargs)
    given = model.prepare_inputs_for_generation(whole, is_first_iteration=True, **kwargs)
    if "logits_to_keep" in given:
        given["logits_to_keep"] = len(ids)
    logits_QV = model(**given).logits[0, -len(ids) :].float()
    for place in range(len(ids)):
        seen = whole[:, : input_ids.shape[1] + place]
        logits_QV[place] = logits_processor(seen, logits_QV[None, place].clone())[0]
    logits.append(logits_QV)
    return whole


def _check_written(logits_QV: Tensor, ids: Sequence[int]) -> None:
    """Raises `UserError` unless the model would write ``ids`` here too, but for rounding."""
    own_Q = logits_QV.gather(1, torch.tensor(ids, device=logits_QV.device)[:, None])[:, 0]
    allowed = SAME.get(logits_QV.dtype, 0.05) * float(logits_QV.abs().max())
    behind = float((logits_QV.amax(1) - own_Q).max())
    if not behind <= allowed:
        raise UserError(
            f"no attention is shown: given at once, the answer is not what the model writes (logits {behind:.1e} off)"
        )


def _before_layer(
    found: list[Tensor], plugin: Any, index: int, queries: int, layer: nn.Module, args: tuple, kwargs: dict
) -> None:
    """Pre-hook of a layer: notes the weights (Q, K) of the last ``queries`` tokens in all that the layer is given."""
    kwargs = {**dict(zip(plugin.layer_parameters, args)), **kwargs}
    hidden_BND = kwargs.pop(plugin.layer_parameters[0])
    got = probe(layer, hidden_BND, kwargs)
    window = sliding_window(plugin.decoder.config, index)
    tokens, mask = got.key_BGNE.shape[2], kwargs.get("attention_mask")
    allowed_QK = allowed(mask, queries, tokens, window)
    causal = mask is not None or getattr(getattr(layer, "self_attn", None), "is_causal", True)
    if not causal or bool(allowed_QK.triu(tokens - queries + 1).any()):
        raise UserError(
            f"no attention is shown: given at once, an answer is seen by {type(layer).__name__} before it is written"
        )
    found.append(weights(got, allowed_QK.to(hidden_BND.device)).cpu())


def allowed(mask: Any, queries: int, tokens: int, window: int | None) -> Tensor:
    """(Q, K) bool: which of ``tokens`` the last ``queries`` of them see, by a layer's ``mask``: (B, 1, N, K), bool or
    added to the logits; of any other kind or none, it says nothing but that they are causal, within the ``window``."""
    if isinstance(mask, Tensor) and mask.ndim == 4:
        last_QK = mask[0, 0, -queries:, :tokens]
        return last_QK if last_QK.dtype == torch.bool else last_QK > torch.finfo(last_QK.dtype).min / 2
    place_K = torch.arange(tokens)
    behind_QK = place_K[-queries:, None] - place_K
    return (behind_QK >= 0) & (behind_QK < (window or tokens))


def weights(got: Attended, allowed_QK: Tensor) -> Tensor:
    """(Q, K) float32, mean over heads: how the last Q tokens attend to those that are ``allowed_QK``."""
    queries, tokens = allowed_QK.shape
    query_QHE, key_KGE = got.query_BHNE[0].transpose(0, 1)[-queries:], got.key_BGNE[0].transpose(0, 1)
    place_K = torch.arange(tokens, device=key_KGE.device)
    row_Q = place_K[-queries:]
    own = Projections(query_QHE, key_KGE, Rows(row_Q, [queries]), [tokens], got.scaling, got.softcap, got.sink_H)

    def among(rows: slice, keys: Tensor) -> Tensor:
        return attention_weights(own, query_QHE[None, rows], row_Q[None, rows], key_KGE[None, keys], keys[None])[0]

    if bool((allowed_QK == (place_K <= row_Q[:, None])).all()):
        return among(slice(None), place_K)
    weight_QK = torch.zeros(allowed_QK.shape, device=key_KGE.device)
    for query, allowed_K in enumerate(allowed_QK):  # the keys that it sees, and no others
        seen = allowed_K.nonzero()[:, 0]
        weight_QK[query, seen] = among(slice(query, query + 1), seen)[0]
    return weight_QK


def drawn(sight: Sight, weight_N: Tensor, alive_N: Tensor) -> Image.Image:
    """The picture as the model sees it, its patches glowing as the weight of their token, of the largest one that is
    drawn; patches whose token is not alive are dark."""
    shown, picture = weight_N[torch.from_numpy(sight.numbers)], np.asarray(sight.picture.convert("RGB"))
    most = float(shown.max()) if len(shown) else 0.0
    share_N = (weight_N / most if most > 0 else weight_N).numpy()
    share_RC = np.where(sight.token_RC >= 0, share_N[sight.token_RC], 0.0)
    share = np.repeat(np.repeat(share_RC, sight.patch, 0), sight.patch, 1)[: len(picture), : picture.shape[1], None]
    glowing = 0.55 * picture * (1 - share) + GLOW * (0.35 + 0.65 * share) * share + 0.45 * picture * share
    kept = sight.grid(alive_N.nonzero()[:, 0].tolist())
    return Image.fromarray(shade(glowing.clip(0, 255).astype(np.uint8), kept, sight.patch))


def share_text(sight: Sight, weight_N: Tensor, alive_N: Tensor) -> str:
    """How much of the attention lies on the picture, and where image tokens are alive that show no patch, how much on
    the patches that are drawn."""
    whole = f"{float(weight_N.sum()):.1%} on the picture"
    alive = alive_N.nonzero()[:, 0].tolist()
    if sight.count(alive) == len(alive):
        return whole
    return f"{whole}, {float(weight_N[torch.from_numpy(sight.numbers)].sum()):.1%} on the patches drawn"


def spans(schedule: Schedule, depth: int) -> list[range]:
    """The decoder layers of every stage, in which the same image tokens are left; none where a drop comes at once."""
    edges = [schedule.inject, *schedule.layers, depth]
    return [range(low, high) for low, high in zip(edges, edges[1:])]
