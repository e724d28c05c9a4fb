"""A shard is what it claims to be: other people's HDF5 and Zarr libraries read back what was written."""

import gc
import json
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
import tensorstore
import zarr
from disks import small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stagein.formats import Dataset, Field, Schema, Writer, payload_file, verify
from stagein.formats.checksums import chunk_sums, crc32c, record_sums
from stagein.formats.codecs import LZ4, WORK_BYTES, Codec, lz4_block_bytes
from stagein.formats.errors import ChecksumError, NoSpaceError, UsageError
from stagein.formats.hdf5_shard import Hdf5Structure, create_skeleton
from stagein.formats.manifest import Container
from stagein.formats.native_code import NativeKernel
from stagein.formats.payload_file import PayloadFile
from stagein.formats.read_kernels import decode_record
from stagein.formats.shards import plan_shards

CONTAINERS = [container for container in get_args(Container) if container != "foreign"]
WORK = np.empty(WORK_BYTES, np.uint8)
LABEL = Field(kind="tensor", dtype="int64")
BOX = Field(kind="tensor", dtype="float32", shape=(4,))
JPEG = Field(kind="encoded", dtype="uint8", shape=(None, None, 3), encoding="jpeg")
VOLUME = Field(kind="tensor", dtype="int16", shape=(16, 24, 5), dims=("height", "width", "channel"))


def _records(primary: Field, count: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)

    def content() -> NDArray[np.generic]:
        if primary.kind == "encoded":
            return random.integers(0, 256, int(random.integers(0, 60_000)), dtype=np.uint8)
        return random.integers(-999, 999, (16, 24, 5)).astype(np.int16)

    return [{"x": content(), "label": number, "box": random.random(4, np.float32)} for number in range(count)]


def _write(target: Path, primary: Field, container: Container, records: list[dict[str, Any]]) -> Dataset:
    _skip_what_cannot_be(primary, container)
    schema = Schema(fields={"x": primary, "label": LABEL, "box": BOX}, primary="x")
    with Writer(target, schema, container=container, shard_bytes=100 << 10, chunk_bytes=32 << 10) as writer:
        for record in records:
            writer.write(record)
    return Dataset(target)


CODECS = {
    "blosc-byte": Codec(name="blosc-lz4", shuffle="byte"),
    "blosc-bit": Codec(name="blosc-lz4", shuffle="bit"),
    "zstd": Codec(name="zstd"),
    "lz4": Codec(name="lz4"),
}
PRIMARIES = {"encoded": JPEG, "tensor": VOLUME} | {
    f"tensor, {name}": VOLUME.model_copy(update={"codec": codec}) for name, codec in CODECS.items()
}


@pytest.fixture(scope="module", params=PRIMARIES.values(), ids=PRIMARIES.keys())
def primary(request: pytest.FixtureRequest) -> Field:
    field: Field = request.param
    return field


def _skip_what_cannot_be(primary: Field, container: Container) -> None:
    if primary.codec is not None and primary.codec.name == "lz4" and container != "hdf5":
        pytest.skip("Zarr has no codec lz4")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("count", [0, 1, 53])
def test_records_are_read_back(tmp_path: Path, primary: Field, container: Container, count: int) -> None:
    records = _records(primary, count)
    dataset = _write(tmp_path / "x.st", primary, container, records)
    assert len(dataset) == count
    assert count < 50 or len(dataset.manifest.shards) > 2
    for written, read in zip(records, dataset, strict=True):
        assert read.keys() == written.keys()
        assert all(np.array_equal(read[name], written[name]) for name in written)
    assert verify(dataset.path).problems == []
    if primary.kind == "tensor" and count:
        order = np.random.default_rng(1).permutation(count)
        assert np.array_equal(dataset.read_tensors(order), np.stack([records[number]["x"] for number in order]))


@pytest.mark.parametrize("container", ["hdf5+zarr", "hdf5"])
def test_h5py_and_h5dump_read_a_shard(tmp_path: Path, primary: Field, container: Container) -> None:
    records = _records(primary, 53)
    dataset = _write(tmp_path / "x.st", primary, container, records)
    for shard in dataset.manifest.shards:
        path = dataset.path / shard.file
        with h5py.File(path) as file:
            assert json.loads(file.attrs["schema"])["primary"] == "x"
            for row in range(shard.records):
                record = records[shard.first + row]
                if primary.kind == "encoded":
                    start, nbytes = int(file["x/offset"][row]), int(file["x/nbytes"][row])
                    content = file["x/data"][start : start + nbytes]
                else:
                    content = file["x/data"][row]
                assert np.array_equal(content, record["x"])
                assert file["label"][row] == record["label"]
                assert np.array_equal(file["box"][row], record["box"])
    if primary.codec is not None:
        return  # h5dump has none of the filters
    if shutil.which("h5dump") is None:
        pytest.skip("no h5dump here (Debian: hdf5-tools); h5py has read the shards")
    first = dataset.manifest.shards[0]
    dumped = tmp_path / "dumped.bin"
    subprocess.run(
        ["h5dump", "-d", "/x/data", "-b", "LE", "-o", dumped, dataset.path / first.file],
        check=True,
        capture_output=True,
    )
    payload = b"".join(records[number]["x"].tobytes() for number in range(first.records))
    assert dumped.read_bytes()[: len(payload)] == payload


@pytest.mark.parametrize("container", ["hdf5+zarr", "zarr"])
def test_zarr_and_tensorstore_read_the_data_set(tmp_path: Path, primary: Field, container: Container) -> None:
    records = _records(primary, 53)
    dataset = _write(tmp_path / "x.st", primary, container, records)
    group = zarr.open_group(dataset.path, mode="r")
    store = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(dataset.path / "x")}}, read=True
    ).result()
    assert np.array_equal(group["label"][:], [record["label"] for record in records])
    assert np.array_equal(group["box"][:], np.stack([record["box"] for record in records]))
    index = group["index/x"]
    for number, record in enumerate(records):
        if primary.kind == "encoded":
            shard = int(index["shard"][number])
            in_payload = int(index["offset"][number]) - dataset.manifest.shards[shard].data_offset
            start = shard * dataset.manifest.capacity["x"] + in_payload
            place = slice(start, start + int(index["nbytes"][number]))
        else:
            place = slice(number, number + 1)
        expected = record["x"] if primary.kind == "encoded" else record["x"][None]
        assert np.array_equal(group["x"][place], expected)
        assert np.array_equal(store[place].read().result(), expected)


def test_an_edit_by_hdf5_is_refused_by_the_file_mode(tmp_path: Path) -> None:
    dataset = _write(tmp_path / "x.st", JPEG, "hdf5+zarr", _records(JPEG, 3))
    assert (dataset.path / dataset.manifest.shards[0].file).stat().st_mode & 0o777 == 0o444


def test_the_same_records_give_the_same_bytes(tmp_path: Path, primary: Field) -> None:
    ids = {_write(tmp_path / name, primary, "hdf5", _records(primary, 20)).manifest.id for name in ("a.st", "b.st")}
    assert len(ids) == 1


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    schema = Schema(fields={"x": JPEG}, primary="x")
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "x.st", schema) as writer:
        writer.write({"x": b"abc"})
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("container", ["hdf5+zarr", "zarr"])
@pytest.mark.parametrize("field", [VOLUME, VOLUME.model_copy(update={"codec": CODECS["zstd"]}), JPEG], ids=str)
def test_the_only_shard_has_a_zarr_index_of_its_size(tmp_path: Path, field: Field, container: Container) -> None:
    records = _records(field, 5)
    with Writer(
        tmp_path / "x.st", Schema(fields={"x": field, "label": LABEL, "box": BOX}), container=container
    ) as writer:
        for record in records:
            writer.write(record)
    assert verify(tmp_path / "x.st").problems == []
    array = zarr.open_array(tmp_path / "x.st/x", mode="r")
    assert array.shards == array.shape


@given(st.lists(st.integers(0, 300_000), max_size=60), st.integers(1, 400_000))
def test_every_record_is_in_exactly_one_shard(sizes: list[int], shard_bytes: int) -> None:
    schema = Schema(fields={"x": JPEG}).resolved({})
    plans, capacity = plan_shards(schema, len(sizes), {"x": np.array(sizes, np.int64)}, shard_bytes)
    assert [number for plan in plans for number in range(plan.first, plan.first + plan.records)] == list(
        range(len(sizes))
    )
    for plan in plans:
        used = sum(sizes[plan.first : plan.first + plan.records])
        assert used <= plan.payload_bytes["x"] <= capacity["x"]
        assert used <= shard_bytes or plan.records == 1
    assert not plans or capacity["x"] == max(plan.payload_bytes["x"] for plan in plans)


@given(st.integers(0, 1000), st.integers(1, 5000), st.integers(1, 20_000))
def test_tensor_shards_are_full_but_the_last(count: int, record_bytes: int, shard_bytes: int) -> None:
    schema = Schema(fields={"x": Field(kind="tensor", dtype="uint8", shape=(record_bytes,))}).resolved({})
    plans, capacity = plan_shards(schema, count, {}, shard_bytes)
    assert all(plan.records == capacity["x"] for plan in plans[:-1])
    assert sum(plan.records for plan in plans) == count
    assert len({plan.records for plan in plans[:-1]}) <= 1


def test_a_codec_that_the_container_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are adopted, not written"):
        Writer(tmp_path / "x.st", Schema(fields={"x": VOLUME}), container="foreign")
    with pytest.raises(UsageError, match="there is no container 'both': take hdf5"):
        Writer(tmp_path / "x.st", container="both")  # type: ignore[arg-type]
    schema = Schema(fields={"x": PRIMARIES["tensor, lz4"]}, primary="x")
    with pytest.raises(UsageError, match="Zarr has no codec lz4"):
        Writer(tmp_path / "x.st", schema, container="hdf5+zarr")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@given(
    dtype=st.sampled_from(["uint8", "int16", "float32", "complex64", "float64"]),
    count=st.integers(1, 40_000),
    spread=st.integers(1, 256),
    seed=st.integers(0, 9),
)
@settings(max_examples=25)
def test_every_record_survives_its_codec(codec: Codec, dtype: str, count: int, spread: int, seed: int) -> None:
    itemsize = np.dtype(dtype).itemsize
    record = np.random.default_rng(seed).integers(0, spread, count * itemsize, dtype=np.uint8)
    stored = codec.encode(record, itemsize)
    decoded = np.full_like(record, 7)
    codec.decode_into(np.frombuffer(stored, np.uint8), decoded)
    assert np.array_equal(decoded, record)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.integers(0, 10**6))
@settings(max_examples=200)
def test_a_damaged_chunk_never_writes_past_its_record(codec: Codec, position: int, value: int, cut: int) -> None:
    record = np.random.default_rng(0).integers(0, 9, 70_000, dtype=np.uint8)
    stored = np.frombuffer(codec.encode(record, 2), np.uint8).copy()
    stored[position % len(stored)] = value
    stored = stored[: len(stored) - cut % len(stored) // 2]
    by_library, by_kernel = (np.zeros(len(record) + 8192, np.uint8) for _ in range(2))
    is_decoded = True
    try:
        codec.decode_into(stored, by_library[4096:-4096])
    except ChecksumError:
        is_decoded = False
    # Of what is damaged in reserved bytes of a frame, the library and the kernel may think differently.
    is_decoded &= bool(decode_record(codec.kernel_number, stored, by_kernel[4096:-4096], WORK))
    for room in (by_library, by_kernel):
        assert not room[:4096].any()
        assert not room[-4096:].any()
    assert not is_decoded or np.array_equal(by_library, by_kernel)


@given(head=st.binary(max_size=40), body=st.binary(max_size=200), room=st.integers(0, 400))
@settings(max_examples=200)
def test_any_bytes_are_an_lz4_chunk_or_none(head: bytes, body: bytes, room: int) -> None:
    """Also with a head that fits the record, so that what follows is looked at."""
    for stored in (
        head + body,
        struct.pack(">QI", room, max(1, room // 3)) + body,
        struct.pack(">QI", room, 2**31) + body,
    ):
        rooms = np.zeros(room + 128, np.uint8), np.zeros(room + 128, np.uint8)
        is_decoded = True
        try:
            CODECS["lz4"].decode_into(np.frombuffer(stored, np.uint8), rooms[0][64:-64])
        except ChecksumError:
            is_decoded = False
        assert decode_record(LZ4, np.frombuffer(stored, np.uint8), rooms[1][64:-64], WORK) == is_decoded
        assert not any(around.any() for each in rooms for around in (each[:64], each[-64:]))
        assert not is_decoded or np.array_equal(*rooms)


@given(st.integers(1, 3_000_000))
def test_lz4_blocks_are_equal_and_small(record_bytes: int) -> None:
    block_bytes = lz4_block_bytes(record_bytes)
    assert record_bytes % block_bytes == 0
    assert block_bytes <= 65536 or block_bytes == record_bytes


def test_what_fills_one_shard_is_in_no_other_of_the_same_structure() -> None:
    small = (("x/crc32c", np.dtype(np.uint32), (3,)),)
    structure = Hdf5Structure("x/data", (5, 8), "uint8", small, (("field", "x"), ("stagein_version", (1, 0))), ())
    first, empty = create_skeleton(structure, 16), create_skeleton(structure, 16)
    assert first == empty
    first.fill({"x/crc32c": np.arange(1, 4, dtype=np.uint32)})
    first.fill_index(bytes(range(16)))
    assert first.head + first.tail != empty.head + empty.tail
    assert create_skeleton(structure, 16) == empty


@pytest.mark.parametrize("worthwhile_bytes", [0, 1 << 40], ids=["by kernels", "by Python"])
@pytest.mark.parametrize(
    ("payload_bytes", "offset", "tail_bytes", "chunk_bytes"),
    [
        (100_000, 4096, 70, 4096),
        (100_000, 4096 * 3, 70, 5000),
        (1 << 20, 0, 0, 65536),
        (3 << 20, 8192, 1004, 8 << 20),
        (1 << 20, 4096, (1 << 20) - 4096, 1 << 20),
        (0, 100, 0, 4096),
    ],
)
def test_a_payload_is_written_and_summed_in_any_pieces(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    payload_bytes: int,
    offset: int,
    tail_bytes: int,
    chunk_bytes: int,
    worthwhile_bytes: int,
) -> None:
    monkeypatch.setattr(payload_file, "_WORTHWHILE_BYTES", worthwhile_bytes)
    random = np.random.default_rng(0)
    records = [b"", *(random.bytes(size) for size in (70_000, 1, 0, 7) if size <= payload_bytes)]
    records += [random.bytes(payload_bytes - sum(map(len, records))), b""]
    head, tail, padding = random.bytes(offset), random.bytes(tail_bytes), bytes(9)
    expected = head + b"".join(records) + padding + tail
    with open(tmp_path / "x", "w+b", buffering=0) as file:
        payload = PayloadFile(file.fileno(), offset, payload_bytes, chunk_bytes)
        sums = []
        for pieces in ([records[0], b"".join(records[1:4])], records[4:], [padding]):
            count = {2: 4, 1: 0}.get(len(pieces), len(records) - 4)
            sizes = np.array([len(record) for record in records[len(sums) : len(sums) + count]], np.uint32)
            sums += payload.append(pieces, sizes).tolist()
        chunks = payload.finish(head, tail)
        payload.close()
    assert (tmp_path / "x").read_bytes() == expected
    assert sums == [crc32c(record) for record in records]
    assert chunks == b"".join(chunk_sums([expected], chunk_bytes))


@pytest.mark.parametrize("worthwhile_bytes", [0, 1 << 40], ids=["by kernels", "by Python"])
def test_a_payload_that_finds_no_space_says_so(monkeypatch: pytest.MonkeyPatch, worthwhile_bytes: int) -> None:
    monkeypatch.setattr(payload_file, "_WORTHWHILE_BYTES", worthwhile_bytes)
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        PayloadFile(full.fileno(), 0, 4096, 4096).append([bytes(4096)], np.array([4096], np.uint32))


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("count", [0, 7, 5000])
def test_records_are_summed_by_a_kernel_and_while_that_is_compiled(
    monkeypatch: pytest.MonkeyPatch, count: int, is_compiled: bool
) -> None:
    monkeypatch.setattr(NativeKernel, "is_awaited", lambda *arguments: not is_compiled)
    random = np.random.default_rng(0)
    records = [random.bytes(size) for size in random.integers(0, 40, count).tolist()]
    pieces = [b"".join(records[:6]), b"".join(records[6:])]
    sums = record_sums(pieces, np.array([len(record) for record in records], np.uint32))
    assert sums.tolist() == [crc32c(record) for record in records]


@pytest.mark.parametrize("codec", [None, "blosc-lz4"])
def test_a_disk_that_is_full_at_any_point_of_a_shard_is_said_once(
    tmp_path: Path, codec: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """HDF5 itself would tell of some of these as a RuntimeError, and write tracebacks when its objects are freed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    outcomes = []
    for room in range(4096, 128 << 10, 4096):
        with small_disk(disk, room):
            try:
                with Writer(disk / "x.st", codec=codec, shard_bytes=20_000) as writer:
                    for number in range(20):
                        writer.write({"x": np.full((16, 24), number, np.int16), "label": number})
                outcomes.append("written")
            except NoSpaceError:
                outcomes.append("no space")
    gc.collect()
    assert outcomes == sorted(outcomes)
    assert {"no space", "written"} == set(outcomes)
    assert capfd.readouterr().err == ""
