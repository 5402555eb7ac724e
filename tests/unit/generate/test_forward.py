"""What a token behind a pruned prompt costs: its masks and rotary embeddings are made once for all layers that share
them. (That they are the right ones is shown in tests/parity.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_pdrop.generate import forward
from llava_pdrop.generate.forward import Layers
from llava_pdrop.generate.plugin import attach
from llava_pdrop.schedule import Schedule
from tests.parity.generation import inputs, make_hf_model
from tests.tiny import make_sample

DROPS = Schedule((2, 3, 5), (0.5, 0.25, 0.125))


@pytest.mark.parametrize(
    ("schedule", "entries"),
    [
        (DROPS, [None, None, 0, 1, 1, 2]),
        (Schedule((0, 3), (0.5, 0.25)), [0, 0, 0, 1, 1, 1]),
        (Schedule((2, 3), (0.5, 0.25), inject=2), [0, 0, 2, 3, 3, 3]),
        (Schedule(downsample=9), [0, 0, 0, 0, 0, 0]),
    ],
    ids=["drops", "before the decoder", "inject", "downsample"],
)
def test_layers_know_their_stage(schedule: Schedule, entries: list[int | None]) -> None:
    decoder = make_hf_model().model.language_model
    known = Layers.of(decoder, schedule)
    assert known.entries == entries and known.windows == [None] * 6 and known.types == [()] * 6
    assert Layers.of(make_hf_model("mistral_window").model.language_model, schedule).windows == [9] * 6


@pytest.mark.parametrize(("positions", "calls"), [("renumber", 2), ("keep", 1)])
def test_a_token_makes_one_rotary_embedding_for_all_stages_and_no_mask(
    monkeypatch: pytest.MonkeyPatch, positions: Any, calls: int
) -> None:
    hf, rows = make_hf_model(), [make_sample(1, (28, 28), 3, seed=seed) for seed in (0, 1)]
    attach(hf, Schedule(DROPS.layers, DROPS.ratios, positions=positions))
    given = inputs(hf, *rows)
    with torch.no_grad():
        cache = hf(**given, use_cache=True).past_key_values
    rotary, turned = hf.model.language_model.rotary_emb, list[torch.Size]()
    rotary.register_forward_hook(lambda module, args, output: turned.append(output[0].shape[:2]))
    masks, own = list[Any](), forward.stage_mask
    monkeypatch.setattr(forward, "stage_mask", lambda *args: masks.append(own(*args)) or masks[-1])
    mask = torch.ones(2, given["input_ids"].shape[1] + 1, dtype=torch.long)
    with torch.no_grad():
        hf(input_ids=torch.full((2, 1), 4), attention_mask=mask, past_key_values=cache, use_cache=True)
    assert len(turned) == calls and turned[1:] == [torch.Size([3 * 2, 1])] * (calls - 1)
    assert masks == [None] * 3
