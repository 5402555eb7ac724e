"""Records -> samples on demand, and samples -> packed batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch.utils.data import Dataset
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from llava_pdrop.data.conversation import Template
from llava_pdrop.data.images import image_size, load_image, preprocess
from llava_pdrop.data.tokens import Truncation, build_sample, sample_length
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import ImageInput, PackedBatch, Record, Sample

T = TypeVar("T")


class ConversationDataset(Dataset[Sample]):
    """Training samples made from records when they are asked for.

    Args:
        records: e.g. of `llava_pdrop.data.records.read_records`.
        processor: the vision tower's image processor.
        max_length, truncation: see `llava_pdrop.data.tokens.build_sample`.
    """

    def __init__(
        self,
        records: Sequence[Record],
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        geometry: ImageGeometry,
        processor: BaseImageProcessor,
        max_length: int | None = None,
        truncation: Truncation = "turns",
    ) -> None:
        self.records = records
        self.geometry = geometry
        self.processor = processor
        self._rules = (template, tokenizer, image_token_id, geometry, max_length, truncation)
        self._lengths: list[int] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``.

        Raises:
            ValueError, FileNotFoundError: an image cannot be read or the conversation not be used; names the record.
        """
        record = self.records[index]
        images = [_naming(record, self._read, path) for path in record.images]
        return build_sample(record, images, *self._rules)

    def lengths(self) -> list[int]:
        """Tokens of every sample, without decoding a picture. Goes through all records, so an unusable conversation
        is reported before training starts.

        Raises:
            ValueError, FileNotFoundError: as `__getitem__`.
        """
        if self._lengths is None:
            self._lengths = [self._length(record) for record in self.records]
        return self._lengths

    def _length(self, record: Record) -> int:
        sizes = [_naming(record, image_size, path) for path in record.images]
        return sample_length(record, sizes, *self._rules)

    def _read(self, path: Path) -> ImageInput:
        return preprocess(load_image(path), self.geometry, self.processor)


def _naming(record: Record, read: Callable[[Path], T], path: Path) -> T:
    """``read(path)`` with the record's name in front of an error about the image."""
    try:
        return read(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{record.origin} (id {record.id}): {error}") from None
    except ValueError as error:
        raise ValueError(f"{record.origin} (id {record.id}): {error}") from None


def collate(samples: list[Sample]) -> PackedBatch:
    """A micro-batch for training: the ``collate_fn`` of a `torch.utils.data.DataLoader`."""
    return PackedBatch.pack(samples)
