"""Our models under an unmodified lmms-eval, offline (``make test-lmms-eval``): to local questions it has the answers of
`llava-pdrop eval`.

The model is a short training on pages, from the shipped miniatures: wrong answers, but not the same to every page.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import entry_points, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from llava_pdrop.__main__ import main
from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.config.load import load_config
from llava_pdrop.data.records import read_records
from llava_pdrop.eval.evaluate import PREDICTIONS_FILE
from llava_pdrop.eval.lmms.requests import limits_of
from llava_pdrop.train.run import train
from llava_pdrop.types import IMAGE_MARKER
from tests.messages import says

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="no lmms-eval here: make test-lmms-eval"),
    pytest.mark.process,
    pytest.mark.trains,
    pytest.mark.xdist_group("lmms"),
]

ROOT = Path(__file__).parents[2]
TASKS = Path(__file__).parent / "tasks"
BATCH = 16
DROP = ["pyramid_drop.layers=[1,2,3]", "pyramid_drop.ratios=[0.5,0.25,0.125]"]
SAME = "layers=1-2-3,ratios=0.5-0.25-0.125"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``forms`` (pages), a run trained on some, and ``pages.json``, what the task asks: the same."""
    home = tmp_path_factory.mktemp("lmms")
    counts = ["--pretrain", "1", "--train", "96", "--eval", "40"]
    pages = [sys.executable, str(ROOT / "data/prepare/forms.py"), "--out", str(home / "forms"), *counts]
    subprocess.run(pages, check=True, capture_output=True)
    where = [
        f"data.train={home}/forms/train.json",
        f"data.eval={home}/forms/eval.json",
        f"data.image_root={home}/forms",
    ]
    paths = [f"model.{name}={ROOT}/data/tiny/{name}" for name in ("language_model", "vision_tower")]
    paths = [word.replace("data/tiny/vision_tower", "data/tiny/tower") for word in paths]
    words = [*where, *paths, f"model.projector={ROOT}/data/tiny/projector/model.safetensors", "pretrain=null"]
    words += ["data.prepare=null", "data.samples_per_batch=4", "train.max_steps=24", f"output_dir={home}/run"]
    train(load_config(ROOT / "configs/tiny/finetune_pdrop.yaml", words))
    rows = [
        {
            "question": record.turns[0].text.replace(IMAGE_MARKER, "").strip(),
            "image": str(record.images[0]),
            "answer": record.turns[-1].text,
        }
        for record in read_records(home / "forms/eval.json", home / "forms")
    ]
    (home / "pages.json").write_text(json.dumps(rows))
    return home


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What data sets leave behind goes with the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@cache
def tasks() -> Any:
    """What lmms-eval finds in ``TASKS``, beside its own; it reads all files of both for that."""
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS), model_name="llava_pdrop")


def given(home: Path, model_args: str, gen_kwargs: str | None = None) -> list[str]:
    """The answers of lmms-eval, in the order of the questions in ``home``."""
    from lmms_eval.evaluator import simple_evaluate

    with contextlib.chdir(home):
        found = simple_evaluate(
            model="llava_pdrop",
            model_args=model_args,
            tasks=["pages"],
            batch_size=BATCH,
            gen_kwargs=gen_kwargs,
            task_manager=tasks(),
        )
    return answers_in(found["samples"]["pages"])


def answers_in(rows: Sequence[dict[str, Any]]) -> list[str]:
    rows = sorted(rows, key=lambda row: row["doc_id"])
    assert [row["doc_id"] for row in rows] == list(range(len(rows)))
    answers = [row["filtered_resps"] for row in rows]
    return [answer if isinstance(answer, str) else answer[0] for answer in answers]


def lmms_eval(home: Path, model_args: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """``python -m lmms_eval`` in ``home``."""
    words = ["-m", "lmms_eval", "--model", "llava_pdrop", "--model_args", model_args, "--tasks", "pages"]
    words += ["--include_path", str(TASKS), "--batch_size", str(BATCH), "--output_path", "out", "--log_samples"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *words]
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)


def answers_of(home: Path, done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the command has written."""
    files = list((home / "out").rglob("*_samples_*.jsonl"))
    assert len(files) == 1, done.stdout[-2000:] + done.stderr[-3000:]
    return answers_in([json.loads(line) for line in files[0].read_text().splitlines()])


def ours(home: Path, directory: Path, *words: str) -> list[str]:
    """The answers of ``llava-pdrop eval`` to the same questions."""
    data = [f"data.eval={home}/forms/eval.json", f"data.image_root={home}/forms", f"eval.batch_size={BATCH}"]
    assert main(["eval", str(directory), *data, *words]) == 0
    lines = (directory / PREDICTIONS_FILE).read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def test_it_is_lmms_eval_as_published_beside_our_own_packages() -> None:
    assert version("lmms_eval") == "0.7.3"
    assert [entry.value for entry in entry_points(group="lmms_eval.models") if entry.name == "llava_pdrop"]
    beside = Path(importlib.util.find_spec("lmms_eval").origin).parents[1]  # type: ignore[union-attr, arg-type]
    for module in (torch, hf):
        assert not Path(module.__file__).is_relative_to(beside), "lmms-eval must not bring its own"


def test_a_run_answers_the_same_with_its_own_schedule_a_named_one_and_without(home: Path) -> None:
    run = home / "run"
    own, vanilla = ours(home, run), ours(home, run, "pyramid_drop=null")
    lucky = ours(home, run, *DROP, "pyramid_drop.ranker=random")
    assert len(set(own)) > 2 and own != vanilla and lucky not in (own, vanilla), "else nothing is shown"
    assert answers_of(home, lmms_eval(home, f"pretrained=run,{SAME}")) == own
    assert given(home, "pretrained=run,schedule=own") == own
    assert given(home, "pretrained=run") == vanilla
    assert given(home, f"pretrained=run,{SAME},ranker=random") == lucky


def test_a_preset_by_name(home: Path) -> None:
    preset = ours(home, home / "run", "pyramid_drop=configs/schedules/uniform.yaml")
    assert given(home, "pretrained=run,schedule=uniform") == preset


def test_an_original_checkpoint(home: Path) -> None:
    assert main(["convert", str(home / "run"), str(home / "original"), "--to", "llava"]) == 0
    assert "mm_vision_tower" in json.loads((home / "original/config.json").read_text())
    template = "model.template=" + re.findall(r"template: (\w+)", (home / "run/llava_pdrop.yaml").read_text())[0]
    dropping = ours(home, home / "original", template, *DROP)
    assert given(home, f"pretrained=original,{SAME},{template}") == dropping == ours(home, home / "run")
    assert given(home, f"pretrained=original,{template}") == ours(home, home / "run", "pyramid_drop=null")


def test_another_family(home: Path) -> None:
    """By its own processor and chat template."""
    parts = build_parts(str(home / "run"))
    torch.manual_seed(0)
    config = hf.VipLlavaConfig(
        text_config=parts.hf.config.text_config,
        vision_config=parts.hf.config.vision_config,
        image_token_index=parts.hf.config.image_token_id,
        vision_feature_layers=[-2, -1],
        tie_word_embeddings=False,
    )
    model, processor = hf.VipLlavaForConditionalGeneration(config), parts.processor()
    model.model.language_model.load_state_dict(parts.hf.model.language_model.state_dict())
    model.lm_head.load_state_dict(parts.hf.lm_head.state_dict())
    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    model.save_pretrained(home / "vip")
    processor.save_pretrained(home / "vip")
    dropping, vanilla = ours(home, home / "vip", *DROP), ours(home, home / "vip")
    assert dropping != vanilla, "else nothing is shown"
    assert given(home, f"pretrained=vip,{SAME}") == dropping
    assert given(home, "pretrained=vip") == vanilla


def test_a_benchmark_of_the_paper(home: Path) -> None:
    """POPE's questions, in its official files for us and as JSON for lmms-eval."""
    sets, other = home / "sets", home / "pope"
    other.mkdir()
    make = [sys.executable, str(ROOT / "data/prepare/benchmarks.py"), "--forms", str(home / "forms")]
    subprocess.run([*make, "--out", str(sets), "--pages", "12"], check=True, capture_output=True)
    rows = [json.loads(line) for line in (sets / "pope/llava_pope_test.jsonl").read_text().splitlines()]
    tasks = [
        {"question": row["text"], "image": str(sets / "pope/val2014" / row["image"]), "answer": "yes"} for row in rows
    ]
    (other / "pages.json").write_text(json.dumps(tasks))
    assert main(["eval", str(home / "run"), "benchmarks=pope", f"eval.root={sets}", "eval.batch_size=16"]) == 0
    (kept,) = (home / "run/benchmarks/pope").glob("*/answers.jsonl")
    answers = {row["question_id"]: row["text"] for row in map(json.loads, kept.read_text().splitlines())}
    found = given(other, f"pretrained={home}/run,schedule=own", "max_new_tokens=128")
    assert found == [answers[row["question_id"]] for row in rows]


def test_two_processes_share_the_questions(home: Path) -> None:
    """41 of them: one process has a question more, and the other one is given a request to fill up."""
    other = home / "two"
    other.mkdir()
    rows = json.loads((home / "pages.json").read_text())
    (other / "pages.json").write_text(json.dumps([*rows, rows[0]]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own = ours(home, home / "run")
    done = lmms_eval(other, f"pretrained={home}/run,schedule=own", launcher)
    assert answers_of(other, done) == [*own, own[0]]


def test_texts_alone(home: Path) -> None:
    other = home / "texts"
    other.mkdir()
    rows = [{"question": text, "image": None, "answer": ""} for text in ("Which digit is it", "Field K")]
    (other / "pages.json").write_text(json.dumps(rows))
    found = given(other, f"pretrained={home}/run")
    assert len(found) == 2 and all(found)


def test_what_is_wrong_is_one_line_and_status_2(home: Path) -> None:
    """lmms-eval by itself prints a traceback and ends with status 0."""
    done = lmms_eval(home, "pretrained=run,layer=1")
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    (error,) = (text for text in done.stderr.splitlines() if text.startswith("error: "))
    assert re.search(says("model_args", "'layer'", "did you mean 'layers'"), error)


def test_what_a_task_asks_otherwise_is_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        given(home, "pretrained=run", "temperature=0.5,do_sample=true")
    assert re.search("error: " + says("pages", "sampling", "0.5", "do_sample=false"), capsys.readouterr().err)


def test_other_kinds_of_requests_are_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llava_pdrop.eval.lmms.model import LlavaPdrop

    model = LlavaPdrop(pretrained=str(home / "run"))
    for method, kind in ((model.loglikelihood, "loglikelihood"), (model.generate_until_multi_round, "multi_round")):
        assert method([]) == []
        with pytest.raises(SystemExit, match="2"):
            method([SimpleNamespace(task_name="seedbench_ppl")])
        assert re.search(f"error: .*seedbench_ppl.*{kind}", capsys.readouterr().err)


def test_pictures_that_cannot_be_read(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = home / "broken"
    other.mkdir()
    (other / "none.png").write_bytes(b"no picture")
    rows = json.loads((home / "pages.json").read_text())[:2]
    rows[0]["image"] = str(other / "none.png")
    (other / "pages.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match="2"):
        given(other, f"pretrained={home}/run")
    assert re.search("error: " + says("1 of 2", "none.png", "eval.max_unread"), capsys.readouterr().err)
    found = given(other, f"pretrained={home}/run,eval.max_unread=0.5")
    assert found[0] == "" and found[1]
    assert re.search(says("1 of 2", "none.png", "empty"), capsys.readouterr().out)


def test_the_tasks_that_the_page_names_are_there_and_ask_for_what_is_offered() -> None:
    from lmms_eval import utils

    page = (ROOT / "llava_pdrop/eval/lmms/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| `(\w+)` \|(.*)", page, re.MULTILINE)
    named = {name for _, name, more in rows for name in [name, *re.findall(r"`((?:mmbench|vqav2|vizwiz)_\w+)`", more)]}
    assert len(rows) == 16 and len(named) == 19
    for name in sorted(named):
        settings = utils.load_yaml_config(tasks().task_index[name]["yaml_path"], mode="simple")
        assert settings["task"] == name and settings.get("output_type", "generate_until") == "generate_until"
        limits_of(name, settings.get("generation_kwargs") or {})
    listed = re.search(r"^    tasks=(.*)", page, re.MULTILINE)[1].split(",")
    assert set(listed) <= named
