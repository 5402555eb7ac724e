"""Opens checkpoints of every layout without reading their weights: config, tensors under names in memory, tokenizer.

What comes out, a `Source`, is what `build.py` loads into a model and `export.py` writes in another layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_pdrop.checkpoint import layouts, lora, original
from llava_pdrop.checkpoint.ends import GENERATION_CONFIG, settle_ends
from llava_pdrop.checkpoint.hf_files import chat_template_in, reading
from llava_pdrop.checkpoint.hf_models import make_config, meta_hf_model
from llava_pdrop.checkpoint.load import check_fit, mean_rows
from llava_pdrop.checkpoint.shards import Stored, beside, open_tensors, resolve, weight_files
from llava_pdrop.checkpoint.tower import TOWER_FOLDER, open_tower
from llava_pdrop.checkpoint.vocabulary import add_special_tokens, rows_with_specials
from llava_pdrop.config.places import absolute
from llava_pdrop.errors import MissingFileError, UserError, naming
from llava_pdrop.files import read_json
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.vision import load_image_processor, used_tower_layers
from llava_pdrop.model.vlm import geometry_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IMAGE_MARKER

PROJECTOR_ONLY = "mm_projector.bin"


@dataclass(frozen=True)
class Source:
    """A LLaVA that is opened, not loaded.

    Attributes:
        origin: where it lies, for messages.
        config: of the Hugging Face LLaVA.
        tensors: its weights under names in memory, rows for new tokens included. Checked against ``config`` key by key.
        schedule: the one it was trained with, None where nothing says so.
        tokenizer: None where none lies there.
        generation: what ``generate`` uses if nothing is said.
        notes: lines for the user on what its files contradict each other in.
    """

    origin: str
    config: Any
    tensors: dict[str, Stored]
    geometry: ImageGeometry
    schedule: Schedule | None
    tokenizer: Any | None
    image_processor: CLIPImageProcessorPil
    generation: GenerationConfig
    notes: tuple[str, ...] = ()

    def checked(self, fresh: bool = False, rows: int | None = None) -> Source:
        """Itself, if its tensors are those of the model, with one opinion of where an answer ends.

        Args:
            fresh: its projector is yet to be made.
            rows: its vocabulary before ``<image>`` and ``<pad>``, where rows were added for them.

        Raises:
            UserError: lists every missing, unexpected and mis-shaped key; or the tower has no such feature layer.
        """
        vision, used = self.config.vision_config, used_tower_layers(self.config)
        if not 0 <= used <= vision.num_hidden_layers:
            number = f"vision_feature_layer (mm_vision_select_layer) {self.config.vision_feature_layer}"
            raise UserError(f"{self.origin}: {number}: the tower has {vision.num_hidden_layers} layers")
        with reading(Path(self.origin) / "config.json"):
            hf = meta_hf_model(self.config)
        own = hf.state_dict()
        tensors = layouts.in_memory(self.tensors, own)
        made = {name: Stored.of(tensor) for name, tensor in own.items() if fresh and layouts.is_projector(name)}
        check_fit(hf, tensors | made, self.origin, rows=rows)
        notes: list[str] = []
        if self.tokenizer is not None:
            notes = settle_ends(Path(self.origin), self.generation, self.config, self.tokenizer)
        return replace(self, tensors=tensors, notes=(*self.notes, *notes))


def open_llava(
    source: str, base: str | None = None, vision_tower: str | None = None, pad_vocabulary: bool = True
) -> Source:
    """A LLaVA of the original or of Hugging Face's layout.

    Args:
        base: the model under a LoRA run or a projector-only directory; default: what the adapter's config names.
        vision_tower: instead of the directory or hub id that an original config names.
        pad_vocabulary: give an original LLaVA rows for ``<image>`` and ``<pad>``.

    Raises:
        MissingFileError: a directory or file that does not exist. UserError: weights that do not fit, or a kind of
            model that is not supported.
    """
    directory = resolve(source)
    if lora.is_lora(directory) and not (directory / "config.json").is_file():
        return _open_peft(directory, base, vision_tower)
    fields = read_json(directory / "config.json")
    if "mm_vision_tower" in fields:
        return _open_original(directory, fields, base, vision_tower, pad_vocabulary)
    if lora.is_lora(directory):
        return _open_adapters(directory, fields, base, vision_tower)
    if base is not None or vision_tower is not None:
        raise UserError(f"{source}: is whole, so that it takes neither another base model nor another vision tower")
    if fields.get("model_type") not in ("llava", "llava_next"):
        raise UserError(
            f"{source}: model_type {fields.get('model_type')!r} is neither llava nor llava_next, and config.json has "
            "no mm_vision_tower as the original layout has"
        )
    return _open_hf(directory, fields)


def _open_peft(directory: Path, base: str | None, vision_tower: str | None) -> Source:
    """Adapters that peft has saved on a Hugging Face LLaVA: all but their weights is the base's own, and the tokenizer
    theirs where they bring one."""
    home = lora.config_directory(directory, base)
    takes_tower = "mm_vision_tower" in read_json(home / "config.json")
    source = open_llava(str(home), vision_tower=vision_tower if takes_tower else None)
    tokenizer = _tokenizer(directory)
    if tokenizer is None or tokenizer.convert_tokens_to_ids(IMAGE_MARKER) != source.config.image_token_id:
        tokenizer = source.tokenizer
    elif tokenizer.chat_template is None and source.tokenizer is not None:
        tokenizer.chat_template = source.tokenizer.chat_template
    tensors = lora.merged(source.tensors, directory, layouts.HF_TO_MEMORY)
    return replace(source, origin=str(directory), tensors=tensors, tokenizer=tokenizer)


def _open_adapters(directory: Path, fields: dict[str, Any], base: str | None, vision_tower: str | None) -> Source:
    """A LoRA run of ours: config and tokenizer are its own, its adapters are merged into the model that it was trained
    on, a whole LLaVA or a raw LLM and a CLIP tower."""
    base = base or lora.find_base(directory)
    if base is None:
        raise UserError(f"{directory}: holds only a LoRA run: name the model under it (convert: --base DIR)")
    under = read_json(resolve(base) / "config.json")
    if "text_config" in under or "mm_vision_tower" in under:
        tensors = open_llava(base, vision_tower=vision_tower if "mm_vision_tower" in under else None).tensors
    else:
        with reading(directory / "config.json"):
            side = fields["vision_config"]["image_size"]
            tower = beside(directory, vision_tower or fields[original.SECTION]["mm_vision_tower"])
        with _naming_tower(directory):
            resolve(tower)
        tensors = open_parts(base, tower, {}, side).tensors
    return _open_hf(directory, fields, lora.merged(tensors, directory, layouts.HF_TO_MEMORY))


def _open_hf(directory: Path, fields: dict[str, Any], tensors: dict[str, Stored] | None = None) -> Source:
    """``tensors``: weights under names in memory that are not, as they are, in ``directory``."""
    with reading(directory / "config.json"):
        config = AutoConfig.from_pretrained(directory)
    tower = config.vision_config.model_type
    if tower not in ("clip_vision_model", "clip"):
        raise UserError(f"{directory}/config.json: a {tower!r} vision tower is not supported, only CLIP's")
    if fields.get("quantization_config"):
        raise UserError(f"{directory}/config.json: quantised weights are not supported: take the float ones")
    if "tie_word_embeddings" not in fields:  # transformers 4 asked the decoder's config
        config.tie_word_embeddings = bool(getattr(config.text_config, "tie_word_embeddings", False))
    with reading(directory / "config.json"):
        geometry = geometry_of(config)
        schedule = original.original_schedule({"pyramid_drop": fields.get("pyramid_drop")})
        if schedule is not None:
            schedule.check(config.text_config.num_hidden_layers)
    return Source(
        str(directory),
        config,
        _named(directory, layouts.HF_TO_MEMORY) if tensors is None else tensors,
        geometry,
        schedule,
        _tokenizer(directory),
        _image_processor(directory, geometry.tile),
        _generation(directory, config.text_config, None),
    ).checked()


def _open_original(
    directory: Path, fields: dict[str, Any], base: str | None, vision_tower: str | None, pad: bool
) -> Source:
    """The layout of `liuhaotian/llava-v1.5-7b`: a LLaMA config with ``mm_*`` fields, the tower inside or beside."""
    original.refuse_unsupported(fields, str(directory))
    tensors, home = _original_tensors(directory, base)
    tensors = layouts.rename(tensors, layouts.ORIGINAL_TO_MEMORY)
    tower_source = vision_tower or _named_tower(directory, fields["mm_vision_tower"])
    with _naming_tower(directory):
        vision, beside_tensors = open_tower(tower_source)
    with reading(directory / "config.json"):
        geometry = original.original_geometry(fields, vision)
        text = original.text_config_of(fields)
        schedule = original.original_schedule(fields)
        if schedule is not None:
            schedule.check(text.num_hidden_layers)
    inside = {name for name in tensors if name.startswith(layouts.TOWER)}
    if not fields.get("unfreeze_mm_vision_tower") or not inside:  # golden/README 4.13: a frozen tower is CLIP's own
        tensors = {name: tensor for name, tensor in tensors.items() if name not in inside} | beside_tensors
    if geometry.aspect == "pad":
        tensors.pop("model.image_newline", None)
    rows = text.vocab_size
    tokenizer = _tokenizer(directory, text) or (_tokenizer(home, text) if home != directory else None)
    image_token_id = rows if tokenizer is None else add_special_tokens(tokenizer, rows)
    text.vocab_size = rows_with_specials(rows, tokenizer) if pad else rows
    config = make_config(text, vision, geometry, image_token_id, fields.get("mm_vision_select_layer", -2))
    setattr(config, original.SECTION, original.carried(fields))
    if schedule is not None:
        config.pyramid_drop = schedule.to_dict()
    return Source(
        str(directory),
        config,
        mean_rows(tensors, rows, text.vocab_size),
        geometry,
        schedule,
        tokenizer,
        _image_processor(resolve(tower_source), geometry.tile),
        _generation(directory, text, tokenizer),
    ).checked(rows=rows)


@contextmanager
def _naming_tower(directory: Path) -> Iterator[None]:
    """A tower that is not there is one that the config of ``directory`` names."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{directory}/config.json: mm_vision_tower: {error}; name a copy of it (convert: --vision-tower DIR)"
        ) from None


def _named_tower(directory: Path, name: str) -> str:
    """The tower that an original config calls ``name``; of a checkpoint that brings it along and was moved, the one
    inside."""
    if not Path(name).is_dir() and Path(name).name == TOWER_FOLDER and (directory / TOWER_FOLDER).is_dir():
        return str(directory / TOWER_FOLDER)
    return beside(directory, name)


def _original_tensors(directory: Path, base: str | None) -> tuple[dict[str, Stored], Path]:
    """The weights of an original directory under their original names, and the directory of the decoder: a whole
    model, a LoRA run on a base, or a projector on a base."""
    if not lora.is_lora(directory) and weight_files(directory):
        if base is not None:
            raise UserError(f"{directory}: is whole, so that it takes no base model")
        return open_tensors(directory), directory
    base = base or (lora.find_base(directory) if lora.is_lora(directory) else None)
    projector = directory / PROJECTOR_ONLY
    kind = "a LoRA run" if lora.is_lora(directory) else "a projector" if projector.is_file() else None
    if kind is None:
        raise MissingFileError(
            f"{directory}: holds no model*.safetensors, pytorch_model*.bin, adapter or {PROJECTOR_ONLY}"
        )
    if base is None:
        raise UserError(f"{directory}: holds only {kind}: name the model under it (convert: --base DIR)")
    home = resolve(base)
    if "text_config" in read_json(home / "config.json"):
        raise UserError(f"{base}: the base model must be an LLM or an original LLaVA, not a llava-hf directory")
    tensors = open_tensors(home)
    if lora.is_lora(directory):
        return lora.merged(tensors, directory), home
    return tensors | open_tensors(projector), home


def open_parts(
    language_model: str, vision_tower: str, geometry_options: dict[str, Any], image_size: int | None = None
) -> Source:
    """A raw LLM and a raw CLIP tower, to be joined by a projector that is not there yet.

    Args:
        geometry_options: ``aspect``, ``merge``, ``pinpoints`` and ``rounding`` of `ImageGeometry`.
        image_size: side of a tile in pixels if not the tower's own (its position embeddings are interpolated).

    Raises:
        MissingFileError, UserError: one of the two is not there or not usable; its ``key`` says which.
    """
    with naming("model.vision_tower"):
        vision, tower = open_tower(vision_tower, image_size)
        geometry = ImageGeometry(vision.image_size, vision.patch_size, **geometry_options)
        image_processor = _image_processor(resolve(vision_tower), vision.image_size)
    with naming("model.language_model"):
        home = resolve(language_model)
        with reading(home / "config.json"):
            text = AutoConfig.from_pretrained(home)
        rows = text.vocab_size
        tokenizer = _tokenizer(home)
        if tokenizer is None:
            raise MissingFileError(f"{home}: has no tokenizer*: copy it from where the language model comes from")
        image_token_id = add_special_tokens(tokenizer, rows)
        text.vocab_size = rows_with_specials(rows, tokenizer)
        if text.pad_token_id is None:
            text.pad_token_id = tokenizer.pad_token_id
        config = make_config(text, vision, geometry, image_token_id)
        origin = {"mm_vision_tower": absolute("model.vision_tower", vision_tower), "vocab_size": rows}
        setattr(config, original.SECTION, origin)
        return Source(
            language_model,
            config,
            mean_rows(_named(home, layouts.ORIGINAL_TO_MEMORY), rows, text.vocab_size) | tower,
            geometry,
            None,
            tokenizer,
            image_processor,
            _generation(home, text, tokenizer),
        ).checked(fresh=True, rows=rows)


def _named(directory: Path, table: layouts.NameTable) -> dict[str, Stored]:
    """The tensors of ``directory`` under names in memory."""
    tensors = open_tensors(directory)
    with reading(directory):
        return layouts.rename(tensors, table)


def _tokenizer(directory: Path, text: Any | None = None) -> Any | None:
    """``text``: config of the decoder, where config.json is the original layout's, which transformers warns of."""
    if not any(directory.glob("tokenizer*")):
        return None
    with reading(directory / "tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(directory, **({} if text is None else {"config": text}))
    tokenizer.chat_template = chat_template_in(directory) or tokenizer.chat_template
    return tokenizer


def _image_processor(directory: Path, tile: int) -> CLIPImageProcessorPil:
    file = directory / "preprocessor_config.json"
    if not file.is_file() and not (directory / "processor_config.json").is_file():  # transformers 5 writes the latter
        raise MissingFileError(f"{file}: no such file: copy it from where the model comes from")
    with reading(file):
        return load_image_processor(str(directory), tile)


def _generation(directory: Path, text: Any, tokenizer: Any | None) -> GenerationConfig:
    """The checkpoint's own token ids for ``generate``. Sampling settings are left out: some published ones contradict
    each other, and transformers then refuses to save them."""
    file = directory / GENERATION_CONFIG
    fields = read_json(file) if file.is_file() else {}
    ids = {name: fields.get(name, getattr(text, name, None)) for name in ("bos_token_id", "eos_token_id")}
    pad = fields.get("pad_token_id") if tokenizer is None else tokenizer.pad_token_id
    with reading(file):
        return GenerationConfig(**ids, pad_token_id=pad)
