"""Sources that can only be read in large pieces: each piece is read once for a shard, in whatever order its records are wanted."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lookalikes import read_source
from test_source_tfrecord import bytes_list, example, write

from stagein.formats.source import PiecewiseSource, RefusedRecord, Source
from stagein.formats.sources.hdf5 import scan_hdf5
from stagein.formats.sources.parquet import scan_parquet
from stagein.formats.sources.selection import select
from stagein.formats.sources.tfrecord import scan_tfrecord

COUNT, FILES = 60, 3
ROWS = np.random.default_rng(0).integers(0, 1 << 16, (COUNT * FILES, 2000), np.uint16)
"""Noise: as many bytes on disk as in memory."""
BAD = 77


def gzip_tfrecords(root: Path) -> Source:
    for file in range(FILES):
        rows = ROWS[file * COUNT : (file + 1) * COUNT]
        path = write(root / f"{file}.tfrecord", [example({"x": bytes_list(row.tobytes())}) for row in rows])
        content = bytearray(path.read_bytes())
        if file == BAD // COUNT:
            content[content.index(ROWS[BAD].tobytes()) + 9] ^= 1
        path.with_suffix(".tfrecord.gz").write_bytes(gzip.compress(content, 1))
        path.unlink()
    return scan_tfrecord(root, fields={"x": "x:uint16:2000"})


def parquet(root: Path) -> Source:
    for file in range(FILES):
        rows = [None if n == BAD else ROWS[n].tolist() for n in range(file * COUNT, (file + 1) * COUNT)]
        table = pa.table({"x": pa.array(rows, pa.list_(pa.uint16(), 2000))})
        pq.write_table(table, root / f"{file}.parquet", row_group_size=20, compression="gzip")
    return scan_parquet(root)


def hdf5_chunks(root: Path) -> Source:
    with h5py.File(root / "x.h5", "w") as file:
        file.create_dataset("data", data=ROWS, chunks=(20, 2000), compression="gzip")
    return scan_hdf5(root / "x.h5", fields={"x": "data"})


SOURCES: dict[str, Callable[[Path], Source]] = {
    "gzip TFRecord": gzip_tfrecords,
    "Parquet": parquet,
    "HDF5, chunks of rows": hdf5_chunks,
}


def bytes_read() -> int:
    """By all read calls of this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("kind", SOURCES)
def test_a_shuffled_shard_reads_each_piece_once(tmp_path: Path, kind: str) -> None:
    source = SOURCES[kind](tmp_path)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    shuffled: Any = select(source, shuffle_seed=3)
    read_source(source, 0, 1)  # whatever is imported when a record is first read
    before = bytes_read()
    records = read_source(shuffled)
    assert total / 2 < bytes_read() - before < 1.5 * total
    for number, record in zip(shuffled.numbers.tolist(), records, strict=True):
        if number == BAD and kind != "HDF5, chunks of rows":
            assert isinstance(record, RefusedRecord)
        else:
            assert isinstance(record, dict)
            assert np.array_equal(record["x"], ROWS[number])
    assert isinstance(source, PiecewiseSource)
    assert source.costly_order


def test_what_lies_by_itself_is_read_in_any_order_without_a_copy(tmp_path: Path) -> None:
    plain = scan_tfrecord(
        write(tmp_path / "x.tfrecord", [example({"x": bytes_list(row.tobytes())}) for row in ROWS[:7]]),
        fields={"x": "x:uint16:2000"},
    )
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("data", data=ROWS[:7], chunks=(1, 2000))
    for source in (plain, scan_hdf5(tmp_path / "x.h5")):
        room = bytearray(ROWS[0].nbytes)
        records = source.part(np.array([5, 2, 6])).read(lambda name, nbytes, room=room: memoryview(room))  # type: ignore[misc]
        for number in (5, 2, 6):
            assert not isinstance(next(records), RefusedRecord)
            assert bytes(room) == ROWS[number].tobytes()
        assert not source.costly_order
