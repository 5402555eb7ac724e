"""PyramidDrop in Hugging Face's own ``generate``: one line on a vanilla vision-language model.

    attach(model, Schedule(layers=(8, 16, 24), ratios=(0.5, 0.25, 0.125)))
    model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    detach(model)

Hooks do it. The model's pre-hook opens a `Call`, the state of one forward; the layers' pre-hooks drop tokens where the
schedule says so, and from there on give every layer its share of the mask and of the positions that the model made.
What later steps need to know travels in the cache (`cache.py`).

* Every batch of prompts works: padding, several pictures or none per row, clips, beams, samples, prompt lookup, static
  cache, ``use_cache=False``, plain ``model(**inputs)``. Logits come back for the surviving tokens only, padded on the
  left. Every picture has its own budget (`families.py` says what a picture is).
* The last token of the prompt ranks, or what the ranker asks with. A forward is a prompt when its cache is empty, not
  by its length.
* Tokens that are added to a filled cache (a second turn) are never dropped, not even images. A pruned cache needs the
  schedule that pruned it: do not detach between two turns.
* Rows without images, and calls without images, pass unchanged.
* The model pickles, copies and saves as its vanilla self with its schedule.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache

from llava_pdrop.errors import UserError
from llava_pdrop.generate.cache import cache_in, check_implementation
from llava_pdrop.generate.families import Family, family_of, resolved
from llava_pdrop.generate.forward import Call, Generation, Layers
from llava_pdrop.generate.pictures import check_prompt, pictures_of
from llava_pdrop.generate.pooling import Pooling
from llava_pdrop.generate.prefill import ForwardStep, Prefill
from llava_pdrop.generate.unhook import HANDLE, bare, plugin_of, unwrapped
from llava_pdrop.model.attention import check_transformers
from llava_pdrop.model.decoder import COVERED
from llava_pdrop.model.rankers import RANKERS, check_rankers
from llava_pdrop.schedule import Schedule

Model = TypeVar("Model", bound=nn.Module)

_CALL: ContextVar[Call | None] = ContextVar("call", default=None)
"""The forward that is running; None where no prompt is pruned and no cache was."""

_PROMPT: ContextVar[Generation | None] = ContextVar("prompt", default=None)
"""The ``generate`` that is running."""

SAME = {torch.float32: 1e-3, torch.float64: 1e-6}
"""How far logits may be from vanilla at ratio 1.0, in parts of the largest one, before an unchecked class is refused;
other precisions: 0.05."""


def attach(
    model: Model,
    schedule: Schedule | None = None,
    trace: list[ForwardStep] | None = None,
    *,
    unchecked: bool = False,
) -> Model:
    """Makes a Hugging Face vision-language model drop image tokens by ``schedule``; attaching again replaces.

    Args:
        model: a model of a class in ``families.ATTACHABLE`` (``llava-pdrop families`` lists them), or PEFT's or
            ``torch.compile``'s wrapper of one; attention ``eager``, ``sdpa``, ``llava_pdrop`` or flash attention.
        schedule: when and how much; default: the one in the model's config (``pyramid_drop``), else none.
        trace: where given, receives one `ForwardStep` per forward.
        unchecked: take a class that is not in the table too. At the first prompt with a picture its logits at ratio 1.0
            are compared with those of the detached model.

    Returns:
        the same model. Its config holds the schedule (``config.pyramid_drop``) until `detach`.

    Raises:
        UserError: the class is not in the table, the schedule does not fit it, or transformers is a version that this
            package has not been tested with. The model is left as it was.
    """
    check_transformers()
    target = unwrapped(model)
    if schedule is None:
        schedule = Schedule.from_dict(getattr(getattr(target, "config", None), "pyramid_drop", None))
    if not isinstance(schedule, Schedule):
        raise UserError(f"attach() takes a Schedule(layers, ratios), not {schedule!r}")
    plugin = _Plugin(target, schedule, trace, unchecked)
    detach(model)
    plugin.install(target)
    setattr(target, HANDLE, plugin)
    return model


def detach(model: Model) -> Model:
    """Takes the schedule off again: hooks, attributes and config are as before `attach`. No-op on a model without
    one."""
    target, plugin = unwrapped(model), plugin_of(model)
    if plugin is not None:
        plugin.remove(target)
        delattr(target, HANDLE)
    return model


class _Plugin:
    """The hooks of one attached model. Holds settings only; the state of a forward is in its `Call`."""

    def __init__(
        self, model: nn.Module, schedule: Schedule, trace: list[ForwardStep] | None, unchecked: bool = False
    ) -> None:
        base = getattr(model, "base_model", model)
        self.base, self.decoder = base, _decoder_of(model, base)
        self.family: Family = family_of(model, self.decoder, unchecked)
        check_rankers(schedule)
        if any(RANKERS[name].normalised for name in schedule.rankers) and not hasattr(self.decoder, "norm"):
            raise UserError(
                f"pyramid_drop.ranker dart needs the final norm of {type(self.decoder).__name__}: has it none?"
            )
        self.pooling = Pooling.of(model, base, schedule.downsample, unchecked) if schedule.downsample else None
        self.given = schedule
        self.schedule = resolved(schedule.check(len(self.decoder.layers)), self.family, model)
        config: Any = model.config
        self.image_token = getattr(config, "image_token_id", None)
        self.video_token = getattr(config, "video_token_id", None)
        if self.image_token is None:
            raise UserError(f"the config of {type(model).__name__} has no image_token_id: which tokens are images?")
        check_implementation(self.decoder.config._attn_implementation)
        self.unchecked, self.untried, self.trace = unchecked, unchecked, trace
        self.cheap = self.decoder.config.model_type in COVERED and not unchecked
        self.parameters = list(inspect.signature(base.forward).parameters)
        self.layers = Layers.of(self.decoder, self.schedule)
        self.layer_parameters = list(inspect.signature(self.decoder.layers[0].forward).parameters)

    def install(self, model: nn.Module) -> None:
        """Sets hooks, patches and the schedule in the config."""
        self.hooks = []
        if self.unchecked:  # before a `Call` is opened: the model may be its own base
            self.hooks.append(model.register_forward_pre_hook(self._try_once, with_kwargs=True))
        self.hooks += [
            self.base.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.base.register_forward_hook(self._after_model, always_call=True),
        ]
        if self.base is not model:
            refuse = functools.partial(_refuse_labels, list(inspect.signature(model.forward).parameters))
            self.hooks.append(model.register_forward_pre_hook(refuse, with_kwargs=True))
        self.hooks.append(self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        for index, layer in enumerate(self.decoder.layers):
            hook = functools.partial(self._before_layer, index)
            self.hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if self.pooling is not None:
            self.hooks += self.pooling.hooks(self.base.multi_modal_projector, self._encoding)
        # generate() knows where the prompt ends; and for static caches it would build the masks of layer 0 for all.
        patches: dict[tuple[nn.Module, str], Callable] = {(model, "__reduce_ex__"): MethodType(_reduce, model)}
        if hasattr(model, "generate"):
            patches[model, "generate"] = MethodType(_generate, model)
            patches[model, "create_masks_for_generate"] = MethodType(_two_dimensional_mask, model)
        for name in ("image", "video"):
            encoder = getattr(self.base, f"get_{name}_features", None)
            if encoder is not None:
                patches[self.base, f"get_{name}_features"] = noting(name, encoder)
        self.shadowed = {(owner, name): owner.__dict__.get(name) for owner, name in patches}
        for (owner, name), patch in patches.items():
            setattr(owner, name, patch)
        config: Any = model.config
        self.configured = vars(config).get("pyramid_drop", HANDLE)
        config.pyramid_drop = self.given.to_dict()

    def remove(self, model: nn.Module) -> None:
        """Undoes `install`."""
        for hook in self.hooks:
            hook.remove()
        for (owner, name), original in self.shadowed.items():
            delattr(owner, name)
            if original is not None:
                setattr(owner, name, original)
        config: Any = model.config
        vars(config).pop("pyramid_drop", None)  # models may share a config
        if self.configured is not HANDLE:
            config.pyramid_drop = self.configured

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the model: opens a `Call` where there is something to do."""
        _CALL.set(None)
        given = {**dict(zip(self.parameters, args)), **kwargs}
        cache, mask = cache_in(given), given.get("attention_mask")
        stages = getattr(cache, "stages", None)
        if stages is not None and stages.schedule != self.schedule:
            raise UserError(
                "this cache was pruned by another schedule than the attached one: start with an empty cache"
            )
        prompt = not self.schedule.vanilla and stages is None and self._is_prompt(given, cache)
        if (prompt or stages) and mask is not None and getattr(mask, "ndim", 0) != 2:
            raise UserError("attach() builds the masks of pruned layers itself: give a 2-D attention_mask or none")
        if stages and not self.family.causal and self._shows(given):
            raise UserError(
                f"{type(module).__name__} masks pictures in its own way, which a pruned cache does not allow for: give "
                "a turn with a picture an empty cache"
            )
        call = Call(self, self.decoder, self.layers, self.schedule, self.cheap, given, mask, prompt, stages)
        if self.trace is not None:
            call.step = ForwardStep()
            self.trace.append(call.step)
        if prompt or stages or call.step:
            _CALL.set(call)

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook behind the model: closes the `Call`. Has a prompt gone through all of its drops?"""
        call = _CALL.get()
        _CALL.set(None)
        if output is None or call is None or not call.prompt:  # no output: an error is on its way
            return
        if call.stage < len(self.schedule.shortening):
            raise UserError(f"attach() cannot drop: {type(module).__name__} does not run all of its decoder layers")

    def _is_prompt(self, given: dict[str, Any], cache: Any) -> bool:
        """Whether this forward begins with pictures and an empty cache."""
        if cache is not None and int(cache.get_seq_length()):
            return False  # a later turn, after a first one without images
        pixels = any(value is not None for name, value in given.items() if name.startswith("pixel_values"))
        pictures = pixels or bool(given.get("mm_encoder_outputs"))
        if given.get("input_ids") is None:
            if pictures or given.get("inputs_embeds") is not None:
                raise UserError(
                    "attach() finds the image tokens in input_ids, but the prompt came as inputs_embeds: give "
                    "input_ids and pixel_values, or detach(model)"
                )
            return False
        # Placeholders without pictures are text, as `generate` gives them to an assistant. An unknown class: who knows?
        return (pictures or self.unchecked) and self._shows(given)

    def _shows(self, given: dict[str, Any]) -> bool:
        """Whether any token of this forward is a placeholder. Reads it back from the device where there may be some."""
        ids = given.get("input_ids")
        if ids is None or (ids.shape[1] == 1 and cache_in(given) is not None):
            return False
        shown = ids == self.image_token
        if self.video_token is not None:
            shown = shown | (ids == self.video_token)
        return bool(shown.any())

    def _try_once(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of a model of an unchecked class: at its first prompt with a picture, keeping all tokens has to give
        the logits of the detached model.
        """
        given = {**dict(zip(inspect.signature(model.forward).parameters, args)), **kwargs}
        if not self.untried or not self.schedule.layers or not self._is_prompt(given, cache_in(given)):
            return
        schedule, trace = self.schedule, self.trace
        self.trace, self.untried = None, False
        given = {name: value for name, value in given.items() if not isinstance(value, Cache)}
        given |= {"use_cache": False, "logits_to_keep": 0}
        logits: list[Tensor] = []
        try:
            for tried in (Schedule(), replace(schedule, ratios=(1.0,) * len(schedule.layers), keep=(), inject=0)):
                self.schedule = tried
                output = model(**given)
                logits.append(getattr(output, "logits", output[0]))
        finally:
            self.schedule, self.trace, self.untried = schedule, trace, True
        mask = given.get("attention_mask")
        real = torch.ones_like(logits[0][..., 0], dtype=torch.bool) if mask is None else mask.bool()
        left = torch.arange(logits[1].shape[1], device=real.device) >= logits[1].shape[1] - real.sum(1, keepdim=True)
        vanilla, kept = logits[0][real].float(), logits[1][left].float()
        allowed = SAME.get(logits[0].dtype, 0.05) * float(vanilla.abs().max())
        if not (difference := float((vanilla - kept).abs().max())) <= allowed:
            raise UserError(
                f"attach() cannot take {type(model).__name__}: keeping all image tokens changes its logits by "
                f"{difference:.1e}, and at most {allowed:.1e} is rounding"
            )
        self.untried = False

    def _pruning(self) -> Call | None:
        """The running forward, where it is of this model and prunes a prompt."""
        call = _CALL.get()
        return call if call is not None and call.owner is self and call.prompt else None

    def _encoding(self) -> Call | Generation | None:
        """Whose prompt is to be pruned that the projector makes features for: of the running forward, or since
        transformers 5.18 of a ``generate`` before its first one."""
        if _CALL.get() is not None:
            return self._pruning()
        prompt = _PROMPT.get()
        return prompt if prompt is not None and prompt.owner is self and prompt.begins else None

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the decoder: plans the drops of a prompt, whose pictures the encoders have seen by now. Reads ids
        and mask back from the device."""
        call = self._pruning()
        if call is None:
            return
        ids, mask = call.given["input_ids"], call.given.get("attention_mask")
        real = mask.to(ids.device) if mask is not None else torch.ones_like(ids)
        ids_BN, real_BN = torch.stack([ids, real.to(ids.dtype)]).cpu().numpy()
        prompt = _PROMPT.get()
        ours = prompt if prompt is not None and prompt.owner is self else Generation(self)
        encoded = call.given.get("mm_encoder_outputs") or {}
        for name in ("image", "video"):
            if encoded.get(name) is not None:
                call.shown = call.shown.noting(name, encoded[name])
        given = (place.get("pixel_values_videos") for place in (call.given, ours.given))
        clips = next((pixels for pixels in given if pixels is not None), None)
        call.shown.frames = None if clips is None else clips.shape[1]
        picture_BN = pictures_of(ids_BN, real_BN != 0, self.family, self.image_token, self.video_token, call.shown)
        by_caller = prompt is None and (cache_in(kwargs) is not None or bool(kwargs.get("use_cache")))
        check_prompt(picture_BN, real_BN != 0, by_caller, self.schedule.positions == "renumber")
        staying = None if self.pooling is None else functools.partial(self.pooling.staying, call, ours)
        call.prefill = Prefill.build(picture_BN, real_BN != 0, ours.columns, self.schedule, ids.device, staying)

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of a decoder layer."""
        call = _CALL.get()
        if call is None or call.owner is not self:
            return None
        if not call.prompt and call.step is None and len(args) == 1:  # every token of every answer comes this way
            changed = call.behind(index, args[0], kwargs)
            return (args, kwargs | changed) if changed else None
        kwargs = {**dict(zip(self.layer_parameters, args)), **kwargs}
        hidden_BND, kwargs = call.at(index, layer, kwargs.pop(self.layer_parameters[0]), kwargs)
        return (hidden_BND,), kwargs


def noting(name: str, encoder: Callable) -> Callable:
    """``encoder``, a model's own method, which notes in the running `Call` how long its features are. What it calls
    itself notes nothing: clips may be encoded as pictures."""

    @functools.wraps(encoder)
    def encode(*args: Any, **kwargs: Any) -> Any:
        call = _CALL.get()
        shown = None if call is None else call.shown
        output = encoder(*args, **kwargs)
        if call is not None and shown is not None:
            call.shown = shown.noting(name, output)
        return output

    return encode


def _decoder_of(model: nn.Module, base: nn.Module) -> nn.Module:
    """The stack of decoder layers inside a vision-language model."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else getattr(base, "language_model", base)
    if len(getattr(decoder, "layers", [])) == 0 or not hasattr(getattr(model, "config", None), "model_type"):
        raise UserError(
            f"attach() needs a vision-language model of transformers with a stack of decoder layers, which "
            f"{type(model).__name__} is not"
        )
    return decoder


def _generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of an attached model: the model's own, with the length of the prompt noted."""
    plugin = getattr(model, HANDLE)
    prompt = next((p for p in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if p is not None), None)
    settings: Any = kwargs.get("generation_config") or model.generation_config
    chunked = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
    pictures = any(kwargs.get(name) is not None for name in kwargs if name.startswith("pixel_values"))
    if not plugin.schedule.vanilla and chunked is not None and pictures:
        raise UserError("attach() ranks with the end of the prompt: generate without prefill_chunk_size")
    own = plugin.shadowed[model, "generate"] or MethodType(type(model).generate, model)
    token = _PROMPT.set(Generation(plugin, None if prompt is None else prompt.shape[1], kwargs))
    try:
        return own(*args, **kwargs)
    finally:
        _PROMPT.reset(token)


def _two_dimensional_mask(model: nn.Module, *, attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
    """Stands in for ``create_masks_for_generate``: the decoder makes the masks of unpruned layers, we the others."""
    return attention_mask


def _refuse_labels(parameters: list[str], model: nn.Module, args: tuple, kwargs: dict) -> None:
    given = {**dict(zip(parameters, args)), **kwargs}
    images = any(value is not None for name, value in given.items() if name.startswith("pixel_values"))
    if images and given.get("labels") is not None and not getattr(model, HANDLE).schedule.vanilla:
        raise UserError("an attached model drops tokens, so labels no longer line up: train with PyramidLlava")


def _reduce(model: nn.Module, protocol: Any) -> tuple:
    """How an attached model is pickled and copied: as its vanilla self, which is attached again when it is read."""
    plugin = getattr(model, HANDLE)
    return _again, (bare(model, plugin), plugin.given, plugin.unchecked)


def _again(model: nn.Module, schedule: Schedule, unchecked: bool) -> nn.Module:
    """Named in every pickle of an attached model."""
    return attach(model, schedule, unchecked=unchecked)
