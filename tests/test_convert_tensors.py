"""Conversion of tensor records: dealt to shards by count, compressed by the codec asked for or the one that pays."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stagein.formats import Dataset, Field, Schema, convert, verify
from stagein.formats.codecs import Codec
from stagein.formats.conversion import choose_codecs
from stagein.formats.errors import UsageError
from stagein.formats.source import RefusedRecord, Room, SourceRecord


@dataclass(frozen=True)
class ArrayPart:
    values: NDArray[np.generic]
    numbers: NDArray[np.int64]

    def mark(self) -> object:
        return self.numbers.tolist(), self.values.tobytes().hex()

    def read(self, room: Room) -> Iterator[SourceRecord | RefusedRecord]:
        for number, value in zip(self.numbers, self.values, strict=True):
            room("x", value.nbytes)[:] = value.tobytes()
            yield SourceRecord({"y": number})


@dataclass(frozen=True)
class ArraySource:
    """An array in memory as a source: one row a record."""

    values: NDArray[np.generic]
    kind: str = "array"
    name: str = "memory"
    refused: tuple[RefusedRecord, ...] = ()
    secondary_nbytes: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def schema(self) -> Schema:
        x = Field(kind="tensor", dtype=self.values.dtype.name, shape=self.values.shape[1:])
        return Schema(fields={"x": x, "y": Field(kind="tensor", dtype="int64")}, primary="x")

    @property
    def nbytes(self) -> NDArray[np.int64]:
        return np.full(len(self.values), self.values[0].nbytes if len(self.values) else 0, np.int64)

    def identity(self) -> object:
        return len(self.values)

    def part(self, numbers: NDArray[np.int64]) -> ArrayPart:
        return ArrayPart(self.values[numbers], numbers)


@pytest.fixture
def counts() -> NDArray[np.int16]:
    """Particle counts, as CosmoFlow's: small integers, which compress well."""
    return np.random.default_rng(0).poisson(1, (23, 12, 12, 12)).astype(np.int16)


@pytest.mark.parametrize("codec", [None, "auto", Codec(name="zstd")], ids=["none", "auto", "zstd"])
@pytest.mark.parametrize("workers", [1, 2])
def test_rows_come_back(counts: NDArray[np.int16], tmp_path: Path, codec, workers: int) -> None:
    converted = convert(ArraySource(counts), tmp_path / "x.st", codec=codec, shard_bytes=20_000, workers=workers)
    assert len(converted.manifest.shards) == 5
    dataset = Dataset(tmp_path / "x.st")
    assert np.array_equal(dataset.read_tensors(range(23)), counts)
    assert np.array_equal(dataset.columns["y"], np.arange(23))
    assert verify(tmp_path / "x.st").problems == []
    assert (converted.manifest.nbytes < counts.nbytes) == (codec is not None)


def test_the_codec_that_pays_is_chosen(counts: NDArray[np.int16]) -> None:
    chosen = choose_codecs(ArraySource(counts), ["x"])["x"]
    assert chosen is not None
    assert chosen.name == "blosc-lz4"
    noise = np.random.default_rng(0).integers(-(2**15), 2**15, (7, 5000)).astype(np.int16)
    assert choose_codecs(ArraySource(noise), ["x"]) == {"x": None}
    assert choose_codecs(ArraySource(counts[:0]), ["x"]) == {"x": None}


def test_a_source_without_records_is_a_data_set_without_shards(counts: NDArray[np.int16], tmp_path: Path) -> None:
    convert(ArraySource(counts[:0]), tmp_path / "x.st", codec="auto")
    assert len(Dataset(tmp_path / "x.st")) == 0
    assert verify(tmp_path / "x.st").problems == []


def test_nothing_is_left_where_the_codec_does_not_fit_the_container(counts: NDArray[np.int16], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Zarr has no codec lz4"):
        convert(ArraySource(counts), tmp_path / "x.st", codec=Codec(name="lz4"))
    assert list(tmp_path.iterdir()) == []
    convert(ArraySource(counts), tmp_path / "x.st", codec=Codec(name="lz4"), container="hdf5")
    assert np.array_equal(Dataset(tmp_path / "x.st").read_tensors([5, 2]), counts[[5, 2]])
