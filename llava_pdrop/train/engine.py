"""The engine of one run ends with it: what comes next in the process (stage 2, a vanilla model to compare with, another
variant, an evaluation) has an engine of its own, or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

SET_BY_ENGINES = ("ACCELERATE_", "FSDP_")
"""Beginnings of the environment variables by which transformers tells accelerate of DeepSpeed, FSDP and compilation. It
leaves them there, and a later run would take them for its own."""


@contextmanager
def engine_for_one_run() -> Iterator[None]:
    """Takes back what the engine of a run changes in this process: environment variables, and the ZeRO-3 of models that
    are made."""
    with environment_kept(SET_BY_ENGINES):
        try:
            yield
        finally:
            unset_hf_deepspeed_config()


@contextmanager
def environment_kept(beginnings: tuple[str, ...] = ("",)) -> Iterator[None]:
    """Takes back what is changed meanwhile in the environment variables that begin so (default: in all)."""

    def variables() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(beginnings)}

    before = variables()
    try:
        yield
    finally:
        for name in variables().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
