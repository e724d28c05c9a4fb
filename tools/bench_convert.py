"""`stagein bench convert`: packing a folder beside copying it, whole commands in interleaved rounds."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stagein.formats.sources.imagefolder import scan_imagefolder

from .rates import print_rates


def run_convert(source: Path, rounds: int, work: Path | None = None) -> None:
    """Convert the image folder `source` and copy it with `cp -r`, in turn, `rounds` times, below the folder `work`.

    Conversion ends with everything on the disk; `cp -r` ends earlier, with its bytes in the page cache, so that
    `cp -r` followed by `sync` is measured too. Before each run the disk is let come to rest.
    """
    nbytes = int(scan_imagefolder(source).nbytes.sum())
    folder = Path(tempfile.mkdtemp(prefix="stagein-bench-", dir=work))
    copy, target = str(folder / "copy"), str(folder / "x.st")
    commands = {
        "stagein convert": [sys.executable, "-m", "stagein.tools.cli", "convert", "imagefolder", str(source), target],
        "cp -r": ["cp", "-r", str(source), copy],
        "cp -r, sync": ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), copy],
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    try:
        for _ in range(rounds):
            for name, command in commands.items():
                os.sync()
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                rates[name].append(nbytes / 1e6 / (time.perf_counter() - started))
                for made in folder.iterdir():
                    shutil.rmtree(made)
    finally:
        shutil.rmtree(folder)
    print_rates("convert", rates, baseline="cp -r", unit="MB/s", source_bytes=nbytes)
