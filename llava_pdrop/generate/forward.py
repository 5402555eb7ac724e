"""One forward of an attached model: what is dropped before a layer, and what the layers behind it are given.

Masks and positions behind a drop are slices of those that the model made for the whole prompt; only where positions are
numbered anew, and in decoding, where the model knows nothing of the drops, they are made here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llava_pdrop.errors import UserError
from llava_pdrop.generate.cache import (
    PromptStages,
    cache_in,
    mask_sizes,
    remember,
    sliced_mask,
    sliding_window,
    stage_mask,
)
from llava_pdrop.generate.pictures import Shown
from llava_pdrop.generate.prefill import ForwardStep, Prefill
from llava_pdrop.generate.probe import probe
from llava_pdrop.model.decoder import project
from llava_pdrop.model.pyramid_drop import Candidates, Projections, Ranking, Rows, merged
from llava_pdrop.model.rankers import RANKERS, Ranker
from llava_pdrop.schedule import Schedule

SAME_FOR_ALL_LENGTHS = ("default", "linear", "llama3", "yarn")
"""Types of rotary embedding whose frequencies are the same whatever the positions are."""


@dataclass(frozen=True)
class Layers:
    """What is known of the decoder layers before any forward, one entry per layer.

    Attributes:
        entries: which entry of `PromptStages` holds there in a forward behind the prompt; None: no drop came before.
        windows: the sliding window, or None.
        types: what the rotary embedding is given besides positions: nothing, or the type of the layer.
    """

    entries: Sequence[int | None]
    windows: Sequence[int | None]
    types: Sequence[tuple[str, ...]]

    @classmethod
    def of(cls, decoder: Any, schedule: Schedule) -> Layers:
        """Of the layers of ``decoder`` under ``schedule``."""
        numbers = range(len(decoder.layers))
        behind = [sum(start <= number for start in schedule.stage_starts) for number in numbers]
        rotary = getattr(decoder, "rotary_emb", None)
        typed = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters
        return cls(
            [count - 1 if count else None for count in behind],
            [sliding_window(decoder.config, number) for number in numbers],
            [(decoder.config.layer_types[number],) if typed else () for number in numbers],
        )


@dataclass
class Generation:
    """A running ``generate``: the plug-in whose it is, the columns of its prompt (assisted decoding and
    ``use_cache=False`` feed more than that to an empty cache; None: not known), its arguments, and whether the features
    that it made before its first forward were ``pooled``."""

    owner: Any
    columns: int | None = None
    given: dict[str, Any] = field(default_factory=dict)
    pooled: bool = False

    @property
    def begins(self) -> bool:
        """Whether its prompt is the first."""
        cache = cache_in(self.given)
        return cache is None or not int(cache.get_seq_length())


@dataclass
class Call:
    """State of one forward on its way through the decoder layers.

    Attributes:
        owner: the plug-in that opened it.
        decoder, layers, schedule: the plug-in's.
        cheap: whether queries and keys may be projected by `project`, which is exact for few decoders.
        given: arguments of the model by name.
        attention_mask: (B, N) of the whole sequence; None where nothing is padding.
        prompt: whether this is a prompt with pictures that is being pruned.
        stages: of the pruned prompt: out of the cache, or from the first drop on.
        shown: what the encoders have made.
        pooled: whether the features that went through the projector were pooled.
        prefill: the plan of a prompt, from the decoder on.
        stage: of a prompt, how many drops came before the layer that runs.
        entry: which entry of `PromptStages` holds at that layer; None: the prompt is as it was given.
        whole: the packed prompt, while its text runs alone.
        picture_T, column_T: picture and first column of every token of the packed prompt at this stage.
        column_BN: the latter as it lies in the batch.
        before: the previous layer and what it was given, for rankers that look back.
        made: masks and positions of this stage, by what they were made from.
        step: receives what this forward did.
    """

    owner: Any
    decoder: nn.Module
    layers: Layers
    schedule: Schedule
    cheap: bool
    given: dict[str, Any]
    attention_mask: Tensor | None
    prompt: bool
    stages: PromptStages | None
    shown: Shown = field(default_factory=Shown)
    pooled: bool = False
    prefill: Prefill | None = None
    stage: int = 0
    entry: int | None = None
    whole: Tensor | None = None
    picture_T: Tensor | None = None
    column_T: Tensor | None = None
    column_BN: Tensor | None = None
    before: tuple[nn.Module, Tensor, dict[str, Any]] | None = None
    made: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    step: ForwardStep | None = None

    def at(self, index: int, layer: nn.Module, hidden_BND: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict]:
        """Hidden states and arguments of layer number ``index``, given those that the model hands to it."""
        inject = self.schedule.inject
        if self.prompt:
            if inject and index in (0, inject):
                hidden_BND = self._enter(index, layer, hidden_BND, kwargs)
                self._next()
            for _ in range(self.schedule.shortening.count(index)):
                hidden_BND = self._drop(index, layer, hidden_BND, kwargs)
                self.stage += 1
                self._next()
            kwargs = kwargs | self._placed(index, hidden_BND, kwargs)
            before_drop = index + 1 in self.schedule.layers
            if before_drop and RANKERS[self.schedule.rankers[self.schedule.stage(index)]].looks_back:
                self.before = (layer, hidden_BND, kwargs)
        elif self.stages is not None:
            kwargs = kwargs | self.behind(index, hidden_BND, kwargs)
        if self.step is not None and kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"]
            positions = positions.expand(*positions.shape[:-2], len(hidden_BND), -1)
            self.step.position_ids.append(positions.detach().cpu().clone())
        return hidden_BND, kwargs

    def behind(self, index: int, hidden_BND: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What other arguments layer number ``index`` is to be given in a forward behind a pruned prompt. It runs for
        every layer of every token of an answer, and layers of one stage and kind are given the same."""
        entry, kind = self.layers.entries[index], self.layers.types[index]
        if entry is None:
            return {}
        window, ids, unmasked = self.layers.windows[index], kwargs.get("position_ids"), not _masked(kwargs)
        found = self.made.get((entry, window, kind, unmasked, id(ids)))
        if found is None:
            changed = self._behind(index, entry, kind, hidden_BND, kwargs)
            found = self.made[entry, window, kind, unmasked, id(ids)] = (ids, changed)
        return found[1]

    def _behind(
        self, index: int, entry: int, kind: tuple[str, ...], hidden_BND: Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        stages, window = self.stages, self.layers.windows[index]
        assert stages is not None, "asked only behind a pruned prompt"
        given = self.attention_mask if _masked(kwargs) else None  # without a mask: the model has found no padding
        mask = stage_mask(
            self.decoder.config._attn_implementation,
            stages, entry, given, cache_in(kwargs), index, hidden_BND, window,
        )  # fmt: skip
        changed: dict[str, Any] = {"attention_mask": mask} if mask is not None or _masked(kwargs) else {}
        ids, rope = kwargs.get("position_ids"), kwargs.get("position_embeddings")
        if self.schedule.positions == "renumber":
            ids_SBN = self._once("ids", ids, lambda: ids - stages.shift_SB.to(hidden_BND.device)[..., None])
            changed["position_ids"] = ids_SBN[entry]
            if rope is not None:
                changed["position_embeddings"] = self._turned(entry, kind, hidden_BND, ids_SBN)
        return changed

    def _turned(self, entry: int, kind: tuple[str, ...], hidden_BND: Tensor, ids_SBN: Tensor) -> Any:
        """The rotary embedding of the positions of one stage; those of all stages are made in one go where that changes
        nothing: a call is a dozen small kernels."""
        rotary = self.decoder.rotary_emb
        types: Any = getattr(rotary, "rope_type", None)
        if (types[kind[0]] if kind and isinstance(types, dict) else types) not in SAME_FOR_ALL_LENGTHS:
            return self._once(("rope", entry, *kind), None, lambda: rotary(hidden_BND, ids_SBN[entry], *kind))
        parts = self._once(("rope", *kind), None, lambda: rotary(hidden_BND, ids_SBN.flatten(0, 1), *kind))
        batch = ids_SBN.shape[1]
        return tuple(part[entry * batch : (entry + 1) * batch] for part in parts)

    def _next(self) -> None:
        self.entry = 0 if self.entry is None else self.entry + 1
        self.made.clear()

    def _enter(self, index: int, layer: nn.Module, hidden_BND: Tensor, kwargs: dict) -> Tensor:
        """Before layer 0 the text of a prompt alone, later the whole prompt with what has become of its text."""
        prefill = self.prefill
        assert prefill is not None and prefill.alone is not None, "planned before the first layer"
        (alone, row_X), frame = prefill.alone, prefill.stages[0].frame
        row_X = row_X.to(hidden_BND.device)
        if index:
            whole, self.whole = self.whole.to(hidden_BND.device), None
            return frame.unpack(whole.index_copy(0, row_X, alone.frame.pack(hidden_BND)))
        self.stages = self._begin(prefill, layer, hidden_BND, kwargs)
        self.whole = frame.pack(hidden_BND)
        self.column_BN = alone.frame.unpack(self.column_T.to(hidden_BND.device).index_select(0, row_X))
        if self.stages.column_BN is not None:
            self.stages.column_BN.extend([self.column_BN, frame.unpack(self.column_T)])
        return alone.frame.unpack(self.whole.index_select(0, row_X))

    def _once(self, key: Any, source: Any, make: Callable[[], Any]) -> Any:
        """``make()``, once a stage for each ``key`` and ``source`` (kept, so that its id is not given away)."""
        entry = self.made.get((key, id(source)))
        if entry is None:
            entry = self.made[key, id(source)] = (source, make())
        return entry[1]

    def _drop(self, index: int, layer: nn.Module, hidden_BND: Tensor, kwargs: dict) -> Tensor:
        """Ranks the tokens of a prompt before ``layer`` and returns the hidden states of those that survive."""
        prefill, stage = self.prefill, self.stage
        assert prefill is not None, "planned before the first layer"
        if self.stages is None:
            self.stages = self._begin(prefill, layer, hidden_BND, kwargs)
        here = kwargs | self._placed(index, hidden_BND, kwargs)
        frame, after = prefill.stages[stage].frame, prefill.stages[stage + 1].frame
        picture_T, column_T = (x.to(hidden_BND.device) for x in (self.picture_T, self.column_T))
        x_TD, score_V = frame.pack(hidden_BND), None
        if stage == 0 and prefill.entering is not None:
            index_K = prefill.entering.to(hidden_BND.device)
        else:
            ranker = RANKERS[self.schedule.rankers[self.schedule.stage(index) - 1]]
            look = functools.partial(self._look, ranker, layer, hidden_BND, here)
            candidates, score_V, index_K = prefill.rank(stage, picture_T, ranker, look)
            if self.schedule.merge == "nearest":
                x_TD = merged(x_TD, score_V, candidates)
        if self.step is not None:
            self.step.drop(index_K, score_V)
        self.picture_T, self.column_T = picture_T.index_select(0, index_K), column_T.index_select(0, index_K)
        self.column_BN = after.unpack(self.column_T)
        if self.stages.column_BN is not None:
            self.stages.column_BN.append(self.column_BN)
        return after.unpack(x_TD.index_select(0, index_K))

    def _begin(self, prefill: Prefill, layer: nn.Module, hidden_BND: Tensor, kwargs: dict) -> PromptStages:
        """What the cache is to remember of this prompt, before its first drop."""
        if kwargs.get("attention_mask") is None:
            self.attention_mask = None  # the model has read the mask: nothing is padding in the whole sequence
        positions, cache = kwargs.get("position_ids"), cache_in(kwargs)
        if self.schedule.positions == "renumber" and (positions is None or positions.ndim != 2):
            raise UserError(
                f"pyramid_drop.positions: renumber needs one position per token, which {type(layer).__name__} is not "
                "given: set 'keep'"
            )
        stages = prefill.remembered(self.schedule, positions, hidden_BND.device)
        if cache is not None:
            remember(cache, stages)
        self.picture_T = prefill.picture_T
        self.column_T = prefill.stages[0].frame.row_T % self.given["input_ids"].shape[1]
        if self.step is not None:
            self.step.pictures = prefill.places
        return stages

    def _look(
        self, ranker: Ranker, layer: nn.Module, hidden_BND: Tensor, kwargs: dict, candidates: Candidates
    ) -> Ranking:
        """What ``ranker`` may look at before ``layer``."""
        now, device = self.prefill.stages[self.stage], hidden_BND.device
        before, self.before = self.before, None
        instruction, text = (Rows(rows.row_Q.to(device), rows.counts) for rows in (now.instruction, now.text))
        projections = None
        if ranker.projections is not None:
            here = layer, hidden_BND, kwargs
            source: tuple[nn.Module, Tensor, dict[str, Any]] = (
                before if ranker.projections == "previous" and before is not None else here
            )
            projections = self._projected(*source, ranker.asking(instruction, text, candidates))
        hidden_BND = self.decoder.norm(hidden_BND) if ranker.normalised else hidden_BND
        before_TD = None if before is None else now.frame.pack(before[1].to(device))
        return Ranking(candidates, now.frame.pack(hidden_BND), before_TD, text, projections)

    def _projected(self, layer: nn.Module, hidden_BND: Tensor, kwargs: dict, asking: Rows) -> Projections:
        """Queries of the tokens ``asking`` and keys of all, as ``layer`` makes them of ``hidden_BND``."""
        now = self.prefill.stages[self.stage]
        frame = now.frame
        if self.cheap and not hasattr(layer, "_hf_hook"):  # where accelerate looks after the weights, the layer runs
            rope = tuple(frame.pack(part)[None] for part in kwargs["position_embeddings"])
            return project(layer, frame.pack(hidden_BND), rope, asking, now.seq_lens)
        got = probe(layer, hidden_BND, kwargs)
        query_THE, key_TGE = (frame.pack(x.transpose(1, 2)) for x in (got.query_BHNE, got.key_BGNE))
        query_QHE = query_THE.index_select(0, asking.row_Q)
        return Projections(query_QHE, key_TGE, asking, now.seq_lens, got.scaling, got.softcap, got.sink_H)

    def _placed(self, index: int, hidden_BND: Tensor, kwargs: dict) -> dict[str, Any]:
        """Mask and positions of a layer of a prompt that does not see all that the model was given, in the place of
        those that the model made."""
        if self.entry is None or (self.whole is None and not self.stage):
            return {}
        made = {"attention_mask": self._mask(index, hidden_BND, kwargs)}
        ids, rope = kwargs.get("position_ids"), kwargs.get("position_embeddings")
        if self.schedule.positions == "renumber":
            alone = None if self.whole is None else self.prefill.alone
            stage = self.prefill.stages[self.stage] if alone is None else alone[0]
            ids = self._once("ids", None, lambda: stage.frame.unpack(stage.position_T.to(hidden_BND.device)))
            extra = self.layers.types[index]
            if rope is not None:
                rope = self._once(("rope", *extra), None, lambda: self.decoder.rotary_emb(hidden_BND, ids, *extra))
        else:
            column_BN = self.column_BN.to(hidden_BND.device)
            if ids is not None:
                ids = self._once("ids", ids, lambda: _taken(kwargs["position_ids"], column_BN, -1))
            if rope is not None:
                parts = kwargs["position_embeddings"]
                rope = self._once("rope", parts, lambda: tuple(_taken(part, column_BN, -2) for part in parts))
        given = {"position_ids": ids, "position_embeddings": rope}
        return made | {name: value for name, value in given.items() if name in kwargs}

    def _mask(self, index: int, hidden_BND: Tensor, kwargs: dict) -> Any:
        """The mask of a layer of a prompt behind a drop, in the form its attention implementation takes."""
        config, own, cache = self.decoder.config, kwargs.get("attention_mask"), cache_in(kwargs)
        window, implementation = self.layers.windows[index], config._attn_implementation
        stages, entry = self.stages, self.entry
        assert stages is not None and entry is not None, "here the prompt's stages are known"
        if isinstance(own, Tensor) and own.ndim == 4:
            keys = mask_sizes(cache, index, hidden_BND.shape[1])[0]
            wide = window if self.schedule.positions == "renumber" else None
            column_BN = self.column_BN.to(hidden_BND.device)
            return self._once(
                ("mask", wide, keys),
                own,
                lambda: sliced_mask(own, stages, entry, column_BN, keys, wide),
            )
        causal = getattr(getattr(self.decoder.layers[index], "self_attn", None), "is_causal", True)
        if own is None and not causal:  # no mask: everything sees everything (PaliGemma)
            fed, real_BK = hidden_BND.shape[1], stages.real_BN[entry].to(hidden_BND.device)
            return real_BK[:, None, None].expand(-1, 1, fed, -1) if stages.padded[entry] else None
        return self._once(
            ("mask", window),
            None,
            lambda: stage_mask(implementation, stages, entry, self.attention_mask, cache, index, hidden_BND, window),
        )


def _masked(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("attention_mask") is not None


def _taken(x: Tensor, column_BN: Tensor, dim: int) -> Tensor:
    """Columns (B, N') of every row of ``x``, whose tokens lie along ``dim`` and whose rows (one for all of them, or B)
    along the dimension before."""
    x = x.movedim((dim - 1, dim), (0, 1))
    x = x.expand(len(column_BN), *x.shape[1:])
    row_B1 = torch.arange(len(column_BN), device=x.device)[:, None]
    return x[row_B1, column_BN].movedim((0, 1), (dim - 1, dim))
