"""Reading a config: inheritance, overrides, `train.engine`, round trip, and one line for every mistake of a user."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from llava_pdrop.config.load import ENGINES, load_config, to_yaml
from llava_pdrop.config.paths import check_paths, decoder_layers, missing_model, part_configs, pretrain_words
from llava_pdrop.config.schema import Config
from llava_pdrop.config.values import keys_of
from llava_pdrop.errors import ConfigError, UserError
from llava_pdrop.schedule import Schedule
from tests.messages import meant, says
from tests.properties import cases, one_line

ROOT = Path(__file__).parents[3]
CONFIGS = sorted(
    file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name not in ("ablations", "schedules")
)

LAYERS = 4


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete small run: parts with config.json files, data, images, and a YAML that names them."""
    for name, content in {
        "llm": {"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 96},
        "tower": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    (tmp_path / "train.json").write_text("[]")
    return write(
        tmp_path / "run.yaml",
        """
        name: a run
        model: {language_model: llm, vision_tower: tower}
        data: {train: train.json, image_root: images, samples_per_batch: 4}
        pyramid_drop: {layers: [1, 2, 3], ratios: [0.5, 0.25, 0.125]}
        train: {learning_rate: 1e-3, max_steps: 7, projector_lr: 2e-3}
        compare: {training_free: {same_drop: same, early: {single_drop: 1, ranker: fastv}, lucky: {ranker: random}}}
        """,
    )


def write(path: Path, text: str) -> Path:
    lines = text.strip("\n").splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    path.write_text("\n".join(line[indent:] for line in lines) + "\n")
    return path


def complaint(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_values_arrive_under_their_names_and_types(run: Path) -> None:
    config = load_config(run)
    assert (config.name, config.output_dir, config.seed) == ("a run", "checkpoints/a run", 0)
    assert config.schedule == Schedule((1, 2, 3), (0.5, 0.25, 0.125)).at("renumber")
    assert config.train.projector_lr == 2e-3 and config.train.resume == "auto"
    assert config.train.arguments == {"learning_rate": 1e-3, "max_steps": 7}
    assert config.model.trainable == ("projector", "language_model")
    assert config.vanilla().schedule == Schedule() and config.vanilla().data == config.data
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_name_and_output_default_to_the_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    child = write(tmp_path / "sub" / "child.yaml", "base: ../run.yaml\nname: null")
    assert re.search(says("name", "text"), complaint(child))
    text = run.read_text().replace("name: a run\n", "")
    (tmp_path / "sub" / "own.yaml").write_text(text)
    assert load_config(tmp_path / "sub" / "own.yaml").name == "sub/own"


def test_base_is_relative_to_the_file_and_merged_key_by_key(run: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    child = write(
        tmp_path / "sub" / "child.yaml",
        """
        base: ../run.yaml
        train: {learning_rate: 5e-4}
        pyramid_drop: {ratios: [0.4, 0.2, 0.1]}
        compare: {training_free: {lucky: null}}
        """,
    )
    grandchild = write(tmp_path / "grandchild.yaml", "base: sub/child.yaml\npyramid_drop: null\nseed: 3")
    config = load_config(child)
    assert config.train.arguments == {"learning_rate": 5e-4, "max_steps": 7}
    assert config.schedule == Schedule((1, 2, 3), (0.4, 0.2, 0.1)).at("renumber")
    assert sorted(config.training_free(LAYERS)) == ["early", "same_drop"]
    config = load_config(grandchild)
    assert config.pyramid_drop is None and config.seed == 3 and config.train.arguments["max_steps"] == 7


def test_overrides_win_and_are_yaml(run: Path) -> None:
    config = load_config(
        run, ["pyramid_drop.layers=[2,3]", "pyramid_drop.ratios=[.5,.1]", "train.learning_rate=1e-5", "data.eval=null"]
    )
    assert config.schedule == Schedule((2, 3), (0.5, 0.1)).at("renumber")
    assert config.train.arguments["learning_rate"] == 1e-5 and config.data.eval is None
    assert load_config(run, ["pyramid_drop=null", "compare.training_free=null"]).pyramid_drop is None
    assert load_config(run, ["name=a=b"]).name == "a=b"
    assert load_config(run, ["train.learning_rate=1"]).train.arguments["learning_rate"] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.training_free.x={single_drop: 3}", says("compare.training_free.x", "layer 3 of 4")),
        (
            "pyramid_drop={layers: [1], ratios: [], keep: [9]}",
            says("compare.training_free.early", "counts tokens", "null"),
        ),
    ],
)
def test_a_training_free_schedule_without_room_stops_only_who_wants_it(run: Path, override: str, message: str) -> None:
    config = load_config(run, [override])
    with pytest.raises(ConfigError, match=message):
        config.training_free(LAYERS)


def test_training_free_schedules(run: Path) -> None:
    schedules = load_config(run).training_free(LAYERS)
    assert schedules["same_drop"] == Schedule((1, 2, 3), (0.5, 0.25, 0.125)).at("renumber")
    assert schedules["lucky"] == Schedule((1, 2, 3), (0.5, 0.25, 0.125), "random").at("renumber")
    early = schedules["early"]
    assert early.layers == (1,) and early.ranker == "fastv"
    assert early.average_ratio(LAYERS) == pytest.approx(schedules["same_drop"].average_ratio(LAYERS))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_shipped_config_parses_and_survives_a_round_trip(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # paths in configs are meant from the checkout
    config = load_config(path)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    first = path.read_text().splitlines()[0]
    assert first.startswith("# "), "the first line says what the file is"
    for named in (pretrain_words(config)[0] if config.pretrain else None, config.train.arguments.get("deepspeed")):
        assert named is None or Path(named).is_file()
    if config.data.prepare:
        assert Path(config.data.prepare[0]).is_file()


def test_round_trip_with_everything_set(run: Path, tmp_path: Path) -> None:
    shape = "model.reference_shape={language_model: {num_hidden_layers: 4}, vision_tower: {patch_size: 8}}"
    config = load_config(
        run,
        ["data.prepare=[a.py, --n, '3']", "model.aspect=anyres", "model.pinpoints=[[32,64]]", shape, "pretrain=p.yaml"],
    )
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config.data.prepare == ("a.py", "--n", "3") and config.model.pinpoints == ((32, 64),)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.trian=x", says("'data.trian'", meant("data.train'"))),
        ("max_length=3", says("'max_length'", meant("data.max_length'"))),
        ("pyramid_drop.layer=[1]", says("'pyramid_drop.layer'", meant("pyramid_drop.layers'"))),
        ("train.learning_rat=1", says("'train.learning_rat'", meant("train.learning_rate'"))),
        ("train.learning_rate=fast", says("train.learning_rate", "number", "'fast'")),
        ("train.max_steps=1.5", says("train.max_steps", "whole number", "1.5")),
        ("train.bf16=1", says("train.bf16", "true", "false", "1")),
        ("train.optim=adamw", says("train.optim", "'adamw'", "'adamw_torch'", "'adafactor'")),
        ("train.optim=adamw", says("train.optim", meant("adamw_torch'"))),
        ("train.lr_scheduler_type=cosin", says("train.lr_scheduler_type", "'cosin'", meant("cosine'"))),
        ("train.log_level=loud", says("train.log_level", "'loud'", "'debug'")),
        ("train.save_strategy=no", says("train.save_strategy", "'epoch'", "'best'", '"no"', "YAML")),
        ("train.gradient_accumulation_steps=0", says("train.gradient_accumulation_steps", "1", "0")),
        ("train.output_dir=x", says("train.output_dir", "output_dir (top level)")),
        ("train.warmup_ratio=0.03", says("train.warmup_ratio", "train.warmup_steps")),
        (
            "train.per_device_train_batch_size=1",
            says("train.per_device_train_batch_size", "data.samples_per_batch", "data.tokens_per_batch"),
        ),
        ("seed=1.5", says("seed", "whole number", "1.5")),
        ("seed=true", says("seed", "whole number", "True")),
        ("seed=99999999999999999999", says("seed", "2**32", "99999999999999999999")),
        ("data=3", says("data", "section", "3")),
        ("data.prepare=x.py", says("data.prepare", "list")),
        ("model.pinpoints=[[1,2,3]]", says("model.pinpoints[0]", "2 entries")),
        ("model.aspect=pda", says("model.aspect", "'pda'", "'anyres'", meant("pad'"))),
        ("model.aspect=anyres", says("model.aspect", "model.pinpoints")),
        ("model.trainable=[tower]", says("model.trainable", "'tower'", meant("vision_tower'"))),
        ("model.trainable=[]", says("model.trainable", "nothing")),
        ("model.path=x", says("model.path", "model.language_model", "exclude")),
        ("model.vision_tower=null", says("both", "model.language_model", "model.vision_tower")),
        ("data.tokens_per_batch=4096", says("data.samples_per_batch", "data.tokens_per_batch", "exclude")),
        ("data.samples_per_batch=null", says("set", "data.samples_per_batch", "data.tokens_per_batch")),
        ("data.samples_per_batch=0", says("data.samples_per_batch", "1", "0")),
        ("pyramid_drop.layers=[1,2,4]", says("pyramid_drop.layers", "4 layers", "3")),
        ("pyramid_drop.layers=[-1,1,2]", says("pyramid_drop.layers", "at least 0")),
        ("pyramid_drop.keep=[9,4,1]", says("pyramid_drop.keep", "pyramid_drop.ratios", "not both")),
        ("pyramid_drop.keep=[x,4,1]", says("pyramid_drop.keep[0]", "a whole number or a number", "'x'")),
        ("pyramid_drop.ranker=7", says("pyramid_drop.ranker", "text or a list", "7")),
        ("pyramid_drop.ranker=[random,random]", says("pyramid_drop.ranker", "2", "pyramid_drop.layers", "3")),
        ("pyramid_drop.ranker=[random,best,random]", says("pyramid_drop.ranker", "'best'")),
        ("pyramid_drop={layers: [0], ratios: [0.5], ranker: v2drop}", says("pyramid_drop.ranker", "v2drop", "layer 0")),
        ("pyramid_drop.depth=0", says("pyramid_drop.depth", "at least 1")),
        ("pyramid_drop.layers=[2,1,3]", says("pyramid_drop.layers", "grow")),
        ("pyramid_drop.layers=[1,2]", says("pyramid_drop.layers", "2", "pyramid_drop.ratios", "3")),
        ("pyramid_drop.ratios=[.5,.6,.1]", says("pyramid_drop.ratios", "grow")),
        ("pyramid_drop.ratios=[1.5,.6,.1]", says("pyramid_drop.ratios", "[0, 1]")),
        ("pyramid_drop.ratios=[.5,.2,-0.1]", says("pyramid_drop.ratios", "[0, 1]")),
        ("pyramid_drop.ranker=fastvv", says("pyramid_drop.ranker", "'fastvv'")),
        ("pyramid_drop.positions=drop", says("pyramid_drop.positions", "'drop'")),
        ("compare.training_free.x=3", says("compare.training_free.x", "'same'")),
        ("compare.training_free.x={layer: 1}", says(meant("compare.training_free.x.layers'"))),
        ("compare.training_free.x={ranker: best}", says("compare.training_free.x.ranker", "'best'")),
        ("compare.training_free.x={single_drop: 4}", says("compare.training_free.x.single_drop", "from 1 to 3", "4")),
        ("compare.training_free.x={single_drop: 0}", says("compare.training_free.x.single_drop", "from 1 to 3", "0")),
        ("seed=${nowhere}", says("seed", "nowhere")),
        ("data.index=???", says("data.index", "Missing")),
        ("data.train=${a:b}", says("data.train", "a")),
        ("pyramid_drop.layers=[1,'${nowhere}',3]", says("pyramid_drop.layers[1]", "nowhere")),
        ("name", says("name", "section.key=value")),
        ("a.b=[", says("a.b=[")),
    ],
)
def test_a_wrong_override_is_one_line(run: Path, override: str, expected: str) -> None:
    message = complaint(run, override)
    assert re.search(expected, message) and message.startswith("command line: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian: {}", says("'trian'", meant("train'"))),
        ("base: run.yaml\ngrid: {seed: [1, 2]}", says("llava-pdrop ablate /")),
        ("model: [", r"line \d"),
        ("- a", says("list", "config")),
        ("3", says("YAML", "int")),
        ("seed: ${nowhere}", says("seed", "nowhere")),
        (
            "pyramid_drop: {layers: [1], ratios: [0.5, 0.2]}",
            says("pyramid_drop.layers", "1", "pyramid_drop.ratios", "2"),
        ),
        ("model: {language_model: llm, vision_tower: tower}", says("data", "missing")),
        ("seed: 0\nseed: 1", r"line \d"),
        ("base: [a.yaml, b.yaml]", says("'base'", "one")),
    ],
)
def test_a_wrong_file_is_named(run: Path, tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "wrong.yaml", text)
    message = complaint(path)
    assert re.search(expected, message) and message.startswith(str(path))


def test_the_file_that_sets_a_key_is_the_one_named(run: Path, tmp_path: Path) -> None:
    child = write(tmp_path / "child.yaml", "base: run.yaml\nseed: 1")
    run.write_text(run.read_text().replace("layers: [1, 2, 3]", "layers: [1, 3, 2]"))
    assert re.match(re.escape(f"{run}: ") + says("pyramid_drop.layers", "grow"), complaint(child))


def test_bases_that_do_not_exist_or_come_back(run: Path, tmp_path: Path) -> None:
    lost = write(tmp_path / "lost.yaml", "base: rum.yaml")
    assert re.search(says("base of lost.yaml", "rum.yaml", meant(f"{run}'")), complaint(lost))

    first = write(tmp_path / "first.yaml", "base: second.yaml")
    write(tmp_path / "second.yaml", "base: first.yaml")
    assert "first.yaml -> second.yaml -> first.yaml" in complaint(first)
    assert re.search(says("ruN.yaml", meant(f"{run}'")), complaint(tmp_path / "ruN.yaml"))


def test_paths_that_exist_pass(run: Path) -> None:
    check_paths(load_config(run))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=no.json", says("data.train", "no.json")),
        ("data.eval=no.json", says("data.eval", "no.json")),
        ("data.image_root=nowhere", says("data.image_root", "nowhere")),
        ("data.prepare=[no.py]", says("data.prepare", "no.py")),
        ("pretrain=no.yaml", says("pretrain", "no.yaml")),
        ("model.projector=no.bin", says("model.projector", "no.bin")),
        ("model.vision_tower=a/b/c", says("model.vision_tower", "a/b/c")),
        ("model.vision_tower=images", says("model.vision_tower", "images", "config.json")),
        ("model.language_model=lmsys/vicuna-7b-v1.5", says("model.language_model", "lmsys/vicuna-7b-v1.5", "cache")),
        ("train.resume=checkpoint-9", says("train.resume", "checkpoint-9")),
        ("train.deepspeed=no.json", says("train.deepspeed", "no.json")),
    ],
)
def test_a_missing_path_is_one_line(run: Path, override: str, expected: str) -> None:
    config = load_config(run, [override])
    with pytest.raises(ConfigError) as error:
        check_paths(config)
    said = str(error.value)
    assert re.search(expected, said) and said.startswith(f"{run}: ") and "\n" not in said


def test_data_that_a_command_makes_may_be_missing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "make.py").touch()
    check_paths(load_config(run, ["data.prepare=[make.py]", "data.train=later.json", "data.image_root=later"]))


def test_the_full_size_recipe_stops_with_the_missing_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = load_config("configs/llava_next_7b/finetune_pdrop.yaml")
    with pytest.raises(
        ConfigError, match=r"^configs/llava_next_7b/\S+: " + says("model.language_model", "lmsys/vicuna-7b-v1.5")
    ):
        check_paths(config)


def test_number_of_layers_is_found_where_it_stands(run: Path, tmp_path: Path) -> None:
    config = load_config(run)
    assert decoder_layers(config.model) == LAYERS
    whole = tmp_path / "whole"
    whole.mkdir()
    swap = ["model.path=whole", "model.language_model=null", "model.vision_tower=null", "pyramid_drop=null"]
    swap += ["compare.training_free=null"]

    def layers(content: dict) -> int | None:
        (whole / "config.json").write_text(json.dumps(content))
        return decoder_layers(load_config(run, swap).model)

    assert layers({"text_config": {"model_type": "llama", "num_hidden_layers": 5}}) == 5
    assert (
        layers({"text_config": {"model_type": "llama"}}) == 32
    )  # the default of the model type is left out of the file
    assert layers({"num_hidden_layers": 6, "mm_vision_tower": "tower"}) == 6  # original LLaVA layout
    assert part_configs(load_config(run, swap).model)[1] == {
        "model_type": "clip_vision_model",
        "image_size": 32,
        "patch_size": 8,
    }
    unknown = load_config(run, ["model.language_model=some/llm", "pyramid_drop.layers=[8,16,24]"])
    assert decoder_layers(unknown.model) is None


def test_missing_model_says_nothing_about_directories_that_are_there(run: Path) -> None:
    assert missing_model("llm") is None
    assert re.search(says("llm/no", "hub id"), str(missing_model("llm/no")))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=-1", says("seed", "0", "-1")),
        ("eval.limit=0", says("eval.limit", "1", "0")),
        ("model.image_size=0", says("model.image_size", "1", "0")),
    ],
)
def test_numbers_too_small_are_named(run: Path, override: str, expected: str) -> None:
    assert re.match("command line: " + expected, complaint(run, override))


def test_two_half_precisions_exclude_each_other(run: Path) -> None:
    said = complaint(run, "train.bf16=true", "train.fp16=true")
    assert re.search(says("train.bf16", "train.fp16", "exclude"), said)


def test_a_broken_config_json_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "llm" / "config.json").write_text("{")
    assert re.match("llm/config.json: " + says("JSON"), complaint(run))


def test_config_is_the_schema(run: Path) -> None:
    assert isinstance(load_config(run), Config)
    assert load_config(run).file == str(run)


def test_what_a_paper_reports_is_not_inherited(tmp_path: Path) -> None:
    """A run made of another one is not in the paper, nor is one whose model or schedule is changed on the way."""
    file = Path(__file__).parents[3] / "configs/llava_next_7b/finetune_pdrop.yaml"
    assert load_config(file).paper.gpu_hours == 218
    assert load_config(file, ["seed=3", "train.logging_steps=7"]).paper is not None
    assert load_config(file, ["pyramid_drop.layers=[4,8,12]"]).paper is None
    assert load_config(file).vanilla().paper is None
    (tmp_path / "mine.yaml").write_text(f"base: {file}\nname: mine\n")
    assert load_config(tmp_path / "mine.yaml").paper is None


def engine_of(file: Path | str, *overrides: str) -> dict:
    arguments = load_config(file, overrides).train.arguments
    return {name: arguments[name] for name in ("deepspeed", "fsdp", "fsdp_config") if name in arguments}


@pytest.mark.parametrize("name", ENGINES)
def test_a_name_stands_for_training_arguments(tiny_config, name):
    assert engine_of(tiny_config(train={"engine": name})) == ENGINES[name]


def test_settings_of_every_engine_are_here():
    for name, arguments in ENGINES.items():
        for file in (value for value in arguments.values() if isinstance(value, str)):
            assert json.loads((ROOT / file).read_text()), name
    stages = {
        name: json.loads((ROOT / f"configs/deepspeed/{name}.json").read_text()) for name in ENGINES if "zero" in name
    }
    for name, content in stages.items():
        section = content["zero_optimization"]
        assert section["stage"] == int(name[4]) and ("offload_optimizer" in section) == name.endswith("offload")


def test_one_key_changes_the_engine_of_a_recipe():
    recipe = ROOT / "configs/llava15_7b/finetune_pdrop.yaml"
    assert engine_of(recipe) == ENGINES["zero3"]
    assert engine_of(recipe, "train.engine=fsdp2") == ENGINES["fsdp2"]
    assert engine_of(recipe, "train.engine=ddp") == {}
    assert engine_of(recipe, "train.engine=my/zero.json") == {"deepspeed": "my/zero.json"}
    assert engine_of(recipe, "train.engine=null", "train.deepspeed=my/zero.json") == {"deepspeed": "my/zero.json"}


def test_a_saved_run_says_it_once(tiny_config, tmp_path):
    config = load_config(tiny_config(train={"engine": "zero2"}))
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml").train == config.train
    assert engine_of(tmp_path / "saved.yaml") == ENGINES["zero2"]


REPLACED = [("zero3", ENGINES["zero3"]), ("fsdp2", ENGINES["fsdp2"]), ("ddp", {}), ("null", ENGINES["zero2"])]


@pytest.mark.parametrize(("engine", "found"), REPLACED)
def test_a_name_replaces_an_inherited_engine_however_that_was_said(tiny_config, tmp_path, engine, found):
    """In a config older than the key, and in a saved run, it stands as training arguments."""
    older = tiny_config(train=ENGINES["zero2"])
    assert engine_of(older, f"train.engine={engine}") == found
    (tmp_path / "child.yaml").write_text(f"base: {older}\ntrain: {{engine: {engine}}}\n")
    assert engine_of(tmp_path / "child.yaml") == found


def test_one_file_says_its_engine_once(tiny_config):
    with pytest.raises(ConfigError, match=r"run\.yaml: train\.deepspeed " + says("train.engine", "zero3")):
        engine_of(tiny_config(train={"engine": "zero3", **ENGINES["zero2"]}))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.engine=zero", says("train.engine", "'zero'", meant("zero2"))),
        ("train.engine=3", says("train.engine", "'3'", "ddp")),
        ("train.engine=[zero2]", says("train.engine", "['zero2']")),
        ("train.deepspeed=null", says("train.deepspeed", "train.engine", "zero2")),
        ("train.fsdp=true", says("train.fsdp", "train.engine", "zero2")),
    ],
)
def test_mistakes(tiny_config, override, line):
    with pytest.raises(ConfigError, match=f"^command line: {line}"):
        load_config(tiny_config(train={"engine": "zero2"}), [override])


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**9), st.floats(), st.text(max_size=12),
    st.sampled_from(["", "~", "$HOME", "${seed}", "null", "[1,2", "auto", "1e-5", "zero3", "x" * 300, "日本"]),
)  # fmt: skip
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=5), SCALARS, max_size=2)
OTHERS = ["train.max_steps", "train.nonsense", "pyramid_drop.single_drop", "no.such", ""]
KEYS = st.sampled_from([*keys_of(Config), *OTHERS])


@hypothesis.given(st.data())
@cases
def test_any_value_of_any_key_is_a_config_or_one_line(tmp_path_factory, data):
    """In the file and on the command line."""
    content: dict = {"output_dir": "out", "model": {"path": "m"}, "data": {"train": "t.json", "samples_per_batch": 4}}
    for key, value in data.draw(st.lists(st.tuples(KEYS, VALUES), max_size=3)):
        place, *more = key.split(".")
        if more:
            section = content.setdefault(place, {})
            content[place] = {**(section if isinstance(section, dict) else {}), more[0]: value}
        else:
            content[place] = value
    words = [
        f"{key}={json.dumps(value) if data.draw(st.booleans()) else value}"
        for key, value in data.draw(st.lists(st.tuples(KEYS, VALUES), max_size=3))
    ]
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")
    try:
        config = load_config(file, words)
    except UserError as error:
        one_line(error)
    else:
        assert isinstance(config, Config) and config.file == str(file)
