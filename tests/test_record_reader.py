"""Reading many records by one native call: where the bytes end up, what a damaged or failing file leads to, few descriptors."""

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stagein.formats import Dataset, Field, RecordIndex, Schema, Writer, native_code, record_reader
from stagein.formats.checksums import crc32c
from stagein.formats.codecs import Codec, CodecName
from stagein.formats.errors import ChecksumError, SourceError, UsageError
from stagein.formats.native_code import NativeKernel
from stagein.formats.record_reader import RecordReader

BYTES = Field(kind="encoded", dtype="uint8", shape=(None,), encoding="bytes")
SIZES = [0, 1, 3000, 5, 700_000, 262_144, 0, 40_000]
"""Nothing, little, more than is read at a time, exactly that much."""


@pytest.fixture
def records(tmp_path: Path) -> list[bytes]:
    """Contents of records that lie back to back in the files `a` and `b`, alternately four each."""
    rng = np.random.default_rng(0)
    contents = [rng.bytes(nbytes) for nbytes in SIZES]
    (tmp_path / "a").write_bytes(b"".join(contents[:4]))
    (tmp_path / "b").write_bytes(b"head" + b"".join(contents[4:]))
    return contents


@pytest.fixture(params=["kernel", "kernel being compiled"])
def compilation(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are read by a kernel, or without one."""
    if request.param == "kernel":
        monkeypatch.setattr(NativeKernel, "is_awaited", lambda *arguments: False)
        return
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(native_code, "cache_folder", lambda: tmp_path / "cache")
    for name in ("read_records", "read_and_decode"):
        monkeypatch.setattr(record_reader, f"_{name}", NativeKernel("stagein.formats.read_kernels", name))


@pytest.fixture
def reader(tmp_path: Path, records: list[bytes], compilation: None) -> RecordReader:
    sizes = np.array(SIZES, np.uint64)
    offset = np.concatenate([np.cumsum(sizes[:4]) - sizes[:4], 4 + np.cumsum(sizes[4:]) - sizes[4:]])
    sums = np.array([crc32c(content) for content in records], np.uint32)
    index = RecordIndex(np.repeat(np.arange(2, dtype=np.uint32), 4), offset, sizes.astype(np.uint32), sums)
    return RecordReader(BYTES, index, [tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("order", [[], [4], [0, 1, 2, 3, 4, 5, 6, 7], [7, 2, 2, 4, 0, 5, 6, 3]], ids=str)
def test_records_lie_one_after_the_other(reader: RecordReader, records: list[bytes], order: list[int]) -> None:
    packed = reader.read_packed(order)
    assert [view.tobytes() for view in packed] == [records[number] for number in order]
    assert packed.buffer.tobytes() == b"".join(records[number] for number in order)
    assert [packed[row].tobytes() for row in range(len(packed))] == [view.tobytes() for view in packed[:]]


def test_a_larger_buffer_keeps_its_rest_and_a_smaller_one_is_refused(
    reader: RecordReader, records: list[bytes]
) -> None:
    buffer = bytearray(b"\xaa" * 3010)
    reader.read_records([2, 3], memoryview(buffer))
    assert buffer == records[2] + records[3] + b"\xaa" * 5
    with pytest.raises(UsageError, match="3004 bytes cannot take records of 3005"):
        reader.read_records([2, 3], memoryview(buffer)[:3004])


def test_what_is_not_in_memory_is_fetched_from_the_disk(
    tmp_path: Path, reader: RecordReader, records: list[bytes]
) -> None:
    for name in "ab":
        with open(tmp_path / name, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert [view.tobytes() for view in reader.read_packed([5, 4, 2, 7])] == [records[n] for n in (5, 4, 2, 7)]


def _read_ranges(
    reader: RecordReader, records: list[bytes], wanted: list[tuple[int, int, int]], wrong_sum: int | None = None
) -> bytes:
    """Ranges (record, start, nbytes) of records, with their sums; that of entry `wrong_sum` is not right."""
    numbers, start, nbytes = (np.array(each, np.int64) for each in zip(*wanted, strict=True))
    before = np.array([crc32c(records[n][:first]) for n, first, _ in wanted], np.uint32)
    after = np.array([crc32c(records[n][: first + size]) for n, first, size in wanted], np.uint32)
    if wrong_sum is not None:
        after[wrong_sum] ^= 1
    buffer = np.zeros(int(np.maximum(nbytes, 0).sum()), np.uint8)
    reader.read_ranges(numbers, start, nbytes, before, after, buffer)
    return buffer.tobytes()


RANGES = [(4, 0, 600), (4, 600, 70), (4, 600_000, 100_000), (7, 39_999, 1), (2, 10, 0), (6, 0, 0), (4, 100, 650_000)]


def test_ranges_of_records(reader: RecordReader, records: list[bytes]) -> None:
    assert _read_ranges(reader, records, RANGES) == b"".join(records[n][at : at + size] for n, at, size in RANGES)
    for start, nbytes in ((-1, 2), (0, 40_001), (40_000, 1), (1, -1)):
        with pytest.raises(UsageError, match=r"not all in record 7 in .*/b"):
            _read_ranges(reader, records, [(4, 0, 1), (7, start, nbytes)])


@pytest.mark.parametrize("entry", [0, 1, 2, 3, 6])
def test_a_range_that_is_not_what_its_table_says(reader: RecordReader, records: list[bytes], entry: int) -> None:
    with pytest.raises(ChecksumError, match="is whole, but the crc32c of a part of it is not that of its row table"):
        _read_ranges(reader, records, RANGES, wrong_sum=entry)


def test_damage_in_a_range(tmp_path: Path, reader: RecordReader, records: list[bytes]) -> None:
    content = bytearray((tmp_path / "b").read_bytes())
    content[4 + 600_050] ^= 1
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(ChecksumError, match=r"record 4 in .*/b is damaged"):
        _read_ranges(reader, records, RANGES)
    assert _read_ranges(reader, records, RANGES[:2]) == records[4][:670]


@pytest.mark.parametrize("order", [[2], [1, 2, 3], [4, 2, 5]], ids=str)
def test_a_flipped_bit_is_found_whether_read_alone_or_with_neighbours(
    tmp_path: Path, reader: RecordReader, order: list[int]
) -> None:
    content = bytearray((tmp_path / "a").read_bytes())
    content[1500] ^= 4
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ChecksumError, match=r"record 2 in .*/a is damaged: its crc32c is \w{8}, the index says"):
        reader.read_packed(order)
    assert len(reader.read_packed(order, check=False)) == len(order)


@pytest.mark.parametrize("order", [[2, 0], [0, 1, 2, 3]], ids=str)
def test_a_shard_cut_short(tmp_path: Path, reader: RecordReader, order: list[int]) -> None:
    os.truncate(tmp_path / "a", 2000)
    with pytest.raises(SourceError, match=r"in .*/a is cut off"):
        reader.read_packed(order)


def test_nothing_is_read_after_close(reader: RecordReader) -> None:
    reader.read_packed([1, 5])
    reader.close()
    with pytest.raises(SourceError, match="its data set was closed"):
        reader.read_packed([1])


def test_what_cannot_be_read_names_record_and_reason(tmp_path: Path, reader: RecordReader) -> None:
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(SourceError, match=r"record 2 in .*/a cannot be read: Is a directory"):
        reader.read_packed([5, 2])


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
MAP_FIXED = 0x10
FREE_ADDRESS = 0x1000_0000_0000
"""Far from where the system places anything by itself."""


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RecordReader, Callable[[], None]]]:
    """A reader of a file whose reads fail with EIO until the function is called: memory of this process, not there yet."""
    monkeypatch.setattr(record_reader, "RETRY_PAUSES_SECONDS", (0.01, 0.1, 0.5, 2))
    (tmp_path / "memory").symlink_to("/proc/self/mem")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

    def appear() -> None:
        LIBC.mmap(FREE_ADDRESS, 4096, mmap.PROT_READ | mmap.PROT_WRITE, flags | MAP_FIXED, -1, 0)

    sizes, sums = np.array([64], np.uint32), np.array([crc32c(bytes(64))], np.uint32)
    index = RecordIndex(np.zeros(1, np.uint32), np.array([FREE_ADDRESS], np.uint64), sizes, sums)
    yield RecordReader(BYTES, index, [tmp_path / "memory"]), appear
    LIBC.munmap(ctypes.c_void_p(FREE_ADDRESS), ctypes.c_size_t(4096))


def test_reads_that_fail_for_a_while_are_tried_again(failing: tuple[RecordReader, Callable[[], None]]) -> None:
    reader, appear = failing
    later = threading.Timer(0.3, appear)
    later.start()
    started = time.monotonic()
    (record,) = reader.read_packed([0])
    assert record.tobytes() == bytes(64)
    assert time.monotonic() - started > 0.2
    later.join()


def test_reads_that_fail_for_long_are_an_error(
    failing: tuple[RecordReader, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_reader, "RETRY_PAUSES_SECONDS", (0.01, 0.01))
    with pytest.raises(SourceError, match=r"record 0 in .*/memory cannot be read: Input/output error"):
        failing[0].read_packed([0])


def _write_counts(target: Path, codec: CodecName | None, count: int = 11) -> NDArray[np.float32]:
    counts = np.random.default_rng(1).poisson(3, (count, 5, 40, 40)).astype(np.float32)
    field = Field(kind="tensor", dtype="float32", shape=(5, 40, 40), codec=Codec(name=codec) if codec else None)
    with Writer(target, Schema(fields={"x": field}, primary="x"), container="hdf5", shard_bytes=100_000) as writer:
        for row in counts:
            writer.write({"x": row})
    return counts


@pytest.mark.parametrize("codec", [None, "blosc-lz4", "zstd", "lz4"])
def test_threads_decode_into_the_callers_rows(tmp_path: Path, compilation: None, codec: CodecName | None) -> None:
    counts = _write_counts(tmp_path / "x.st", codec)
    reader = Dataset(tmp_path / "x.st").reader
    order = [10, 3, 3, 0, 7, 9, 1]
    for threads in (1, 2, 3, 20):
        out = np.full((9, 5, 40, 40), np.nan, np.float32)
        reader.read_tensors(order, out[1:8], threads=threads)
        assert np.array_equal(out[1:8], counts[order])
        assert np.isnan(out[[0, 8]]).all()
    assert reader.read_tensors([], threads=2).shape == (0, 5, 40, 40)
    for unfit in (np.empty((6, 5, 40, 40), np.float32), np.empty((5, 40, 40, 7), np.float32).T):
        with pytest.raises(UsageError, match="7 records of 32000 bytes need an array in C order"):
            reader.read_tensors(order, unfit)


@pytest.mark.parametrize("codec", ["blosc-lz4", "zstd", "lz4"])
@pytest.mark.parametrize("fault", ["garbage", "short", "other size", "longer"])
def test_a_record_that_its_codec_did_not_make(tmp_path: Path, compilation: None, codec: CodecName, fault: str) -> None:
    """Its crc32c is right, so that only decoding can tell."""
    _write_counts(tmp_path / "x.st", codec)
    reader = Dataset(tmp_path / "x.st").reader
    (stored,) = reader.read_packed([4])
    (longer,) = reader.read_packed([4])
    content = {
        "garbage": np.random.default_rng(2).bytes(len(stored)),
        "short": stored[: len(stored) // 2].tobytes(),
        "other size": bytes(Codec(name=codec).encode(np.zeros(32_004, np.uint8), 4)),
        "longer": longer.tobytes() + b"\0\0\0",
    }[fault]
    (tmp_path / "bad").write_bytes(content)
    sums, sizes = np.array([crc32c(content)], np.uint32), np.array([len(content)], np.uint32)
    bad = RecordIndex(np.zeros(1, np.uint32), np.zeros(1, np.uint64), sizes, sums)
    with pytest.raises(ChecksumError, match=r"record 0 in .*/bad.* is damaged"):
        RecordReader(reader.field, bad, [tmp_path / "bad"]).read_tensors([0], threads=2)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_threads_without_a_record_of_their_own_help_with_that_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    """Three records of some blocks each for two threads, again and again: each time other blocks are left to be shared."""
    monkeypatch.setattr(NativeKernel, "is_awaited", lambda *arguments: False)
    counts = np.random.default_rng(0).poisson(3, (3, 1 << 20)).astype(np.float32)
    frames = [bytearray(Codec(name="blosc-lz4").encode(row, 4)) for row in counts]
    assert int.from_bytes(frames[0][8:12], "little") <= counts[0].nbytes // 8
    if is_damaged:
        frames[2][16 + 4 * 7 : 16 + 4 * 8] = len(frames[2]).to_bytes(4, "little")  # where its last block starts
    (tmp_path / "x").write_bytes(b"".join(frames))
    sizes, sums = np.array([len(frame) for frame in frames], np.uint32), np.array(list(map(crc32c, frames)), np.uint32)
    index = RecordIndex(np.zeros(3, np.uint32), np.cumsum(sizes, dtype=np.uint64) - sizes, sizes, sums)
    field = Field(kind="tensor", dtype="float32", shape=counts.shape[1:], codec=Codec(name="blosc-lz4"))
    reader, out = RecordReader(field, index, [tmp_path / "x"]), np.empty_like(counts)
    for _ in range(60):
        out[:] = np.nan
        if is_damaged:
            with pytest.raises(ChecksumError, match=r"record 2 in .* (is damaged|cannot be decoded)"):
                reader.read_tensors([0, 1, 2], out, threads=2)
        else:
            reader.read_tensors([0, 1, 2], out, threads=2)
            assert np.array_equal(out, counts)


def test_batches_over_more_shards_than_descriptors(tmp_path: Path) -> None:
    """Eight threads, four descriptors, batches that need ten shards: none waits for ever, none reads from another's file, no map
    outlives its descriptor."""
    counts = _write_counts(tmp_path / "x.st", None, 40)
    np.save(tmp_path / "counts.npy", counts)
    script = (
        "import resource, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "import numpy as np\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (260, 260))\n"
        "from stagein.formats import Dataset\n"
        "dataset, counts = Dataset(sys.argv[1]), np.load(sys.argv[2])\n"
        "assert len(dataset.manifest.shards) >= 10\n"
        "def read(seed):\n"
        "    order = np.random.default_rng(seed).permutation(40)\n"
        "    assert np.array_equal(dataset.read_tensors(order), counts[order])\n"
        "    return np.count_nonzero(dataset.reader._files._descriptors >= 0)\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    assert max(pool.map(read, range(200))) <= 4\n"
        "def count_maps():\n"
        "    return open('/proc/self/maps').read().count('/x.st/shards/')\n"
        "assert 0 < count_maps() <= 4\n"
        "dataset.close()\n"
        "assert count_maps() == 0\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "x.st", tmp_path / "counts.npy"]
    subprocess.run(command, check=True, timeout=60)


def test_the_index_is_mapped_not_copied(jpeg_dataset: Dataset) -> None:
    for array in (jpeg_dataset.index.shard, jpeg_dataset.index.offset, jpeg_dataset.index.nbytes):
        base: object = array
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
    assert not jpeg_dataset.index.offset.flags.writeable
    assert replace(jpeg_dataset.index).offset is jpeg_dataset.index.offset
