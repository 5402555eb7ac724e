"""Pictures inside containers: tables and tar shards give the records that a JSON file with pictures beside it gives."""

from __future__ import annotations

import errno
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_pdrop.data.images import image_size, load_image
from llava_pdrop.data.records import read_records
from llava_pdrop.errors import UserError
from tests.messages import says

SIZES = [(30, 20), (21, 40), (50, 50)]


def talk(images: int, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>" * images + "What?"}, {"from": "gpt", "value": answer}]


ENTRIES = [
    {"id": "one", "pictures": [0], "conversations": talk(1, "a cat")},
    {"id": "none", "pictures": [], "conversations": talk(0, "no picture")},
    {"id": "two", "pictures": [1, 2], "conversations": talk(2, "two \u00e9t\u00e9s")},
]


def encoded(index: int) -> bytes:
    """Picture ``index`` as a PNG file; number 1 lies on its side and says so."""
    exif = Image.Exif()
    if index == 1:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    noise = np.random.default_rng(index).integers(0, 255, (*SIZES[index][::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@pytest.fixture
def expected(tmp_path: Path):
    """The records of a plain JSON file."""
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encoded(index))
    entries = [{**entry, "image": [f"{i}.png" for i in entry["pictures"]]} for entry in ENTRIES]
    (tmp_path / "plain.json").write_text(json.dumps(entries))
    return read_records(tmp_path / "plain.json")


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def table(pictures: str = "list"):
    """ENTRIES as a `datasets.Dataset`; ``list`` of pictures in every row, or ``one`` or none."""
    import datasets

    cells = [[{"bytes": encoded(i), "path": None} for i in entry["pictures"]] for entry in ENTRIES]
    rows = {"id": [e["id"] for e in ENTRIES], "conversations": [e["conversations"] for e in ENTRIES]}
    if pictures == "list":
        made = datasets.Dataset.from_dict({**rows, "images": cells})
        return made.cast_column("images", datasets.List(datasets.Image(decode=False)))
    first = [row[0] if len(row) == 1 else None for row in cells]
    made = datasets.Dataset.from_dict({**rows, "image": first}).select([0, 1])
    return made.cast_column("image", datasets.Image(decode=True))


def write_shard(path: Path, entries, leave_out: tuple[str, ...] = (), folder: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        for entry in entries:
            text = {"conversations": entry["conversations"], "image": ["an old name.jpg"] * len(entry["pictures"])}
            members = {"json": json.dumps(text).encode(), "txt": b"not for us"}
            several = len(entry["pictures"]) > 1
            for place, index in reversed(list(enumerate(entry["pictures"]))):
                members[f"{place}.png" if several else "png"] = encoded(index)
            for suffix, content in members.items():
                if suffix not in leave_out:
                    member = tarfile.TarInfo(f"{folder}{entry['id']}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return path


def containers(tmp_path: Path) -> dict[str, Path]:
    table().save_to_disk(tmp_path / "arrow")
    (tmp_path / "parquet").mkdir()
    table().select([0, 1]).to_parquet(tmp_path / "parquet" / "part-0.parquet")
    table().select([2]).to_parquet(tmp_path / "parquet" / "part-1.parquet")
    table().to_parquet(tmp_path / "single.parquet")
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "00.tar", ENTRIES[:1])
    write_shard(tmp_path / "shards" / "01.tar", ENTRIES[1:])
    return {name: tmp_path / name for name in ("arrow", "parquet", "single.parquet", "shards")}


@pytest.mark.parametrize("kind", ["arrow", "parquet", "single.parquet", "shards"])
def test_containers_give_the_same_records(tmp_path, expected, kind):
    records = read_records(containers(tmp_path)[kind])
    assert [(r.id, r.turns) for r in records] == [(r.id, r.turns) for r in expected]
    for ours, plain in zip(records, expected, strict=True):
        assert len(ours.images) == len(plain.images)
        for source, path in zip(ours.images, plain.images):
            assert image_size(source) == image_size(path)
            assert np.array_equal(np.asarray(load_image(source)), np.asarray(load_image(path)))
            assert (
                hash(source) == hash(pickle.loads(pickle.dumps(source)))
                and pickle.loads(pickle.dumps(source)) == source
            )
    assert image_size(records[2].images[0]) == SIZES[1][::-1]  # turned upright, by the header alone


def test_what_a_worker_gets_is_small(tmp_path, expected):
    for path in containers(tmp_path).values():
        records = read_records(path)
        assert len(pickle.dumps(records)) < 8000 < sum(len(encoded(i)) for i in range(3))
        assert pickle.loads(pickle.dumps(records))[0].turns == expected[0].turns


def test_one_picture_or_none_per_row(tmp_path):
    table("one").save_to_disk(tmp_path / "arrow")
    records = read_records(tmp_path / "arrow")
    assert [len(record.images) for record in records] == [1, 0]
    assert image_size(records[0].images[0]) == SIZES[0]
    assert str(records[0].images[0]).endswith("arrow[0].image[0]")


def test_names_of_files_in_a_table(tmp_path, expected):
    import datasets

    rows = [{"id": e["id"], "conversations": e["conversations"], "image": "0.png"} for e in ENTRIES[:1]]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "arrow")
    assert read_records(tmp_path / "arrow", tmp_path)[0].images == expected[0].images


def test_broken_pictures_in_containers_are_named(tmp_path):
    broken = [{**ENTRIES[0], "pictures": [0]}]
    shard = write_shard(tmp_path / "a.tar", broken)
    content = shard.read_bytes()
    at = content.index(b"\x89PNG")
    shard.write_bytes(content[:at] + b"\0" * 64 + content[at + 64 :])
    (record,) = read_records(shard)
    with pytest.raises(ValueError, match=says("a.tar:one.png", "image")):
        image_size(record.images[0])


def test_ten_pictures_stay_in_the_order_of_their_numbers(tmp_path):
    entry = {"id": "many", "pictures": [i % 3 for i in range(11)], "conversations": talk(11, "x")}
    (record,) = read_records(write_shard(tmp_path / "a.tar", [entry], folder="deep/er.folder/"))
    assert [source.name for source in record.images] == [f"deep/er.folder/many.{i}.png" for i in range(11)]
    assert (record.id, record.origin) == ("deep/er.folder/many", f"{tmp_path / 'a.tar'}:deep/er.folder/many")


def test_bad_containers_are_named(tmp_path):
    import datasets

    def refused(path: Path, message: str, **options) -> None:
        with pytest.raises(ValueError, match=message) as error:
            read_records(path, **options)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

    refused(write_shard(tmp_path / "a.tar", ENTRIES[:1], leave_out=("json",)), says("no one.json"))
    message = says(".tar:one.json", "id one", "1 picture", "0")
    refused(write_shard(tmp_path / "b.tar", ENTRIES[:1], leave_out=("png",)), message)
    # without a marker in the text nothing else would tell that the picture is lost
    unmarked = ENTRIES[0] | {"conversations": talk(0, "a cat")}
    refused(write_shard(tmp_path / "b2.tar", [unmarked], leave_out=("png",)), message)
    (tmp_path / "c.tar").write_bytes(b"no tar" * 200)
    refused(tmp_path / "c.tar", says("c.tar", "uncompressed"))
    whole = ENTRIES[0] | {"conversations": talk(0, "a cat")}
    refused(  # without a marker in the text nothing else would show that the picture is lost
        write_shard(tmp_path / "b2.tar", [whole], leave_out=("png",)),
        says("b2.tar:one.json", "id one", "1 picture", "0"),
    )
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", says("format", "'empty'", "llava_json"))
    refused(tmp_path / "empty", says("save_to_disk"), format="hf")
    refused(tmp_path / "empty", "there is no", format="webdataset")
    datasets.DatasetDict(train=table(), test=table()).save_to_disk(tmp_path / "splits")
    refused(tmp_path / "splits", r"holds the splits train, test; name one of them, e\.g\. .*splits.train")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "other")
    refused(tmp_path / "other", says("'conversations'", "'messages'", "columns: text"))
    cells = [{**row, "images": [{"bytes": None, "path": None}]} for row in table().to_list()[:1]]
    features = datasets.Features(
        {**table().features, "images": [{"bytes": datasets.Value("binary"), "path": datasets.Value("string")}]}
    )
    datasets.Dataset.from_list(cells, features=features).save_to_disk(tmp_path / "hollow")
    refused(tmp_path / "hollow", r"\(id one\): picture 0 has neither bytes nor a file name")


def members(path: Path, *names: str) -> Path:
    """A tar of these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            name, _, target = name.partition(" -> ")
            content = json.dumps({"conversations": talk(1, "x")}).encode() if name.endswith("json") else encoded(0)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if "meta" in name:
                content = b"{}".ljust(len(content))
            if target:
                member.size, member.linkname = 0, target
                member.type = tarfile.SYMTYPE if target.startswith("/") else tarfile.LNKTYPE
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("names", "cause"),
    [
        (("k1.png", "k1.json", "k2.png", "k2.json", "k1.png", "k1.json"), "k1"),  # what tar -r adds
        (("k1.png", "k1.json", "k1.png", "k1.json"), "k1.png"),
        (("k1.png", "k1.json", "k1.JSON"), "k1.json"),
        (("a/k1.0.png", "a/k1.1.png", "a/k1.0.PNG", "a/k1.json"), "a/k1.0.png"),
        (("k1.png", "k1.json", "k2.png", "k2.json", "./k1.png", "./k1.json"), "./k1"),
        (("k1.json", "k2.json", "k1.png", "k2.png"), "k1"),  # sorted by what they are
        (("k1.png", "k1.json", "k1.jpg"), "k1.jpg"),
        (("k1.0.png", "k1.json", "k1.00.png"), "k1.00.png"),
    ],
)
def test_the_same_name_twice_in_a_tar(tmp_path, names, cause):
    with pytest.raises(ValueError, match=says("a.tar", cause, "twice", "tar -r")):
        read_records(members(tmp_path / "a.tar", *names))


def test_the_same_key_in_two_shards_is_two_records(tmp_path):
    (tmp_path / "shards").mkdir()
    for name in ("0.tar", "1.tar"):
        members(tmp_path / "shards" / name, "k1.png", "k1.json", "k1.txt", "k1.meta.json", "readme.txt")
    assert [record.id for record in read_records(tmp_path / "shards")] == ["k1", "k1"]


@pytest.mark.parametrize(
    ("names", "broken", "key"),
    [
        (("v1.0_a.png", "v1.0_a.json"), "v1.0_a.json", "v1"),
        (("img/photo.final.json", "img/photo.final.jpg"), "img/photo.final.json", "img/photo"),
        (("2024.05.01.json",), "2024.05.01.json", "2024"),
        (("k.json", "k.png", "k.1.json"), "k.1.json", "k"),  # beside another one it would be lost without a word
        (("k.\u00b2.json", "k.\u00b2.png"), "k.\u00b2.json", "k"),
    ],
)
def test_a_dot_too_much_in_a_tar_key(tmp_path, names, broken, key):
    with pytest.raises(ValueError, match=says(f"a.tar:{key}", broken, "first dot")):
        read_records(members(tmp_path / "a.tar", *names))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("k1.png", "k1.json", "k2.png -> k1.png", "k2.json -> k1.json"), says("k2.png", "link", "k1.png")),
        (("k1.png", "k1.json", "k2.json -> /k1.json"), says("k2.json", "link")),
        (("k1.png", "k1.json", ".k2.json"), says(".k2.json", "no key", "first dot")),
        (("k1.png", "k1.json", "k\udcff.json"), says("UTF-8")),
        (("k1.txt",), says("no records")),
        (("k1.png", "k1.json", "k2.mp4", "k2.json"), says("a.tar:k2", "k2.mp4", "cannot be shown")),
        (("k1.png", "k1.json", "k1.1.WAV"), says("a.tar:k1", "k1.1.WAV", "cannot be shown")),
    ],
)
def test_no_member_is_lost_without_a_word(tmp_path, names, message):
    """Not in a directory either, where other shards have records."""
    members(tmp_path / "b.tar", "._k1.json", "k1.png", "k1.json")
    for path in (members(tmp_path / "a.tar", *names), tmp_path):
        with pytest.raises(ValueError, match=says("a.tar") + message):
            read_records(path)


def test_every_shard_of_a_directory_is_read_or_named(tmp_path):
    members(tmp_path / "A.TAR", "k1.png", "k1.json")
    assert len(read_records(tmp_path)) == 1
    (tmp_path / "b.tar.gz").touch()
    with pytest.raises(ValueError, match=says(str(tmp_path), "b.tar.gz", "compressed")):
        read_records(tmp_path)


def test_messages_in_containers(tmp_path, expected):
    """Pictures of the container take the place of what the parts name; other columns are not lost without a word."""
    import datasets
    import pyarrow.parquet

    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": parts, "loss": None},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}], "loss": True},
    ]
    row = {
        "id": "one",
        "messages": messages,
        "images": [{"bytes": encoded(0), "path": None}],
        "source": "x",
        "video": None,
    }
    datasets.Dataset.from_list([row, {**row, "id": "two", "source": None}]).to_parquet(tmp_path / "m.parquet")
    records = read_records(tmp_path / "m.parquet")
    assert [turn.text for turn in records[0].turns] == ["<image>\nWhat?", "a cat"]
    assert image_size(records[0].images[0]) == SIZES[0]
    assert records.examined(0)[1] == ["source"] and records.examined(1)[1] == []

    datasets.Dataset.from_list([{**row, "video": "v.mp4"}]).to_parquet(tmp_path / "v.parquet")
    with pytest.raises(ValueError, match=says("v.parquet[0]", "id one", "'video'")):
        read_records(tmp_path / "v.parquet")

    only_text = {"conversations": talk(0, "x"), "source": "f.mp4"}
    datasets.Dataset.from_list([only_text]).to_parquet(tmp_path / "s.parquet")
    with pytest.raises(ValueError, match=says("s.parquet[0]", "'source'", "f.mp4")):
        read_records(tmp_path / "s.parquet")

    broken = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())  # in a column that nobody reads
    columns = {"conversations": [talk(0, "x")], "source": broken}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "u.parquet")
    assert read_records(tmp_path / "u.parquet").examined(0)[1] == ["source"]

    both = [{**row, "image": None}, {**row, "image": {"bytes": encoded(1), "path": None}, "images": []}]
    datasets.Dataset.from_list(both).to_parquet(tmp_path / "i.parquet")
    sizes = [image_size(record.images[0]) for record in read_records(tmp_path / "i.parquet")]
    assert sizes == [SIZES[0], SIZES[1][::-1]]

    parts[0]["image"] = "an old name.png"
    with tarfile.open(tmp_path / "m.tar", "w") as tar:
        for name, content in (("k.json", json.dumps({"messages": messages}).encode()), ("k.png", encoded(0))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (record,) = read_records(tmp_path / "m.tar")
    assert record.images[0].name == "k.png" and record.turns == records[0].turns


def test_a_broken_tar_loses_no_record_silently(tmp_path):
    """`tarfile` takes what is no header for the end of the archive."""
    whole = write_shard(tmp_path / "a.tar", ENTRIES).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        second = next(member for member in tar if member.name.startswith("none.")).offset
    spoilt = {
        "cut": (whole[:second], says(f"byte {second}")),
        "overwritten": (whole[:second] + b"\xff" * 512 + whole[second + 512 :], says(f"byte {second}")),
        "joined": (whole + whole, says("behind", "byte")),
    }
    for name, (content, message) in spoilt.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
        with pytest.raises(ValueError, match=says(f"{name}.tar") + message):
            read_records(tmp_path / f"{name}.tar")
    (tmp_path / "padded.tar").write_bytes(whole + bytes(1 << 16))  # writers fill up with zeros as they like
    assert len(read_records(tmp_path / "padded.tar")) == len(ENTRIES)


def test_a_torn_parquet_file_is_one_line(tmp_path, caplog, capfd):
    (tmp_path / "parts").mkdir()
    whole = tmp_path / "parts" / "a.parquet"
    table().to_parquet(whole)
    (tmp_path / "parts" / "b.parquet").write_bytes(whole.read_bytes()[:-20])
    capfd.readouterr()
    with pytest.raises(ValueError, match=says("parts", "b.parquet", "footer")):
        read_records(tmp_path / "parts")
    assert not caplog.records and capfd.readouterr() == ("", "")


PICTURE = {"bytes": encoded(0), "path": None}
COLUMN_TYPES = {
    "a name": ("0.png", lambda pa: pa.string()),
    "a name as polars writes it": ("0.png", lambda pa: pa.large_string()),
    "names of a fixed number": (["0.png"], lambda pa: pa.list_(pa.string(), 1)),
    "a list of long lists": (["0.png"], lambda pa: pa.large_list(pa.large_string())),
    "bytes": (encoded(0), lambda pa: pa.binary()),
    "long bytes": ([encoded(0)], lambda pa: pa.list_(pa.large_binary())),
    "an image": (PICTURE, lambda pa: pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    "an image without a path": ({"bytes": encoded(0)}, lambda pa: pa.struct([("bytes", pa.binary())])),
    "a number": (3, lambda pa: pa.int64()),
    "a struct of something else": ({"path": "0.png"}, lambda pa: pa.struct([("path", pa.string())])),
}


@pytest.mark.parametrize("kind", COLUMN_TYPES)
def test_types_of_an_image_column(tmp_path, expected, kind):
    import pyarrow
    import pyarrow.parquet

    value, of = COLUMN_TYPES[kind]
    columns = {"conversations": [ENTRIES[0]["conversations"]], "image": pyarrow.array([value], of(pyarrow))}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "one.parquet")
    if kind in ("a number", "a struct of something else"):
        with pytest.raises(ValueError, match=says("one.parquet", "'image'", "type")):
            read_records(tmp_path / "one.parquet")
    else:
        (record,) = read_records(tmp_path / "one.parquet")
        assert [image_size(source) for source in record.images] == [SIZES[0]]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    """A good file was said to be unreadable, where it was the home that could not be written to."""
    import datasets

    table().to_parquet(tmp_path / "good.parquet")
    (tmp_path / "home").write_text("no directory")
    cache = tmp_path / "home" / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    with pytest.raises(UserError, match=says(str(cache), "good.parquet", "HF_DATASETS_CACHE", "Not a directory")):
        read_records(tmp_path / "good.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for cause in (OSError(errno.ENOSPC, "No space left on device"), OSError("Not enough disk space. Needed: 3 MB")):

        def full(*args, cause=cause, **options):
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from cause

        with monkeypatch.context() as patch:
            patch.setattr(datasets, "load_dataset", full)
            with pytest.raises(UserError, match=says("HF_DATASETS_CACHE", "room")):
                read_records(tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=says("bad.parquet")) as error:
        read_records(tmp_path / "bad.parquet")
    assert "HF_DATASETS_CACHE" not in str(error.value)
