"""Every benchmark against the scores that official code gave for the same answers (``PDROP_SCORING``).

The last tests spoil what is recorded and look that it is noticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_pdrop.eval.benchmarks import BENCHMARKS
from tests.golden.official_scores import MAIN, NOT_OURS, PACKED, Scored, conversation, directories, load_lines, unpacked
from tests.golden.shuffled import shuffled

ROWS = [*BENCHMARKS]
CASES = [pytest.param(name, root, id=f"{root.name}-{name}") for root in directories() for name in ROWS]
COUNTS = {"count", "rows", "questions", "llava_printed", "llava_upload_rows", "llava_upload_empty_for_unanswered"}
"""What stands in ``aggregate`` beside the rules: numbers of rows, and numbers that are there unrounded too."""

SEEDS = (1, 2)


@pytest.fixture(scope="module")
def other_names(tmp_path_factory) -> dict[tuple[Path, int], Path]:
    """(directory, seed) -> its shuffled copy."""
    made: dict[tuple[Path, int], Path] = {}
    for root in directories():
        for seed in SEEDS:
            made[root, seed] = shuffled(unpacked(root), tmp_path_factory.mktemp("shuffled") / "set", seed)
    return made


@pytest.mark.parametrize(("name", "root"), CASES)
def test_scores(name: str, root: Path, tmp_path: Path, capsys) -> None:
    scored = compare(name, unpacked(root), tmp_path)
    with capsys.disabled():
        print(f"\n{name}: {len(scored.questions)} questions, {scored.compared:,} values compared", end=" ")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "root"), CASES)
def test_scores_do_not_hang_on_names_and_order(name: str, root: Path, seed: int, other_names, tmp_path: Path) -> None:
    before, after = Scored.load(name, unpacked(root)), compare(name, other_names[root, seed], tmp_path)
    assert [q.id for q in before.questions] != [q.id for q in after.questions]
    assert after.compared >= len(before.questions)


@pytest.mark.parametrize("root", directories(), ids=lambda root: root.name)
def test_nothing_is_left_out(root: Path) -> None:
    folders = {expected.parent.name for expected in unpacked(root).glob("*/expected.json")}
    assert folders == {row.folder for row in BENCHMARKS.values()}
    assert {line["benchmark"] for line in load_lines(unpacked(root) / "prompts.jsonl")} <= folders


def compare(name: str, root: Path, scratch: Path) -> Scored:
    scored = Scored.load(name, root)
    scored.compare_facts()
    scored.compare_values()
    scored.compare_uploads(scratch)
    scored.compare_prompts(root)
    recorded = scored.expected["aggregate"].keys() | {MAIN[name]}
    assert recorded - COUNTS - {"llava_upload_columns"} == scored.seen - {"llava_upload"} | NOT_OURS.get(name, set())
    for key in scored.seen - {"llava_upload"}:
        assert key in scored.expected["rules"]
    return scored


# ---- what is recorded wrongly is noticed ----


def spoilt(name: str, change) -> Scored:
    scored = Scored.load(name, unpacked(PACKED))
    change(scored.expected)
    return scored


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_value_is_noticed(name: str, tmp_path: Path) -> None:
    rows = {"mmvet": "llava_result", "mmbench": "vlmevalkit_vanilla", "mmbench_cn": "vlmevalkit_vanilla"}
    key = rows.get(name, MAIN[name])

    def change(expected: dict[str, Any]) -> None:
        row = expected["per_question"][3]
        row[key] = row[key] + "x" if isinstance(row[key], str) else row[key] + 1e-6

    scored = spoilt(name, change)
    compared = scored.compare_values if BENCHMARKS[name].total else lambda: scored.compare_uploads(tmp_path)
    with pytest.raises(AssertionError, match="ours .*, official"):
        compared()


@pytest.mark.parametrize("name", [name for name in ROWS if BENCHMARKS[name].total is not None])
def test_a_wrong_number_of_all_is_noticed(name: str) -> None:
    for key in [MAIN[name], *BENCHMARKS[name].also]:

        def change(expected: dict[str, Any], key: str = key) -> None:
            numbers = expected["aggregate"][key]
            while isinstance(numbers[last := [name for name in numbers if name != "printed"][-1]], dict):
                numbers = numbers[last]
            numbers[last] += 1e-2 if "official" in key else 1e-6

        with pytest.raises(AssertionError, match=f"{key}.*: ours .*, official"):
            spoilt(name, change).compare_values()


@pytest.mark.parametrize("name", [name for name in ROWS if BENCHMARKS[name].upload is not None])
def test_a_wrong_upload_is_noticed(name: str, tmp_path: Path) -> None:
    fields = {"vizwiz": "llava_upload", "gqa": "llava_prediction", "mmvet": "llava_result"}

    def change(expected: dict[str, Any]) -> None:
        if name in fields:
            expected["per_question"][-1][fields[name]] += "x"
        elif name == "vqav2":
            expected["llava_upload"][-1]["answer"] += "x"
        else:
            expected["llava_upload_predictions"][-1][1] += "x"

    with pytest.raises(AssertionError, match="ours .*, official"):
        spoilt(name, change).compare_uploads(tmp_path)


def test_a_wrong_prompt_is_noticed(tmp_path: Path) -> None:
    for source, name in (("llava", "mmbench"), ("vlmevalkit", "ai2d")):
        lines = load_lines(unpacked(PACKED) / "prompts.jsonl")
        line = next(line for line in lines if line["benchmark"] == name and line["source"] == source)
        line["prompt"] = line["prompt"].replace("\nA. ", "\nA.")
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        with pytest.raises(AssertionError, match="ours .*, official"):
            Scored.load(name, unpacked(PACKED)).compare_prompts(tmp_path)


def test_a_wrong_fact_is_noticed() -> None:
    def change(expected: dict[str, Any]) -> None:
        expected["per_question"][5]["answer"] = "E"

    with pytest.raises(AssertionError, match="answer: ours .*, official"):
        spoilt("seed_bench", change).compare_facts()


def test_a_number_half_way_between_two_decimals_may_be_printed_as_either() -> None:
    scored = Scored.load("vqav2", unpacked(PACKED))
    for ours, printed in ((5.625, 5.62), (5.625, 5.63), (5.624999999999999, 5.63), (33.514, 33.51)):
        scored.same_printed(ours, printed, "overall")
    for ours, printed in ((5.6251, 5.62), (33.514, 33.52)):
        with pytest.raises(AssertionError, match="ours .*, official"):
            scored.same_printed(ours, printed, "overall")


def test_the_prompt_of_a_llava_is_its_whole_conversation() -> None:
    question = BENCHMARKS["mmvet"].read(unpacked(PACKED) / "mm-vet", True)[0]
    assert conversation(question).endswith(f"USER: <image>\n{question.text} ASSISTANT:")
