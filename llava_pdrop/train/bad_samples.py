"""What happens when a sample cannot be loaded in the middle of a run, say because a picture is gone: the run stops and
names it, or another sample takes its place.

(Records that cannot be used at all are found before training; that is ``data.on_invalid``.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch.utils.data import Dataset

from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.errors import UserError, clip
from llava_pdrop.types import PackedBatch, Sample

BAD_SAMPLES_FILE = "bad_samples.jsonl"
"""In ``output_dir``: the samples that ``train.on_bad_sample: skip`` replaced."""


@dataclass(frozen=True)
class BadSample:
    """Stands for a sample, or a batch with one, that ends the run; ``message`` is the whole error. It travels as a
    value because a `DataLoader` wraps what its workers raise in a traceback of many lines."""

    message: str


class CheckedSamples(Dataset["Sample | BadSample"]):
    """The samples of ``dataset``, none of which ends the run by surprise.

    With ``skip``, the next usable sample of no more tokens takes the place of one that cannot be loaded. Which one that
    is depends on the lengths alone, so the micro-batch stays within its budget, all ranks keep their number of steps,
    and a run that is resumed does the same again.

    Args:
        skip: False stops at the first sample that cannot be loaded.
        limit: most samples that are replaced in the whole run; more end it.
        report: JSON lines of those replaced: ``index``, ``origin``, ``id``, ``reason``, ``replaced_by``.
    """

    def __init__(self, dataset: ConversationDataset, skip: bool, limit: int, report: Path) -> None:
        self.dataset, self.skip, self.limit, self.report = dataset, skip, limit, report

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | BadSample:
        """Sample ``index``, its replacement, or what ends the run."""
        found = self._load(index)
        if isinstance(found, Sample):
            return found
        if not self.skip:
            return BadSample(f"{found}; or set train.on_bad_sample=skip, and another sample takes its place")
        for other in self._shorter(index):
            replacement = self._load(other)
            if isinstance(replacement, Sample):
                return self._note(index, found, other) or replacement
            if (ended := self._note(other, replacement, None)) is not None:
                return ended
        return BadSample(f"{found}; no sample of at most {self._lengths[index]} tokens can take its place")

    def _load(self, index: int) -> Sample | str:
        """A sample, or why it cannot be loaded."""
        try:
            return self.dataset[index]
        except (UserError, OSError) as error:
            return " ".join(str(error).split())
        except MemoryError:
            record = self.dataset.records[index]
            return f"{record.origin} (id {clip(record.id)}): memory does not suffice for it; make it smaller"

    @cached_property
    def _lengths(self) -> list[int]:
        return self.dataset.lengths()

    def _shorter(self, index: int) -> list[int]:
        """The samples of no more tokens, the longest first."""
        place = (self._lengths[index], index)
        return [i for _, i in sorted(((n, i) for i, n in enumerate(self._lengths) if (n, i) < place), reverse=True)]

    def _note(self, index: int, reason: str, replaced_by: int | None) -> BadSample | None:
        """Writes a bad sample down, once per run, and counts; returns what ends the run if there are too many."""
        noted = self.report.read_text(encoding="utf-8") if self.report.is_file() else ""
        known = {json.loads(line)["index"] for line in noted.splitlines()}
        if index not in known:
            record = self.dataset.records[index]
            entry = {"index": index, "origin": record.origin, "id": record.id, "reason": reason}
            self.report.parent.mkdir(parents=True, exist_ok=True)
            with self.report.open("a", encoding="utf-8") as lines:  # one short write: workers and ranks share the file
                lines.write(json.dumps({**entry, "replaced_by": replaced_by}, ensure_ascii=False) + "\n")
            known.add(index)
        if len(known) <= self.limit:
            return None
        return BadSample(
            f"{reason}; {len(known)} samples could not be loaded, more than train.max_bad_samples={self.limit}; all of "
            f"them are listed in {self.report}"
        )


def collate_checked(samples: list[Sample | BadSample]) -> PackedBatch | BadSample:
    """A micro-batch, for the loader of training; one sample that ends the run makes a batch that does."""
    bad = next((sample for sample in samples if isinstance(sample, BadSample)), None)
    return bad or PackedBatch.pack([sample for sample in samples if isinstance(sample, Sample)])
