"""Which benchmarks and schedules are measured, and what a score stands beside."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llava_pdrop.config.load import load_config
from llava_pdrop.config.schema import PaperRow
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.answering import Answer
from llava_pdrop.eval.benchmarks import BENCHMARKS
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.evaluate import AnswerSettings
from llava_pdrop.eval.measure import Examinee, chosen, columns_of, first_units
from llava_pdrop.eval.questions import ask
from llava_pdrop.eval.rules.grades import Grade, means
from llava_pdrop.eval.score import beside_paper, paired, score_of
from llava_pdrop.eval.score_table import blocks, refuse_unread
from llava_pdrop.eval.team import ALONE
from llava_pdrop.report.page import markdown_of
from llava_pdrop.runtime import device
from llava_pdrop.schedule import Schedule
from tests.messages import says

DROP = Schedule((1, 2), (0.5, 0.25))
QUESTIONS = [ask(str(i), "Is it?", [], f"q[{i}]", "yes", unit=f"u{i // 2}") for i in range(40)]
TOY = Benchmark(
    name="toy",
    title="Toy",
    wanted=(),
    rule="none",
    split="val",
    read=lambda directory, llava: list(QUESTIONS),
    grade=lambda question, answer: Grade(float(answer == question.gold)),
    total=means,
    headline="Overall",
    paper_split="test",
)


def row_of(*scores):
    """Head -> cell of the first of ``scores``."""
    table, *_ = blocks(scores)
    return dict(zip(table.head, table.rows[0]))


def answers(right):
    return [Answer(q.id, "yes" if i % right else "no", (8,), 0.5) for i, q in enumerate(QUESTIONS)]


def score(column="vanilla", right=4, benchmark=TOY, schedule=Schedule()):
    return score_of(benchmark, QUESTIONS, answers(right), column, schedule, "p")


def test_names_are_keys_titles_or_the_papers(tiny_config):
    config = load_config(tiny_config(), ["benchmarks=POPE"])
    assert chosen(config) == [BENCHMARKS["pope"]]
    assert chosen(load_config(tiny_config(), ["benchmarks=pope,POPE"])) == [BENCHMARKS["pope"]]
    config = replace(config, eval=replace(config.eval, benchmarks=("paper",)))
    assert chosen(config) == [row for row in BENCHMARKS.values() if row.total is not None]
    told = replace(config, paper=PaperRow("Table 1", scores={"POPE": 86.0, "Video": 1.0}))
    assert chosen(told) == [BENCHMARKS["pope"]]
    with pytest.raises(ConfigError, match=says("eval.benchmarks", "'pop'", "did you mean 'pope'")):
        chosen(load_config(tiny_config(), ["benchmarks=pop"]))


def test_columns_are_the_runs_own_and_those_named(tiny_config):
    section = {"layers": [1, 2], "ratios": [0.5, 0.25]}
    file = tiny_config(pyramid_drop=section, compare={"training_free": {"late": {"layers": [3], "ratios": [0.5]}}})
    config = load_config(file, ["training_free=vanilla,late"])
    found = columns_of(config, "pyramid_drop", 4)
    assert list(found) == ["pyramid_drop", "vanilla", "late"]
    assert found["late"].layers == (3,) and not found["vanilla"].layers
    with pytest.raises(ConfigError, match=says("eval.training_free", "'lat'", "did you mean 'late'")):
        columns_of(load_config(file, ["training_free=lat"]), "pyramid_drop", 4)
    for name in ("pyramid_drop", "vanilla"):
        other = tiny_config(pyramid_drop=section, compare={"training_free": {name: {"layers": [3], "ratios": [0.5]}}})
        with pytest.raises(ConfigError, match=says(f"compare.training_free.{name}", "another name")):
            columns_of(load_config(other, [f"training_free={name}"]), "pyramid_drop", 4)
    with pytest.raises(ConfigError, match=says("compare.training_free.a/b", "name")):
        load_config(tiny_config(pyramid_drop=section, compare={"training_free": {"a/b": "same"}}))
    same = load_config(tiny_config(), ["training_free=vanilla"])
    assert list(columns_of(same, "vanilla", 4)) == ["vanilla"], "one schedule is one column"


@pytest.mark.parametrize(
    "word",
    ["eval.max_new_tokens=3", "train.bf16=true", "seed=5", "pyramid_drop.ranker=fastv", "prompt", "ends", "model"],
)
def test_all_that_answers_depend_on_has_a_directory_of_its_own(tiny_config, tmp_path, monkeypatch, word):
    monkeypatch.setattr(device, "has_fast_bfloat16", lambda device: True)  # elsewhere bf16 answers are float32's
    file = tiny_config(pyramid_drop={"layers": [1, 2], "ratios": [0.5, 0.25], "ranker": "random"})

    def kept(prompt="p", end=2, model="m", words=()):
        respondent = SimpleNamespace(text=lambda question: prompt, ends=[end], stops=())
        config = load_config(file, list(words))
        monkeypatch.setattr("llava_pdrop.eval.measure.model_facts", lambda directory: {"weights": model})
        examinee = Examinee(AnswerSettings.of(config), respondent, ALONE, tmp_path)
        return examinee.kept(TOY, QUESTIONS, "c", config.schedule)

    own = {"prompt": {"prompt": "q"}, "ends": {"end": 3}, "model": {"model": "n"}}.get(word, {"words": [word]})
    assert kept().directory == kept().directory != kept(**own).directory


def test_a_limit_counts_units(tiny_config):
    assert len(first_units(QUESTIONS, 3)) == 6
    assert first_units(QUESTIONS, None) == QUESTIONS


def test_a_score_has_an_interval_over_units_and_what_was_seen():
    found = score()
    assert found.value == pytest.approx(75.0) and found.low < 75 < found.high
    assert found.image_tokens == [8] and found.seconds == 0.5 and found.questions == 40
    dropped = score(schedule=DROP)
    assert dropped.image_tokens == [8, 4, 2]


def test_the_second_column_is_compared_in_pairs():
    first, second = paired([score("vanilla", 4), score("pyramid_drop", 2)])
    assert first.against is None
    name, difference, low, high = second.against
    assert (name, difference) == ("vanilla", pytest.approx(-25.0)) and low < -25 < high
    same = paired([score("vanilla", 4), score("pyramid_drop", 4)])[1]
    assert same.against[1:] == (0, 0, 0), "the same answers differ by nothing, whatever is drawn"


def test_the_paper_stands_only_beside_what_it_is_about(tiny_config):
    config = load_config(tiny_config())
    reported = {"Toy": 70.0}
    other_split = beside_paper(score(), config.eval.limit, reported)
    assert other_split.paper is None
    assert row_of(other_split)["difference"] == "(paper: test)"
    alike = beside_paper(score(benchmark=replace(TOY, paper_split="")), config.eval.limit, reported)
    assert alike.paper == 70.0 and row_of(alike)["difference"] == "+5.0"
    limited = replace(config, eval=replace(config.eval, limit=3))
    assert beside_paper(score(benchmark=replace(TOY, paper_split="")), limited.eval.limit, reported).paper is None


def test_unread_pictures_stay_in_the_denominator():
    some = [Answer(q.id, "", problem="cut") if i < 10 else a for i, (q, a) in enumerate(zip(QUESTIONS, answers(100)))]
    found = score_of(TOY, QUESTIONS, some, "vanilla", Schedule(), "p")
    assert found.unread == 10 and found.problem == "cut" and found.value == pytest.approx(75.0)
    assert row_of(found)["not read"] == "10"


@pytest.mark.parametrize(("unread", "questions"), [(1, 70), (3, 7), (1, 60)])
def test_the_share_that_a_refusal_names_is_enough(capsys, unread, questions):
    found = replace(score(), unread=unread, questions=questions)
    with pytest.raises(SystemExit) as exit:
        refuse_unread([score(), found], 0.01)
    assert exit.value.code == 1
    said = capsys.readouterr().out
    assert re.search(says("toy", str(unread), str(questions)), said)
    refuse_unread([found], float(said.split("eval.max_unread=")[1]))


def test_what_only_a_server_knows_has_no_score():
    found = score_of(replace(TOY, total=None), QUESTIONS, answers(2), "vanilla", Schedule(), "p")
    assert found.value is None and row_of(found)["score"] == "server"
    assert "server" in markdown_of(blocks(paired([found, found])))
    asked = [replace(question, facts={"known": False}) for question in QUESTIONS]
    assert score_of(TOY, asked, answers(2), "vanilla", Schedule(), "p").value is None


def test_a_limit_that_leaves_no_question_of_the_score():
    """The first question of ScienceQA has no picture, and its score is that of the others."""
    nothing = replace(TOY, total=lambda questions, grades: lambda weights: {"accuracy": 75.0})
    found = score_of(nothing, QUESTIONS, answers(4), "vanilla", Schedule(), "p")
    assert found.value is None and found.numbers == {"accuracy": 75.0}
    assert row_of(*paired([found, found]))["score"] == "none asked"
