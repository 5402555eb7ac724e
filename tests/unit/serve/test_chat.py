"""What is typed is done, what is wrong is one line, and the conversation goes on."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest

from llava_pdrop.__main__ import main
from llava_pdrop.config.load import load_config
from llava_pdrop.errors import UserError
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.chat import HELP, Chat, parsed, told
from llava_pdrop.serve.conversation import Conversation, Reply
from llava_pdrop.train.run import train
from tests.messages import says


def typed(conversation: Conversation, *lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    Chat(conversation).run()


def test_a_conversation(
    conversation: Conversation, pictures: list[Path], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept it.json"
    typed(
        conversation,
        f"/image {pictures[0]}",
        "Which colour is it",
        "/vanilla",
        "Which colour is it",
        "/schedule 1,2 0.5,0.25",
        "Which colour is it",
        "",
        f"/save '{kept}'",
        "/quit",
        "never read",
        monkeypatch=monkeypatch,
    )
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("[image tokens")] and "error" not in shown
    assert re.findall(r"image tokens ([\d >]+);", shown) == ["16 > 8 > 4 > 2", "16", "16 > 8 > 4"]
    assert all(reply.text in shown for reply in conversation.replies) and len(conversation.replies) == 3
    assert "drops after layers [1, 2] and keeps 50.0%, 25.0%" in shown and "vanilla: no image token" in shown
    (record,) = json.loads(kept.read_text())
    assert len(record["conversations"]) == 6 and record["image"] == [str(pictures[0])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/imag x.png", says("'/imag'", "/image")),
        ("/image gone.png", says("gone.png")),
        ("/image", says("one file")),
        ("/image 'a", says("/image 'a", "quotation")),
        ("/schedule 1,2", says("8,16,24 0.5,0.25,0.125")),
        ("/schedule 1,x 0.5,0.2", says("'x'")),
        ("/schedule 1,2 0.5", says("ratios")),
        ("/schedule 1,9 0.5,0.2", says("9", "4 layers")),
        ("/schedule gone.yaml", says("gone.yaml")),
        ("/save kept.txt", says(".json")),
        ("/vanilla now", says("/vanilla", "now")),
        ("/clear all", says("/clear", "all")),
        ("/quit now", says("/quit", "now")),
        ("what is an <image>", says("<image>")),
    ],
)
def test_what_is_wrong_is_one_line_and_it_goes_on(
    conversation: Conversation, line: str, message: str, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(conversation, line, "Which colour is it", monkeypatch=monkeypatch)
    errors = [shown for shown in capsys.readouterr().out.splitlines() if shown.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0])
    assert len(conversation.replies) == 1


def test_a_line_in_another_encoding_is_refused(conversation: Conversation, monkeypatch, capsys) -> None:
    lines = io.TextIOWrapper(
        io.BytesIO("Welche Farbe hat die Tür\n".encode("latin-1") + b"Which colour is it\n"), "utf-8"
    )
    monkeypatch.setattr("sys.stdin", lines)
    Chat(conversation).run()
    assert re.search(says("error", "utf-8"), capsys.readouterr().out)
    assert [turn.text for turn in conversation.turns[::2]] == ["Which colour is it"]


def test_a_file_that_is_there_is_not_overwritten(conversation: Conversation, tmp_path: Path) -> None:
    chat, mine, other = Chat(conversation), tmp_path / "mine.json", tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(UserError, match=says("/save", "nothing has been asked")):
        chat.obey(f"/save {mine}")
    conversation.ask("Which colour is it")
    chat.obey(f"/save {mine}")
    chat.obey(f"/save {mine}")  # its own
    with pytest.raises(UserError, match=says("other.json", "another")):
        chat.obey(f"/save {other}")
    assert other.read_text() == "{}"


def test_an_answer_that_is_stopped_is_taken_back(conversation: Conversation, monkeypatch, capsys) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "ask", interrupted)
    Chat(conversation).obey("Which colour is it")
    assert "taken back" in capsys.readouterr().out and conversation.turns == []


def test_schedules_are_numbers_or_a_file() -> None:
    assert parsed(["8,16,24", "0.5,0.25,0.125"], 32) == Schedule((8, 16, 24), (0.5, 0.25, 0.125))
    assert parsed(["configs/schedules/pyramiddrop.yaml"], 4) == Schedule((1, 2, 3), (0.5, 0.25, 0.125))


def test_the_line_of_an_answer_says_what_it_lacks() -> None:
    reply = Reply("a", False, (0,), 9, 1, 0.5, 0.5, 2**20, 2**20, reused=True)
    assert told(reply) == (
        "[prompt 9 tokens; first token 500 ms; cache 1,020 KiB; on the cache of the question before; "
        "cut: no more tokens were allowed]"
    )


def test_help_names_every_command(conversation: Conversation) -> None:
    assert {line.split()[0] for line in HELP.splitlines()} == set(Chat(conversation).commands)


def test_the_command(tiny_config, pictures: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    run = train(load_config(tiny_config(), ["train.max_steps=1"]))
    monkeypatch.setattr("sys.stdin", io.StringIO("Which colour is it\n"))
    drop = "pyramid_drop={layers: [1], ratios: [0.5]}"
    assert main(["chat", str(run), str(pictures[0]), drop, "--max-new-tokens", "3"]) == 0
    assert "16 > 8;" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llava_pdrop.config.presets.CHECKOUT", tmp_path)
    assert main(["chat"]) == 2
    assert re.search(says("embedded run", "scripts/finetune_pdrop.sh"), capsys.readouterr().err)
    assert main(["chat", str(pictures[0])]) == 2
    assert re.search(says(pictures[0].name, "is no model"), capsys.readouterr().err)
    assert main(["chat", str(run), "gone.png"]) == 2
    assert re.search(says("gone.png"), capsys.readouterr().err)
