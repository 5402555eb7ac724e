"""Hugging Face ``datasets``: a directory written by ``save_to_disk``, or parquet files, with the bytes of pictures in
an image column (or names of files)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_pdrop.data.readers.pictures import TableCell, is_list, pictures_of
from llava_pdrop.errors import FULL, QUOTED, RecordError, UserError, clip

TEXT_COLUMNS = ("id", "conversations", "messages", "system", "loss", "weight")
IMAGE_COLUMNS = ("image", "images")

HELD = "(not read)"
"""Stands in an entry for what any other column holds, if that is no short text: that it has such a key is all that is
asked. Of a text it is also asked whether it names a film."""


class TableEntries(Sequence[tuple[str, Any]]):
    """Rows of a table; their pictures become `TableCell` and are not read here.

    Args:
        dataset: a `datasets.Dataset`.
    """

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        dataset = dataset.with_format("arrow")
        self._text = dataset.select_columns([name for name in TEXT_COLUMNS if name in dataset.column_names])
        self._columns = [name for name in IMAGE_COLUMNS if name in dataset.column_names]
        self._images = dataset.select_columns(self._columns)
        others = [name for name in dataset.column_names if name not in (*TEXT_COLUMNS, *IMAGE_COLUMNS)]
        self._others = dataset.select_columns(others) if others else None
        for column in self._columns:
            if not _holds_pictures(found := dataset.features.arrow_schema.field(column).type):
                raise UserError(
                    f"{path}: column '{column}' is of type {found}; a picture is a file name, bytes, or an image of "
                    "datasets (a struct of bytes and path), alone or in a list"
                )

    def __len__(self) -> int:
        return len(self._text)

    def __getitem__(self, index: Any) -> Any:
        """Raises: RecordError: a picture with neither bytes nor a file name."""
        origin = f"{self.path}[{index}]"
        try:
            (entry,) = self._text[int(index)].to_pylist()
        except ValueError as error:  # pyarrow's: broken UTF-8, a broken file
            raise RecordError(origin, None, clip(error)) from None
        if self._others is not None:
            row = self._others[int(index)]
            entry |= {name: _held(row.column(name)[0]) for name in row.column_names}
            entry = {name: value for name, value in entry.items() if value is not None or name in TEXT_COLUMNS}
        for column in self._columns:
            cell = self._images[int(index)].column(column)[0]
            found = [self._source(picture, int(index), column, i) for i, picture in enumerate(pictures_of(cell))]
            entry[column] = found
            if None in found:
                place = found.index(None)
                id = None if entry.get("id") is None else str(entry["id"])
                raise RecordError(origin, id, f"picture {place} has neither bytes nor a file name")
        return origin, entry

    def _source(self, picture: Any, row: int, column: str, position: int) -> TableCell | str | None:
        import pyarrow.types as of

        value = picture
        if of.is_struct(picture.type) and picture.is_valid:
            value = picture["bytes"]
            if not value.is_valid:
                return picture["path"].as_py() if "path" in picture else None
        if _is_text(value.type) or not value.is_valid:
            return value.as_py()
        return TableCell(self.path, row, column, position, self._images)


def read_hf(path: Path) -> TableEntries:
    """Rows of a ``datasets`` directory or of parquet files (one, or all below a directory, in order of their names).

    Parquet is converted to Arrow in the cache of ``datasets`` (``HF_DATASETS_CACHE``) on first use, since a row of a
    parquet file cannot be read alone; that takes as much disk space again.

    Raises:
        UserError: several splits, not readable, or no column ``conversations`` or ``messages``.
    """
    import datasets
    import pyarrow

    if path.is_dir() and (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise UserError(f"{path}: holds the splits {', '.join(splits)}; name one of them, e.g. {path / splits[0]}")
    try:
        if path.is_dir() and (path / "state.json").is_file():
            dataset = datasets.load_from_disk(str(path))
        else:
            files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
            if not files:
                raise UserError("neither written by save_to_disk nor any *.parquet in it")
            for file in files:
                _read_footer(file)
            dataset = datasets.load_dataset("parquet", data_files=files, split="train")
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        problem = not_writable(cache)
        if problem is None and _is_full(error):
            problem = "lies on a disk without room for it: make some"
        if problem is not None:
            raise UserError(
                f"{cache}: the cache of data sets, into which {path} has to be converted, {problem}, or "
                "name another directory in the environment variable HF_DATASETS_CACHE (or HF_HOME)"
            ) from None
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read as a Hugging Face data set: {reason}") from None
    if not {"conversations", "messages"} & set(dataset.column_names):
        found = clip(", ".join(dataset.column_names))
        raise UserError(f"{path}: has no column 'conversations' or 'messages' (columns: {found}); rename or convert it")
    return TableEntries(path, dataset)


def not_writable(directory: Path) -> str | None:
    """What keeps this user from writing into ``directory``, which may not be there yet; None where nothing does."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return f"cannot be written to ({error.strerror}): make it writable"


def _is_full(error: BaseException) -> bool:
    """Whether it was the disk that failed, and not the data: ``datasets`` looks before, or writes until it fails."""
    causes = (error, error.__cause__)
    return any(getattr(cause, "errno", None) in FULL or "Not enough disk space" in str(cause) for cause in causes)


def _read_footer(file: str) -> None:
    """Refuses a parquet file that is cut short. ``datasets`` would log a line of its own, and not say which file."""
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: {error}") from None


def _held(cell: Any) -> str | None:
    """What an entry says a cell of any other column holds; None: nothing."""
    if not _holds_something(cell):
        return None
    if _is_text(cell.type) and (text := cell.as_buffer()).size <= QUOTED:
        return text.to_pybytes().decode(errors="replace")
    return HELD


def _holds_something(cell: Any) -> bool:
    import pyarrow.types as of

    if not cell.is_valid:
        return False
    if is_list(cell.type):
        return len(cell) > 0
    if of.is_struct(cell.type):
        return any(_holds_something(value) for value in cell.values())
    return not _is_text(cell.type) or cell.as_buffer().size > 0


def _is_text(type: Any) -> bool:
    import pyarrow.types as of

    return of.is_string(type) or of.is_large_string(type) or of.is_string_view(type)


def _holds_pictures(type: Any) -> bool:
    """Whether a column of this pyarrow type can hold or name pictures."""
    import pyarrow.types as of

    inner = type.value_type if is_list(type) else type
    if of.is_struct(inner):
        return inner.get_field_index("bytes") >= 0
    return of.is_binary(inner) or of.is_large_binary(inner) or of.is_null(inner) or _is_text(inner)
