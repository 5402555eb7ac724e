"""PyramidDrop in Hugging Face's own ``generate``: one line on a vanilla vision-language model.

    attach(model, Schedule(layers=(8, 16, 24), ratios=(0.5, 0.25, 0.125)))
    model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    detach(model)

Three hooks do it. The model's pre-hook looks at the prompt (which columns are image tokens, how many rows) and sends a
`Call` down to the decoder layers as a keyword argument; the layers' pre-hooks drop tokens where the schedule says so
and replace mask and positions from there on. What later steps need to know travels in the cache (`cache.py`).

* Every batch of prompts works: padding, several images or none per row, beams, samples, prompt lookup, static cache,
  ``use_cache=False``, plain ``model(**inputs)``. Logits come back for the surviving tokens only, padded on the left.
* The last token of the prompt ranks. A forward is a prompt when its cache is empty, not by its length.
* Tokens that are added to a filled cache (a second turn) are never dropped, not even images. A pruned cache needs the
  schedule that pruned it: do not detach between two turns.
* Rows without images, and calls without images, pass unchanged.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llava_pdrop.errors import UserError
from llava_pdrop.generate.cache import PromptStages, remember, sliding_window, stage_mask
from llava_pdrop.generate.prefill import ForwardStep, Prefill, image_lengths
from llava_pdrop.model.decoder import Rope
from llava_pdrop.model.pyramid_drop import RANKERS
from llava_pdrop.model.vision import PackByGeometry
from llava_pdrop.schedule import Schedule

Model = TypeVar("Model", bound=nn.Module)

_HANDLE = "_pyramid_drop"  # attribute of an attached model, and the keyword under which a Call reaches the layers

_PROMPT: ContextVar[tuple[Any, int | None] | None] = ContextVar("prompt", default=None)
"""The plug-in whose ``generate`` is running and the columns of its prompt: assisted decoding and ``use_cache=False``
feed more than the prompt to an empty cache."""


@dataclass
class Call:
    """State of one forward on its way through the decoder layers.

    ``prefill`` is there while a prompt is being pruned, ``stages`` from its first drop on (or out of the cache);
    ``position_T`` are the positions of the packed prompt, ``before_BND`` what the previous layer was given.
    """

    attention_mask: Tensor | None
    prefill: Prefill | None = None
    stages: PromptStages | None = None
    stage: int = 0
    position_ids: Tensor | None = None
    position_T: Tensor | None = None
    rope: Rope | None = None
    before_BND: Tensor | None = None
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    step: ForwardStep | None = None


def attach(model: Model, schedule: Schedule | None = None, trace: list[ForwardStep] | None = None) -> Model:
    """Makes a Hugging Face vision-language model drop image tokens by ``schedule``; attaching again replaces.

    Args:
        model: a model with a LLaMA-like decoder (`LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration`
            over llama, mistral, qwen2, qwen3, ...), attention ``eager``, ``sdpa``, ``llava_pdrop`` or flash attention.
        schedule: when and how much; default: the one in the model's config (``pyramid_drop``), else none.
        trace: where given, receives one `ForwardStep` per forward.

    Returns:
        the same model.

    Raises:
        UserError: the decoder is not LLaMA-like, or the schedule does not fit it.
    """
    target = _unwrapped(detach(model))
    if schedule is None:
        schedule = Schedule.from_dict(getattr(target.config, "pyramid_drop", None))
    setattr(target, _HANDLE, _Plugin(target, schedule, trace))
    return model


def detach(model: Model) -> Model:
    """Takes the schedule off again: hooks and attributes are as before `attach`. No-op on a model without one."""
    target = _unwrapped(model)
    plugin = vars(target).get(_HANDLE)
    if plugin is not None:
        plugin.remove(target)
        delattr(target, _HANDLE)
    return model


class _Plugin:
    """The hooks of one attached model. Holds settings only; the state of a forward is in its `Call`."""

    def __init__(self, model: nn.Module, schedule: Schedule, trace: list[ForwardStep] | None) -> None:
        base = getattr(model, "base_model", model)
        self.decoder = _decoder_of(base)
        self.config = model.config
        self.schedule = schedule.check(len(self.decoder.layers))
        if schedule.ranker not in RANKERS:
            raise UserError(f"unknown pyramid_drop.ranker {schedule.ranker!r}: choose one of {sorted(RANKERS)}")
        self.image_token = getattr(model.config, "image_token_id", None)
        if self.image_token is None:
            raise UserError(f"the config of {type(model).__name__} has no image_token_id: which tokens are images?")
        pack = base.__dict__.get("pack_image_features")
        self.geometry = pack.geometry if isinstance(pack, PackByGeometry) else None
        self.trace = trace
        self.parameters = list(inspect.signature(base.forward).parameters)
        self.hooks = [
            base.register_forward_pre_hook(self._before_model, with_kwargs=True),
            base.register_forward_hook(_check_reached, with_kwargs=True),
        ]
        if base is not model:
            self.hooks.append(model.register_forward_pre_hook(_refuse_labels, with_kwargs=True))
        for index, layer in enumerate(self.decoder.layers):
            hook = functools.partial(self._before_layer, index)
            self.hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        # generate() knows where the prompt ends; and for static caches it would build the masks of layer 0 for all.
        patches = {"generate": _generate, "create_masks_for_generate": _two_dimensional_mask}
        patches = patches if hasattr(model, "generate") else {}
        self.shadowed = {name: model.__dict__.get(name) for name in patches}
        for name, patch in patches.items():
            setattr(model, name, MethodType(patch, model))

    def remove(self, model: nn.Module) -> None:
        for hook in self.hooks:
            hook.remove()
        for name, original in self.shadowed.items():
            delattr(model, name)
            if original is not None:
                setattr(model, name, original)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of the model: opens a `Call` where there is something to do."""
        given = {**dict(zip(self.parameters, args)), **kwargs}
        mask, stages = given.get("attention_mask"), getattr(given.get("past_key_values"), "stages", None)
        call = Call(mask, stages=stages, step=None if self.trace is None else ForwardStep())
        if stages is not None and stages.schedule != self.schedule:
            raise UserError(
                "this cache was pruned by another schedule than the attached one: start with an empty cache"
            )
        if stages is None and self.schedule.layers:
            call.prefill = self._plan(given)
        if (call.prefill or stages) and mask is not None and getattr(mask, "ndim", 0) != 2:
            raise UserError("attach() builds the masks of pruned layers itself: give a 2-D attention_mask or none")
        if call.step is not None:
            self.trace.append(call.step)
            call.step.image_spans = call.prefill.plan.stages[0].layout.image_spans if call.prefill else []
        if call.prefill or stages or call.step:
            return args, {**kwargs, _HANDLE: call}
        return None

    def _plan(self, given: dict[str, Any]) -> Prefill | None:
        """The drops of a prompt; None where it shows no image. Reads ids and mask back from the device, once."""
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        features = (given.get("mm_encoder_outputs") or {}).get("image")
        if ids is not None and features is None and given.get("pixel_values") is None:
            return None
        if cache is not None and int(cache.get_seq_length()):
            return None  # a later turn, after a first one without images
        if ids is None:
            raise UserError(
                "attach() finds the image tokens in input_ids, but the prompt came as inputs_embeds: give input_ids "
                "and pixel_values, or detach(model)"
            )
        mask = given.get("attention_mask")
        real = mask.to(ids.device) if getattr(mask, "ndim", 0) == 2 else torch.ones_like(ids)
        image_BN, real_BN = torch.stack([ids == self.image_token, real != 0]).cpu().numpy()
        if not image_BN.any():
            return None
        prompt = _PROMPT.get()
        columns = prompt[1] if prompt is not None and prompt[0] is self else None
        lengths = image_lengths(self.config, int(image_BN.sum()), given, self.geometry)
        return Prefill.build(image_BN, real_BN, lengths, columns, self.schedule, ids.device)

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Pre-hook of a decoder layer: drops before it if it ranks; behind a drop, gives it its mask and positions."""
        call: Call | None = kwargs.pop(_HANDLE, None)
        if call is None:
            return args, kwargs
        hidden_BND = args[0] if args else kwargs.pop("hidden_states")
        pruned = call.prefill is not None or call.stages is not None
        if pruned and index in self.schedule.layers:
            hidden_BND = self._enter(call, index, hidden_BND, kwargs)
        if call.prefill is not None and index + 1 in self.schedule.layers:
            call.before_BND = hidden_BND
        if call.stage:
            kwargs["attention_mask"] = self._mask(call, index, hidden_BND, kwargs.get("past_key_values"))
            kwargs["position_ids"], kwargs["position_embeddings"] = call.position_ids, call.rope
        if call.step is not None:
            positions = kwargs["position_ids"].expand(len(hidden_BND), -1)
            call.step.position_ids.append(positions.detach().cpu().clone())
        return (hidden_BND, *args[1:]), kwargs

    def _enter(self, call: Call, index: int, hidden_BND: Tensor, kwargs: dict) -> Tensor:
        """Starts the next stage: prunes a prompt, or shifts the positions of later tokens. Returns hidden states."""
        positions = kwargs["position_ids"]
        if positions.ndim != 2:
            raise UserError(f"attach() supports one position per token, but {type(self.decoder).__name__} has several")
        if call.stage == 0 and kwargs.get("attention_mask") is None:
            call.attention_mask = None  # the host has read the mask: nothing is padding in the whole sequence
        if call.prefill is not None:
            frame = call.prefill.frames[call.stage]
            if call.stage == 0:
                call.rope, call.position_T = kwargs["position_embeddings"], frame.pack(positions)
                call.stages = call.prefill.stages(positions, self.schedule)
                if kwargs.get("past_key_values") is not None:
                    remember(kwargs["past_key_values"], call.stages)
            index_K = call.prefill.rank(
                self.decoder, index, self.schedule, call.stage, hidden_BND, call.before_BND, call.rope
            )
            if call.step is not None:
                call.step.drop(index_K)
            hidden_TD, frame = frame.pack(hidden_BND), call.prefill.frames[call.stage + 1]
            hidden_BND = frame.unpack(hidden_TD.index_select(0, index_K))
            if self.schedule.positions == "keep":
                call.position_T = call.position_T.index_select(0, index_K)
            else:
                call.position_T = call.prefill.plan.stages[call.stage + 1].position_T
            call.position_ids = frame.unpack(call.position_T)
        else:
            call.position_ids = positions - call.stages.shift_B[call.stage][:, None]
        call.stage += 1
        call.masks.clear()
        call.rope = self.decoder.rotary_emb(hidden_BND, call.position_ids)
        return hidden_BND

    def _mask(self, call: Call, index: int, hidden_BND: Tensor, cache: Any) -> Tensor | None:
        """The mask of a layer behind a drop, in the form its attention implementation takes."""
        config = self.decoder.config
        window, implementation = sliding_window(config, index), config._attn_implementation
        if window not in call.masks:
            assert call.stages is not None, "behind a drop the prompt's stages are known"
            call.masks[window] = stage_mask(
                implementation, call.stages, call.stage - 1, call.attention_mask, cache, index, hidden_BND, window
            )
        return call.masks[window]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, whose ``generate`` goes past the wrapper's own hooks."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _decoder_of(base: nn.Module) -> nn.Module:
    """The stack of decoder layers inside a vision-language model."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else getattr(base, "language_model", base)
    layer = next(iter(getattr(decoder, "layers", [])), None)
    attention = getattr(layer, "self_attn", None)
    wanted = {
        "norm": decoder,
        "rotary_emb": decoder,
        "input_layernorm": layer,
        "q_proj": attention,
        "k_proj": attention,
    }
    if any(getattr(part, name, None) is None for name, part in wanted.items()):
        raise UserError(
            "attach() needs a LLaMA-like decoder (norm, rotary_emb, layers with input_layernorm and self_attn.q_proj), "
            f"{type(decoder).__name__} is none"
        )
    return decoder


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of an attached model: the model's own, with the length of the prompt noted."""
    plugin = getattr(model, _HANDLE)
    prompt = next((p for p in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if p is not None), None)
    settings = kwargs.get("generation_config") or model.generation_config
    chunked = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
    if plugin.schedule.layers and chunked is not None and kwargs.get("pixel_values") is not None:
        raise UserError("attach() ranks with the end of the prompt: generate without prefill_chunk_size")
    own = plugin.shadowed["generate"] or MethodType(type(model).generate, model)
    token = _PROMPT.set((plugin, None if prompt is None else prompt.shape[1]))
    try:
        return own(*args, **kwargs)
    finally:
        _PROMPT.reset(token)


def _two_dimensional_mask(model: nn.Module, *, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
    """Stands in for ``create_masks_for_generate``: the decoder makes the masks of unpruned layers, we the others."""
    return attention_mask


def _check_reached(model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Hook behind the model: has a prompt gone through all of its drops?"""
    call: Call | None = kwargs.get(_HANDLE)
    if call is not None and call.prefill is not None and call.stage + 1 < len(call.prefill.frames):
        raise UserError(f"attach() cannot drop: {type(model).__name__} hands no keyword arguments to its layers")


def _refuse_labels(model: nn.Module, args: tuple, kwargs: dict) -> None:
    images = kwargs.get("pixel_values") is not None
    if images and kwargs.get("labels") is not None and getattr(model, _HANDLE).schedule.layers:
        raise UserError("an attached model drops tokens, so labels no longer line up: train with PyramidLlava")
