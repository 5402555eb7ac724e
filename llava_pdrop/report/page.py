"""A report is a page: paragraphs, tables and pictures, shown on a screen and written as Markdown from the same rows,
beside the numbers as JSON."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_pdrop.files import save_text, write_json
from llava_pdrop.report.console import grid, paragraph, say
from llava_pdrop.report.pictures import save_picture


@dataclass(frozen=True)
class Table:
    """Cells as text. The first ``left`` columns are words and aligned so, those behind them numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    left: int = 1

    @classmethod
    def of_columns(cls, columns: Iterable[tuple[str, Sequence[str]]], title: str = "", left: int = 1) -> Table:
        """Of (head, cells) pairs; columns of which nothing is known are left out."""
        known = [(head, cells) for head, cells in columns if any(cells)]
        return cls([head for head, _ in known], list(zip(*(cells for _, cells in known))), title, left)

    def markdown(self) -> str:
        """The table, ending with a newline."""
        ruler = ["---" if place < self.left else "---:" for place in range(len(self.head))]
        return "".join(
            "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n"
            for line in (self.head, ruler, *self.rows)
        )

    def show(self) -> None:
        """Prints the table."""
        grid(self.title, self.head, self.rows, self.left)


@dataclass(frozen=True)
class Picture:
    """``draw`` makes the figure (by `report.pictures.subplots`) that is saved as ``file`` beside the page."""

    file: str
    caption: str
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Note:
    """A paragraph, list or table in Markdown that stands in the file only."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to copy, which the screen does not wrap."""

    text: str


Block = str | Note | Code | Table | Picture
"""What a page consists of; a text is a paragraph, in Markdown."""


@dataclass(frozen=True)
class Page:
    """What a command found out. ``facts`` are its numbers, whatever `write_json` knows."""

    title: str
    blocks: Sequence[Block]
    facts: Any = None

    def show(self) -> None:
        """Prints tables, paragraphs and code. In a log file a paragraph is one line."""
        for block in self.blocks:
            if isinstance(block, Table):
                block.show()
            elif isinstance(block, Code):
                say(block.text)
            elif isinstance(block, str):
                paragraph(block.replace("*", ""))

    def write(self, directory: Path, markdown: str, facts: str | None = None) -> list[Path]:
        """Writes the page into ``directory`` as the file ``markdown``, its numbers as ``facts`` where that is named,
        and the pictures. Returns the files that lie there then: a picture that cannot be drawn is left out, and the
        page goes without it."""
        directory.mkdir(parents=True, exist_ok=True)
        files = [directory / markdown]
        if facts is not None:
            files.append(write_json(directory / facts, self.facts))
        for block in self.blocks:
            if isinstance(block, Picture) and save_picture(directory / block.file, block.draw, facecolor="white"):
                files.append(directory / block.file)
        text = f"# {self.title}\n\n{markdown_of(self.blocks, {file.name for file in files})}"
        save_text(files[0], text)
        return files


def markdown_of(blocks: Iterable[Block], pictures: Collection[str] = ()) -> str:
    """``blocks`` as text, with those pictures whose files are named."""
    text = []
    for block in blocks:
        match block:
            case Table():
                text.append((f"## {block.title}\n\n" if block.title else "") + block.markdown())
            case Picture():
                text += [f"![{block.caption}]({block.file})\n"] if block.file in pictures else []
            case Code():
                text.append(f"```\n{block.text}\n```\n")
            case Note():
                text.append(f"{block.text}\n")
            case _:
                text.append(f"{block}\n")
    return "\n".join(text)
