"""What the profile of a step is made into: busy share, kinds of kernels, synchronisations with their places."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.bench.gpu import inside

CPU = torch.device("cpu")


def test_the_busy_share_and_the_gaps() -> None:
    """Microseconds 0 to 10, 8 to 12 beside it, nothing until 20, then to 30."""
    found = inside.busy([(20, 30, "late"), (0, 10, "first"), (8, 12, "beside"), (9, 9.5, "within")])
    assert found["busy_share"] == pytest.approx(22 / 30, abs=1e-4)
    assert found["gaps_us"] == [[8, "late"]] and found["kernels"] == 4 and found["wall_ms"] == 0.0
    assert inside.busy([])["busy_share"] == 0.0


def test_kernels_by_kind() -> None:
    kernels = [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_TNT", 3.0),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, false, cutlass::bfloat16_t>>", 2.0),
        ("triton_poi_fused_mul_silu_0", 0.75),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", 1.0),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", 0.5),
        ("vectorized_layer_norm_kernel", 0.25),
        ("void at::native::reduce_kernel<512, 1, ...>", 0.125),
        ("mystery", 0.0625),
    ]
    assert inside.by_kind(kernels) == {
        "matrix products": 3.0, "attention": 2.0, "elementwise and copies": 1.5, "compiled": 0.75, "norms": 0.25,
        "reductions": 0.12, "other": 0.06,
    }  # fmt: skip


def test_a_synchronisation_is_reported_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning like CUDA's, since a CPU has nothing to wait for."""
    import warnings

    from llava_pdrop.bench.shapes import shape_named
    from llava_pdrop.bench.train_step import BenchArm, BenchTrainer
    from llava_pdrop.bench.workload import Workload

    shape = shape_named("tiny")
    trainer = BenchTrainer(shape, CPU, Workload(shape), "none")
    batch = trainer.workload.batch(0, CPU, 1)
    assert inside.synchronisations(trainer, BenchArm("vanilla"), batch) == []
    monkeypatch.setattr(
        trainer.model.hf.lm_head, "forward",
        lambda x, real=trainer.model.hf.lm_head.forward: (
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1),
            warnings.warn("Synchronization debug mode is a prototype feature that does not detect all", stacklevel=1),
            real(x),
        )[2],
    )  # fmt: skip
    (place,) = inside.synchronisations(trainer, BenchArm("vanilla"), batch)
    assert place.startswith("test_inside.py:") and place.endswith("called a synchronizing CUDA operation")
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
