"""Parameters that ZeRO-3 has cut up: every rank holds a piece, and ``shape`` says 0 until all pieces are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, distributed, nn
from transformers.integrations import deepspeed as integration
from transformers.modeling_utils import set_zero3_state


@contextmanager
def cut_up() -> Iterator[None]:
    """Cuts parameters up as modules are made, where the training arguments ask for ZeRO-3; otherwise nothing.

    `transformers` would do the same and then fill them with random numbers: minutes for weights that are about to be
    read, and on the first rank alone, whose random state would no longer be that of the others.
    """
    if not integration.is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    # Rotary frequencies stay float32; transformers 5.17 does not have it yet.
    keep_arange = getattr(integration, "prevent_arange_dtype_change", nullcontext)
    with (
        keep_arange(),
        deepspeed.zero.Init(config_dict_or_path=integration.deepspeed_config()),
        set_zero3_state(),  # tells transformers that it is done
    ):
        yield


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor, of a parameter that is cut up that of all its pieces together."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What ``module.state_dict()`` names: the parameters themselves, which know how they are cut up, and buffers."""
    return module.state_dict(keep_vars=True)


@torch.no_grad()
def overwrite(own: Tensor, read: Callable[[], Tensor]) -> None:
    """Puts what ``read`` returns into ``own``. Of a parameter that is cut up only the first rank reads, and hands every
    rank its piece; all ranks must come here."""
    with gathered(own) as writes:
        if writes:
            own.copy_(read())


@contextmanager
def gathered(*tensors: Tensor) -> Iterator[bool]:
    """Makes parameters that are cut up whole as long as it lasts; yields whether this rank is the one that may change
    them. Others are whole anyway and every rank changes its own."""
    pieces = [tensor for tensor in tensors if hasattr(tensor, "ds_shape")]
    if not pieces:
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(pieces, modifier_rank=0):
        yield distributed.get_rank() == 0
