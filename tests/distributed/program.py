"""One rank of the distributed tests: ``torchrun ... -m tests.distributed.program RUN.yaml...``

Trains every configuration, one after the other in the same process as a run of two stages does, and writes beside each
what this rank's modules did (`Visits`).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llava_pdrop.config.load import load_config
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train import arguments, run

BFLOAT16, BLIND = "bf16", "blind"
"""In the name of a run: bfloat16 although this CPU is slow at it; text-only batches leave the tower out."""


class Visits:
    """The names of the modules of ``model`` in the order in which they are called, micro-batch by micro-batch, the
    recomputation in the backward pass included; the pictures of every micro-batch; whether the decoder's layers have
    whole weights on this rank when it begins."""

    def __init__(self, model: PyramidLlava) -> None:
        self.modules: list[list[str]] = []
        self.pictures: list[int] = []
        self.whole: list[bool] = []
        model.register_forward_pre_hook(self._begin)
        for name, module in model.named_modules():
            if name:
                module.register_forward_pre_hook(lambda *_, name=name: self.modules[-1].append(name))

    def _begin(self, model: nn.Module, arguments: tuple) -> None:
        self.modules.append([])
        weights = model.hf.model.language_model.layers.parameters()
        self.whole.append(not any(isinstance(weight, DTensor) or not weight.numel() for weight in weights))
        self.pictures.append(len(arguments[0].image_spans))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps({"modules": self.modules, "pictures": self.pictures, "whole": self.whole}))


def main(files: list[Path]) -> None:
    torch.set_num_threads(1)
    build_model, embed, has_fast_bfloat16 = run.build_model, PyramidLlava.embed, arguments.has_fast_bfloat16
    visits: list[Visits] = []

    def watched(*args) -> PyramidLlava:
        model = build_model(*args)
        visits.append(Visits(model))
        return model

    run.build_model = watched
    for file in files:
        arguments.has_fast_bfloat16 = (lambda device: True) if BFLOAT16 in file.stem else has_fast_bfloat16
        PyramidLlava.embed = embed_blindly(embed) if BLIND in file.stem else embed
        run.train(load_config(file))
        visits[-1].write(visits_of(file, int(os.environ["RANK"])))


def embed_blindly(embed):
    """An `embed` as one might write it: without pictures there is nothing for the tower to do."""
    return lambda model, batch, plan: (
        embed(model, batch, plan) if len(batch.image_spans) else model.hf.get_input_embeddings()(plan.text_T)
    )


def visits_of(file: Path, rank: int) -> Path:
    """Where a rank of the run ``file`` writes its `Visits`."""
    return file.with_suffix(f".visits{rank}.json")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
