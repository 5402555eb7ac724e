"""Every benchmark against the scores that official code gave for the same answers (``PDROP_SCORING``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_pdrop.eval.benchmarks import BENCHMARKS
from tests.golden.scoring import Scored, conversation, directories, load_lines

CASES = [pytest.param(name, root, id=f"{root.parent.name}-{name}") for root in directories() for name in BENCHMARKS]


@pytest.mark.parametrize(("name", "root"), CASES)
def test_scores(name: str, root: Path, tmp_path: Path, capsys) -> None:
    scored = Scored.load(name, root)
    scored.compare_facts()
    scored.compare_values()
    scored.compare_uploads(tmp_path)
    compare_prompts(scored, root)
    assert scored.compared
    with capsys.disabled():
        print(f" {name}: {len(scored.questions)} questions, {scored.compared} values compared", end="")


def compare_prompts(scored: Scored, root: Path) -> None:
    seen: dict[str, int] = {}
    for line in load_lines(root / "prompts.jsonl"):
        if line["benchmark"] != scored.row.folder:
            continue
        if line["source"] == "llava":
            id = str(line["id"])
            seen[id] = seen.get(id, 0) + 1
            id = id if seen[id] == 1 else f"{id}#{seen[id]}"
            question = next(q for q in scored.questions if q.id == id)
            scored.same(conversation(question), line["prompt"], f"prompt of {id}")
