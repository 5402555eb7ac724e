"""Questions shared out among processes: the answers are those of one process, whoever gave them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from accelerate.state import PartialState

from llava_pdrop.compare.compare import RESULTS_FILE
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.config.schema import Config
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.evaluate import EVALUATION_FILE, PREDICTIONS_FILE, evaluate_config
from llava_pdrop.eval.team import ALONE, Team, team_of
from llava_pdrop.runtime.watchdog import DIRECTORY, STUCK_EXIT
from llava_pdrop.train.run import train
from llava_pdrop.world import environment_kept
from tests.faults.processes import Fault, run_ranks
from tests.messages import says

DROP = {"layers": [1, 2, 3], "ratios": [0.5, 0.25, 0.125]}
LUCKY = {"layers": [1], "ratios": [0.25], "ranker": "random"}
EVAL = {"batch_size": 2, "max_new_tokens": 4, "limit": 5}  # 3 batches, so 2 processes have not the same number


def left_by(config: Config) -> dict[str, str]:
    """What an evaluation has written."""
    return {name: (Path(config.output_dir) / name).read_text() for name in (PREDICTIONS_FILE, EVALUATION_FILE)}


@pytest.mark.parametrize(("tasks", "ranks"), [(5, 1), (5, 2), (1, 3), (6, 3), (7, 3)])
def test_every_task_is_done_once(tasks, ranks):
    teams = [Team(rank, ranks) for rank in range(ranks)]
    rounds = {team.rounds(tasks) for team in teams}
    assert rounds == {-(-tasks // ranks)}, "all come to the same places"
    done = [team.task(turn) for team in teams for turn in range(team.rounds(tasks))]
    assert sorted(number for number in done if number < tasks) == list(range(tasks))


def test_one_process_is_a_team_of_its_own(tiny_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with team_of(load_config(tiny_config()), Path("/nowhere")) as team:
        assert team is ALONE and team.first and team.gather("x") == ["x"]


def test_others_without_a_launcher_are_one_line(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(PartialState, "_shared_state", {})  # of earlier tests in this process
    line = says("run.yaml", "WORLD_SIZE=2", "unset WORLD_SIZE")
    with environment_kept():
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ["WORLD_SIZE"] = "2"
        with pytest.raises(ConfigError, match=line), team_of(load_config(tiny_config()), tmp_path):
            pass


@pytest.mark.parametrize("section", [DROP, LUCKY], ids=["attention", "random"])
def test_answers_do_not_depend_on_the_number_of_processes(tiny_config, section):
    """Nor do the numbers drawn by the random ranker, and one process has no batch at all in the last round."""
    file = tiny_config(pyramid_drop=section, eval=EVAL)
    config = load_config(file)
    run = train(config) / RUN_FILE
    alone = evaluate_config(config)
    before = left_by(config)
    assert len(alone.predictions) == 5 and len({entry.answer for entry in alone.predictions}) > 1
    for name in before:
        (run.parent / name).unlink()
    ended = run_ranks(file, ranks=2, command="eval")
    assert ended.codes == [0, 0], ended.texts
    assert left_by(config) == before
    assert f"{alone.accuracy:.1%} (chance {alone.chance:.1%}), 5 questions" in ended.texts[0].replace("\n", " ")
    assert "questions" not in ended.texts[1]
    assert not (run.parent / DIRECTORY).exists()


def test_comparison_by_two_processes(tiny_config):
    """Both train and both answer; one report is left, with the accuracies of one process over the same weights."""
    file = tiny_config("job", pyramid_drop=DROP, eval=EVAL, compare={"training_free": {"lucky": LUCKY}})
    ended = run_ranks(file, ranks=2, command="compare")
    assert ended.codes == [0, 0], ended.texts
    output = Path(load_config(file).output_dir)
    rows = {row["name"]: row for row in json.loads((output / RESULTS_FILE).read_text())["rows"]}
    assert list(rows) == ["vanilla", "pyramid_drop", "vanilla + lucky"]
    alone = evaluate_config(load_config(output / "pyramid_drop" / RUN_FILE))
    assert rows["pyramid_drop"]["accuracy"] == alone.accuracy
    assert rows["pyramid_drop"]["image_tokens"] == alone.image_tokens
    saving = rows["pyramid_drop"]["saving"]
    assert saving["quartiles"] is None and re.search(says("had 2", "now 2"), saving["reason"])
    assert "report: " in ended.texts[0] and "report: " not in ended.texts[1]


def test_ablation_of_a_checkpoint_by_two_processes(tiny_config, tmp_path):
    file = tiny_config(pyramid_drop=DROP, eval=EVAL)
    output = train(load_config(file))
    variants = {"vanilla": {"pyramid_drop": None}, "pyramid": {}}
    ablation = tmp_path / "ablation.yaml"
    content = {"base": file.name, "name": "ab", "output_dir": str(tmp_path / "ab"), "variants": variants}
    ablation.write_text(json.dumps(content))
    ended = run_ranks(ablation, f"checkpoint={output}", ranks=2, command="ablate")
    assert ended.codes == [0, 0], ended.texts
    evaluate_config(load_config(file))
    alone = (output / PREDICTIONS_FILE).read_text()
    assert (tmp_path / "ab/predictions/pyramid.jsonl").read_text() == alone
    assert "report: " in ended.texts[0] and "report: " not in ended.texts[1]


def test_what_is_wrong_on_one_rank_is_said(tiny_config, tiny_files, tmp_path):
    """The second batch, which is the second rank's, has a picture that is none."""
    records = json.loads((tiny_files / "data/eval.json").read_text())
    for record in records:
        record["image"] = str(tiny_files / "data/images" / record["image"])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    records[2]["image"] = str(tmp_path / "broken.png")
    (tmp_path / "questions.json").write_text(json.dumps(records))
    file = tiny_config(pyramid_drop=DROP, eval=EVAL)
    train(load_config(file))
    ended = run_ranks(file, f"data.eval={tmp_path / 'questions.json'}", ranks=2, command="eval")
    assert ended.codes[1] == 2 and ended.codes[0] != 0
    assert "[rank 1] error: " in ended.texts[1] and "broken.png" in ended.texts[1]
    assert "Traceback" not in ended.texts[1]


def test_a_stuck_rank_is_named(tiny_config):
    train_section = {"max_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "ddp_timeout": 15}
    file = tiny_config(pyramid_drop=DROP, train=train_section, eval=EVAL)
    train(load_config(file))
    ended = run_ranks(file, ranks=2, command="eval", fault=Fault("sleep_answering", 1, rank=1), limit=300)
    assert ended.codes == [STUCK_EXIT, STUCK_EXIT], ended.texts
    assert re.search(says("gathering", "rank 1 (", "round 1", "arrived"), ended.texts[0])
    assert "in prepare" in ended.texts[1]
