"""A model to talk to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.conversation import Conversation, Settings

DROP = Schedule((1, 2, 3), (0.5, 0.25, 0.125))


@pytest.fixture(scope="module")
def respondent(tiny_files: Path) -> LlavaRespondent:
    torch.manual_seed(0)
    parts = build_parts(language_model=str(tiny_files / "llm"), vision_tower=str(tiny_files / "tower"))
    with torch.no_grad():
        for parameter in parts.hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return LlavaRespondent(parts, TEMPLATES["qa"])


@pytest.fixture
def pictures(tiny_files: Path) -> list[Path]:
    return sorted((tiny_files / "data/images").glob("*.png"))[:3]


@pytest.fixture
def conversation(respondent: LlavaRespondent) -> Conversation:
    return Conversation(respondent, DROP, Settings(max_new_tokens=6))
