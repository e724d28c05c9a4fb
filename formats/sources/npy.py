"""Files of numpy: a folder of .npy or .npz with one record a file, or .npy files whose rows are the records.

The layouts that are recognised are CosmoFlow's (`NAME_data.npy`, `NAME_label.npy`, with or without the lists
`files_data.lst` and `files_label.lst`), DeepCAM's (`data-NAME.npy`, `label-NAME.npy`), and plain folders. The format is that
of numpy.lib.format; no file is ever unpickled.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from stagein.formats.errors import SourceError, UsageError, source_error
from stagein.formats.schema import Field, Schema, make_schema
from stagein.formats.source import RefusedRecord, Room, SourceRecord

from .files import find_files
from .npy_files import (
    array_field,
    npz_members,
    opened_member,
    opened_npz,
    read_stream,
    stored_array,
    stored_rows,
)
from .tensors import (
    BadTensorError,
    RecordPlace,
    Sample,
    StoredArray,
    TensorFiles,
    TensorRows,
    common_row_count,
    copy_little_endian,
    refuse_any_shape,
    scan_samples,
    tensor_field,
)

_KNOWN_PAIRS = (
    {"data": "*_data.npy", "label": "*_label.npy"},  # CosmoFlow
    {"data": "data-*.npy", "label": "label-*.npy"},  # DeepCAM
)
_KNOWN_LISTS = {"data": "files_data.lst", "label": "files_label.lst"}  # CosmoFlow
_KNOWN_MEMBERS = ({"data": "data", "label": "labels"}, {"data": "data", "label": "label"}, {"x": "x", "y": "y"})


@dataclass(frozen=True)
class NpySamples:
    """Reads records whose fields lie in an .npy file each; `names` are those of the fields in the order of the files."""

    names: tuple[str, ...]

    def mark(self) -> object:
        return self.names

    def fields(self, files: Sample) -> dict[str, Field]:
        found = {}
        for name, file in zip(self.names, files, strict=True):
            with file.open() as descriptor:
                found[name] = array_field(stored_array(file, descriptor))
        return found

    def read(self, files: Sample, schema: Schema, room: Room) -> SourceRecord:
        place = RecordPlace(schema, room)
        for name, file in zip(self.names, files, strict=True):
            with file.open() as descriptor:
                array = stored_array(file, descriptor)
                array.read(descriptor, place.take(name, file.path, "its array", array_field(array)))
        return place.record()


@dataclass(frozen=True)
class NpzSamples:
    """Reads .npz files of one record each; `members` are the arrays of the fields, by the names of the fields."""

    members: Mapping[str, str]

    def mark(self) -> object:
        return dict(self.members)

    def fields(self, files: Sample) -> dict[str, Field]:
        (file,) = files
        found = {}
        with opened_npz(file) as archive:
            for name, member in self.members.items():
                with opened_member(file.path, archive, member) as (array, _):
                    found[name] = array_field(array)
        return found

    def read(self, files: Sample, schema: Schema, room: Room) -> SourceRecord:
        (file,) = files
        place = RecordPlace(schema, room)
        with opened_npz(file) as archive:
            for name, member in self.members.items():
                with opened_member(file.path, archive, member) as (array, stream):
                    target = place.take(name, file.path, f"its array {member}", array_field(array))
                    read_stream(array, stream, target)
        return place.record()


@dataclass(frozen=True)
class NpyRows:
    """Reads the rows of .npy files, one file a field; `fields` are their names in the order of the files."""

    files: Sample
    fields: tuple[str, ...]
    shares_chunks: bool = False

    def mark(self) -> object:
        return self.fields

    @contextmanager
    def open(self) -> Iterator[Callable[[int, str, memoryview], None]]:
        with ExitStack() as stack:
            descriptors = {
                name: stack.enter_context(file.open()) for name, file in zip(self.fields, self.files, strict=True)
            }
            arrays = {
                name: stored_rows(file, descriptors[name]) for name, file in zip(self.fields, self.files, strict=True)
            }
            # Here a row is scattered over all of the file: the one case in which mapping it is no worse than reading it.
            scattered = {name: array.mapped() for name, array in arrays.items() if array.fortran_order}

            def read_cell(number: int, name: str, target: memoryview) -> None:
                if name in scattered:
                    copy_little_endian(scattered[name][number], target)
                else:
                    arrays[name].row(number).read(descriptors[name], target)

            yield read_cell


def scan_npy(
    source: Path,
    *,
    fields: Mapping[str, str] | None = None,
    primary: str | None = None,
    any_shape: bool = False,
) -> TensorFiles | TensorRows:
    """The records of .npy or .npz files: of a folder, one a file in the order of their names; of one .npy file, one a row.

    `fields` maps names of fields to where they are in the folder, all in one of these ways:
      "*_data.npy", "*_label.npy"       a file a record and field; what * stands for says which belong together
      "files_data.lst"                  a list of such files, one a line, with or without its size in bytes
      "data", "label"                   arrays in .npz files, of which each holds one record
      "images.npy", "labels.npy"        files whose rows are the records
    Without it, the layouts of CosmoFlow and DeepCAM are recognised, then .npz files with `data` and `label` or `labels`,
    with `x` and `y`, or with one array, then plain .npy files. `primary` is the field that fills the shards, by default
    the first.

    Most of a few files, from all over the folder, say what type and shape records have; files that differ are refused when they are
    read. Where more than a quarter of these differ in shape (and not in the number of extents), or with `any_shape`, all files
    are looked at, and records may have any extent where files differ. Raises SourceError when nothing can be read or what belongs together does not match, and UsageError when
    the fields are not to be guessed, not there, or make no record.
    """
    if not source.is_dir():
        if fields:
            raise UsageError(f"{source} is a file: to choose fields by name, give the folder that it lies in")
        refuse_any_shape(source, any_shape=any_shape)
        return _scan_rows(source, {"data": source}, primary)
    names = _listed(source)
    chosen = dict(fields or _recognised(source, names))
    ways = {_way(place) for place in chosen.values()}
    if len(ways) > 1:
        raise UsageError(
            f"{source}: the fields {', '.join(chosen.values())} are to be found in different ways: choose one way"
        )
    match ways.pop() if ways else "member":
        case "rows":
            refuse_any_shape(source, any_shape=any_shape)
            return _scan_rows(source, {name: source / place for name, place in chosen.items()}, primary)
        case "list":
            samples, refused = _listed_samples(source, chosen)
        case "pattern":
            samples, unpaired = _paired_samples(source, names, chosen)
            refused = (*unpaired, *(() if fields else _strays(names, chosen)))
        case _:
            return _scan_npz(source, names, chosen, primary, any_shape=any_shape)
    reader = NpySamples(tuple(chosen))
    return scan_samples("npy", source, samples, lambda _: reader, primary=primary, any_shape=any_shape, refused=refused)


def _listed(root: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(root) if not name.startswith("."))  # noqa: PTH208 (names, not paths)
    except OSError as error:
        raise source_error(error, "listing", root) from None


def _recognised(root: Path, names: Sequence[str]) -> dict[str, str]:
    """The fields of a folder with these names in it; none for .npz files, which must be opened to know them."""
    if _KNOWN_LISTS["data"] in names:
        return {field: place for field, place in _KNOWN_LISTS.items() if place in names}
    suffixes = {suffix for suffix in (".npy", ".npz") if any(name.endswith(suffix) for name in names)}
    if not suffixes:
        raise SourceError(f"{root} holds no .npy and no .npz files: name the folder that they lie in")
    if len(suffixes) > 1:
        raise UsageError(f"{root} holds .npy and .npz files: say where the fields of a record are")
    if ".npz" in suffixes:
        return {}
    for pair in _KNOWN_PAIRS:
        if _matches(names, pair["data"]):
            return {field: pattern for field, pattern in pair.items() if _matches(names, pattern)}
    return {"data": "*.npy"}


def _way(place: str) -> str:
    """How a field is to be found, by how its place is written."""
    if place.endswith(".lst"):
        return "list"
    if place.endswith(".npy"):
        return "pattern" if "*" in place else "rows"
    return "member"


def _matches(names: Iterable[str], pattern: str) -> dict[str, str]:
    """The names that `pattern` fits, by what its * stands for."""
    before, _, after = pattern.partition("*")
    return {
        name[len(before) : len(name) - len(after)]: name
        for name in names
        if name.startswith(before) and name.endswith(after) and len(name) >= len(before) + len(after)
    }


def _paired_samples(
    root: Path, names: Sequence[str], patterns: Mapping[str, str]
) -> tuple[list[Sample], tuple[RefusedRecord, ...]]:
    """The files that belong together by their names, and those that lack another."""
    matches = {field: _matches(names, pattern) for field, pattern in patterns.items()}
    keys = {key: name for found in reversed(matches.values()) for key, name in found.items()}
    complete: list[list[str]] = []
    refused: list[RefusedRecord] = []
    for key in sorted(keys, key=keys.__getitem__):
        lacking = [patterns[field].replace("*", key) for field, found in matches.items() if key not in found]
        if lacking:
            refused.append(RefusedRecord(keys[key], f"there is no {lacking[0]} beside it"))
        else:
            complete.append([found[key] for found in matches.values()])
    return _found_samples(root, complete), tuple(refused)


def _strays(names: Sequence[str], patterns: Mapping[str, str]) -> tuple[RefusedRecord, ...]:
    """The .npy files that no pattern fits."""
    fitting = {name for pattern in patterns.values() for name in _matches(names, pattern).values()}
    reason = f"its name is not {' or '.join(patterns.values())}"
    return tuple(RefusedRecord(name, reason) for name in names if name.endswith(".npy") and name not in fitting)


def _listed_samples(root: Path, lists: Mapping[str, str]) -> tuple[list[Sample], tuple[RefusedRecord, ...]]:
    """The files that are named in the same line of each list, and those that are not as long as their list says."""
    lines = {name: _read_list(root / name) for name in lists.values()}
    counts = {name: len(listed) for name, listed in lines.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} names {count} files" for name, count in counts.items())
        raise SourceError(f"{root}: {listed}: line i of each belongs to record i, so they must be equally many")
    rows = list(zip(*lines.values(), strict=True))
    whole: list[Sample] = []
    refused: list[RefusedRecord] = []
    for row, sample in zip(rows, _found_samples(root, [[name for name, _ in row] for row in rows]), strict=True):
        wrong = [
            RefusedRecord(name, f"it has {file.nbytes} bytes, its list says {nbytes}")
            for (name, nbytes), file in zip(row, sample, strict=True)
            if nbytes not in (None, file.nbytes)
        ]
        if wrong:
            refused.append(wrong[0])
        else:
            whole.append(sample)
    return whole, tuple(refused)


def _read_list(path: Path) -> list[tuple[str, int | None]]:
    """The lines `name` or `name size` of a list; names may hold spaces. Raises SourceError for lines that are neither."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise source_error(error, "reading", path) from None
    except UnicodeDecodeError:
        raise SourceError(f"{path} is no list of files: it is not text in UTF-8") from None
    listed: list[tuple[str, int | None]] = []
    for number, line in enumerate(lines, 1):
        name, _, size = line.strip().rpartition(" ")
        if line.strip().endswith(".npy"):
            listed.append((line.strip(), None))
        elif name.strip().endswith(".npy") and size.isdecimal():
            listed.append((name.strip(), int(size)))
        elif line.strip():
            raise SourceError(f"{path} line {number} is {line!r}: write NAME.npy, or NAME.npy and its size in bytes")
    return listed


def _found_samples(root: Path, names: Sequence[Sequence[str]]) -> list[Sample]:
    """Samples of the files with these names below `root`, all looked at together."""
    if not names:
        raise SourceError(f"{root} holds no complete record: no files with the names of all its fields")
    files = iter(find_files([root / name for sample in names for name in sample], bool, ".npy files"))
    return [tuple(next(files) for _ in sample) for sample in names]


def _scan_npz(
    root: Path, names: Sequence[str], members: Mapping[str, str], primary: str | None, *, any_shape: bool
) -> TensorFiles:
    files = find_files([root / name for name in names if name.endswith(".npz")], bool, ".npz files")

    def choose_reader(sample: Sample) -> NpzSamples:
        (file,) = sample
        if members:
            return NpzSamples(members)
        with opened_npz(file) as archive:
            return NpzSamples(_recognised_members(file.path, archive))

    return scan_samples("npy", root, [(file,) for file in files], choose_reader, primary=primary, any_shape=any_shape)


def _scan_rows(root: Path, paths: Mapping[str, Path], primary: str | None) -> TensorRows:
    fields, files = tuple(paths), find_files(list(paths.values()), bool, ".npy files")
    found: dict[str, Field] = {}
    rows: dict[str, int] = {}
    for name, file in zip(fields, files, strict=True):
        with file.open() as descriptor:
            array = stored_rows(file, descriptor)
        found[name] = _field_of_rows(array)
        rows[file.path.name] = array.shape[0]
    schema = make_schema(found, primary or fields[0])
    return TensorRows("npy", root, schema, common_row_count(root, rows), NpyRows(files, fields))


def _field_of_rows(array: StoredArray) -> Field:
    try:
        return tensor_field(array.path, "its array", array.dtype, array.shape[1:])
    except BadTensorError as error:
        raise SourceError(str(error)) from None


def _recognised_members(path: Path, archive: ZipFile) -> dict[str, str]:
    """The arrays of an archive that are the fields of a record."""
    found = npz_members(archive)
    for known in _KNOWN_MEMBERS:
        if set(known.values()) <= set(found):
            return dict(known)
    if len(found) == 1:
        return {"data": found[0]}
    if not found:
        raise BadTensorError(path, "it holds no arrays")
    raise UsageError(
        f"{path} holds the arrays {', '.join(found)}: say by --field NAME=ARRAY which of them are the fields of a record"
    )
