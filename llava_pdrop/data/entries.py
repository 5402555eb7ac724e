"""One entry of a data file -> `Record`. Two layouts are read, LLaVA's and the one of chat services and other trainers:

    {"id": ..., "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
    {"id": ..., "images": ["a.png"], "messages": [{"role": "user", "content": "<image>What?"}, ...]}

``content`` (or ``value``) may be a list of parts: texts and pictures, each of which stands on a line of its own. What
an entry says about training is followed (``loss``, ``weight``, system prompts); what it asks for and cannot be had
(a video, a sound) is refused; a key that means nothing here is counted (`unknown_keys`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from llava_pdrop.data.readers.pictures import MEDIA_SUFFIXES, InlinePicture
from llava_pdrop.errors import RecordError, Unfit, UserError, clip
from llava_pdrop.types import IMAGE_MARKER, ImageSource, Record, Turn

Role = Literal["human", "gpt", "system"]

ROLES: dict[str, Role] = {
    "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system",
}  # fmt: skip
"""Speakers found in files -> role of a `Turn`; a system turn becomes the record's system prompt."""

LAYOUTS = ("conversations", "messages")
RECORD_KEYS = {"id", "image", "images", *LAYOUTS, "system", "loss", "weight"}
TURN_KEYS = {"from", "value", "role", "content", "loss", "weight"}
PART_KEYS = {"type", "text", "image", "image_url", "path", "url", "base64"}

MEDIA = re.compile(
    r"(videos?|movies?|films?|clips?|audios?|sounds?|voices?|speech|music|point_?clouds?)"
    r"(_?(paths?|files?|file_?names?|urls?|\d+))?",
    re.I,
)
"""Keys, and types of parts, of what no model here can see or hear."""

MEDIA_FILE = re.compile(rf"[^\n]*\.({'|'.join(sorted(MEDIA_SUFFIXES))})(\?[^\n]*)?", re.I)
"""Names of such files. Under any other key they may be a note, as long as the record shows pictures."""

PICTURE_KEYS = re.compile(
    r"(images?|imgs?|pictures?|pics?|photos?|(video_?)?frames?|screenshots?)(_?(paths?|files?|file_?names?|urls?))?",
    re.I,
)
"""Keys under which pictures may stand; of a record, `image` and `images` are read."""

_MARK = r"<\|?(video|audio|sound|speech|voice|music|point_?cloud)\|?>"
MEDIA_MARKER = re.compile(rf"\A(?:\s|{IMAGE_MARKER})*{_MARK}|\n\s*{_MARK}\s*\Z", re.I)
"""A question that begins like this, or ends in such a line, shows something else than pictures; in between it may be a
word of HTML."""

CALLS = ("tool_calls", "function_call")
SOURCES = ("image", "image_url", "path", "url", "base64")
"""Keys of a picture that is an object, or a part."""

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")
BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0AK)[A-Za-z0-9+/\s]{48,}={0,2}\s*")
"""How the base64 of a PNG, JPEG, GIF, WebP, BMP or TIFF file begins, and that nothing else follows."""


def parse_entry(entry: Any, image_root: Path, origin: str, template: str | None = None) -> Record:
    """One entry as a `Record`. Ids may be numbers; an entry without id is called by its origin.

    Raises:
        RecordError: no conversation, an unknown speaker, text that is not a string, something that cannot be shown, or
            a number of ``<image>`` markers that is not the number of images.
    """
    if not isinstance(entry, dict):
        reason = f"expected an object with 'conversations' or 'messages', found {type(entry).__name__}"
        raise RecordError(origin, None, reason, "format")
    name = origin if entry.get("id") is None else str(entry["id"])
    try:
        key, listed = conversation_of(entry)
        pictures = _Pictures(named_images(entry))
        _refuse_media(entry, "", pictures_too=not pictures.given)
        turns = [_parse_turn(turn, f"{key}[{number}]", pictures) for number, turn in enumerate(listed)]
        system = _system_prompt(entry, turns, key)
        spoken = tuple(Turn(role, text, learnt) for role, text, learnt in turns if role != "system")
        if not spoken:
            raise Unfit("empty_conversation", f"'{key}' must have at least one turn beside the system prompt")
        if _off(entry):
            spoken = tuple(Turn(turn.role, turn.text, turn.role == "human") for turn in spoken)
        images = tuple(_source(image, image_root) for image in pictures.shown())
        if not images:
            _refuse_media_files(entry, listed, key)
        markers = sum(turn.text.count(IMAGE_MARKER) for turn in spoken)
        if markers != len(images):
            raise Unfit(
                "image_markers",
                f"{len(images)} image(s) but {markers} {IMAGE_MARKER} marker(s) in the text; write one marker per "
                "image, where the image is shown",
            )
    except UserError as error:
        raise RecordError(origin, name, str(error), error.kind or "format") from None
    return Record(name, spoken, images, origin, template, system)


def conversation_of(entry: dict[str, Any]) -> tuple[str, list[Any]]:
    """The key of an entry's conversation, and its turns.

    Raises:
        UserError: it has none, two, or one without turns.
    """
    present = [key for key in LAYOUTS if entry.get(key) is not None]
    if not present:
        found = ", ".join(map(str, entry)) or "none"
        raise UserError(
            f"neither 'conversations' (from, value) nor 'messages' (role, content); its keys are {clip(found)}: write "
            "one of them"
        )
    if len(present) > 1:
        raise UserError("both 'conversations' and 'messages'; leave one of them out")
    (key,) = present
    if not isinstance(entry[key], list) or not entry[key]:
        kind = "empty_conversation" if entry[key] == [] else "format"
        raise Unfit(kind, f"'{key}' must be a list with at least one turn")
    return key, entry[key]


def named_images(entry: dict[str, Any]) -> list[Any]:
    """What an entry has under ``image`` or ``images``, as a list; null, an empty text or list name nothing.

    Raises:
        UserError: the two keys name different pictures.
    """
    listed = [entry.get(key) for key in ("image", "images")]
    image, images = ([] if value in (None, "") else value if isinstance(value, list) else [value] for value in listed)
    if image and images and image != images:
        raise UserError("'image' and 'images' name different pictures; leave one of them out")
    return image or images


def unknown_keys(entry: Any) -> list[str]:
    """Keys of a valid entry and of its turns that nobody reads."""
    if not isinstance(entry, dict):
        return []
    keys = [str(key) for key in entry if key not in RECORD_KEYS]
    keys += ["loss"] if _is_measured(entry.get("loss")) else []
    for layout in LAYOUTS:
        turns = entry.get(layout)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                keys += [f"{layout}[].{key}" for key in turn if key not in TURN_KEYS and turn[key] is not None]
                for name in ("value", "content"):
                    listed = turn.get(name) if isinstance(turn.get(name), list) else []
                    parts = [part for part in listed if isinstance(part, dict)]
                    unread = [key for part in parts for key in part if key not in PART_KEYS and part[key] is not None]
                    keys += [f"{layout}[].{name}[].{key}" for key in unread]
    return list(dict.fromkeys(keys))


@dataclass
class _Pictures:
    """The pictures of one entry: ``given`` by the record itself, and ``named`` by the parts of its turns (None: a part
    that only says where one of the record's pictures is shown)."""

    given: list[Any]
    named: list[Any] = field(default_factory=list)

    def shown(self) -> list[Any]:
        """All of them, in order.

        Raises:
            UserError: they are named twice, differently, or a part names none.
        """
        own = [value for value in self.named if value is not None]
        inside = any(hasattr(value, "open") for value in self.given)  # of a tar or table, in place of what is named
        if self.given and (inside or not own or own == self.given):
            return self.given
        if self.given:
            raise UserError("pictures are named by the record and by its parts, differently; name them in one place")
        if len(own) < len(self.named):
            raise UserError(
                f"a part of type 'image' names no picture: give it one of {', '.join(SOURCES)}, or 'images'"
            )
        return own


def _parse_turn(turn: Any, place: str, pictures: _Pictures) -> tuple[Role, str, bool]:
    """Role, text and whether it is trained on."""
    pairs = [pair for pair in (("from", "value"), ("role", "content")) if isinstance(turn, dict) and pair[1] in turn]
    pairs = [pair for pair in pairs if turn[pair[1]] is not None] or pairs
    if len(pairs) != 1:
        raise UserError(f"{place}: a turn needs 'from' and a text 'value', or 'role' and 'content'")
    (keys,) = pairs
    speaker, content = (turn.get(key) for key in keys)
    if not isinstance(content, str | list):
        raise UserError(f"{place}: a turn needs '{keys[0]}' and a text '{keys[1]}'")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise UserError(f"{place}: unknown speaker {clip(repr(speaker))}; known are {', '.join(ROLES)}")
    _refuse_media(turn, place, pictures_too=True)
    if calls := [key for key in CALLS if turn.get(key)]:
        raise UserError(f"{place}: '{calls[0]}' cannot be trained on; write what the model shall say as text")
    text = content if isinstance(content, str) else _join(content, f"{place}.{keys[1]}", pictures)
    role = ROLES[speaker]
    if role == "human" and (marker := MEDIA_MARKER.search(text)) and f"</{marker[1] or marker[2]}" not in text:
        shown = marker[0].replace(IMAGE_MARKER, "").strip()
        raise Unfit("media", f"{place}: shows {shown}, which cannot be shown; only pictures can")
    return role, text, _learnt(turn, place, role)


def _join(parts: list[Any], place: str, pictures: _Pictures) -> str:
    """The text of a list of parts, each picture of which becomes a marker on a line of its own."""
    text, behind_picture = "", False
    for number, part in enumerate(parts):
        shown, word = _part(part, f"{place}[{number}]")
        starts_line = not text or text.endswith("\n") or (word is not None and word.startswith("\n"))
        if (behind_picture or word is None) and not starts_line and word != "":
            text += "\n"
        if word is None:
            pictures.named.append(shown)
        text += IMAGE_MARKER if word is None else word
        behind_picture = word is None or (behind_picture and not word)
    return text


def _part(part: Any, place: str) -> tuple[Any, str | None]:
    """(what it names, None) of a picture, (None, text) of a text."""
    if isinstance(part, str):
        return None, part
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = given.get("type")
    if isinstance(kind, str) and MEDIA.fullmatch(kind.removeprefix("input_")):
        raise Unfit("media", f"{place}: a part of type {clip(repr(kind))} cannot be shown; only pictures can")
    _refuse_media(given, place, pictures_too=False)
    named = {key: given[key] for key in SOURCES if given.get(key)}
    if kind in ("text", None) and isinstance(given.get("text"), str):
        if named:
            raise UserError(f"{place}: a text with a picture ({', '.join(named)}) in one part; make two parts of it")
        return None, given["text"]
    if kind in ("image", "image_url"):
        if given.get("text"):
            raise UserError(f"{place}: a picture with a text in one part; make two parts of it")
        if len(named) > 1:
            raise UserError(f"{place}: names a picture by {', '.join(named)}; by one of them, please")
        return next(iter(named.values()), None), None
    raise UserError(f"{place}: a part is {{'type': 'text', 'text': ...}} or {{'type': 'image', 'image': ...}}")


def _system_prompt(entry: dict[str, Any], turns: Sequence[tuple[Role, str, bool]], key: str) -> str | None:
    """What the record itself or its first turn says; an empty one is none."""
    own = entry.get("system")
    if own is not None and not isinstance(own, str):
        raise UserError(f"'system' must be a text, found {type(own).__name__}")
    places = [number for number, turn in enumerate(turns) if turn[0] == "system"]
    if places not in ([], [0]):
        raise UserError(f"{key}[{places[-1]}]: a system turn stands in front of all others, and there is only one")
    said = turns[0][1] if places else None
    if own and said and own != said:
        raise UserError(f"'system' and {key}[0] are two different system prompts; leave one of them out")
    prompt = own or said or None
    if prompt is not None and IMAGE_MARKER in prompt:
        raise UserError(f"the system prompt has an {IMAGE_MARKER} marker; show pictures in a question")
    return prompt


def _learnt(turn: dict[str, Any], place: str, role: Role) -> bool:
    """Whether an answer is trained on: yes, unless it says otherwise."""
    given = {key: turn[key] for key in ("loss", "weight") if turn.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            wanted = "true or false" if key == "loss" else "0 or 1"
            raise UserError(f"{place}: '{key}' must be {wanted}, found {clip(repr(value))}")
    if role != "gpt" and given.get("loss"):
        raise UserError(f"{place}: 'loss' of a {role} turn must be false: only answers are trained on")
    if len({bool(value) for value in given.values()}) > 1:
        raise UserError(f"{place}: 'loss' and 'weight' contradict each other; leave one of them out")
    return all(given.values()) or role != "gpt"


def _off(entry: dict[str, Any]) -> bool:
    """Whether a whole record says that nothing of it is trained on."""
    return not _learnt({**entry, "loss": None} if _is_measured(entry.get("loss")) else entry, "the record", "gpt")


def _is_measured(loss: Any) -> bool:
    """Whether the ``loss`` of a record is what somebody measured, and says nothing about training."""
    return isinstance(loss, int | float) and loss not in (0, 1)


def _refuse_media(holder: dict[str, Any], place: str, pictures_too: bool) -> None:
    """Refuses a record or turn (at ``place``) with something that cannot be shown, or with pictures where nobody looks
    for them."""
    where = f"{place}: " if place else ""
    for key, value in holder.items():
        if not isinstance(value, str | list | dict) or not value or not isinstance(key, str):
            continue
        if MEDIA.fullmatch(key):
            reason = f"{where}'{clip(key)}' cannot be shown; only pictures can: remove it, or leave the record out"
            raise Unfit("media", reason)
        if pictures_too and (place or key not in RECORD_KEYS) and PICTURE_KEYS.fullmatch(key):
            raise UserError(f"{where}pictures stand in 'image' or 'images' of the record, not in '{clip(key)}'")


def _refuse_media_files(entry: dict[str, Any], turns: Sequence[dict[str, Any]], layout: str) -> None:
    """Refuses a record without pictures that names a film or sound under whatever key."""
    holders = [("", entry, RECORD_KEYS), *((f"{layout}[{i}].", turn, TURN_KEYS) for i, turn in enumerate(turns))]
    for place, holder, known in holders:
        for key, value in holder.items():
            values = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
            named = [name for name in values if isinstance(name, str) and MEDIA_FILE.fullmatch(name)]
            if key not in known and named:
                raise Unfit(
                    "media",
                    f"'{place}{clip(key)}' names {clip(named[0])}, which cannot be shown; only pictures can: "
                    "remove it, or leave the record out",
                )


def _source(value: Any, root: Path) -> ImageSource:
    """Names become paths below ``root``; what a reader has made a source already stays."""
    if hasattr(value, "open"):
        return value
    found = type(value).__name__ if value != "" else "an empty text"
    while isinstance(value, dict):
        named = [value[key] for key in SOURCES if value.get(key)]
        found = f"an object with the keys {', '.join(map(str, value)) or 'none'}"
        value = named[0] if len(named) == 1 else None
    if not isinstance(value, str) or not value:
        raise UserError(
            f"'image' must be a file name, a data URI, base64 or a list of these (or an object with one of "
            f"{', '.join(SOURCES)}), found {clip(found)}"
        )
    if value[:5].lower() == "data:":
        head, _, letters = value.partition(",")
        if not re.fullmatch(r"data:image/[^;,]+(;[^;,]+)*;base64", head, re.I):
            raise UserError(f"the data URI {clip(head)!r} is no picture in base64 (data:image/png;base64,...)")
        return InlinePicture(unquote(letters) if "%" in letters else letters)
    if scheme := SCHEME.match(value):
        host, _, path = value[len(scheme[0]) + 3 :].partition("/")
        if scheme[0].lower() != "file" or host not in ("", "localhost"):
            raise UserError(f"{clip(value)}: pictures are not fetched; download them and write their file names")
        return Path("/", unquote(path))
    return InlinePicture(value) if BASE64.fullmatch(value) else root / value
