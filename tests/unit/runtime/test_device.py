"""Devices: by which name they are known, how fast they are, how much memory a process has used."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.runtime.device import PEAK_TFLOPS, device_named, known_gpu, peak_flops, peak_memory, reset_peak_memory


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIE"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 2080 Ti", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, key: str | None) -> None:
    assert known_gpu(name) == key
    assert key is None or PEAK_TFLOPS[key] > 0


@pytest.mark.parametrize(("name", "number"), [("cuda", 0), (None, 0), ("cuda:1", 1)])
def test_a_gpu_has_a_number_and_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str | None, number: int
) -> None:
    """`torch.cuda.set_device` refuses a device without one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", current.append, raising=False)
    assert device_named(name) == torch.device("cuda", number)
    assert current == [number]


def test_an_unknown_device_is_measured() -> None:
    rate, source = peak_flops(torch.device("cpu"), torch.float32)
    assert rate > 1e8 and source.startswith("measured")


CPU = torch.device("cpu")


def test_peak_memory_sees_a_large_tensor():
    reset_peak_memory()
    before = peak_memory(CPU)["peak_rss_mib"]
    tensor = torch.ones(64 * 2**20 // 4)
    assert peak_memory(CPU)["peak_rss_mib"] >= before + 40 or before > 2000
    assert tensor.sum() > 0
    assert peak_memory(CPU)["peak_rss_mib"] == pytest.approx(peak_memory(CPU)["peak_rss_mib"], rel=0.1)
