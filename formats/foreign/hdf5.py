"""HDF5 files of others: data sets of one row a record, or of one record a file; contiguous, or one record a chunk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401 (registers the filters that columns may have)
import numpy as np
from numpy.typing import NDArray

from stagein.formats.codecs import Codec
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.schema import Field

from .layout import ForeignRecords, ForeignShard, foreign_part, large_names, primary_name, refuse, tensor_field

_BLOSC = 32001
_CODECS = {_BLOSC: Codec(name="blosc-lz4"), 32015: Codec(name="zstd"), 32004: Codec(name="lz4")}
_BLOSC_COMPRESSOR, _SNAPPY = 6, 3
"""Which parameter of the filter is the compressor within Blosc, and the one that our library of Blosc is built without."""


def scan_foreign_hdf5(
    paths: Sequence[Path],
    fields: Mapping[str, str] | None = None,
    primary: str | None = None,
    *,
    file_per_record: bool = False,
) -> ForeignRecords:
    """What lies in HDF5 files of one layout; every file becomes a shard.

    fields   names of fields and the data sets that they are; by default every data set, by the last part of its path.
    primary  the field that fills the shards; by default the largest.
    file_per_record  a file is a record, and its data sets are the record's fields; else every row of them is one.

    Large fields are read where they lie, the others copied. Raises UsageError for a layout that cannot be adopted, SourceError
    for a file that cannot be read.
    """
    parts = [_scan(path, fields, primary, file_per_record) for path in paths]
    first = parts[0]
    for path, part in zip(paths, parts, strict=True):
        if (list(part.large.items()), part.columns) != (list(first.large.items()), first.columns):
            raise UsageError(f"{path} has other fields than {paths[0]}: adopt files of one layout")
    return ForeignRecords("hdf5", first.large, first.columns, tuple(part.shards[0] for part in parts))


def _scan(path: Path, fields: Mapping[str, str] | None, primary: str | None, file_per_record: bool) -> ForeignRecords:
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _scan_open(path, file, fields, primary, file_per_record)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # the library raises any of them
        raise SourceError(f"{path} cannot be read as HDF5: {str(error).splitlines()[0]}") from None


def _scan_open(
    path: Path, file: h5py.File, fields: Mapping[str, str] | None, primary: str | None, file_per_record: bool
) -> ForeignRecords:
    places = fields or _all_datasets(path, file, file_per_record)
    found = {name: _dataset(path, file, place, file_per_record) for name, place in places.items()}
    if not file_per_record:
        rows = {name: len(dataset) for name, dataset in found.items()}
        if len(set(rows.values())) != 1:
            raise UsageError(
                f"{path} has data sets of different lengths, {rows}: name those of one row a record with --field, or say "
                "--file-per-record where a file is one"
            )
    declared = {}
    for name, dataset in found.items():
        what, shape = f"{path}:{dataset.name}", dataset.shape if file_per_record else dataset.shape[1:]
        if dataset.dtype.byteorder == ">":
            refuse(what, "is big-endian")
        declared[name] = tensor_field(what, dataset.dtype.name, shape)
    large = large_names(declared, primary_name(path, declared, primary))
    file_bytes = path.stat().st_size
    parts, with_codecs = {}, {}
    for name in large:
        if found[name].file != file:
            refuse(f"{path}:{places[name]}", "is a link into another file")
        codec, where = _places(f"{path}:{found[name].name}", found[name], declared[name], file_per_record)
        parts[name] = foreign_part(path, where, file_bytes)
        with_codecs[name] = declared[name].model_copy(update={"codec": codec})
    columns = {name: field for name, field in declared.items() if name not in large}
    values = {name: np.asarray(found[name][()]) for name in columns}
    content = {name: array[None] if file_per_record else array for name, array in values.items()}
    return ForeignRecords("hdf5", with_codecs, columns, (ForeignShard(parts, content),))


def _all_datasets(path: Path, file: h5py.File, file_per_record: bool) -> dict[str, str]:
    places: dict[str, str] = {}

    def note(place: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and (item.ndim or file_per_record):
            name = place.rpartition("/")[2]
            if not name.isidentifier() or name in places:
                raise UsageError(f"{path}:{place} gives no name of its own to a field: name the fields with --field")
            places[name] = place

    file.visititems(note)
    if not places:
        raise UsageError(f"{path} holds no data set of one row a record")
    return places


def _dataset(path: Path, file: h5py.File, place: str, file_per_record: bool) -> h5py.Dataset:
    dataset = file.get(place)
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or (dataset.ndim == 0 and not file_per_record):
        raise UsageError(f"{path} has no data set {place!r} of one row a record: see `h5ls -r {path}`")
    return dataset


def _places(
    what: str, dataset: h5py.Dataset, field: Field, file_per_record: bool
) -> tuple[Codec | None, NDArray[np.uint64]]:
    """Codec of the records, and [records, 2]: where each lies in the file, and how long it is there, in bytes."""
    count, record_bytes = 1 if file_per_record else len(dataset), field.record_bytes
    if record_bytes == 0 or count == 0:
        refuse(what, "has no bytes")
    if dataset.is_virtual or dataset.external:
        refuse(what, "lies in other files")
    if dataset.chunks is None:
        offset = dataset.id.get_offset()  # from the start of the file, a user block included
        if offset is None:
            refuse(what, "is stored within its header, or not written at all")
        starts = np.uint64(offset) + np.arange(count, dtype=np.uint64) * np.uint64(record_bytes)
        return None, np.stack([starts, np.full(count, record_bytes, np.uint64)], axis=1)
    if dataset.chunks != (dataset.shape if file_per_record else (1, *dataset.shape[1:])):
        refuse(what, f"has chunks of shape {dataset.chunks}, not of one record each")
    codec = _codec(what, dataset)
    places, masks = np.zeros((count, 2), np.uint64), np.zeros(count, np.uint32)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        record = 0 if file_per_record else chunk.chunk_offset[0]
        places[record], masks[record] = (chunk.byte_offset, chunk.size), chunk.filter_mask

    dataset.id.chunk_iter(note)  # get_chunk_info(i) walks the whole index for every i
    if (places[:, 1] == 0).any():
        refuse(what, f"has no chunk for record {int(np.argmin(places[:, 1]))}, only its fill value")
    if masks.all():  # none would have got smaller
        codec = None
    elif masks.any():
        refuse(what, f"has some chunks without its filter, of record {int(np.argmax(masks))} the first")
    if codec is None and (places[:, 1] != record_bytes).any():
        raise SourceError(f"{what} has chunks of other sizes than {record_bytes} bytes: restore it from a good copy")
    return codec, places


def _codec(what: str, dataset: h5py.Dataset) -> Codec | None:
    layout = dataset.id.get_create_plist()
    filters = [layout.get_filter(number) for number in range(layout.get_nfilters())]
    if not filters:
        return None
    if len(filters) > 1 or filters[0][0] not in _CODECS:
        names = " and ".join((name or b"?").decode().partition(";")[0] for _, _, _, name in filters)
        refuse(what, f"is filtered by {names}, of which only blosc, zstd or lz4 alone is read")
    number, _, parameters, _ = filters[0]
    if number == _BLOSC and parameters[_BLOSC_COMPRESSOR : _BLOSC_COMPRESSOR + 1] == (_SNAPPY,):
        refuse(what, "is compressed by snappy within blosc")
    return _CODECS[number]
