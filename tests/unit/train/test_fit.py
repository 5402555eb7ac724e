"""What fits alone and not together: template and tokenizer, labels and limit, pictures and what learns, positions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llava_pdrop.__main__ import main
from llava_pdrop.checkpoint.convert import convert
from llava_pdrop.checkpoint.export import save_original
from llava_pdrop.checkpoint.open import open_llava
from llava_pdrop.config.load import load_config
from llava_pdrop.errors import ConfigError
from llava_pdrop.train.arguments import learning_rates, tried_arguments
from llava_pdrop.train.fit import check_positions, positions_of, warn_of_rates
from llava_pdrop.train.run import build_dataset, load_parts, train
from tests.messages import says

LLAMA_3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def build(file: Path, *overrides: str):
    config = load_config(file, overrides)
    parts = load_parts(config)
    return build_dataset(config, parts), parts


@pytest.fixture
def llama_3(tiny_files: Path, tmp_path: Path) -> Path:
    """The tiny decoder with Llama-3's marks among its tokens, whose own end is another one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_files / "llm")
    tokenizer.add_tokens(LLAMA_3, special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "llama_3")
    decoder = LlamaForCausalLM.from_pretrained(tiny_files / "llm")
    decoder.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2)
    decoder.save_pretrained(tmp_path / "llama_3")
    return tmp_path / "llama_3"


# ---- template and tokenizer ----


def test_a_template_of_another_tokenizer_is_refused(tiny_config, tiny_files, llama_3, tmp_path, capsys):
    file = tiny_config()
    message = says("run.yaml", "model.template", "llama_3", "<|eot_id|>", str(tiny_files / "llm"), "several", "v1")
    with pytest.raises(ConfigError, match=message):
        build(file, "model.template=llama_3")
    for template in ("gemma", "qwen_2", "mpt"):
        with pytest.raises(ConfigError, match=says("model.template", template, "several", "llama_3")):
            build(file, f"model.template={template}", f"model.language_model={llama_3}")
    build(file, "model.template=llama_3", f"model.language_model={llama_3}", "data.max_length=400")
    build(file, "model.template=v1")
    capsys.readouterr()
    assert main(["doctor", str(file), "model.template=llama_3", "--workers", "0"]) == 2
    assert "<|eot_id|>" in capsys.readouterr().err


def test_a_template_of_a_part_is_compared_too(tiny_config, tiny_files, tmp_path):
    parts = [{"path": str(tiny_files / "data/train.json"), "image_root": str(tiny_files / "data/images")}]
    parts.append({**parts[0], "template": "gemma"})
    (tmp_path / "mixture.yaml").write_text(yaml.safe_dump({"parts": parts}))
    with pytest.raises(ConfigError, match=says("data.train", "template gemma", "<end_of_turn>")):
        build(tiny_config(), f"data.train={tmp_path / 'mixture.yaml'}")


def test_marks_that_are_meant_as_text_are_said(tiny_config, capsys):
    file = tiny_config()
    build(file, "model.template=mistral_instruct")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "mistral_instruct" in line]
    assert "'[INST]'" in line and "several tokens" in line
    build(file)
    assert "several" not in capsys.readouterr().out


# ---- where generate stops ----


def ends_in(directory: Path) -> list[int]:
    found = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("lora", [False, True])
def test_every_saved_model_stops_at_the_end_of_its_template(tiny_config, llama_3, tmp_path, lora):
    sections = {"lora": {"r": 2, "alpha": 4}} if lora else {}
    file = tiny_config(**sections)
    words = [
        "model.template=llama_3",
        f"model.language_model={llama_3}",
        "train.save_strategy=steps",
        "data.max_length=400",
    ]
    output = train(load_config(file, [*words, "train.save_steps=2", "train.max_steps=2"]))
    end = AutoTokenizer.from_pretrained(llama_3).convert_tokens_to_ids("<|eot_id|>")
    for directory in (output, output / "checkpoint-2"):
        assert ends_in(directory) == [2, end]
    if not lora:
        convert(str(output), tmp_path / "hf", "llava-hf")
        save_original(open_llava(str(output)), tmp_path / "original", vision_tower="tower")
        assert ends_in(tmp_path / "hf") == ends_in(tmp_path / "original") == [2, end]


def test_an_end_that_the_base_knows_stays_one(tiny_config):
    _, parts = build(tiny_config(), "model.template=v1")
    assert parts.hf.generation_config.eos_token_id == 2
    _, parts = build(tiny_config())
    newline = parts.tokenizer.convert_tokens_to_ids("Ċ")
    assert parts.hf.generation_config.eos_token_id == [2, newline]


# ---- labels ----


def test_a_run_without_a_label_is_refused(tiny_config, capsys):
    file, words = tiny_config(), ["data.truncation=tokens", "data.max_length=17"]
    with pytest.raises(
        ConfigError, match=says("run.yaml", "12 records", "label", "data.max_length=17", "data.truncation")
    ):
        build(file, *words)
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        main(["doctor", str(file), *words, "--workers", "0"])
    assert status.value.code == 1 and "would not start" in capsys.readouterr().out


def test_the_doctor_and_training_agree_where_one_record_is_left_out_and_no_other_teaches(
    tiny_config, tiny_files, tmp_path, capsys
):
    records = json.loads((tiny_files / "data/train.json").read_text())
    records[0]["image"] = "gone.png"
    (tmp_path / "d.json").write_text(json.dumps(records))
    words = [f"data.train={tmp_path / 'd.json'}", "data.truncation=tokens", "data.max_length=17"]
    words += ["data.on_invalid=skip", "data.max_invalid=0.5", f"data.image_root={tiny_files / 'data/images'}"]
    with pytest.raises(ConfigError, match=says("11 records", "label", "data.max_length=17")):
        build(tiny_config(), *words)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["doctor", str(tiny_config()), *words, "--workers", "0"])
    assert re.search(says("would not start", "11 records", "label", "data.max_length=17"), capsys.readouterr().out)


def test_answers_that_are_not_trained_on_are_not_said_to_be_cut(tiny_config, tmp_path):
    turns = [{"from": "human", "value": "Yes?"}, {"from": "gpt", "value": "Yes", "loss": False}]
    (tmp_path / "d.json").write_text(json.dumps([{"conversations": turns}]))
    with pytest.raises(ConfigError, match=says("1 records", "label", "loss: false")):
        build(tiny_config(), f"data.train={tmp_path / 'd.json'}", "data.truncation=tokens")


def test_a_share_without_labels_is_said(tiny_config, tiny_files, tmp_path, capsys):
    records = json.loads((tiny_files / "data/train.json").read_text())
    records[0]["conversations"][0]["value"] += "x" * 300
    (tmp_path / "long.json").write_text(json.dumps(records))
    words = [f"data.train={tmp_path / 'long.json'}", "data.truncation=tokens", "data.max_length=200"]
    dataset, _ = build(tiny_config(), *words)
    assert len(dataset) == 12
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "label" in line]
    assert "1 of 12" in line and "8.3%" in line and "data.max_length=200" in line
    build(tiny_config(), "data.truncation=tokens")
    assert "label" not in capsys.readouterr().out


# ---- what learns ----


@pytest.mark.parametrize("trainable", ["[projector]", "[projector,vision_tower]"])
def test_text_cannot_teach_what_sees(tiny_config, tmp_path, trainable, capsys):
    turns = [{"from": "human", "value": "Yes?"}, {"from": "gpt", "value": "Yes"}]
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": turns}] * 3))
    file, words = tiny_config(), [f"data.train={tmp_path / 'text.json'}", f"model.trainable={trainable}"]
    with pytest.raises(ConfigError, match=says("run.yaml", "model.trainable", "projector", "3 records", "pictures")):
        build(file, *words)
    build(file, words[0])
    build(file, words[1])
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        main(["doctor", str(file), *words, "--workers", "0"])
    assert status.value.code == 1 and "would not start" in capsys.readouterr().out


def test_pictures_whose_answers_are_cut_teach_nothing(tiny_config, tiny_files, tmp_path):
    """Records with pictures lose their labels, those that keep one show none."""
    records = json.loads((tiny_files / "data/train.json").read_text())[:2]
    for record in records:
        record["conversations"][0]["value"] += "x" * 300
    records.append({"conversations": [{"from": "human", "value": "Yes?"}, {"from": "gpt", "value": "Yes"}]})
    (tmp_path / "d.json").write_text(json.dumps(records))
    words = [f"data.train={tmp_path / 'd.json'}", "data.truncation=tokens", "data.max_length=100"]
    with pytest.raises(ConfigError, match=says("model.trainable", "pictures")):
        build(tiny_config(), *words, "model.trainable=[projector]")
    build(tiny_config(), *words)


def test_pictures_behind_all_that_is_learnt_teach_nothing(tiny_config, tiny_files, tmp_path, capsys):
    """In a question without an answer, before one that is not trained on, or in a round that is cut off."""
    (first, *_) = json.loads((tiny_files / "data/train.json").read_text())
    ask, answer = first["conversations"][:2]
    before = [{"from": "human", "value": "Yes?"}, {"from": "gpt", "value": "Yes"}]
    file, alone = tiny_config(), "model.trainable=[projector]"
    for number, more in enumerate(([ask], [ask, {**answer, "loss": False}], [ask, {**answer, "value": "x" * 900}])):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([{**first, "conversations": before + more}] * 2))
        words = [f"data.train={path}", "data.max_length=400", f"data.image_root={tiny_files / 'data/images'}"]
        with pytest.raises(ConfigError, match=says("model.trainable", "2 records", "before")):
            build(file, *words, alone)
        with pytest.raises(SystemExit) as status:
            main(["doctor", str(file), *words, alone, "--workers", "0"])
        assert status.value.code == 1 and "would not start" in capsys.readouterr().out
        build(file, *words)
        path.write_text(json.dumps([{**first, "conversations": before + more}, first]))
        build(file, *words, alone)


def test_a_run_whose_records_are_all_left_out_says_so(tiny_config, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"video": "v.mp4", "conversations": []}]))
    words = [f"data.train={tmp_path / 'd.json'}", "data.on_invalid=skip", "data.max_invalid=1"]
    with pytest.raises(ConfigError, match=says("run.yaml", str(tmp_path / "d.json"), "data.on_invalid")):
        build(tiny_config(), *words)


def test_keys_that_nobody_reads_are_said_once(tiny_config, tiny_files, tmp_path, capsys):
    records = json.loads((tiny_files / "data/train.json").read_text())
    (tmp_path / "d.json").write_text(json.dumps([{**record, "model": "x"} for record in records]))
    build(tiny_config(), f"data.train={tmp_path / 'd.json'}")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "'model'" in line]
    assert "data.train" in line and "12 records" in line


# ---- positions and rates ----

RECORD = SimpleNamespace(origin="train.json[1]", id="b", images=[])
PICTURE = SimpleNamespace(origin="train.json[0]", id="a", images=["a.png"])


def data(*lengths):
    records = [SimpleNamespace(origin=f"train.json[{i}]", id=f"r{i}") for i in range(len(lengths))]
    return SimpleNamespace(lengths=lambda: list(lengths), records=records)


@pytest.mark.parametrize(("settings", "limit"), [
    ({}, 128),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 128),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 512),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                          "rope_theta": 1e4}}, 256),
])  # fmt: skip
def test_positions_of_a_decoder(settings, limit):
    assert positions_of(LlamaConfig(max_position_embeddings=128, **settings)) == limit


def test_a_sample_beyond_the_positions_is_refused_or_said(tiny_config, caplog):
    decoder = LlamaConfig(max_position_embeddings=128)
    config = load_config(tiny_config())
    check_positions(config, decoder, data(3, 128))
    with pytest.raises(ConfigError, match=says("data.max_length", "2 of 3", "128", "train.json[2]", "r2", "200")):
        check_positions(config, decoder, data(3, 129, 200))
    check_positions(load_config(tiny_config(), ["model.beyond_positions=allow"]), decoder, data(3, 129, 200))
    assert re.search(says("model.beyond_positions", "r2"), caplog.text)


def test_training_compares_them(tiny_config, tiny_files, tmp_path):
    llm = tmp_path / "llm"
    llm.mkdir()
    for file in (tiny_files / "llm").iterdir():
        (llm / file.name).write_bytes(file.read_bytes())
    settings = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 50}))
    with pytest.raises(ConfigError, match=says("data.max_length", "50", "train.json")):
        train(load_config(tiny_config(), [f"model.language_model={llm}"]))


def test_learning_rates_of_zero_are_said(tiny_config, caplog):
    def warn(*words: str) -> None:
        config = load_config(tiny_config(), list(words))
        warn_of_rates(config, learning_rates(config, tried_arguments(config)))

    warn("train.learning_rate=0", "train.projector_lr=1e-3")
    assert not caplog.records
    warn("train.learning_rate=0")
    assert re.search(says("train.learning_rate", "0", "projector", "nothing"), caplog.text)


def test_training_refuses_text_for_the_projector(tiny_config, tiny_files, tmp_path):
    records = json.loads((tiny_files / "data/train.json").read_text())
    for record in records:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>\n", "")
    (tmp_path / "text.json").write_text(json.dumps(records))
    words = [f"data.train={tmp_path / 'text.json'}", "model.trainable=[projector]"]
    with pytest.raises(ConfigError, match=says("model.trainable", "text.json")):
        train(load_config(tiny_config(), words))
