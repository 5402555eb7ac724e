"""Hugging Face ``datasets``: a directory written by ``save_to_disk``, or parquet files, with the bytes of pictures in
an image column (or names of files)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_pdrop.data.sources import TableCell

TEXT_COLUMNS = ("id", "conversations")
IMAGE_COLUMNS = ("image", "images")


class TableEntries(Sequence[tuple[str, Any]]):
    """Rows of a table; their pictures become `TableCell` and are not read here.

    Args:
        dataset: a `datasets.Dataset`.
    """

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        dataset = dataset.with_format("arrow")
        self._text = dataset.select_columns([name for name in TEXT_COLUMNS if name in dataset.column_names])
        self._column = next((name for name in IMAGE_COLUMNS if name in dataset.column_names), None)
        self._images = dataset.select_columns([self._column]) if self._column else None

    def __len__(self) -> int:
        return len(self._text)

    def __getitem__(self, index: Any) -> Any:
        """Raises: ValueError: a picture with neither bytes nor a file name."""
        origin = f"{self.path}[{index}]"
        (entry,) = self._text[int(index)].to_pylist()
        if self._images is not None:
            cell = self._images[int(index)].column(self._column)[0]
            entry["image"] = [self._source(picture, int(index), i) for i, picture in enumerate(_pictures(cell))]
            if None in entry["image"]:
                place = entry["image"].index(None)
                raise ValueError(f"{origin} (id {entry.get('id')}): picture {place} has neither bytes nor a file name")
        return origin, entry

    def _source(self, picture: Any, row: int, position: int) -> TableCell | str | None:
        import pyarrow

        if pyarrow.types.is_struct(picture.type) and picture.is_valid:
            if not picture["bytes"].is_valid:
                return picture["path"].as_py()
        elif pyarrow.types.is_string(picture.type) or not picture.is_valid:
            return picture.as_py()
        return TableCell(self.path, row, str(self._column), position, self._images)


def read_hf(path: Path) -> TableEntries:
    """Rows of a ``datasets`` directory or of parquet files (one, or all below a directory, in order of their names).

    Parquet is converted to Arrow in the cache of ``datasets`` (``HF_DATASETS_CACHE``) on first use, since a row of a
    parquet file cannot be read alone; that takes as much disk space again.

    Raises:
        ValueError: several splits, not readable, or no column ``conversations``.
    """
    import datasets
    import pyarrow

    if path.is_dir() and (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{path}: holds the splits {', '.join(splits)}; name one of them, e.g. {path / splits[0]}")
    try:
        if path.is_dir() and (path / "state.json").is_file():
            dataset = datasets.load_from_disk(str(path))
        else:
            files = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
            if not files:
                raise ValueError("neither written by save_to_disk nor any *.parquet in it")
            dataset = datasets.load_dataset("parquet", data_files=files, split="train")
    except (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ValueError(f"{path}: cannot be read as a Hugging Face data set: {reason}") from None
    if "conversations" not in dataset.column_names:
        found = ", ".join(dataset.column_names)
        raise ValueError(f"{path}: has no column 'conversations' (columns: {found}); rename or convert it")
    return TableEntries(path, dataset)


def _pictures(cell: Any) -> list[Any]:
    """The scalars of a cell with one picture, a list of them, or none."""
    import pyarrow

    if not cell.is_valid:
        return []
    if pyarrow.types.is_list(cell.type) or pyarrow.types.is_large_list(cell.type):
        return list(cell.values)
    return [cell]
