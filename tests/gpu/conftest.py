"""Every test in this directory has the marker ``gpu`` and needs a CUDA device; elsewhere it is skipped with the reason.

make test-gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

NO_DEVICE = "needs a CUDA device: its kernels have no CPU version"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Called with the items of all directories."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_DEVICE))


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Float32 means float32: no TF32 in matrix products, nor in convolutions, where torch allows it by default."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    """Operations that make the host wait for the device raise. The mode is global: it holds for autograd's threads."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def synchronising_is_allowed() -> Iterator[None]:
    """An exception inside of `synchronising_is_an_error`, which must be the mode here."""
    assert torch.cuda.get_sync_debug_mode() == 2, "nothing is forbidden here"
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("error")


@pytest.fixture
def sync_allowed():
    """The context manager `synchronising_is_allowed`."""
    return synchronising_is_allowed


@pytest.fixture
def no_sync():
    """The context manager `synchronising_is_an_error`."""
    return synchronising_is_an_error
