"""Directories of official scores (``PDROP_SCORING``), and what of them our rules are compared with."""

from __future__ import annotations

import atexit
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.eval.benchmarks import BENCHMARKS
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.benchmarks.files import numbered, read_answers
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Rule
from llava_pdrop.eval.rules.text import MISSING
from llava_pdrop.types import IMAGE_MARKER

REPOSITORY = Path(__file__).parents[2]
PACKED = REPOSITORY / "tests" / "golden" / "scoring" / "set.tar.xz"
TOLERANCE = 1e-9

MAIN = {
    "mme": "eval_tool", "mmbench": "vlmevalkit", "mmbench_cn": "vlmevalkit", "seed_bench": "llava",
    "mmstar": "vlmevalkit", "pope": "llava", "scienceqa": "llava", "ai2d": "vlmevalkit", "docvqa": "vlmevalkit",
    "infovqa": "vlmevalkit", "textvqa": "llava", "chartqa": "vlmevalkit", "ocrvqa": "vlmevalkit",
    "vqav2": "llava_upload_then_official", "vizwiz": "lmms_eval", "gqa": "llava", "mmvet": "llava_results",
}  # fmt: skip
"""Benchmark -> the key of its own rule in ``expected.json``. Those of `Benchmark.also` are called as there."""

NOT_OURS = {
    "mmbench": {"lmms_eval_static"},
    "mmbench_cn": {"lmms_eval_static"},
    "mmstar": {"lmms_eval"},
}
"""Recorded rules that we do not have."""

READ = {
    ("pope", "llava"): "llava_word",
    ("pope", "vlmevalkit"): "vlmevalkit_word",
    ("mme", "eval_tool"): "eval_tool_word",
    ("mme", "lmms_eval"): "lmms_eval_word",
    ("mme", "vlmevalkit"): "vlmevalkit_word",
    ("mmbench", "vlmevalkit"): "vlmevalkit_option",
    ("mmbench_cn", "vlmevalkit"): "vlmevalkit_option",
    ("seed_bench", "lmms_eval"): "lmms_eval_letter",
    ("seed_bench", "vlmevalkit"): "vlmevalkit_option",
    ("mmstar", "vlmevalkit"): "vlmevalkit_option",
    ("scienceqa", "llava"): "llava_parsed",
    ("scienceqa", "vlmevalkit"): "vlmevalkit_option",
    ("ai2d", "vlmevalkit"): "vlmevalkit_option",
    ("docvqa", "vlmevalkit"): "vlmevalkit_prediction",
    ("infovqa", "vlmevalkit"): "vlmevalkit_prediction",
    ("ocrvqa", "vlmevalkit"): "vlmevalkit_prediction",
    ("textvqa", "llava"): "llava_answer",
    ("textvqa", "vlmevalkit"): "vlmevalkit_answer",
    ("vizwiz", "lmms_eval"): "llava_upload",
    ("vizwiz", "vlmevalkit"): "vlmevalkit_answer",
    ("vqav2", "llava_upload_then_official"): "llava_upload",
    ("vqav2", "lmms_eval"): "lmms_eval_answer",
    ("gqa", "llava"): "llava_prediction",
}
"""(benchmark, rule) -> what was parsed, in ``per_question``."""

FACTS = {"label": "gold", "answer": "gold", "category": "category", "data_type": "kind", "split": "part"}
"""Field of ``per_question`` -> what we call it."""


def directories() -> list[Path]:
    """What ``PDROP_SCORING`` names; by default what is packed in this repository, and the set beside it, if there."""
    if named := os.environ.get("PDROP_SCORING"):
        assert Path(named).exists(), f"PDROP_SCORING={named}: no such directory, or archive of one"
        return [Path(named).resolve()]
    full = REPOSITORY.parent / "shared" / "scoring"
    return [PACKED, *([full] if full.is_dir() else [])]


@lru_cache(maxsize=1)
def unpacked(archive: Path) -> Path:
    """The directory within ``archive``, which lies there until the tests end; a directory stays where it is."""
    if archive.is_dir():
        return archive
    home = tempfile.TemporaryDirectory()
    atexit.register(home.cleanup)
    with tarfile.open(archive) as opened:
        opened.extractall(home.name, filter="data")
    return Path(home.name)


def load_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


@dataclass
class Scored:
    """A benchmark of a directory, asked and answered as recorded; ``compared``: values looked at so far."""

    row: Benchmark
    directory: Path
    expected: dict[str, Any]
    questions: list[Question]
    answers: list[str | None]
    compared: int = 0
    seen: set[str] = field(default_factory=set)

    @staticmethod
    def load(name: str, root: Path, expected: dict[str, Any] | None = None) -> Scored:
        row = BENCHMARKS[name]
        directory = root / row.folder
        stored = json.loads((directory / "expected.json").read_text(encoding="utf-8"))
        files = [*directory.glob("answers/**/*.jsonl"), *directory.glob("predictions.jsonl")]
        assert len(files) == 1, f"{directory}: {len(files)} files of answers"
        questions = row.read(directory, True)
        return Scored(row, directory, expected or stored, questions, read_answers(files[0], questions))

    def rules(self) -> Iterator[tuple[str, Rule]]:
        if self.row.grade is not None:
            yield MAIN[self.row.name], Rule(self.row.rule, self.row.grade, self.row.total)
        yield from self.row.also.items()

    def same(self, ours: Any, theirs: Any, what: str) -> None:
        self.compared += 1
        if isinstance(theirs, float) or isinstance(ours, float):
            equal = theirs is not None and abs(ours - theirs) <= TOLERANCE
        else:
            equal = ours == theirs
        if not equal and isinstance(ours, list) and isinstance(theirs, list):
            assert len(ours) == len(theirs), f"{self.row.name}: {what}: ours {len(ours)}, official {len(theirs)}"
            ours, theirs = next(pair for pair in zip(ours, theirs) if pair[0] != pair[1])
        assert equal, f"{self.row.name}: {what}: ours {ours!r}, official {theirs!r}"

    def same_printed(self, ours: float, theirs: float, what: str) -> None:
        """``theirs`` has two decimals; half way between two of them (0.9 of 16 answers is 5.625 %) the last digit of a
        float decides, so both are right."""
        self.compared += 1
        assert abs(ours - theirs) <= 0.005 + TOLERANCE, f"{self.row.name}: {what}: ours {ours!r}, official {theirs!r}"

    def rows(self) -> list[dict[str, Any]]:
        """``per_question`` in the order of our questions: by name where it has one of its own, else in order."""
        rows = self.expected["per_question"]
        by_name = dict(zip(numbered([str(row["id"]) for row in rows]), rows))
        if {question.id for question in self.questions} != by_name.keys():
            by_name = dict(zip(numbered([str(row.get("image_id")) for row in rows]), rows))
        if self.row.name == "mmvet":
            by_name = {str(row["id"]).removeprefix("v1_"): row for row in rows}
        self.same(sorted(question.id for question in self.questions), sorted(by_name), "names of questions")
        return [by_name[question.id] for question in self.questions]

    def compare_facts(self) -> None:
        """Right answers, categories, and whether there is a picture."""
        for question, row in zip(self.questions, self.rows()):
            for key in FACTS.keys() & row.keys():
                own = question.gold if FACTS[key] == "gold" else question.facts[FACTS[key]]
                self.same(own, row[key], f"{question.id}: {key}")
            if "has_image" in row:
                self.same(len(question.record.images), row["has_image"], f"{question.id}: has_image")

    def grades(self, rule: Rule) -> list[Grade]:
        return [rule.grade(question, answer) for question, answer in zip(self.questions, self.answers)]

    def compare_values(self) -> None:
        """What every answer is worth, what was read in it, and the numbers of all, by every rule."""
        for key, rule in self.rules():
            grades = self.grades(rule)
            for question, grade, row in zip(self.questions, grades, self.rows()):
                value = row.get(f"{key}_vanilla", row.get(key))
                if value is None:
                    asked = question.record.images and grade.answered and question.facts.get("kind") != "video"
                    assert not asked, f"{question.id}: has no value by {key}"
                    continue
                self.same(grade.value, float(value), f"{question.id}: {key}")
                if (self.row.name, key) in READ and (grade.answered or row.get(READ[self.row.name, key]) != "FAILED"):
                    field_name = READ[self.row.name, key]
                    self.same(grade.read, row[field_name], f"{question.id}: {field_name}")
            self.seen.add(key)
            ours = rule.total(self.questions, grades)(np.ones(len(self.questions)))
            self.compare_aggregate(key, ours, grades)
            if self.row.name.startswith("mmbench"):
                self.compare_circular(grades)

    def compare_circular(self, grades: list[Grade]) -> None:
        right: dict[str, float] = {}
        for question, grade in zip(self.questions, grades):
            right[question.unit] = min(grade.value, right.get(question.unit, 1.0))
        theirs = {str(row["id"]): row["vlmevalkit_circular"] for row in self.expected["circular"]}
        self.same(sorted(right), sorted(theirs), "questions of all rotations")
        for unit, value in theirs.items():
            self.same(right[unit], value, f"{unit}: all rotations")

    def compare_aggregate(self, key: str, ours: dict[str, float], grades: list[Grade]) -> None:
        theirs = dict(flat(self.expected["aggregate"][key]))
        counts = counted(self, grades)
        for name, value in theirs.items():
            name = name.replace("_dev/", "/")
            if name.startswith("printed"):
                if name in ("printed", "printed/accuracy"):  # rounded, the number of the paper last
                    shown = value[-1] if isinstance(value, list) else value
                    self.same_printed(ours[self.row.headline], shown, f"{key} {name}")
                continue
            if name in counts:
                self.same(counts[name], value, f"{key} {name}")
                continue
            assert name in ours, f"{self.row.name}: {key}: {name} is not among ours: {sorted(ours)}"
            compare = self.same_printed if "official" in key else self.same
            compare(ours[name], float(value), f"{key} {name}")
        missing = ours.keys() - {name.replace("_dev/", "/") for name in theirs}
        assert missing != ours.keys(), f"{self.row.name}: {key}: nothing was compared"
        assert not missing, f"{self.row.name}: {key}: nothing official to compare {sorted(missing)} with"
        if self.row.headline and key == MAIN[self.row.name]:
            assert self.row.headline in ours

    def compare_uploads(self, scratch: Path) -> None:
        if self.row.upload is None:
            return
        file = self.row.upload(self.questions, self.answers, scratch, "golden")
        assert file.is_file() and "golden" in str(file.relative_to(scratch))
        UPLOADS[self.row.name](self, file)

    def compare_prompts(self, root: Path) -> None:
        """Prompts of a LLaVA as the whole conversation; those of VLMEvalKit for other models, where LLaVA has none."""
        lines = [line for line in load_lines(root / "prompts.jsonl") if line["benchmark"] == self.row.folder]
        if any(line["source"] == "llava" for line in lines):
            asked, source, text_of = self.questions, "llava", conversation
        else:
            asked, source, text_of = self.row.read(self.directory, False), "vlmevalkit", words
        before = self.compared
        for line in lines:
            if line["source"] == source:
                own = [text_of(question) for question in asked if question.id.split("#")[0] == str(line["id"])]
                self.same(line["prompt"] if line["prompt"] in own else own, line["prompt"], f"prompt of {line['id']}")
        assert self.compared > before, f"{self.row.name}: no prompt to compare"

    def compare_upload_vqav2(self, file: Path) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        self.same(content, self.expected["llava_upload"], "upload")
        counts = self.expected["aggregate"]
        self.same(len(content), counts["llava_upload_rows"], "rows of the upload")
        self.compared += len(content)

    def compare_upload_vizwiz(self, file: Path) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [{"image": row["image"], "answer": row["llava_upload"]} for row in self.rows()]
        self.same(content, rows, "upload")
        self.compared += len(content)

    def compare_upload_gqa(self, file: Path) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [{"questionId": row["id"], "prediction": row["llava_prediction"]} for row in self.rows()]
        self.same(content, rows, "upload")
        self.compared += len(content)

    def compare_upload_mmvet(self, file: Path) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        self.same(content, {row["id"]: row["llava_result"] for row in self.rows()}, "results")
        self.compared += len(content)
        self.seen.add("llava_results")

    def compare_upload_mmbench(self, file: Path) -> None:
        from openpyxl import load_workbook

        head, *rows = load_workbook(file).active.iter_rows(values_only=True)
        self.same(list(head), self.expected["aggregate"]["llava_upload_columns"], "columns of the upload")
        place = head.index("prediction")
        ours = [[row[0], None if row[place] in MISSING else row[place]] for row in rows]
        theirs = [[id, None if text in MISSING else text] for id, text in self.expected["llava_upload_predictions"]]
        self.same(ours, theirs, "upload")
        self.compared += len(ours)
        self.seen.add("llava_upload")


UPLOADS = {
    "vqav2": Scored.compare_upload_vqav2,
    "vizwiz": Scored.compare_upload_vizwiz,
    "gqa": Scored.compare_upload_gqa,
    "mmvet": Scored.compare_upload_mmvet,
    "mmbench": Scored.compare_upload_mmbench,
    "mmbench_cn": Scored.compare_upload_mmbench,
}


def flat(numbers: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """``{a: {b: 1}}`` -> ``a/b``, 1."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}/")
        else:
            yield before + name, value


def counted(scored: Scored, grades: list[Grade]) -> dict[str, float]:
    """Counts that are recorded beside the shares."""
    found: dict[str, float] = {}
    if scored.row.name == "scienceqa":
        pictured = sum(bool(q.record.images) and g.answered for q, g in zip(scored.questions, grades))
        found = {"total": len(grades), "correct": sum(grade.value for grade in grades)}
        found |= {"img_total": pictured, "count": pictured}
    if scored.row.name == "pope":
        for category in ("adversarial", "popular", "random"):
            pairs = [
                (grade.read, question.gold)
                for question, grade in zip(scored.questions, grades)
                if question.facts["category"] == category
            ]
            found[f"{category}/samples"] = len(pairs)
            for name, pair in {
                "TP": ("yes", "yes"),
                "FP": ("yes", "no"),
                "TN": ("no", "no"),
                "FN": ("no", "yes"),
            }.items():
                found[f"{category}/{name}"] = pairs.count(pair)
    return found


def conversation(question: Question) -> str:
    """The whole prompt of a LLaVA-1.5, as text."""
    template = TEMPLATES["v1"]
    return "".join(piece.text for piece in template.generation_prompt(template.rounds(question.record.turns)))


def words(question: Question) -> str:
    """The text behind the picture."""
    return question.record.turns[-1].text.replace(f"{IMAGE_MARKER}\n", "", 1)
