"""Models inside of wrappers, and models without their hooks."""

from __future__ import annotations

from typing import Any

from torch import nn

HANDLE = "_pyramid_drop"
"""Attribute of an attached model."""


def unwrapped(model: Any) -> Any:
    """The model inside a wrapper of PEFT or ``torch.compile``, whose ``generate`` goes past the wrapper's own hooks."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        else:
            return model


def plugin_of(model: Any) -> Any:
    """What `attach` has left on ``model``; None: nothing is attached."""
    return vars(unwrapped(model)).get(HANDLE)


def bare(model: nn.Module, plugin: Any) -> nn.Module:
    """``model`` without the hooks, patches and attribute that ``plugin`` gave it: new modules around the same
    parameters and buffers. The attached model stays as it is.

    The hooks by which transformers captures outputs go too (it sets them at the first forward, as local functions,
    which keep a model from being pickled), and the mark that they are set: the next forward sets them again.
    """
    ours = {hook.id for hook in plugin.hooks}
    patched = {(id(owner), name): original for (owner, name), original in plugin.shadowed.items()}
    copies: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        twin = copies[id(module)] = object.__new__(type(module))
        for name, value in vars(module).items():
            if (id(module), name) in patched:
                value = patched[id(module), name]
                if value is None:
                    continue
            elif value is plugin or name == "_output_capturing_hooks_installed":
                continue
            elif "_hooks" in name and isinstance(value, dict):
                kept = ((key, hook) for key, hook in value.items() if key not in ours and not _captures(hook))
                value = type(value)(kept)
            elif name == "_modules":
                value = {key: child if child is None else copied(child) for key, child in value.items()}
            elif isinstance(value, nn.Module):
                value = copied(value)
            twin.__dict__[name] = value
        return twin

    return copied(model)


def _captures(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
