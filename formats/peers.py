"""Other formats, to measure ours against: the same records, written and read by their own libraries, as far as those are installed.

Each peer writes records of bytes to a folder, and opens it for reading: a function that takes record numbers and returns the
bytes of all of them together, once it holds them all: a record that is dropped before the next one is read never leaves the
cache, and is no batch. WebDataset and TFRecord have no random access: theirs gives the next so many records instead.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Read = Callable[[NDArray[np.int64]], int]


@dataclass(frozen=True)
class Peer:
    """`write` raises ImportError where the library is missing; `open_reader` is called once a thread."""

    name: str
    write: Callable[[Path, Sequence[bytes]], None]
    open_reader: Callable[[Path], Read]


def _write_mds(folder: Path, records: Sequence[bytes]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"x": "bytes"}, size_limit=1 << 28) as writer:
        for record in records:
            writer.write({"x": record})


def _open_mds(folder: Path) -> Read:
    from streaming import LocalDataset

    dataset: Any = LocalDataset(local=str(folder))
    return lambda numbers: _total_bytes([dataset[number]["x"] for number in numbers.tolist()])


def _write_litdata(folder: Path, records: Sequence[bytes]) -> None:
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer: Any = BinaryWriter(str(folder), chunk_bytes="256MB")
    for number, record in enumerate(records):
        writer[number] = record
    writer.done()
    writer.merge(1)


def _open_litdata(folder: Path) -> Read:
    from litdata import StreamingDataset

    dataset: Any = StreamingDataset(str(folder))
    return lambda numbers: _total_bytes(
        [bytes(dataset[number]) for number in numbers.tolist()]
    )  # views of a map: not read yet


def _write_array_record(folder: Path, records: Sequence[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir()
    writer: Any = ArrayRecordWriter(str(folder / "x.array_record"), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()


def _open_array_record(folder: Path) -> Read:
    from array_record.python.array_record_module import ArrayRecordReader

    reader: Any = ArrayRecordReader(
        str(folder / "x.array_record"), "readahead_buffer_size:0,index_storage_option:in_memory"
    )
    return lambda numbers: _total_bytes(reader.read(numbers.tolist()))


def _write_webdataset(folder: Path, records: Sequence[bytes]) -> None:
    from webdataset import TarWriter

    folder.mkdir()
    writer: Any = TarWriter(str(folder / "x.tar"))
    for number, record in enumerate(records):
        writer.write({"__key__": f"{number:08d}", "x": record})
    writer.close()


def _open_webdataset(folder: Path) -> Read:
    from webdataset import WebDataset

    def epoch() -> Iterator[bytes]:
        dataset: Any = WebDataset(str(folder / "x.tar"), shardshuffle=False)
        return (sample["x"] for sample in dataset)

    return _in_order(epoch)


def _write_tfrecord(folder: Path, records: Sequence[bytes]) -> None:
    from tfrecord.writer import TFRecordWriter

    folder.mkdir()
    writer: Any = TFRecordWriter(str(folder / "x.tfrecord"))
    for record in records:
        writer.write({"x": (record, "byte")})
    writer.close()


def _open_tfrecord(folder: Path) -> Read:
    from tfrecord.reader import tfrecord_loader

    def epoch() -> Iterator[Any]:
        return (sample["x"] for sample in tfrecord_loader(str(folder / "x.tfrecord"), None, {"x": "byte"}))

    return _in_order(epoch)


def _in_order(epoch: Callable[[], Iterator[Any]]) -> Read:
    records = itertools.chain.from_iterable(epoch() for _ in itertools.count())
    return lambda numbers: _total_bytes(list(itertools.islice(records, len(numbers))))


def _total_bytes(records: Sequence[Any]) -> int:
    return sum(map(len, records))


def _write_h5py(folder: Path, records: Sequence[bytes]) -> None:
    import h5py

    folder.mkdir()
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("x", data=_rows(records))


def _open_h5py(folder: Path) -> Read:
    import h5py

    dataset = h5py.File(folder / "x.h5", "r")["x"]
    out = np.empty((0, *dataset.shape[1:]), np.uint8)

    def read(numbers: NDArray[np.int64]) -> int:
        nonlocal out
        if len(out) < len(numbers):
            out = np.zeros((len(numbers), *dataset.shape[1:]), np.uint8)
        for row, number in enumerate(numbers.tolist()):
            dataset.read_direct(out, np.s_[number], np.s_[row])
        return int(out[: len(numbers)].nbytes)

    return read


def _write_zarr(folder: Path, records: Sequence[bytes]) -> None:
    import zarr

    rows = _rows(records)
    array = zarr.create_array(
        folder,
        shape=rows.shape,
        dtype="uint8",
        chunks=(1, rows.shape[1]),
        shards=rows.shape,
        compressors=None,
        filters=None,
    )
    array[:] = rows


def _open_zarr(folder: Path) -> Read:
    import zarr

    array: Any = zarr.open_array(folder, mode="r")
    return lambda numbers: _total_bytes([array[number] for number in numbers.tolist()])


def _open_tensorstore(folder: Path) -> Read:
    import tensorstore

    array: Any = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{folder}/"}).result()
    return lambda numbers: int(array[numbers].read().result().nbytes)


def _write_tensorstore(folder: Path, records: Sequence[bytes]) -> None:
    import tensorstore  # noqa: F401 (it reads what zarr-python wrote)

    _write_zarr(folder, records)


def _rows(records: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)


PEERS = (
    Peer("mosaicml-streaming", _write_mds, _open_mds),
    Peer("array_record", _write_array_record, _open_array_record),
    Peer("litdata", _write_litdata, _open_litdata),
    Peer("webdataset, in order", _write_webdataset, _open_webdataset),
    Peer("tfrecord, in order", _write_tfrecord, _open_tfrecord),
    Peer("h5py", _write_h5py, _open_h5py),
    Peer("zarr-python", _write_zarr, _open_zarr),
    Peer("tensorstore", _write_tensorstore, _open_tensorstore),
)
"""All records of a data set have the same size."""
