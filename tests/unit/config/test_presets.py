"""``pyramid_drop`` as the path of a file, and the files in configs/schedules: what they cost, and who says so."""

from __future__ import annotations

import re

import pytest

from llava_pdrop.config.load import load_config, to_yaml
from llava_pdrop.config.presets import CHECKOUT
from llava_pdrop.config.values import read_mapping
from llava_pdrop.cost.paper import paper_tflop
from llava_pdrop.errors import ConfigError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.rankers import check_rankers
from llava_pdrop.schedule import Schedule
from tests.messages import meant, says

HOME = CHECKOUT / "configs" / "schedules"
RECIPE = CHECKOUT / "configs" / "llava15_7b" / "finetune_pdrop.yaml"
PAPER, OURS = "published", "recomputed"

FIGURES = [
    # preset, what, figure at 576 tokens and 32 layers, published or recomputed, source
    ("pyramiddrop", "tokens", 270, PAPER, "PyramidDrop, Table 5"),
    ("pyramiddrop", "TFLOP", 1.78, PAPER, "PyramidDrop, Tables 3, 5 and 7"),
    ("pyramiddrop_lambda04", "tokens", 233.5, OURS, "its Table 7 has no tokens"),
    ("pyramiddrop_lambda04", "TFLOP", 1.54, PAPER, "PyramidDrop, Table 7"),
    ("pyramiddrop_lambda06", "tokens", 313, OURS, "its Table 7 has no tokens"),
    ("pyramiddrop_lambda06", "TFLOP", 2.06, PAPER, "PyramidDrop, Table 7"),
    ("fastv", "tokens", 306, PAPER, "PyramidDrop, Table 5"),
    ("fastv", "TFLOP", 2.01, PAPER, "PyramidDrop, Table 5"),
    ("hidrop", "tokens", 64.03, OURS, "inject, layers and counts of its scripts; it says 64.0"),
    ("hidrop", "TFLOP", 0.422, OURS, "the same, by the paper's formula"),
    ("duet", "tokens", 360, OURS, "its own figures include what it merges before the decoder"),
    ("v2drop", "tokens", 202.8, OURS, "layers and ratios of V2Drop.py"),
    ("v2drop", "TFLOP", 1.33, OURS, "layers and ratios of V2Drop.py"),
    ("sparsevlm_192", "tokens", 188.2, OURS, "layers and counts of SparseVLM's score.py; its name for it is 192"),
    ("sparsevlm_128", "tokens", 123.9, OURS, "the same; 128"),
    ("sparsevlm_64", "tokens", 61.7, OURS, "the same; 64"),
    ("divprune", "tokens", 56, OURS, "the ratio 0.098 of its scripts"),
    ("random", "tokens", 270, OURS, "the paper's stages"),
    ("uniform", "tokens", 270, OURS, "the paper's stages"),
    ("downsample", "tokens", 256, OURS, "16x16, the largest square grid not above 270"),
    ("downsample", "TFLOP", 1.68, OURS, "the same, by the paper's formula"),
]


def preset(name: str) -> Schedule:
    return Schedule(**{key: value for key, value in read_mapping(HOME / f"{name}.yaml").items() if key != "depth"})


def test_every_preset_has_a_figure():
    assert {name for name, *_ in FIGURES} == {file.stem for file in HOME.glob("*.yaml")}


@pytest.mark.parametrize(("name", "what", "figure", "kind", "source"), FIGURES)
def test_a_preset_costs_what_is_said_of_it(name, what, figure, kind, source):
    schedule = preset(name)
    enters = ImageGeometry(336, 14).num_tokens((336, 336), schedule.downsample)
    tokens = sum(schedule.tokens_per_layer(enters, 32)) / 32
    cost = {"tokens": tokens, "TFLOP": paper_tflop(enters, 32, 4096, 11008, schedule)}[what]
    assert cost == pytest.approx(figure, abs=0.05 if what == "tokens" else 0.006 if figure > 1 else 0.0006)
    head = (HOME / f"{name}.yaml").read_text(encoding="utf-8").split("depth:")[0]
    assert f"{figure:g}" in head, "the comment on top of the file says it"


@pytest.mark.parametrize("file", sorted(HOME.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_preset_is_one_override(file):
    config = load_config(RECIPE, [f"pyramid_drop={file}"])
    assert config.schedule == preset(file.stem).at("renumber") and config.paper is None
    assert read_mapping(file)["depth"] == 32
    check_rankers(config.schedule)


def test_a_preset_takes_the_place_of_the_section_and_can_be_changed(tiny_config, monkeypatch, tmp_path):
    file = tiny_config(pyramid_drop={"layers": [1, 2], "ratios": [0.5, 0.25], "positions": "keep"})
    (tmp_path / "mine.yaml").write_text("layers: [3]\nkeep: [5]\nranker: random\n")
    monkeypatch.chdir(tmp_path)
    for words in (["pyramid_drop=mine.yaml"], ['pyramid_drop="mine.yaml"']):
        assert load_config(file, words).schedule == Schedule((3,), keep=(5,), ranker="random", positions="renumber")
    changed = load_config(file, ["pyramid_drop.ranker=uniform", "pyramid_drop=mine.yaml", "pyramid_drop.keep=[4]"])
    assert changed.schedule == Schedule((3,), keep=(4,), ranker="uniform", positions="renumber")
    (tmp_path / "child.yaml").write_text(f"base: {file}\npyramid_drop: mine.yaml\n")
    assert load_config("child.yaml").schedule.keep == (5,)
    (tmp_path / "saved.yaml").write_text(to_yaml(load_config("child.yaml")))
    assert load_config("saved.yaml").schedule == load_config("child.yaml").schedule
    assert "mine" not in (tmp_path / "saved.yaml").read_text()


def test_a_preset_of_the_checkout_is_found_from_anywhere_and_scaled(tiny_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scaled = load_config(tiny_config(), ["pyramid_drop=configs/schedules/pyramiddrop.yaml"]).schedule
    assert scaled == Schedule((1, 2, 3), (0.5, 0.25, 0.125), positions="renumber")
    own = load_config(tiny_config(), ["pyramid_drop={depth: 8, layers: [2, 4], ratios: [0.5, 0.2]}"]).schedule
    assert own.layers == (1, 2)


def test_what_is_wrong_with_a_preset_names_its_file(tiny_config, tmp_path):
    file, mine = tiny_config(), tmp_path / "mine.yaml"

    def complaint(content: str, *words: str) -> str:
        mine.write_text(content)
        with pytest.raises(ConfigError) as error:
            load_config(file, [f"pyramid_drop={mine}", *words])
        return str(error.value)

    for content, message in [
        ("layers: [1]\nratios: [2.0]\n", says("pyramid_drop.ratios", "[0, 1]")),
        ("layer: [1]\n", says("'pyramid_drop.layer'", meant("pyramid_drop.layers'"))),
        (
            "layers: [1, 2, 3]\nratios: [1, 1, 1]\ndepth: 32\n",
            says("pyramid_drop.layers", "[0, 0, 0]", "32", "4", "pyramid_drop.depth=null"),
        ),
        ("layers: [1]\nratios: [1]\ndepth: all\n", says("pyramid_drop.depth", "'all'")),
    ]:
        said = complaint(content)
        assert said.startswith(f"{mine}: ") and "\n" not in said
        assert re.search(message, said), said
    assert complaint("- 1\n").startswith(f"{mine}: ")
    assert re.search(says("mine.yaml", "layers", "ratios", "pyramid_drop=null"), complaint("# nothing\n"))
    near = meant("configs/schedules/fastv")
    with pytest.raises(ValueError, match=says("command line", "configs/schedules/fastv2.yaml", near)):
        load_config(file, ["pyramid_drop=configs/schedules/fastv2.yaml"])
    (tmp_path / "child.yaml").write_text(f"base: {file}\npyramid_drop: nothing.yaml\n")
    with pytest.raises(ValueError, match=says("child.yaml", "pyramid_drop", "nothing.yaml")):
        load_config(tmp_path / "child.yaml")


def test_a_preset_whose_ranker_cannot_look_back_in_a_flat_decoder_names_the_depth(tiny_config):
    with pytest.raises(ConfigError, match=says("ranker fastv", "layer 0", "pyramid_drop.depth", "null")):
        load_config(tiny_config(), ["pyramid_drop=configs/schedules/fastv.yaml"])


def test_a_file_that_is_no_schedule_is_one_line(tiny_config, tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{says('list.yaml', 'holds a list', 'give a schedule')}(?!.*data.train)"):
        load_config(tiny_config(), [f"pyramid_drop={tmp_path / 'list.yaml'}"])
