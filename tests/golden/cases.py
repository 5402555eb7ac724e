"""Golden cases as samples of ours, and bookkeeping of what was compared."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import PIL
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor

from llava_pdrop.checkpoint.build import ModelParts, build_parts
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.images import load_image, preprocess
from llava_pdrop.data.labels import IMAGE_SLOT, expand_slots
from llava_pdrop.data.records import read_records
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, ImageInput, Record, Sample, Turn

REPOSITORY = Path(__file__).parents[2]
DEFAULT_MAX_LENGTH = 2048


def directories() -> list[Path]:
    """What ``PDROP_GOLDEN`` names; by default the subset in this repository and the full set beside it, if there."""
    if named := os.environ.get("PDROP_GOLDEN"):
        assert Path(named).is_dir(), f"PDROP_GOLDEN={named}: no such directory"
        return [Path(named).resolve()]
    full = REPOSITORY.parent / "shared" / "golden"
    return [REPOSITORY / "tests" / "golden" / "reference", *([full] if full.is_dir() else [])]


def case_files() -> list[Path]:
    """The JSON of every case; a directory without ``cases/`` has none."""
    files = [file for directory in directories() for file in sorted((directory / "cases").glob("*.json"))]
    stored = [file for directory in directories() for file in (directory / "cases").glob("*.safetensors")]
    orphans = [file for file in stored if not file.with_suffix(".json").exists()]
    assert not orphans, f"recorded tensors without a description: {orphans}"
    return files


@lru_cache(maxsize=4)
def load_parts(directory: Path, padded: bool, device: str) -> ModelParts:
    parts = build_parts(str(directory), pad_vocabulary=padded)
    parts.hf.to(device)
    return parts


@dataclass
class Case:
    """One case: ``info`` its JSON, ``tensors`` its recorded tensors, ``device`` where our model runs, ``compared`` the
    numbers checked so far, ``cut_short`` whether the rest of it cannot be (`check_pixels`)."""

    file: Path
    info: dict
    tensors: dict[str, Tensor]
    device: str = "cpu"
    compared: int = 0
    seen: set[str] = field(default_factory=set)
    cut_short: bool = False

    @staticmethod
    def load(file: Path, device: str = "cpu") -> Case:
        stored = file.with_suffix(".safetensors")
        return Case(file, json.loads(file.read_text()), load_file(stored) if stored.exists() else {}, device)

    @property
    def root(self) -> Path:
        return self.file.parents[1]

    @property
    def model_directory(self) -> Path:
        return self.root / "models" / self.info["model"]

    @property
    def original_config(self) -> dict:
        config = json.loads((self.model_directory / "config.json").read_text())
        return config | self.info["config_overrides"]

    @property
    def flagged(self) -> bool:
        return bool(set(self.info["flags"]) & {"quirk", "tie"}) or "outcome" in self.info

    @property
    def query(self) -> str:
        return "answers" if self.info["mode"] == "train" else "last"

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.info["layer_list"], self.info["image_token_ratio_list_arg"])

    def parts(self, padded: bool = False) -> ModelParts:
        return load_parts(self.model_directory, padded, self.device)

    def geometry(self) -> ImageGeometry:
        geometry, config = self.parts().geometry, self.original_config
        if geometry.aspect == "pad":
            return geometry
        merge = config["mm_patch_merge_type"]
        return ImageGeometry(geometry.tile, geometry.patch, "anyres", merge, geometry.pinpoints)

    def max_length(self) -> int | None:
        """The official cut. A prompt is not cut: the official code crashes there (golden/README B8)."""
        if self.info["mode"] == "infer":
            return None
        return self.original_config.get("tokenizer_model_max_length") or DEFAULT_MAX_LENGTH

    def all_images(self) -> list[ImageInput]:
        """Every recorded image, dummies included."""
        if "in.images" in self.tensors:
            stack = list(self.tensors["in.images"])
        else:
            count = sum(name.startswith("in.images.") for name in self.tensors)
            stack = [self.tensors[f"in.images.{i}"] for i in range(count)]
        pixels = [image if image.dim() == 4 else image[None] for image in stack]
        return [ImageInput(p, tuple(size)) for p, size in zip(pixels, self.info["image_sizes_wh"], strict=True)]

    def samples(self) -> list[Sample]:
        """The rows of the case's batch. Rows without a placeholder use up one (dummy) image and show none of it."""
        if self.data_file is not None:
            return self.end_to_end_samples()
        images, samples = iter(self.all_images() if self.info["image_sizes_wh"] and self.has_images() else []), []
        ids_BL, mask_BL = self.tensors["in.input_ids"], self.tensors["in.attention_mask"]
        labels_BL = self.tensors.get("in.labels", torch.full_like(ids_BL, IGNORE_INDEX))
        for row, (ids, labels, mask) in enumerate(zip(ids_BL, labels_BL, mask_BL)):
            ids, labels = ids[mask].tolist(), labels[mask].tolist()
            slots = sum(token == IMAGE_SLOT for token in ids)
            own = [next(images) for _ in range(slots)] if slots else []
            if not slots:
                next(images, None)
            samples.append(self.expand(f"row {row}", ids, labels, own))
        return samples

    def has_images(self) -> bool:
        return any(name.startswith("in.images") for name in self.tensors)

    def expand(self, name: str, ids: list[int], labels: list[int], images: list[ImageInput]) -> Sample:
        token = self.parts().hf.config.image_token_id
        sizes = [image.size for image in images]
        ids, labels, spans = expand_slots(ids, labels, sizes, token, self.geometry(), self.max_length())
        return Sample(name, torch.tensor(ids), torch.tensor(labels), tuple(images[: len(spans)]), tuple(spans))

    @property
    def data_file(self) -> Path | None:
        """The JSON of an end-to-end case, which its ``purpose`` names."""
        named = re.search(r"e2e/\S+\.json", self.info["purpose"])
        return self.root / named.group() if named else None

    def end_to_end_samples(self) -> list[Sample]:
        """From the JSON file and the PNGs, through our own data path."""
        parts, file = self.parts(), self.data_file
        named = re.search(r"tokenizer (\w+)", self.info["purpose"])
        tokenizer = load_tokenizer(self.root / "tokenizers" / (named.group(1) if named else "sp_legacy_false"))
        token = parts.hf.config.image_token_id
        options = (TEMPLATES["v1"], tokenizer, token, self.geometry())
        if self.info["mode"] == "train":
            records = read_records(file, file.parent / "images")
            encoder = Encoder(*options, max_length=self.max_length(), truncation="tokens")
            dataset = ConversationDataset(records, encoder, parts.image_processor)
            return [dataset[i] for i in range(len(dataset))]
        query = json.loads(file.read_text())
        turn = Turn("human", "<image>\n" + query["question"])
        record = Record("query", (turn,), (self.root / query["image"],), "query")
        image = preprocess(load_image(record.images[0]), self.geometry(), parts.image_processor)
        return [Encoder(*options).prompt(record, [image])]

    def check_pixels(self, samples: list[Sample]) -> None:
        """End-to-end cases: the pixels that we made of the pictures are the official ones. Where Pillow's version makes
        others, which is no fault of ours, the case ends here."""
        for image in [image for sample in samples for image in sample.images] if self.data_file is not None else []:
            shapes, mean = ([*image.pixels.shape], [*image.pixels[0].shape]), image.pixels.mean().item()
            recorded = [s for s in self.info["images_summary"] if s["shape"] in shapes and abs(s["mean"] - mean) < 1e-5]
            if len(recorded) != 1 or abs(recorded[0]["std"] - image.pixels.std().item()) > 1e-4:
                self.cut_short = True
                other_pixels(f"a picture of {image.size[0]}x{image.size[1]} has other pixels")
            self.compared += 2

    def close(self, name: str, ours: Tensor, theirs: Tensor | None = None, atol: float = 0.0) -> None:
        """Compares with the recorded tensor ``name`` (or a part of it, ``theirs``) and counts the numbers."""
        theirs = self.tensors[name] if theirs is None else theirs
        self.seen.add(name)
        self.compared += theirs.numel()
        if atol:
            torch.testing.assert_close(
                ours.float().cpu(), theirs.float(), atol=atol, rtol=0.0, msg=lambda m: f"{name}: {m}"
            )
        else:
            assert ours.tolist() == theirs.tolist(), f"{name} differs: {ours.tolist()} != {theirs.tolist()}"

    def same(self, what: str, ours: list, theirs: list) -> None:
        """Compares host integers of the JSON."""
        self.compared += len(theirs)
        assert ours == theirs, f"{what}: ours {ours}, official {theirs}"


def other_pixels(what: str) -> NoReturn:
    """Pixels are not those that were recorded, with Pillow 13.0: older versions round otherwise where they scale a
    picture down, and the rest of the test is skipped; with a newer one it fails."""
    if Version(PIL.__version__) >= Version("13"):
        pytest.fail(f"{what} than recorded")
    pytest.skip(f"{what} than recorded: this is Pillow {PIL.__version__}, which scales by other roundings than 13.0")


@lru_cache(maxsize=2)
def load_tokenizer(directory: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)
