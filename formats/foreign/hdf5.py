"""HDF5 files of others: data sets of one row a record, contiguous or one record a chunk."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401 (registers the filters that columns may have)
import numpy as np
from numpy.typing import NDArray

from stagein.formats.codecs import Codec
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.schema import SMALL_FIELD_BYTES, Field

from .layout import ForeignFile, ForeignRecords, refuse, tensor_field

_CODECS = {32001: Codec(name="blosc-lz4"), 32015: Codec(name="zstd"), 32004: Codec(name="lz4")}


def scan_foreign_hdf5(
    paths: Sequence[Path], fields: Mapping[str, str] | None = None, primary: str | None = None
) -> ForeignRecords:
    """What lies in HDF5 files of one layout; every file becomes a shard.

    fields   names of fields and the data sets that they are; by default every data set, by the last part of its path.
    primary  the field that is read where it lies; by default the largest. All others must be small.

    Raises UsageError for a layout that cannot be adopted, SourceError for a file that cannot be read.
    """
    parts = [_scan(path, fields, primary) for path in paths]
    first = parts[0]
    for path, part in zip(paths, parts, strict=True):
        if (part.name, part.large, part.columns) != (first.name, first.large, first.columns):
            raise UsageError(f"{path} has other fields than {paths[0]}: adopt files of one layout")
    return ForeignRecords("hdf5", first.name, first.large, first.columns, tuple(part.files[0] for part in parts))


def _scan(path: Path, fields: Mapping[str, str] | None, primary: str | None) -> ForeignRecords:
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _scan_open(path, file, fields, primary)
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{path} cannot be read as HDF5: {str(error).splitlines()[0]}") from None


def _scan_open(path: Path, file: h5py.File, fields: Mapping[str, str] | None, primary: str | None) -> ForeignRecords:
    found = {name: _dataset(path, file, place) for name, place in (fields or _all_datasets(path, file)).items()}
    rows = {name: len(dataset) for name, dataset in found.items()}
    if len(set(rows.values())) != 1:
        raise UsageError(
            f"{path} has data sets of different lengths, {rows}: name those of one row a record with --field"
        )
    declared = {
        name: tensor_field(f"{path}:{dataset.name}", dataset.dtype, dataset.shape[1:])
        for name, dataset in found.items()
    }
    name = primary or max(declared, key=lambda each: declared[each].record_bytes)
    if name not in declared:
        raise UsageError(f"{path} has no field {name!r}: it has {', '.join(declared)}")
    columns = {other: field for other, field in declared.items() if other != name}
    for other, field in columns.items():
        if field.record_bytes > SMALL_FIELD_BYTES:
            refuse(
                f"{path}:{found[other].name}", f"is large, and so is {name!r}; one large field is read where it lies"
            )
    codec, places = _places(f"{path}:{found[name].name}", found[name], declared[name])
    content = {other: found[other][...] for other in columns}
    large = declared[name].model_copy(update={"codec": codec})
    return ForeignRecords(
        "hdf5", name, large, columns, (ForeignFile(path, places[:, 0].copy(), places[:, 1].astype(np.uint32), content),)
    )


def _all_datasets(path: Path, file: h5py.File) -> dict[str, str]:
    places: dict[str, str] = {}

    def note(place: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim:
            name = place.rpartition("/")[2]
            if not name.isidentifier() or name in places:
                raise UsageError(f"{path}:{place} gives no name of its own to a field: name the fields with --field")
            places[name] = place

    file.visititems(note)
    if not places:
        raise UsageError(f"{path} holds no data set of one row a record")
    return places


def _dataset(path: Path, file: h5py.File, place: str) -> h5py.Dataset:
    dataset = file.get(place)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim == 0:
        raise UsageError(f"{path} has no data set {place!r} of one row a record: see `h5ls -r {path}`")
    return dataset


def _places(what: str, dataset: h5py.Dataset, field: Field) -> tuple[Codec | None, NDArray[np.uint64]]:
    """Codec of the records, and [records, 2]: where each lies in the file, and how long it is there, in bytes."""
    count, record_bytes = len(dataset), field.record_bytes
    if record_bytes == 0 or count == 0:
        refuse(what, "has no bytes")
    layout = dataset.id.get_create_plist()
    if dataset.is_virtual or dataset.external:
        refuse(what, "lies in other files")
    if dataset.chunks is None:
        offset = dataset.id.get_offset()  # from the start of the file, a user block included
        if offset is None:
            refuse(what, "is stored within its header, or not written at all")
        starts = np.uint64(offset) + np.arange(count, dtype=np.uint64) * np.uint64(record_bytes)
        return None, np.stack([starts, np.full(count, record_bytes, np.uint64)], axis=1)
    if dataset.chunks != (1, *dataset.shape[1:]):
        refuse(what, f"has chunks of shape {dataset.chunks}, not of one record each")
    filters = [layout.get_filter(number)[0] for number in range(layout.get_nfilters())]
    if len(filters) > 1 or not set(filters) <= _CODECS.keys():
        names = [(layout.get_filter(number)[3] or b"?").decode() for number in range(layout.get_nfilters())]
        refuse(what, f"is filtered by {' and '.join(names)}, of which only blosc, zstd or lz4 alone is read")
    places = np.zeros((count, 2), np.uint64)
    masks = np.zeros(count, np.uint32)

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        places[chunk.chunk_offset[0]] = chunk.byte_offset, chunk.size
        masks[chunk.chunk_offset[0]] = chunk.filter_mask

    dataset.id.chunk_iter(note)  # get_chunk_info(i) walks the whole index for every i
    if (places[:, 1] == 0).any():
        refuse(what, f"has no chunk for record {int(np.argmin(places[:, 1]))}, only its fill value")
    if masks.any():
        refuse(what, "has chunks that left out the filter")
    return (_CODECS[filters[0]] if filters else None), places
