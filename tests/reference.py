"""A slow, plain PyramidDrop to compare the packed one with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, PackedBatch, Sample


@torch.no_grad()
def slow_reference(model: PyramidLlava, sample: Sample, query: str = "answers") -> tuple[Tensor, list[list[int]]]:
    """Logits of ``sample`` and, per drop, which of its positions are left.

    Written out from golden/README section 4 with transformers' eager layers, one sample and one image at a time; it
    shares only the embedding with the packed path.
    """
    decoder, schedule = model.hf.model.language_model, model.schedule
    x, device = model.embed(*_undropped(model, sample)), model.device
    place, labels, survivors = torch.arange(len(x), device=device), sample.labels.to(device), []
    owner = torch.full((len(x),), -1, device=device)
    for image, (start, stop) in enumerate(sample.image_spans):
        owner[start:stop] = image
    whole, is_text = (x, owner, labels, place), owner < 0
    if schedule.inject:
        x, owner, labels, place = (each[is_text] for each in whole)
    for index, layer in enumerate(decoder.layers):
        if schedule.inject and index == schedule.inject:
            text, (x, owner, labels, place) = x, whole
            x = x.clone()
            x[is_text] = text
        if index in schedule.layers:
            keep = torch.ones(len(x), dtype=torch.bool, device=device)
            if queries := _queries(labels, query):
                score = _attention(layer, x, *_rope(decoder, x, place, schedule))[1].mean(0)[queries].mean(0)
                for image, (start, stop) in enumerate(sample.image_spans):
                    own = (owner == image).nonzero()[:, 0]
                    count = schedule.kept(stop - start, schedule.layers.index(index))
                    order = score[own].sort(descending=True, stable=True).indices
                    keep[own[order[count:]]] = False
                    if schedule.merge == "nearest" and count:
                        x = _merged(x, own[order[:count]].tolist(), own[order[count:]].tolist())
            x, owner, labels, place = x[keep], owner[keep], labels[keep], place[keep]
            survivors.append(place.tolist())
        position, rope = _rope(decoder, x, place, schedule)
        x = x + _attention(layer, x, position, rope)[0]
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.hf.lm_head(decoder.norm(x)), survivors


def _merged(x: Tensor, stay: list[int], go: list[int]) -> Tensor:
    """``x`` with the mean of its group at every token that stays."""
    groups = {token: [token] for token in stay}
    for token in go:
        groups[max(stay, key=lambda other: F.cosine_similarity(x[token], x[other], dim=0).item())].append(token)
    means = {token: x[group].mean(0) for token, group in groups.items()}
    return torch.stack([means.get(token, x[token]) for token in range(len(x))])


def _undropped(model: PyramidLlava, sample: Sample) -> tuple[PackedBatch, StreamPlan]:
    batch = PackedBatch.pack([sample]).to(model.device)
    return batch, StreamPlan.build(batch, Schedule(), model.geometry, model.device)


def _queries(labels: Tensor, query: str) -> list[int]:
    if query == "last":
        return [len(labels) - 1]
    is_label = (labels != IGNORE_INDEX).tolist()
    return [i - 1 for i in range(1, len(is_label)) if is_label[i] and not is_label[i - 1]]


def _rope(decoder: nn.Module, x: Tensor, place: Tensor, schedule: Schedule) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    position = place[None] if schedule.positions == "keep" else torch.arange(len(x), device=x.device)[None]
    return position, decoder.rotary_emb(x[None], position)


def _attention(layer: nn.Module, x: Tensor, position: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output (T, D) and weights (H, T, T) of transformers' eager attention."""
    config = layer.self_attn.config
    before, config._attn_implementation = config._attn_implementation, "eager"
    mask = torch.full((len(x), len(x)), float("-inf"), device=x.device).triu(1)[None, None]
    normed = layer.input_layernorm(x[None])
    out, weights = layer.self_attn(
        hidden_states=normed, position_ids=position, position_embeddings=rope, attention_mask=mask
    )
    config._attn_implementation = before
    return out[0], weights[0]
