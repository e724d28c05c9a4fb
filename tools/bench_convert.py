"""`stagein bench convert`: packing a folder beside copying it, whole commands in interleaved rounds."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stagein.formats.sources.imagefolder import scan_imagefolder

from .console import say
from .convert import usable_cores
from .rates import print_rates


def run_convert(source: Path, rounds: int, work: Path | None = None) -> None:
    """Convert the image folder `source`, copy it with `cp -r` and pack it as installed peers do, in turn, below the folder `work`.

    Conversion ends with everything on the disk; `cp -r` ends earlier, with its bytes in the page cache, so that
    `cp -r` followed by `sync` is measured too; peers are followed by `sync`. All use all cores. Before each run the disk is
    let come to rest.
    """
    nbytes = int(scan_imagefolder(source).nbytes.sum())
    folder = Path(tempfile.mkdtemp(prefix="stagein-bench-", dir=work))
    copy, target = str(folder / "copy"), str(folder / "x.st")
    commands: dict[str, list[str]] = {
        "stagein convert": [sys.executable, "-m", "stagein.tools", "convert", "imagefolder", str(source), target],
        "cp -r": ["cp", "-r", str(source), copy],
        "cp -r, sync": ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), copy],
    }
    for peer, library in (("mds", "streaming"), ("webdataset", "webdataset")):
        if importlib.util.find_spec(library) is None:
            say(f"{peer} is left out: {library} is not installed")
            continue
        pack = [sys.executable, "-m", "stagein.tools.pack_peers", peer, str(source), copy, str(usable_cores())]
        commands[f"{peer}, sync"] = ["sh", "-c", '"$@" && sync', "sh", *pack]
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
