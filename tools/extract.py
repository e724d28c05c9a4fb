"""`stagein extract`: a record back as files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagein.formats.dataset import Dataset
from stagein.formats.errors import UsageError, destination_error
from stagein.formats.publish import publish_file
from stagein.formats.schema import BFLOAT16, Field
from stagein.formats.values import UNKNOWN_ENCODING, encoding_of

from .console import say

_SUFFIXES = {"jpeg": ".jpg", "image": ".bin", UNKNOWN_ENCODING: ".bin"}
"""Of the encodings that are not called as their files are."""


def run(path: Path, record: int, to: Path) -> None:
    """Write every field of record number `record` of the data set at `path` into the folder `to`. Raises StageinError.

    FIELD-RECORD.SUFFIX: what is encoded as the file it was, text as .txt, arrays as .npy; the small fields of a fixed shape
    together in record-RECORD.json, but for what JSON cannot say (NaN, infinity, complex). bfloat16, which .npy has not, becomes
    float32.
    """
    dataset = Dataset(path)
    if not 0 <= record < len(dataset):
        raise UsageError(f"{path} has no record {record}: it has {len(dataset)}, counted from 0")
    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} is not a folder, which the files of a record need: choose another")
    small: dict[str, object] = {}
    for name, value in dataset[record].items():
        field = dataset.fields[name]
        if name in dataset.columns and _fits_json(numbers := _numbers(field, value)):
            small[name] = numbers.tolist()
        else:
            _write(to / f"{name}-{record:08d}{_suffix(field, value)}", field, value)
    target = to / f"record-{record:08d}.json"
    line = json.dumps(small, allow_nan=False)
    _publish(target, line.encode() + b"\n")
    say(line)


def _write(target: Path, field: Field, value: Any) -> None:
    if field.kind == "text":
        _publish(target, value.encode())
    elif field.kind == "encoded":
        _publish(target, value.tobytes())
    else:
        _publish(target, _numbers(field, value))


def _publish(target: Path, content: bytes | NDArray[Any]) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with publish_file(target) as part, open(part, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content, allow_pickle=False)
    except OSError as error:
        raise destination_error(error, "writing", target) from None
    say(str(target))


def _fits_json(numbers: NDArray[Any]) -> bool:
    return numbers.dtype.kind != "c" and bool(np.isfinite(numbers).all())


def _numbers(field: Field, value: NDArray[Any]) -> NDArray[Any]:
    if field.dtype != BFLOAT16:
        return value
    bits = value.view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32)


def _suffix(field: Field, value: Any) -> str:
    if field.kind == "text":
        return f".{field.encoding or 'txt'}"
    if field.kind != "encoded":
        return ".npy"
    found = encoding_of(value.data)
    encoding = str(field.encoding) if found == UNKNOWN_ENCODING else found
    return _SUFFIXES.get(encoding, f".{encoding}")
