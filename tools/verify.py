"""`stagein verify`: read a whole data set and check every sum of it."""

import json
import time
from pathlib import Path

from stagein.formats.repair import repair
from stagein.formats.verification import verify

from .console import bytes_text, progress_bytes, say, seconds_text
from .convert import usable_cores


def run(path: Path, *, workers: int | None, repair_from: Path | None, as_json: bool) -> None:
    """Verify the data set at `path` and say what is wrong; first mend it from the copy at `repair_from`, if given.

    Raises ChecksumError or SourceError when something is wrong.
    """
    if repair_from is not None:
        repaired = repair(path, repair_from)
        if not as_json:
            say(f"{path}: {len(repaired.files)} files made again, {repaired.chunks} chunks taken from {repair_from}")
            for file in repaired.files:
                say(f"  {file}")
    start = time.monotonic()
    with progress_bytes("verifying", quiet=as_json) as update:
        report = verify(path, workers=workers or usable_cores(), on_progress=update)
    seconds = time.monotonic() - start
    if as_json:
        problems = [
            {"file": problem.file, "problem": problem.text, "damage": problem.damage} for problem in report.problems
        ]
        summary = {"path": str(path), "id": report.manifest.id, "files": report.files, "nbytes": report.nbytes}
        say(json.dumps(summary | {"sums": report.sums, "seconds": round(seconds, 3), "problems": problems}))
    if error := report.error(path):
        raise error
    if not as_json:
        say(
            f"{path}: all is well: {report.files} files, {bytes_text(report.nbytes)}, {report.sums:,} sums, "
            f"in {seconds_text(seconds)} ({bytes_text(report.nbytes / seconds)}/s)"
        )
