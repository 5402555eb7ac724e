"""Records -> samples on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

import llava_pdrop.geometry
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.images import load_image, preprocess
from llava_pdrop.data.records import Records
from llava_pdrop.data.survey import Survey, may_be_left_out, survey
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.errors import MissingFileError, UserError, clip
from llava_pdrop.types import Record, Sample


@dataclass(eq=False, repr=False)
class ConversationDataset(Dataset[Sample]):
    """Training samples made from records when they are asked for.

    Attributes:
        records: e.g. of `llava_pdrop.data.mixture.read_data`.
        encoder: template, tokenizer, geometry and limit; records that name a template of their own keep it.
        processor: the vision tower's image processor.
        workers: processes that `survey` may use; 0: this one only.
        cache: directory where `survey` keeps what it found about large data sets; None: nowhere.
    """

    records: Sequence[Record]
    encoder: Encoder
    processor: BaseImageProcessor
    workers: int = 0
    cache: Path | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``.

        Raises:
            UserError, MissingFileError: an image cannot be read or the conversation not be used; names the record.
        """
        record, geometry = self.records[index], self.encoder.geometry
        try:
            images = [preprocess(load_image(source), geometry, self.processor) for source in record.images]
        except FileNotFoundError as error:
            raise MissingFileError(f"{record.origin} (id {clip(record.id)}): {error}") from None
        except UserError as error:
            raise UserError(f"{record.origin} (id {clip(record.id)}): {error}") from None
        return self.encoder.train(record, images)

    def lengths(self) -> list[int]:
        """Tokens of every sample, without decoding a picture. Goes through all records (`survey`), so an unusable one
        is reported before training starts.

        Raises:
            UserError: a record cannot be used; names the first one and says how many there are.
        """
        if self.survey.problems:
            raise UserError(self.survey.first_problem())
        return self.survey.lengths.tolist()

    @cached_property
    def survey(self) -> Survey:
        """What a pass over all records finds; see `llava_pdrop.data.survey`."""
        return survey(self.records, self.encoder.lengths, self._rules(), self.workers, self.cache)

    def without_unusable(self, most: float, report: Path | None = None) -> ConversationDataset:
        """The same data set, leaving out the records that cannot be used.

        Args:
            most: the largest share of the records that may be left out.
            report: JSON-lines file for index, origin, id and reason of each that is left out; None: not written.

        Raises:
            UserError: more than that are unusable; names the first one.
        """
        found = self.survey
        if report is not None:
            found.write_report(report)
        if not may_be_left_out(len(found.problems), len(self), most):
            listed = f", all of them listed in {report}" if report is not None else ""
            raise UserError(
                f"{len(found.problems):,} of {len(self):,} records cannot be used{listed}; no more than a share of "
                f"{most:g} (data.max_invalid) may be left out. The first: {found.problems[min(found.problems)]}"
            )
        usable = np.setdiff1d(np.arange(len(self)), list(found.problems))
        records = self.records.take(usable) if isinstance(self.records, Records) else [self.records[i] for i in usable]
        rest = replace(self, records=records)
        rest.survey = found.of(usable)
        return rest

    def _rules(self) -> str:
        """Stands for everything the lengths depend on beside the records: settings, tokenizer, templates, and the code
        that counts."""
        encoder, tokenizer = self.encoder, self.encoder.tokenizer
        words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        limits = encoder.image_token_id, encoder.geometry, encoder.max_length, encoder.truncation
        digest = hashlib.sha256(repr((encoder.template, TEMPLATES, limits, repr(tokenizer), words)).encode())
        for file in [Path(llava_pdrop.geometry.__file__), *sorted(Path(__file__).parent.rglob("*.py"))]:
            digest.update(file.read_bytes())
        return digest.hexdigest()
