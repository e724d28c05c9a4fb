"""TFRecord files framed and encoded by hand from the specifications, converted and compared; damaged ones, named."""

import gzip
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import jpeg, png

from stagein.formats import Dataset, Field, convert
from stagein.formats.errors import SourceError, StageinError, UsageError
from stagein.formats.source import RefusedRecord, SourceRecord
from stagein.formats.sources.tf_example import BadExampleError, Span, feature_spans, feature_values, fetch_from
from stagein.formats.sources.tfrecord import (
    FieldMapping,
    MappedFeature,
    TFRecords,
    cosmoflow_mapping,
    image_mapping,
    scan_tfrecord,
)

SHAPE = (4, 4, 4, 2)
COSMOFLOW = cosmoflow_mapping(SHAPE)


def varint(number: int) -> bytes:
    number &= 2**64 - 1
    content = b""
    while number >= 0x80:
        content += bytes([number & 0x7F | 0x80])
        number >>= 7
    return content + bytes([number])


def message(number: int, content: bytes) -> bytes:
    """A field of wire type 2: string, bytes or message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def bytes_list(*values: bytes) -> bytes:
    return message(1, b"".join(message(1, value) for value in values))


def float_list(*values: float, packed: bool = True) -> bytes:
    if packed:
        return message(2, message(1, struct.pack(f"<{len(values)}f", *values)))
    return message(2, b"".join(varint(1 << 3 | 5) + struct.pack("<f", value) for value in values))


def int64_list(*values: int, packed: bool = True) -> bytes:
    if packed:
        return message(3, message(1, b"".join(varint(value) for value in values)))
    return message(3, b"".join(varint(1 << 3) + varint(value) for value in values))


def example(features: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    entries = features.items() if isinstance(features, dict) else features
    return message(1, b"".join(message(1, message(1, name.encode()) + message(2, value)) for name, value in entries))


def masked_sum(content: bytes) -> bytes:
    plain = google_crc32c.value(content)
    return struct.pack("<I", (((plain >> 15) | (plain << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32)


def frame(payload: bytes) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked_sum(length) + payload + masked_sum(payload)


def image_example(number: int) -> bytes:
    return example(
        {
            "image/filename": bytes_list(f"n0{number}.JPEG".encode()),
            "image/object/bbox/xmin": float_list(*[0.5] * (number % 4), packed=bool(number % 2)),
            "image/encoded": bytes_list(jpeg(number)),
            "image/class/label": int64_list(1 + number % 10, packed=number % 3 > 0),
            "image/format": bytes_list(b"JPEG"),
        }
    )


def cosmoflow_example(number: int) -> bytes:
    return example({"y": float_list(*universe(number)[1].tolist()), "x": bytes_list(universe(number)[0].tobytes())})


def universe(number: int) -> tuple[Any, Any]:
    random = np.random.default_rng(number)
    return random.integers(-9, 999, SHAPE, dtype=np.int16), random.random(4, dtype=np.float32)


def write(path: Path, payloads: list[bytes]) -> Path:
    content = b"".join(frame(payload) for payload in payloads)
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def read_part(source: TFRecords, first: int, count: int) -> list[tuple[bytes, SourceRecord | RefusedRecord]]:
    """The records of a part that went through a pickle, each with the bytes of its primary field."""
    content = bytearray()

    def room(name: str, nbytes: int) -> memoryview:
        assert name == source.schema.primary
        nonlocal content
        content = bytearray(nbytes)
        return memoryview(content)

    part = pickle.loads(pickle.dumps(source.part(np.arange(first, first + count))))
    return [(bytes(content), record) for record in part.read(room)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("count", [0, 1, 13])
def test_imagenet_of_several_files_in_order(tmp_path: Path, count: int, suffix: str) -> None:
    for file in range(3):
        numbers = range(100 * file, 100 * file + max(count, file == 1))
        if numbers or suffix:
            write(tmp_path / f"träin {file}-0000{file}-of-00003{suffix}", [image_example(number) for number in numbers])
    (tmp_path / "train-00000-of-00003.idx").write_text("0 1000\n")
    convert(scan_tfrecord(tmp_path), tmp_path / "x.st", shard_bytes=2048)
    dataset = Dataset(tmp_path / "x.st")
    numbers = [100 * file + number for file in range(3) for number in range(max(count, file == 1))]
    assert len(dataset) == len(numbers)
    for number, record in zip(numbers, dataset, strict=True):
        assert record["image"].tobytes() == jpeg(number)
        assert tuple(record["hw"]) == (8, 12)
        assert record["label"] == number % 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_cosmoflow(tmp_path: Path, suffix: str) -> None:
    numbers = range(7)
    for number in numbers:
        write(tmp_path / f"21_{number}_000.tfrecord{suffix}", [cosmoflow_example(number)])
    source = scan_tfrecord(tmp_path, COSMOFLOW)
    assert all(file.is_lone == (suffix == ".gz") for file in source.files)
    convert(source, tmp_path / "x.st", shard_bytes=600)
    dataset = Dataset(tmp_path / "x.st")
    assert len(dataset) == 7
    for number, record in zip(numbers, dataset, strict=True):
        x, y = universe(number)
        assert np.array_equal(record["x"].view("<i2").reshape(SHAPE), x)
        assert np.array_equal(record["y"], y)


def test_cosmoflow_is_known_by_its_features(tmp_path: Path) -> None:
    assert scan_tfrecord(write(tmp_path / "a.tfrecord", [cosmoflow_example(1)])).mapping == cosmoflow_mapping()


@pytest.mark.parametrize("name", ["a.tfrecord", "a.tfrecord.gz"])
def test_parts_of_a_file_with_many_records(tmp_path: Path, name: str) -> None:
    source = scan_tfrecord(write(tmp_path / name, [cosmoflow_example(number) for number in range(11)]), COSMOFLOW)
    assert not source.files[0].is_lone
    for first, count in ((0, 11), (3, 5), (10, 1), (0, 0)):
        records = read_part(source, first, count)
        assert [content for content, _ in records] == [universe(n)[0].tobytes() for n in range(first, first + count)]


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    for file in range(3):
        write(tmp_path / f"{file}.tfrecord", [image_example(100 * file + number) for number in range(5)])
    ids = {
        convert(scan_tfrecord(tmp_path), tmp_path / f"{workers}.st", shard_bytes=2048, workers=workers).manifest.id
        for workers in (1, 2)
    }
    assert len(ids) == 1


def test_a_mapping_of_lists_to_a_tensor_and_columns(tmp_path: Path) -> None:
    payloads = [
        example(
            {"v": float_list(*range(n, n + 6)), "bytes": bytes_list(struct.pack("<2h", n, -n)), "i": int64_list(-n, n)}
        )
        for n in range(5)
    ]
    fields = {
        "v": MappedFeature("v", Field(kind="tensor", dtype="float64", shape=(2, 3))),
        "pair": MappedFeature("bytes", Field(kind="tensor", dtype="int16", shape=(2,))),
        "small": MappedFeature("i", Field(kind="tensor", dtype="int8", shape=(2,))),
    }
    source = scan_tfrecord(write(tmp_path / "a.tfrecord", payloads), FieldMapping("v", fields))
    for n, (content, record) in enumerate(read_part(source, 0, 5)):
        assert isinstance(record, SourceRecord)
        assert content == np.arange(n, n + 6, dtype=np.float64).tobytes()
        assert np.array_equal(record.values["pair"], [n, -n])
        assert np.array_equal(record.values["small"], [-n, n])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_features_chosen_by_name(tmp_path: Path, suffix: str) -> None:
    volumes = [np.random.default_rng(n).integers(0, 99, (20, 30, 4), np.int16) for n in range(7)]
    payloads = [
        example(
            {
                "depth": bytes_list(volumes[n].tobytes()),
                "photo": bytes_list(png(n) if n % 2 else jpeg(n)),
                "tokens": int64_list(*range(-n, 2 * n), packed=bool(n % 2)),
                "scores": float_list(*[n / 4] * (n + 2)),
                "caption": bytes_list(f"ein Bild ☃ {n}".encode() if n != 2 else b""),
                "weight": float_list(float("nan") if n == 3 else n / 2),
                "second": bytes_list(jpeg(100 + n)),
                "boxes": float_list(*range(4 * (n % 3 + 1))),
            }
        )
        for n in range(7)
    ]
    write(tmp_path / f"a b.tfrecord{suffix}", payloads)
    names = ("photo", "tokens", "scores", "caption", "weight", "second")
    arrays = {"depth": "depth:int16:20x30x4", "boxes": "boxes:float32:?x4"}
    source = scan_tfrecord(tmp_path, fields={name: name for name in names} | arrays)
    assert source.schema.primary == "photo"
    convert(source, tmp_path / "x.st", shard_bytes=3000, workers=2)
    for n, record in enumerate(Dataset(tmp_path / "x.st")):
        assert record["photo"].tobytes() == (png(n) if n % 2 else jpeg(n))
        assert record["second"].tobytes() == jpeg(100 + n)
        assert np.array_equal(record["depth"], volumes[n])
        assert record["tokens"].tolist() == list(range(-n, 2 * n))
        assert np.array_equal(record["boxes"], np.arange(4 * (n % 3 + 1)).reshape(-1, 4))
        assert record["scores"].tolist() == [n / 4] * (n + 2)
        assert record["caption"] == (f"ein Bild ☃ {n}" if n != 2 else "")
        assert np.array_equal(record["weight"], np.float32("nan") if n == 3 else np.float32(n / 2), equal_nan=True)
    for fields, reason in {
        ("x", "colour"): "has no feature 'colour': it has 'boxes', 'caption'",
        ("x", "depth:int17:2"): "is not FEATURE:TYPE:SHAPE",
        ("x", "depth:int16:2y3"): "is not FEATURE:TYPE:SHAPE",
    }.items():
        with pytest.raises(UsageError, match=reason):
            scan_tfrecord(tmp_path, fields=dict([fields]))


def test_mappings_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecord", [image_example(1)])
    with pytest.raises(UsageError, match="the primary field 'picture' is among them"):
        scan_tfrecord(path, FieldMapping("picture", image_mapping().fields))
    write(path, [example({"a": int64_list(1), "ö": int64_list(1)})])
    with pytest.raises(SourceError, match="holds the features 'a', 'ö': say by --field"):
        scan_tfrecord(path)


def test_labels_are_counted_from_where_the_user_says(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecord", [image_example(number) for number in range(3)])
    for first in (0, 1):
        records = [record for _, record in read_part(scan_tfrecord(path, image_mapping(first)), 0, 3)]
        assert [int(record.values["label"]) for record in records] == [1 - first, 2 - first, 3 - first]
    _, refused = read_part(scan_tfrecord(path, image_mapping(2)), 0, 3)[0]
    assert "'image/class/label' is 1, below the first of all, 2" in refused.reason


BAD_EXAMPLES = {
    "no image": (example({"image/class/label": int64_list(1)}), "no feature 'image/encoded'"),
    "no label": (
        example({"image/encoded": bytes_list(jpeg(1))}),
        "no feature 'image/class/label', only 'image/encoded'",
    ),
    "two images": (
        example({"image/encoded": bytes_list(jpeg(1), jpeg(2)), "image/class/label": int64_list(1)}),
        "not one value of bytes",
    ),
    "two features": (
        example([("image/encoded", bytes_list(jpeg(1))), ("image/encoded", bytes_list(png(1)))]),
        "'image/encoded' is there twice",
    ),
    "an image of numbers": (
        example({"image/encoded": int64_list(1), "image/class/label": int64_list(1)}),
        "not one value of bytes",
    ),
    "two labels": (
        example({"image/encoded": bytes_list(jpeg(1)), "image/class/label": int64_list(1, 2)}),
        "'image/class/label' has 2 numbers, not ()",
    ),
    "half a label": (
        example({"image/encoded": bytes_list(jpeg(1)), "image/class/label": float_list(1.5)}),
        "1.5 is none of int64",
    ),
    "a label of text": (
        example({"image/encoded": bytes_list(jpeg(1)), "image/class/label": bytes_list(b"cat")}),
        "has values of [3] bytes",
    ),
    "half an image": (
        example({"image/encoded": bytes_list(jpeg(1)[:-50]), "image/class/label": int64_list(1)}),
        "truncated JPEG",
    ),
    "an empty image": (
        example({"image/encoded": bytes_list(b""), "image/class/label": int64_list(1)}),
        "the file is empty",
    ),
    "no Example": (b"\xff" * 40, "it is no tf.train.Example"),
    "nothing": (b"", "no feature 'image/encoded'"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", BAD_EXAMPLES)
def test_a_bad_record_is_refused_or_left_out(tmp_path: Path, name: str, suffix: str) -> None:
    payload, reason = BAD_EXAMPLES[name]
    path = write(tmp_path / f"a.tfrecord{suffix}", [image_example(0), image_example(1), payload, image_example(2)])
    with pytest.raises(SourceError, match="1 thing in it is no record") as refusal:
        convert(scan_tfrecord(path), tmp_path / "x.st")
    assert reason in str(refusal.value)
    assert f"{path}: record 2: " in str(refusal.value)
    assert len(convert(scan_tfrecord(path), tmp_path / "x.st", skip_bad=True).skipped) == 1
    assert [record["image"].tobytes() for record in Dataset(tmp_path / "x.st")] == [jpeg(n) for n in range(3)]


@pytest.mark.parametrize("kind", ["image", "tensor"])
def test_every_flipped_byte_is_noticed(tmp_path: Path, kind: str) -> None:
    """Every record is either what it was or refused, whichever byte of the file is damaged."""
    make, mapping = (image_example, image_mapping()) if kind == "image" else (cosmoflow_example, COSMOFLOW)
    content = bytearray(write(tmp_path / "a.tfrecord", [make(number) for number in range(2)]).read_bytes())
    whole = [content for content, _ in read_part(scan_tfrecord(tmp_path, mapping), 0, 2)]
    boundary = len(content) // 2
    for position in [*range(16), *range(16, len(content), 23), *range(boundary - 40, boundary + 40)]:
        flipped = content.copy()
        flipped[position] ^= 0x10
        (tmp_path / "a.tfrecord").write_bytes(flipped)
        source = scan_tfrecord(tmp_path, mapping)
        read = read_part(source, 0, len(source.nbytes))
        refused = [*source.refused, *(record for _, record in read if isinstance(record, RefusedRecord))]
        kept = [content for content, record in read if isinstance(record, SourceRecord)]
        assert len(refused) == 1, position
        assert kept in (whole[:1], whole[1:], [])


@pytest.mark.parametrize("name", ["a.tfrecord", "a.tfrecord.gz"])
def test_a_truncated_file_keeps_what_is_whole(tmp_path: Path, name: str) -> None:
    content = write(tmp_path / name, [image_example(number) for number in range(3)]).read_bytes()
    boundaries = {len(b"".join(frame(image_example(n)) for n in range(count))) for count in range(4)}
    for end in [*range(1, len(content), 61), len(content) - 1, len(content) - 9]:
        if name == "a.tfrecord" and end in boundaries:
            continue
        (tmp_path / name).write_bytes(content[:end])
        source = scan_tfrecord(tmp_path, image_mapping())
        (refused,) = source.refused
        assert any(word in refused.reason for word in ("truncated", "gzip")), refused
        whole = [content for content, _ in read_part(source, 0, len(source.nbytes))]
        assert whole == [jpeg(number) for number in range(len(whole))]


def test_a_truncated_cosmoflow_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecord.gz", [cosmoflow_example(1)])
    content = path.read_bytes()
    for end in range(1, len(content), 7):
        path.write_bytes(content[:end])
        (refused,) = scan_tfrecord(path, COSMOFLOW).refused
        assert "copy the file again" in refused.reason
    path.write_bytes(content[: len(content) // 2])
    write(tmp_path / "b.tfrecord.gz", [cosmoflow_example(2)])
    convert(scan_tfrecord(tmp_path, COSMOFLOW), tmp_path / "x.st", skip_bad=True)
    assert len(Dataset(tmp_path / "x.st")) == 1


def gunzips(content: bytes) -> bool:
    try:
        gzip.decompress(content)
    except (EOFError, OSError, zlib.error):
        return False
    return True


def test_a_damaged_cosmoflow_file_is_refused(tmp_path: Path) -> None:
    """Whatever gzip does not notice (its time, its padding) does no harm; all else is refused."""
    path = write(tmp_path / "a.tfrecord.gz", [cosmoflow_example(1)])
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x20
        path.write_bytes(flipped)
        source = scan_tfrecord(path, COSMOFLOW)
        records = read_part(source, 0, len(source.nbytes))
        sound = [data for data, record in records if isinstance(record, SourceRecord)]
        assert sound in ([], [universe(1)[0].tobytes()])
        assert bool(sound and not source.refused) == gunzips(flipped), position


def test_more_records_than_a_gzip_trailer_tells_are_not_lost(tmp_path: Path) -> None:
    members = [gzip.compress(frame(cosmoflow_example(number))) for number in range(3)]
    (tmp_path / "a.tfrecord.gz").write_bytes(b"".join(members))
    source = scan_tfrecord(tmp_path, COSMOFLOW)
    with pytest.raises(SourceError, match="holds more records than the end of the gzip file says"):
        convert(source, tmp_path / "x.st")


def test_a_plain_file_that_starts_like_gzip_is_plain(tmp_path: Path) -> None:
    around = len(example({"f": bytes_list(bytes(0x80000))})) - 0x80000
    filler = bytes_list(bytes(0x88B1F - around - len(image_example(1))))
    payload = example({"f": filler}) + image_example(1)
    assert frame(payload)[:3] == b"\x1f\x8b\x08"
    path = write(tmp_path / "a.tfrecord", [payload])
    assert [content for content, _ in read_part(scan_tfrecord(path), 0, 1)] == [jpeg(1)]


def test_lengths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for length in (2**63, 2**32, 2**31):
        head = struct.pack("<Q", length)
        for name in ("a.tfrecord", "a.tfrecord.gz"):
            content = frame(image_example(1)) + head + masked_sum(head) + b"x" * 100
            path = tmp_path / name
            path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
            source = scan_tfrecord(path, image_mapping())
            assert len(source.nbytes) == len(source.refused) == 1


def test_a_record_that_was_rewritten_in_place_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecord", [image_example(1)])
    source = scan_tfrecord(path)
    write(path, [image_example(2)])
    with pytest.raises(SourceError, match="changed while it was converted"):
        read_part(source, 0, 1)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no TFRecord files"):
        scan_tfrecord(tmp_path)
    (tmp_path / "a.tfrecord").write_bytes(b"")
    with pytest.raises(SourceError, match="no TFRecord file with a record"):
        scan_tfrecord(tmp_path)
    (refused,) = scan_tfrecord(tmp_path, image_mapping()).refused
    assert refused.reason == "the file is empty"
    (tmp_path / "a.tfrecord").write_bytes(b"this is no such file, but text")
    (refused,) = scan_tfrecord(tmp_path, image_mapping()).refused
    assert "does not start with a length" in refused.reason


def test_the_first_bytes_of_every_event_file() -> None:
    """Seen in all files that TensorBoard reads: a record of 24 bytes."""
    assert frame(bytes(24))[:12] == bytes.fromhex("1800000000000000a37f4b22")


FEATURES = st.one_of(
    st.lists(st.binary(max_size=300), max_size=3).map(lambda values: (values, bytes_list(*values))),
    st.tuples(st.lists(st.floats(width=32, allow_nan=False), max_size=5), st.booleans()).map(
        lambda drawn: (drawn[0], float_list(*drawn[0], packed=drawn[1]))
    ),
    st.tuples(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.booleans()).map(
        lambda drawn: (drawn[0], int64_list(*drawn[0], packed=drawn[1]))
    ),
)


def parse(payload: bytes) -> dict[str, list[Any]]:
    view = memoryview(payload)
    spans = feature_spans(fetch_from(view), Span(0, len(view)))
    features = {name: feature_values(view, span) for name, span in spans}
    return {
        name: [bytes(value) for value in values] if isinstance(values, list) else values.tolist()
        for name, values in features.items()
    }


@given(features=st.dictionaries(st.text(max_size=20), FEATURES, max_size=6))
def test_what_is_encoded_is_parsed(features: dict[str, tuple[list[Any], bytes]]) -> None:
    encoded = example({name: content for name, (_, content) in features.items()})
    assert parse(encoded) == {name: values for name, (values, _) in features.items()}


@given(feature=FEATURES, number=st.integers(4, 1000), value=st.integers(0, 2**64 - 1))
def test_unknown_fields_are_stepped_over(feature: tuple[list[Any], bytes], number: int, value: int) -> None:
    unknown = [
        varint(number << 3) + varint(value),
        varint(number << 3 | 1) + bytes(8),
        varint(number << 3 | 5) + bytes(4),
        message(number, b"abc"),
    ]
    for extra in unknown:
        entry = extra + message(1, b"name") + extra + message(2, extra + feature[1] + extra)
        assert parse(extra + message(1, extra + message(1, entry)) + extra) == {"name": feature[0]}


@settings(max_examples=300)
@given(payload=st.binary(max_size=100))
def test_any_bytes_are_an_example_or_not(payload: bytes) -> None:
    for content in (payload, message(1, payload), example({"f": payload})):
        try:
            parse(content)
        except BadExampleError as error:
            assert "tf.train.Example" in str(error)


@settings(max_examples=200)
@given(data=st.data())
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    payload = bytearray(image_example(1) if data.draw(st.booleans()) else cosmoflow_example(1))
    for _ in range(data.draw(st.integers(0, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    content = frame(bytes(payload)) + frame(image_example(2))
    if data.draw(st.booleans()):
        content = gzip.compress(content, 1)
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.mktemp("any") / "a.tfrecord"
    path.write_bytes(content if data.draw(st.integers(0, 9)) else data.draw(st.binary(max_size=50)))
    for mapping in (None, image_mapping(), COSMOFLOW):
        try:
            source = scan_tfrecord(path, mapping)
            records = read_part(source, 0, len(source.nbytes))
            assert all(isinstance(record, (SourceRecord, RefusedRecord)) for _, record in records)
        except StageinError as error:
            assert len(str(error).splitlines()) == 1
