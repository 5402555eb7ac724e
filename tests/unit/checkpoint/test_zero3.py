"""What ZeRO-3 would do to the constants of a model while it is made."""

from __future__ import annotations

import torch

from llava_pdrop.checkpoint.zero3 import _arange_as_asked
from tests.engines import needs_deepspeed


@needs_deepspeed
def test_rotary_frequencies_are_not_rounded():
    from deepspeed.runtime.zero import partition_parameters as partition

    wrap = partition.zero_wrapper_for_fp_tensor_constructor
    half, cpu = torch.bfloat16, torch.device("cpu")
    with _arange_as_asked():
        made = {
            make: partition.zero_wrapper_for_fp_tensor_constructor(make, target_fp_dtype=half, target_device=cpu)
            for make in (partition._orig_torch_arange, partition._orig_torch_ones)
        }
    assert made[partition._orig_torch_arange](0, 4, 2, dtype=torch.float32).dtype == torch.float32
    assert made[partition._orig_torch_ones](3).dtype == half
    assert partition.zero_wrapper_for_fp_tensor_constructor is wrap
