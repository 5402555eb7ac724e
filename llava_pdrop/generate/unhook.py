"""Models inside of wrappers, and models without their hooks."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The model inside a wrapper of PEFT or ``torch.compile``, whose ``generate`` goes past the wrapper's own hooks."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        else:
            return model


def bare(model: nn.Module, plugin: Any) -> nn.Module:
    """``model`` without the hooks, patches and attribute that ``plugin`` gave it: new modules around the same
    parameters and buffers. The attached model stays as it is."""
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
            elif "_hooks" in name and isinstance(value, dict):
                value = type(value)((key, hook) for key, hook in value.items() if key not in ours)
            elif value is plugin:
                continue
            elif name == "_modules":
                value = {key: child if child is None else copied(child) for key, child in value.items()}
            elif isinstance(value, nn.Module):
                value = copied(value)
            twin.__dict__[name] = value
        return twin

    return copied(model)
