"""A conversation in the terminal: lines in, answers out as they are written, and what each of them took."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from llava_pdrop.config.presets import bare_schedule, file_of
from llava_pdrop.config.values import read_mapping
from llava_pdrop.errors import UserError, check_name, line_of
from llava_pdrop.files import write_json
from llava_pdrop.report.console import console, say
from llava_pdrop.report.units import MEMORY, time_text, unit_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.serve.conversation import Conversation, Reply

HELP = """\
/image FILE                       show a picture with the next question
/schedule 8,16,24 0.5,0.25,0.125  drop before these layers to these shares; or as a YAML file says
/vanilla                          drop nothing
/save FILE.json                   keep the conversation, as a record that training reads, with what every answer took
/clear                            start anew
/help                             this list
/quit                             end (so do Ctrl-C and Ctrl-D)"""


class Chat:
    """Reads lines and does what they say: a command that begins with ``/``, or a question."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.saved = set[Path]()
        self.ended = False
        self.commands: dict[str, Callable[[list[str]], None]] = {
            "/image": self._image,
            "/schedule": self._schedule,
            "/vanilla": partial(_alone, "/vanilla", lambda: self._take(Schedule())),
            "/save": self._save,
            "/clear": partial(_alone, "/clear", self.conversation.clear),
            "/help": partial(_alone, "/help", lambda: say(HELP)),
            "/quit": partial(_alone, "/quit", self._quit),
        }

    def run(self) -> None:
        """Until the input ends, or ``/quit``. An error is one line, and the conversation goes on as it was."""
        say(described(self.conversation.schedule))
        say("Ask, or /help.")
        if hasattr(sys.stdin, "reconfigure"):  # `obey` refuses a line that is not in its encoding
            sys.stdin.reconfigure(errors="surrogateescape")
        while not self.ended:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            try:
                self.obey(line)
            except (UserError, OSError) as error:
                say(f"error: {line_of(error)}")

    def obey(self, line: str) -> None:
        """Does what one line says.

        Raises:
            UserError: an unknown command, words it does not take, or what `Conversation.ask` raises.
        """
        if not line:
            return
        if any("\udc80" <= letter <= "\udcff" for letter in line):
            raise UserError(f"the line is not text in {sys.stdin.encoding}: write it in that encoding")
        if not line.startswith("/"):
            return self._ask(line)
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"{line}: {error}: close the quotation mark") from None
        check_name("a line that begins with /", name, self.commands)
        self.commands[name](words)

    def _quit(self) -> None:
        self.ended = True

    def _ask(self, text: str) -> None:
        shown = console()
        try:
            reply = self.conversation.ask(text, lambda piece: shown.out(piece, end="", highlight=False))
        except KeyboardInterrupt:
            say("\nstopped: the question is taken back")
            return
        shown.out()
        shown.print(told(reply), style="dim", soft_wrap=True, markup=False, highlight=False)

    def _image(self, words: list[str]) -> None:
        if len(words) != 1:
            raise UserError("/image takes one file (in quotation marks, if its name has spaces)")
        self.conversation.show(Path(words[0]).expanduser())

    def _schedule(self, words: list[str]) -> None:
        self._take(parsed(words, self.conversation.depth))

    def _take(self, schedule: Schedule) -> None:
        self.conversation.take(schedule)
        say(described(schedule))

    def _save(self, words: list[str]) -> None:
        if len(words) != 1 or not words[0].endswith(".json"):
            raise UserError("/save takes one file that ends in .json")
        file = Path(words[0]).expanduser()
        if file.exists() and file not in self.saved:
            raise UserError(f"{file} is there already: name another file")
        if not self.conversation.turns:
            raise UserError("/save: nothing has been asked yet")
        write_json(file, [self.conversation.as_record()])
        self.saved.add(file)
        say(f"saved: {file}")


def _alone(name: str, do: Callable[[], None], words: list[str]) -> None:
    """A command ``name`` that takes nothing."""
    if words:
        raise UserError(f"{name} takes nothing behind it, got {' '.join(words)}")
    do()


def parsed(words: Sequence[str], depth: int) -> Schedule:
    """The schedule that ``LAYERS RATIOS`` (numbers with commas between them) or a file stands for, in a decoder of
    ``depth`` layers.

    Raises:
        UserError: neither, or it fits no such decoder.
    """
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        content = read_mapping(file_of("/schedule", words[0]), wanted="a schedule")
        found = bare_schedule(content, depth).check(depth)
        return found if "positions" in content else replace(found, positions="auto")
    if len(words) != 2:
        raise UserError("/schedule takes layers and ratios, such as 8,16,24 0.5,0.25,0.125, or a YAML file")
    try:
        layers, ratios = [int(x) for x in words[0].split(",")], [float(x) for x in words[1].split(",")]
    except ValueError as error:
        raise UserError(f"/schedule {' '.join(words)}: {error}: write 8,16,24 0.5,0.25,0.125") from None
    return Schedule(tuple(layers), tuple(ratios)).check(depth)


def described(schedule: Schedule) -> str:
    """One line about what is dropped."""
    if schedule.vanilla:
        return "vanilla: no image token is dropped"
    return f"PyramidDrop: {schedule.told}" + (f" and keeps {schedule.amounts_text}" if schedule.layers else "")


def told(reply: Reply) -> str:
    """One line about what an answer took."""
    sizes = unit_of([reply.whole_cache_bytes], MEMORY)
    parts = [f"image tokens {' > '.join(map(str, reply.stages))}"] if reply.stages[0] else []
    parts += [f"prompt {reply.prompt_tokens} tokens", f"first token {time_text(reply.first_seconds)}"]
    if reply.tokens_per_second is not None:
        parts.append(f"{reply.tokens_per_second:.1f} tokens/s")
    parts.append(f"cache {sizes.text(reply.cache_bytes)} {sizes.name}")
    if reply.cache_bytes < reply.whole_cache_bytes:
        parts[-1] += f" ({sizes.text(reply.whole_cache_bytes)} without dropping)"
    if reply.reused:
        parts.append("on the cache of the question before")
    if not reply.finished:
        parts.append("cut: no more tokens were allowed")
    return "[" + "; ".join(parts) + "]"
