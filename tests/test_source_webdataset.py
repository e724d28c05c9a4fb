"""WebDataset archives written by Python's tarfile, converted and compared record by record; damaged ones, named."""

import io
import json
import os
import pickle
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import jpeg, png

from stagein.formats import Dataset, convert, verify
from stagein.formats.errors import SourceError, StageinError, UsageError
from stagein.formats.source import SourceRecord
from stagein.formats.sources.tar_headers import BadTarError, read_members
from stagein.formats.sources.webdataset import scan_webdataset

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FULL_BLOCK = 512
EMBEDDING = np.arange(6).reshape(2, 3)


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], form: str = "ustar") -> Path:
    with tarfile.open(path, "w", format=FORMATS[form]) as archive:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(first: int, count: int) -> dict[str, bytes]:
    members = {}
    for number in range(first, first + count):
        members[f"{number:06d}.jpg"] = jpeg(number)
        members[f"{number:06d}.cls"] = str(number % 10).encode()
    return members


def read_directly(source) -> list:
    """The records of a source as its part yields them, after a pickle."""
    content = bytearray(1 << 20)
    part = pickle.loads(pickle.dumps(source.part(np.arange(len(source.nbytes)))))
    return list(part.read(lambda name, nbytes: memoryview(content)[:nbytes]))


@pytest.mark.parametrize("count", [0, 1, 13])
def test_records_of_several_archives_in_order(tmp_path: Path, count: int) -> None:
    for number in range(3):
        write_tar(tmp_path / f"train {number} ä.tar", samples(100 * number, count))
    convert(scan_webdataset(tmp_path), tmp_path / "x.st", shard_bytes=2048)
    dataset = Dataset(tmp_path / "x.st")
    numbers = [100 * archive + sample for archive in range(3) for sample in range(count)]
    assert len(dataset) == len(numbers)
    for number, record in zip(numbers, dataset, strict=True):
        assert record["image"].tobytes() == jpeg(number)
        assert tuple(record["hw"]) == (8, 12)
        assert record["label"] == number % 10


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", samples(100 * number, 7))
    ids = {
        convert(scan_webdataset(tmp_path), tmp_path / f"{workers}.st", shard_bytes=2048, workers=workers).manifest.id
        for workers in (1, 2)
    }
    assert len(ids) == 1


@pytest.mark.parametrize("form", FORMATS)
def test_every_tar_format_and_name(tmp_path: Path, form: str) -> None:
    names = ["a", "b c", "Größe", "folder/deep/er/name", "x" * 60 + "/" + "y" * 90]
    if form != "ustar":
        names.append("/".join(["very long name"] * 40))
    write_tar(tmp_path / "a.tar", {f"{name}.JPEG": jpeg(number) for number, name in enumerate(names)}, form)
    source = scan_webdataset(tmp_path / "a.tar")
    assert source.keys == tuple(names)
    assert "label" not in source.schema.fields
    convert(source, tmp_path / "x.st")
    assert [record["image"].tobytes() for record in Dataset(tmp_path / "x.st")] == [
        jpeg(number) for number in range(len(names))
    ]


@settings(max_examples=40)
@given(
    form=st.sampled_from(list(FORMATS)),
    members=st.lists(
        st.tuples(
            st.text(
                st.characters(exclude_categories=["C", "Z"], exclude_characters="/."), min_size=1, max_size=99
            ).filter(lambda name: len(name.encode()) < 100),
            st.binary(max_size=1200),
        ),
        max_size=7,
    ),
)
def test_members_are_where_tarfile_says(tmp_path_factory: pytest.TempPathFactory, form: str, members: list) -> None:
    path = write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members, form)
    with tarfile.open(path) as archive, open(path, "rb") as file:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
        got = list(read_members(file.fileno(), path.stat().st_size))
    assert [(member.name, member.offset, member.nbytes) for member in got] == expected
    assert all(member.is_file for member in got)


def test_archives_of_gnu_tar(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{'long' * 40} {number}.jpg").write_bytes(jpeg(number))
    for form in ("v7", "ustar", "gnu", "pax", "oldgnu"):
        names = sorted(path.name for path in (tmp_path / "in").iterdir())
        short = ["--transform=s/.*\\(.\\).jpg/\\1.jpg/"] if form in ("v7", "ustar") else []
        subprocess.run(
            ["tar", "-C", tmp_path / "in", f"--format={form}", *short, "-cf", tmp_path / "a.tar", *names], check=True
        )
        source = scan_webdataset(tmp_path / "a.tar")
        assert source.nbytes.tolist() == [len(jpeg(number)) for number in range(3)]
        assert all(isinstance(record, SourceRecord) for record in read_directly(source))


def test_times_in_a_gnu_header_are_no_part_of_the_name(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    command = ["tar", "-C", tmp_path, "--incremental", "--format=gnu", "-cf", tmp_path / "a.tar", "1.jpg"]
    subprocess.run(command, check=True)
    assert (tmp_path / "a.tar").read_bytes()[345:350].isdigit()
    assert scan_webdataset(tmp_path / "a.tar").keys == ("1",)


def test_a_damaged_pax_header_is_named(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", {"ö.jpg": jpeg(1)}, "pax").read_bytes()
    for record in (b"zz path=", b"99 path=", b"00 path=", b"15 path:", b"15-path="):
        (tmp_path / "a.tar").write_bytes(whole.replace(b"15 path=", record))
        (refused,) = scan_webdataset(tmp_path / "a.tar").refused
        assert "LENGTH KEYWORD=VALUE" in refused.reason


def test_columns_that_are_asked_for(tmp_path: Path) -> None:
    members = {}
    for number in range(5):
        array = io.BytesIO()
        np.save(array, np.asarray(EMBEDDING * number, ">f4", order="F" if number % 2 else "C"))
        members |= {
            f"{number}.box.json": json.dumps([number, 0.5]).encode(),
            f"{number}.png": png(number),
            f"{number}.emb.npy": array.getvalue(),
            f"{number}.count": f" {number * 1000}\n".encode(),
            f"{number}.txt": b"a caption that nobody asked for",
        }
    write_tar(tmp_path / "a.tar", members)
    source = scan_webdataset(tmp_path / "a.tar", {"box": "box.json", "emb": ".emb.npy", "count": "count"})
    convert(source, tmp_path / "x.st")
    dataset = Dataset(tmp_path / "x.st")
    assert dataset.schema.primary_field.encoding == "png"
    assert dataset.columns["box"].tolist() == [[number, 0.5] for number in range(5)]
    assert dataset.columns["emb"].dtype == "<f4"
    assert np.array_equal(dataset.columns["emb"], [EMBEDDING * number for number in range(5)])
    assert dataset.columns["count"].tolist() == [0, 1000, 2000, 3000, 4000]


def test_members_that_are_known_become_fields(tmp_path: Path) -> None:
    """Texts, JSON, arrays small and large, lists that differ in length; what most records do not have is no field."""
    generator = np.random.default_rng(0)
    maps = [generator.integers(0, 3, (40, 50, 2), np.uint8) for _ in range(13)]
    members: dict[str, bytes] = {}
    for number, segmentation in enumerate(maps):
        array = io.BytesIO()
        np.save(array, segmentation)
        members |= {
            f"größe {number}.jpg": jpeg(number),
            f"größe {number}.txt": f"ein Bild, {number} ☃".encode() if number != 3 else b"",
            f"größe {number}.json": json.dumps({"id": number, "nan": float("nan")}).encode(),
            f"größe {number}.npy": array.getvalue(),
        }
    members["größe 2.rare"] = b"?"
    write_tar(tmp_path / "a b.tar", members)
    source = scan_webdataset(tmp_path)
    assert {name: field.kind for name, field in source.schema.fields.items()} == {
        "image": "encoded",
        "hw": "tensor",
        "txt": "text",
        "json": "text",
        "npy": "tensor",
    }
    convert(source, tmp_path / "x.st", shard_bytes=9000, workers=2)
    for number, record in enumerate(Dataset(tmp_path / "x.st")):
        assert record["image"].tobytes() == jpeg(number)
        assert record["txt"].encode() == members[f"größe {number}.txt"]
        assert record["json"].encode() == members[f"größe {number}.json"]
        assert np.array_equal(record["npy"], maps[number])


def test_what_few_records_have_is_no_field(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(0, 5) | {"000001.txt": b"a note", "000004.json": b"[1]"})
    source = scan_webdataset(tmp_path)
    assert set(source.schema.fields) == {"image", "hw", "label"}
    assert not source.refused
    assert source.left_out == (".txt", ".json")
    assert scan_webdataset(tmp_path, {"note": "cls"}).left_out == ()


def test_boxes_and_sounds_without_images(tmp_path: Path) -> None:
    boxes = [[[n, 1.5]] * (n % 4) for n in range(7)]
    members = {f"{n}.flac": b"fLaC" + bytes([n]) * n for n in range(7)}
    members |= {f"{n}.boxes.json": json.dumps(boxes[n]).encode() for n in range(7)}
    members |= {f"{n}.mp4": bytes(8) + bytes([n]) for n in range(7)}
    write_tar(tmp_path / "a.tar", members)
    fields = {"sound": "flac", "boxes": "boxes.json", "film": "mp4"}
    source = scan_webdataset(tmp_path / "a.tar", fields, primary="sound")
    assert source.schema.fields["film"].encoding == "mp4"
    convert(source, tmp_path / "x.st")
    for number, record in enumerate(Dataset(tmp_path / "x.st")):
        assert record["sound"].tobytes() == members[f"{number}.flac"]
        assert record["film"].tobytes() == members[f"{number}.mp4"]
        assert record["boxes"].tolist() == boxes[number]
    with pytest.raises(SourceError, match="end in nothing that is known"):
        scan_webdataset(write_tar(tmp_path / "b.tar", {"1.mp4": b"?"}))


@pytest.mark.parametrize("extension", ["npy", "json"])
@pytest.mark.parametrize("widths", [(50,), (40, 50, 60)], ids=["one extent", "two extents"])
def test_arrays_that_differ_in_shape_fill_shards(tmp_path: Path, extension: str, widths: tuple[int, ...]) -> None:
    arrays = [np.arange(n * 100 * widths[n % len(widths)]).reshape(n * 100, -1) % 10 for n in range(1, 8)]
    members = {}
    for number, array in enumerate(arrays):
        content = io.BytesIO()
        np.save(content, array)
        text = json.dumps(array.tolist(), separators=(",", ":")).encode()
        members[f"{number}.{extension}"] = content.getvalue() if extension == "npy" else text
    source = scan_webdataset(write_tar(tmp_path / "a.tar", members), {"grid": extension})
    manifest = convert(source, tmp_path / "x.st", shard_bytes=400_000).manifest
    assert manifest.num_shards > 2
    for read, array in zip(Dataset(tmp_path / "x.st"), arrays, strict=True):
        assert np.array_equal(read["grid"], array)
    assert verify(tmp_path / "x.st").problems == []


def test_a_column_of_another_shape_is_refused(tmp_path: Path) -> None:
    members = samples(0, 8) | {f"{n:06d}.json": b"[1, 2, 3]" if n == 2 else b"[1, 2]" for n in range(8)}
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(SourceError, match=r"a\.tar: 000002: its \.json cannot be 'v': its shape is \(3,\), not \(2,\)"):
        convert(scan_webdataset(tmp_path, {"v": "json"}), tmp_path / "x.st")


def test_columns_that_cannot_be(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.txt": b"words", "1.json": b"[1, [2]]", "1.npy": b"\x93NUMPY"})
    for fields, reason in {
        ("t", "npy"): "holds no number",
        ("t", "jpg"): "each needs its own",
        ("t", "absent"): "no record has a member .absent",
        ("hw", "json"): "choose another name",
    }.items():
        with pytest.raises(UsageError, match=reason):
            scan_webdataset(tmp_path / "a.tar", dict([fields]))
    with pytest.raises(UsageError, match="each needs its own"):
        scan_webdataset(tmp_path / "a.tar", {"a": "json", "b": "json"})
    write_tar(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.json": b"1"})
    with pytest.raises(UsageError, match="'not a name' cannot be the name of a field"):
        scan_webdataset(tmp_path / "a.tar", {"not a name": "json"})


BAD_RECORDS = {
    "no image": ([("bad.cls", b"1")], "it has no image"),
    "two images": ([("bad.jpg", jpeg(1)), ("bad.png", png(1)), ("bad.cls", b"1")], "more than one image"),
    "a duplicate": ([("bad.jpg", jpeg(1)), ("bad.cls", b"1"), ("bad.jpg", jpeg(2))], "more than one image"),
    "two labels": ([("bad.jpg", jpeg(1)), ("bad.cls", b"1"), ("bad.cls", b"1")], "more than one .cls"),
    "no label": ([("bad.jpg", jpeg(1))], "it has no .cls"),
    "a label of words": ([("bad.jpg", jpeg(1)), ("bad.cls", b"cat")], "holds no number but b'cat'"),
    "half a label": ([("bad.jpg", jpeg(1)), ("bad.cls", b"0.5")], "0.5 is none of int64"),
    "an endless label": ([("bad.jpg", jpeg(1)), ("bad.cls", b"9" * 30)], "cannot be 'label'"),
    "a long label": ([("bad.jpg", jpeg(1)), ("bad.cls", b"9" * 70000)], "too large for a number"),
    "an empty image": ([("bad.jpg", b""), ("bad.cls", b"1")], "its image is empty"),
    "no picture": ([("bad.jpg", b"this is text"), ("bad.cls", b"1")], "starts like neither JPEG nor PNG"),
    "half a picture": ([("bad.jpg", jpeg(1)[:-60]), ("bad.cls", b"1")], "truncated JPEG"),
    "no extension": ([("bad", b"1")], "not KEY.EXTENSION"),
    "no key": ([("sub/.jpg", jpeg(1))], "not KEY.EXTENSION"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_refused_or_left_out(tmp_path: Path, name: str) -> None:
    members, reason = BAD_RECORDS[name]
    good = list(samples(0, 4).items())
    write_tar(tmp_path / "a.tar", [*good[:4], *members, *good[4:]])
    with pytest.raises(SourceError, match="1 thing in it is no record") as refusal:
        convert(scan_webdataset(tmp_path), tmp_path / "x.st")
    assert reason in str(refusal.value)
    assert f"a.tar: {members[0][0].split('.')[0]}" in str(refusal.value)
    assert len(convert(scan_webdataset(tmp_path), tmp_path / "x.st", skip_bad=True).skipped) == 1
    assert [record["image"].tobytes() for record in Dataset(tmp_path / "x.st")] == [jpeg(n) for n in range(4)]


def test_a_link_is_no_record(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("folder/0.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        archive.addfile(link)
    (refused,) = scan_webdataset(tmp_path).refused
    assert refused.name.endswith("a.tar: folder/0.jpg")
    assert "link" in refused.reason


def test_a_truncated_archive_keeps_what_is_whole(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", samples(0, 5)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = [member.offset for member in archive] + [archive.offset]
    (tmp_path / "whole.tar").unlink()
    path = tmp_path / "cut.tar"
    for end in {*starts[:-1], *range(0, starts[-1], 97), starts[-1] + FULL_BLOCK - 1}:
        path.write_bytes(whole[:end])
        source = scan_webdataset(path)
        assert any("truncated" in refused.reason for refused in source.refused), end
        with pytest.raises(SourceError, match="truncated"):
            convert(source, tmp_path / "x.st")
        assert all(isinstance(record, SourceRecord) for record in read_directly(source))
    path.write_bytes(whole[: starts[4] + 600])
    convert(scan_webdataset(path), tmp_path / "x.st", skip_bad=True)
    assert [record["image"].tobytes() for record in Dataset(tmp_path / "x.st")] == [jpeg(0), jpeg(1)]


def test_archives_in_one_are_not_lost(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", samples(0, 2))
    with open(one, "ab") as file:
        file.write(write_tar(tmp_path / "2.TAR.tmp", samples(5, 2)).read_bytes())
    (refused,) = scan_webdataset(one).refused
    assert "several archives in one" in refused.reason


def test_a_sparse_member_is_named(tmp_path: Path) -> None:
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    for form in ("gnu", "pax"):
        command = ["tar", "-C", tmp_path, "--sparse", f"--format={form}", "-cf", tmp_path / "a.tar", "hole.jpg"]
        subprocess.run(command, check=True)
        (refused,) = scan_webdataset(tmp_path / "a.tar").refused
        assert "--sparse" in refused.reason


def test_a_damaged_header_ends_an_archive_with_a_word(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(0, 3))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        second = archive.getmembers()[2].offset
    for position in range(second, second + 257, 16):
        flipped = bytearray(content)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        source = scan_webdataset(path)
        assert "no header of a member" in source.refused[0].reason
        assert source.keys == ("000000",)


@settings(max_examples=150)
@given(data=st.data())
def test_any_bytes_are_read_or_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(_archive_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    start = data.draw(st.sampled_from([0, 0, 0, 3, 512]))
    content = content[start : data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.mktemp("any") / "a.tar"
    path.write_bytes(content)
    try:
        read_directly(scan_webdataset(path, {"v": "json", "w": "npy"}))
    except StageinError as error:
        assert len(str(error).splitlines()) == 1


def _archive_bytes() -> bytes:
    array = io.BytesIO()
    np.save(array, np.arange(3))
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a", "ö"):
            for extension, value in {"jpg": jpeg(1), "cls": b"3", "json": b"[1, 2]", "npy": array.getvalue()}.items():
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(value)
                archive.addfile(member, io.BytesIO(value))
    return content.getvalue()


@given(content=st.binary(max_size=2000))
def test_garbage_is_no_archive(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "a.tar"
    path.write_bytes(content)
    with open(path, "rb") as file, pytest.raises(BadTarError):
        list(read_members(file.fileno(), len(content)))


def test_an_archive_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(0, 3))
    source = scan_webdataset(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(SourceError, match=r"a\.tar changed while it was converted"):
        convert(source, tmp_path / "x.st")
    path.unlink()
    with pytest.raises(SourceError, match=r"reading .*a\.tar failed: No such file"):
        convert(source, tmp_path / "x.st")


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no tar archives \(\*\.tar\)"):
        scan_webdataset(tmp_path)
    with pytest.raises(SourceError, match="No such file"):
        scan_webdataset(tmp_path / "nowhere.tar")
    with pytest.raises(SourceError, match="is no file"):
        scan_webdataset([tmp_path])
