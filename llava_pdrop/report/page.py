"""A report is a page: paragraphs, tables and pictures, shown on a screen and written as Markdown from the same rows,
beside the numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from llava_pdrop.report.console import console
from llava_pdrop.report.pictures import save_picture


@dataclass(frozen=True)
class Table:
    """Cells as text. The first ``left`` columns are words and aligned so, those behind them numbers; ``sections`` are
    the rows with a line above them on the screen."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    left: int = 1
    sections: frozenset[int] = frozenset()

    @classmethod
    def of_columns(cls, columns: Iterable[tuple[str, Sequence[str]]], title: str = "", left: int = 1) -> Table:
        """Of (head, cells) pairs; columns of which nothing is known are left out."""
        known = [(head, cells) for head, cells in columns if any(cells)]
        return cls([head for head, _ in known], list(zip(*(cells for _, cells in known))), title, left)

    def markdown(self) -> str:
        """The table, ending with a newline."""
        ruler = ["---" if place < self.left else "---:" for place in range(len(self.head))]
        return "".join("| " + " | ".join(line) + " |\n" for line in (self.head, ruler, *self.rows))

    def show(self) -> None:
        """Prints the table; into a file at a width that cuts nothing."""
        shown = RichTable(title=escape(self.title) or None, header_style="bold", box=box.SIMPLE_HEAD)
        for place, name in enumerate(self.head):
            shown.add_column(escape(name), justify="left" if place < self.left else "right", overflow="fold")
        for place, row in enumerate(self.rows):
            if place in self.sections:
                shown.add_section()
            shown.add_row(*map(escape, row))
        console().print(shown)


@dataclass(frozen=True)
class Picture:
    """``draw`` makes the figure (by `report.pictures.subplots`) that is saved as ``file`` beside the page."""

    file: str
    caption: str
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Note:
    """A paragraph that stands in the file only."""

    text: str


Block = str | Note | Table | Picture
"""What a page consists of; a text is a paragraph, in Markdown."""


@dataclass(frozen=True)
class Page:
    """What a command found out. ``facts`` are its numbers, whatever `plain` knows."""

    title: str
    blocks: Sequence[Block]
    facts: Any = None

    def show(self) -> None:
        """Prints tables and paragraphs."""
        for block in self.blocks:
            if isinstance(block, Table):
                block.show()
            elif isinstance(block, str):
                console().print(block.replace("*", ""), markup=False, highlight=False)

    def write(self, directory: Path, markdown: str, facts: str | None = None) -> list[Path]:
        """Writes the page into ``directory`` as the file ``markdown``, its numbers as ``facts`` where that is named,
        and the pictures. Returns the files that lie there then: a picture that cannot be drawn is left out, and the
        page goes without it."""
        directory.mkdir(parents=True, exist_ok=True)
        files = [directory / markdown]
        if facts is not None:
            files.append(write_json(directory / facts, self.facts))
        text = [f"# {self.title}\n"]
        for block in self.blocks:
            if isinstance(block, Picture):
                if save_picture(directory / block.file, block.draw, facecolor="white"):
                    files.append(directory / block.file)
                    text.append(f"![{block.caption}]({block.file})\n")
            elif isinstance(block, Table):
                text.append((f"## {block.title}\n\n" if block.title else "") + block.markdown())
            else:
                text.append(f"{block.text if isinstance(block, Note) else block}\n")
        files[0].write_text("\n".join(text), encoding="utf-8")
        return files


def write_json(file: Path, value: Any, indent: int | None = 1) -> Path:
    """Writes ``value`` for programs; returns ``file``. Without ``indent`` it is one line."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(plain(value), indent=indent, separators=separators, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
    return file


def plain(value: Any) -> Any:
    """``value`` in JSON's own types: dataclasses and mappings become objects, tuples lists, paths text."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
