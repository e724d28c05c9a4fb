"""`stagein extract`: a record back as files."""

import json
from pathlib import Path

import numpy as np

from stagein.formats.dataset import Dataset
from stagein.formats.errors import UsageError, destination_error
from stagein.formats.publish import publish_file

from .console import say

_SUFFIXES = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"))


def run(path: Path, record: int, to: Path) -> None:
    """Write record number `record` of the data set at `path` into the folder `to`. Raises StageinError."""
    dataset = Dataset(path)
    if not 0 <= record < len(dataset):
        raise UsageError(f"{path} has no record {record}: it has {len(dataset)}, counted from 0")
    fields = dataset[record]
    primary = dataset.schema.primary
    content = fields.pop(primary)
    stem = to / f"{primary}-{record:08d}"
    tensor = dataset.schema.primary_field.kind == "tensor"
    target = stem.with_suffix(".npy" if tensor else _suffix(content.tobytes()[:8]))
    try:
        to.mkdir(parents=True, exist_ok=True)
        with publish_file(target) as part, open(part, "wb") as file:
            if tensor:
                np.save(file, content, allow_pickle=False)
            else:
                file.write(content.tobytes())
    except OSError as error:
        raise destination_error(error, "writing", target) from None
    say(str(target))
    say(json.dumps({name: value.tolist() for name, value in fields.items()}))


def _suffix(start: bytes) -> str:
    return next((suffix for signature, suffix in _SUFFIXES if start.startswith(signature)), ".bin")
