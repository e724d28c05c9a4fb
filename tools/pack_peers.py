"""How peers pack an image folder, for `stagein bench convert`: `python -m stagein.tools.pack_peers mds|webdataset SOURCE TARGET PROCESSES`.

Each process packs its share of the images, with their class numbers, into a folder of its own, as their documentation shows it.
"""

import multiprocessing
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

Sample = tuple[Path, int]


def _pack_mds(samples: Iterable[Sample], target: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(target), columns={"image": "bytes", "label": "int"}, size_limit=1 << 28) as writer:
        for path, label in samples:
            writer.write({"image": path.read_bytes(), "label": label})


def _pack_webdataset(samples: Iterable[Sample], target: Path) -> None:
    from webdataset import ShardWriter

    target.mkdir(parents=True)
    with ShardWriter(str(target / "%06d.tar"), maxsize=1 << 28, verbose=0) as writer:
        for number, (path, label) in enumerate(samples):
            writer.write({"__key__": f"{number:08d}", "jpg": path.read_bytes(), "cls": str(label)})


PACKERS: dict[str, Callable[[Iterable[Sample], Path], None]] = {"mds": _pack_mds, "webdataset": _pack_webdataset}


def pack(peer: str, source: Path, target: Path, processes: int) -> None:
    """Pack all images of `source` below `target`. Raises ImportError where the peer is not installed."""
    classes = sorted(path for path in source.iterdir() if path.is_dir())
    samples = [(path, label) for label, folder in enumerate(classes) for path in sorted(folder.iterdir())]
    parts = [(samples[number::processes], target / f"{number}") for number in range(processes)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.starmap(partial(_run, peer), parts)


def _run(peer: str, samples: Iterable[Sample], target: Path) -> None:
    PACKERS[peer](samples, target)


if __name__ == "__main__":
    pack(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
