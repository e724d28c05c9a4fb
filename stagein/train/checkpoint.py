"""Checkpoints: one file a step, published whole or not at all, read back without running anything that is in it."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from stagein.formats.errors import ChecksumError, SourceError, destination_error, source_error
from stagein.formats.publish import publish_file

FORMAT = "stagein checkpoint 1"

_NAME = re.compile(r"step-(\d+)\.pt")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Publish `state` (tensors, numbers, strings, and lists and dicts of them) as that of `step`; keep the newest `keep`.

    Raises NoSpaceError or SourceError, one sentence; the older checkpoints are then as they were.
    """
    path = folder / f"step-{step:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with publish_file(path) as part, part.open("wb") as file:
            try:
                torch.save({"format": FORMAT, **state}, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # on which torch stumbles once more before it is heard of
                    raise error.__context__ from None
                raise
        for old in find_checkpoints(folder)[:-keep]:
            old.unlink()
    except OSError as error:
        raise destination_error(error, "writing the checkpoint", path) from error
    return path


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state saved in `path`, tensors in host memory. No code in the file is run (`weights_only`).

    Raises ChecksumError where bytes of it have changed, and SourceError where it is not a checkpoint of ours.
    """
    advice = "remove it to go on from the checkpoint before it"
    try:
        with zipfile.ZipFile(path) as archive:  # torch writes crc32 sums but does not check them
            damaged = archive.testzip()
        if damaged is not None:
            raise ChecksumError(f"the checkpoint {path} is damaged (in {damaged}): {advice}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise source_error(error, "reading the checkpoint", path) from error
    except ChecksumError:
        raise
    except Exception as error:  # zipfile, pickle and torch raise nearly every kind
        raise SourceError(f"{path} is cut off or not a checkpoint of stagein: {advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise SourceError(f"{path} was not written by stagein's trainer (no format {FORMAT!r}): {advice}")
    return state


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
