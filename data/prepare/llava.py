"""Downloads the data of LLaVA-1.5 and LLaVA-NeXT to where the configs expect them, and checks that nothing is missing.

    python data/prepare/llava.py lcs558k|mix665k|next1m [--root playground/data] [--part NAME ...] [--check]

What belongs to a set, from where, how large and how many files, stands in llava_sets.yaml. A download goes on where it
stopped; an archive is unpacked file by file, so that a second run only adds what is missing. Every part is checked by
size (of the download and of every file in an archive) and by the number of its files. Last, the records are counted and
every picture they name is looked for: what is missing is listed in ROOT/missing_SET.txt and makes the exit status 1.

Some parts cannot be downloaded by a program; the script says what to do by hand, and checks them all the same.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from PIL import Image
from tqdm import tqdm

TABLE = Path(__file__).with_name("llava_sets.yaml")
CHUNK = 1 << 20
TRIES = 5
BUSY = (429, 500, 502, 503, 504)
"""What a server answers that may be able to serve later."""

TOLERANCE = 0.01
"""Published sizes are rounded: a download may differ from them by this share."""


class Problem(Exception):
    """Something the user has to look at; the message is one line."""


def download(url: str, file: Path, gigabytes: float | None = None) -> None:
    """Fetches ``url`` to ``file``, going on where an earlier try stopped. After `TRIES` tries in a row that bring
    nothing it gives up.

    Raises:
        Problem: the server refuses, the connection breaks again and again, or the size is not the one the server says,
            or not about ``gigabytes``.
    """
    part = file.with_name(file.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    while True:
        have, problem = _size(part), "the connection broke"
        try:
            total = _fetch(url, part)
        except urllib.error.HTTPError as error:
            problem = f"the server answers {error.code} {error.reason}"
            if error.code not in BUSY:
                raise Problem(f"{url}: {problem}") from None
        except (OSError, http.client.HTTPException) as error:
            problem = str(error)
        else:
            if total is None or _size(part) == total:
                break
            if _size(part) > total:
                raise Problem(f"{part} has {_size(part)} bytes, {url} {total}: delete it and run this again")
        failed = 0 if _size(part) > have else failed + 1
        if failed == TRIES:
            raise Problem(f"{url}: {problem}; run this again to go on from {part}")
        time.sleep(2**failed)
    found = _size(part) / 1e9
    if gigabytes is not None and abs(found - gigabytes) > TOLERANCE * gigabytes:
        raise Problem(f"{part} has {found:.3g} GB, {gigabytes:.3g} are published: look what it is, or change the table")
    part.replace(file)


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _fetch(url: str, part: Path) -> int | None:
    """Appends to ``part`` what it lacks; returns the size of the whole file if the server says it."""
    have = _size(part)
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    except ValueError as error:
        raise Problem(f"{url}: {error}: mend the address in the table") from None
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send
            return int(error.headers.get("Content-Range", f"*/{have}").rsplit("/", 1)[1])
        raise
    with answer:
        resumed = answer.status == 206
        length = answer.headers.get("Content-Length")
        total = None if length is None else int(length) + (have if resumed else 0)
        _need_space(part.parent, 0 if length is None else int(length))
        bar = tqdm(total=total, initial=have if resumed else 0, unit="B", unit_scale=True, desc=part.stem, leave=False)
        with part.open("ab" if resumed else "wb") as out, bar:
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    return total


def _need_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > free:
        raise Problem(f"{directory}: {size / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def unpack(archive: Path, into: Path, strip: str = "", flatten: bool = False) -> None:
    """Unpacks a zip file, leaving files that are there whole.

    Args:
        strip: only what lies below a directory of this name is taken, and put directly into ``into``.
        flatten: all directories are left out of the names.

    Raises:
        Problem: no zip file, a damaged member, one whose name leads out of ``into``, or no space.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            todo = {}
            for member in source.infolist():
                name = None if member.is_dir() else _inner_name(member.filename, strip, flatten)
                if name is None:
                    continue
                if ".." in name.parts or name.is_absolute():
                    raise Problem(f"{archive}: {member.filename} leads out of {into}")
                if not (into / name).is_file() or _size(into / name) != member.file_size:
                    todo[into / name] = member
            into.mkdir(parents=True, exist_ok=True)
            _need_space(into, sum(member.file_size for member in todo.values()))
            for target, member in tqdm(todo.items(), desc=f"unpacking {archive.name}", unit="file", leave=False):
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(target.name + ".part")
                with source.open(member) as inside, part.open("wb") as out:
                    shutil.copyfileobj(inside, out, CHUNK)  # zipfile compares the checksum at the end
                part.replace(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it wants a password
        raise Problem(f"{archive}: {error}; delete it and run this again") from None


def _inner_name(name: str, strip: str, flatten: bool) -> PurePosixPath | None:
    path = PurePosixPath(name)
    if path.parts[0] == "__MACOSX":
        return None
    if flatten:
        return PurePosixPath(path.name)
    if not strip:
        return path
    if strip not in path.parts[:-1]:
        return None
    return PurePosixPath(*path.parts[path.parts.index(strip) + 1 :])


def gif_to_jpg(directory: Path) -> int:
    """Makes a JPEG of the first frame of every GIF, whatever its file is called; returns how many. One that cannot be
    read is left as it is, with a line that says so.

    OCR-VQA's download holds covers as ``.gif``, and GIFs called ``.jpg``; the records name all of them ``.jpg``.
    """
    count = 0
    for file in tqdm(sorted(directory.iterdir()), desc="looking for GIFs", unit="file", leave=False):
        with file.open("rb") as start:
            if start.read(4) != b"GIF8":
                continue
        target = file.with_suffix(".jpg")
        part = target.with_name(target.name + ".part")
        try:
            with Image.open(file) as picture:
                picture.convert("RGB").save(part, "JPEG", quality=95)
        except (OSError, EOFError, SyntaxError, ValueError) as error:
            print(f"{file}: a GIF that cannot be read ({error}); left as it is")
            continue
        part.replace(target)
        if target != file:
            file.unlink()
        count += 1
    return count


def prepare(name: str, part: dict[str, Any], root: Path, keep: bool) -> None:
    """Brings one part to its place; a part that was finished before is left alone.

    Raises:
        Problem: see `download` and `unpack`; a part to be fetched by hand; a number of files that is not the known one.
    """
    stamp = root / ".prepared" / f"{name}.json"
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == part:
        return
    if "manual" in part:
        if all(any((root / place).glob("*")) for place in part["places"]):
            return
        raise Problem(f"{name} must be fetched by hand: {' '.join(part['manual'].split())}")
    if "link" in part:
        place = root / part["into"]
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(os.path.relpath(root / part["link"], place.parent), target_is_directory=True)
    elif "file" in part:
        if not (root / part["file"]).is_file():
            download(part["url"], root / part["file"], part.get("gigabytes"))
    else:
        archive = root / ".downloads" / f"{name}.zip"
        if not archive.is_file():
            download(part["url"], archive, part.get("gigabytes"))
        into = root / part["into"]
        unpack(archive, into, part.get("strip", ""), part.get("flatten", False))
        if part.get("gif_to_jpg"):
            print(f"{name}: {gif_to_jpg(into)} GIFs made JPEGs")
        found = sum(1 for entry in os.scandir(into) if entry.is_file())
        if part.get("files") not in (None, found):
            raise Problem(
                f"{name}: {into} holds {found} files, {part['files']} are known; delete {archive} and try again"
            )
        if not keep:
            archive.unlink()
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(json.dumps(part), encoding="utf-8")


def missing_images(records: list[dict[str, Any]], image_root: Path) -> Iterator[str]:
    """Names of pictures that the records show and that are not there."""
    listing: dict[Path, set[str]] = {}
    for record in records:
        images = record.get("image") or []
        for image in [images] if isinstance(images, str) else images:
            path = image_root / image
            if path.parent not in listing:  # one listing per directory instead of a million single questions
                listing[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            if path.name not in listing[path.parent]:
                yield image


def check(name: str, entry: dict[str, Any], root: Path) -> int:
    """Counts the records and looks for every picture of theirs; returns how many are missing and lists them.

    Raises:
        Problem: the records are not there, or not those that were published.
    """
    records = root / entry["records"]
    if not records.is_file():
        raise Problem(f"{records} is not there: run without --check first")
    try:
        content = json.loads(records.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Problem(f"{records}: not valid JSON ({error}); delete it and run this again") from None
    if not isinstance(content, list) or len(content) != entry.get("count", len(content)):
        found = f"{len(content)} records" if isinstance(content, list) else "no list of records"
        wanted = f", {entry['count']} are published" if "count" in entry else ""
        raise Problem(f"{records}: holds {found}{wanted}; delete it and run this again")
    missing = sorted(set(missing_images(content, root / entry["image_root"])))
    report = root / f"missing_{name}.txt"
    report.unlink(missing_ok=True)
    if not missing:
        print(f"{name}: every picture of {records} is there")
        return 0
    report.write_text("\n".join(missing) + "\n", encoding="utf-8")
    places = Counter(str(PurePosixPath(image).parent) for image in missing)
    where = ", ".join(f"{count} in {place}" for place, count in places.most_common(8))
    print(f"{name}: {len(missing)} pictures are missing ({where}); all of them: {report}")
    return len(missing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", help="lcs558k, mix665k or next1m")
    parser.add_argument("--root", type=Path, default=Path("playground/data"))
    parser.add_argument("--part", nargs="+", default=None, help="only these parts")
    parser.add_argument("--check", action="store_true", help="download nothing, only look for every picture")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete a zip file once it is unpacked")
    parser.add_argument("--table", type=Path, default=TABLE, help="another table of sets, e.g. of a mirror")
    args = parser.parse_args()
    if not args.table.is_file():
        parser.error(f"{args.table}: no such table")
    table = yaml.safe_load(args.table.read_text(encoding="utf-8"))
    if args.set not in table["sets"]:
        parser.error(f"unknown set {args.set!r}: choose one of {list(table['sets'])}")
    entry = table["sets"][args.set]
    needed = [
        need for name in entry["parts"] if (need := table["parts"][name].get("needs")) and need not in entry["parts"]
    ]
    names = args.part or [*needed, *entry["parts"]]
    if unknown := [name for name in names if name not in table["parts"]]:
        parser.error(f"unknown part {unknown[0]!r}: {args.set} has {entry['parts']}")
    problems = []
    for name in [] if args.check else names:
        try:
            prepare(name, table["parts"][name], args.root, args.keep_archives)
            print(f"{name}: complete")
        except (Problem, OSError) as problem:  # OSError: a full disk, a place nobody may write to
            problems.append(str(problem))
    try:
        missing = check(args.set, entry, args.root) if not args.part else 0
    except Problem as problem:
        problems.append(str(problem))
        missing = 0
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems or missing else 0


if __name__ == "__main__":
    sys.exit(main())
