"""Which files are in a folder, at whatever depth."""

import os
from pathlib import Path
from typing import NoReturn

from .errors import source_error


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and all folders below it, sorted. Raises SourceError for one that cannot be listed: what it holds
    would be missing without a word."""

    def refuse(error: OSError) -> NoReturn:
        raise source_error(error, "listing", error.filename)

    return sorted(Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse) for name in names)
