"""Parameters that ZeRO-3 has cut up: every rank holds a piece, and ``shape`` says 0 until all pieces are gathered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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

    with (
        getattr(integration, "prevent_arange_dtype_change", _arange_as_asked)(),
        deepspeed.zero.Init(config_dict_or_path=integration.deepspeed_config()),
        set_zero3_state(),  # tells transformers that it is done
    ):
        yield


@contextmanager
def _arange_as_asked() -> Iterator[None]:
    """Keeps the numbers that rotary frequencies are made of in float32 while `deepspeed.zero.Init` makes all others in
    the precision of training. Newer transformers than 5.17 have their own."""
    from deepspeed.runtime.zero import partition_parameters as partition

    wrap = partition.zero_wrapper_for_fp_tensor_constructor

    def wrap_all_but_arange(
        make: Callable[..., Tensor], target_fp_dtype: torch.dtype, target_device: torch.device
    ) -> Any:
        return wrap(make, None if make is partition._orig_torch_arange else target_fp_dtype, target_device)

    partition.zero_wrapper_for_fp_tensor_constructor = wrap_all_but_arange
    try:
        yield
    finally:
        partition.zero_wrapper_for_fp_tensor_constructor = wrap


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
