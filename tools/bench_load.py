"""`stagein bench load`: our loader beside its peers, each in a process of its own, in interleaved rounds.

A peer takes part where its package can be imported; who is missing, or fails, is named.
"""

import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

from stagein.formats.errors import UsageError

from .console import say
from .rates import print_rates

_START_SECONDS = 100
_PAUSE_SECONDS, _RESTING_SHARE, _SETTLE_SECONDS = 0.2, 0.1, 10
"""Between two contestants: until the first took less than this share of a core so long, at most some seconds. Some fill their queues
for more than two."""
_WHERE_DATA_IS = ("folder", "dataset", "images")
"""Of the work of a contestant without a data set of its own: what it made for itself, and was given."""
_READ_BYTES = 8 << 20
_MEMORY_SECONDS = 0.05
"""Between two looks at the memory of a contestant."""
TensorKind = Literal["float32", "int16"]
SHAPES: dict[TensorKind, tuple[int, ...]] = {"float32": (16, 192, 288), "int16": (64, 64, 64, 4)}
"""Records of DeepCAM and of CosmoFlow, in small."""
_RECORDS = 256
"""Enough for an epoch of 32 batches: its end, where threads run out of work, counts as it does in a training run, not more."""
_BOUNDS = ("engine alone", "DALI alone", "reading alone", "preadv alone")
"""No loaders, but the same work without one: what a loader can reach."""
_PAIRS = (
    ("stagein", "engine alone"),
    ("stagein, DALI graph", "DALI alone"),
    ("stagein, seekable", "stagein"),
    ("stagein", "reading alone"),
    ("stagein", "preadv alone"),
)
"""Whose ratio is printed too; such contestants run one after the other, as the machine's speed changes by the minute."""


class Contestant:
    """A process that loads while it is told to; see `bench_contestant`. Ends with the `with` block."""

    def __init__(self, spec: dict[str, Any], log: Path) -> None:
        self.name: str = spec["name"]
        self.peak_bytes = 0
        self._log = log
        work = spec.get("work", {})
        where = [spec["dataset"]] if "dataset" in spec else [work[each] for each in _WHERE_DATA_IS if each in work]
        self._data = list(map(Path, where))
        command = [sys.executable, "-m", f"{__package__}.bench_contestant", json.dumps(spec)]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._process:
            for pid in _with_children(self._process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)

    def answer(self, timeout_s: float) -> dict[str, Any] | None:
        """Its next line; None where it failed or did not answer in time."""
        import select

        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def run_round(self, timeout_s: float) -> float | None:
        """Its rate in one more round, of data in memory: while the others had their turns, for minutes, some of it may have left that."""
        for folder in self._data:
            read_through(folder)
        self._begin_round()
        answer = self.answer(timeout_s)
        return None if answer is None else float(answer["rate"])

    def settle(self) -> None:
        """Wait until it rests: what it still does for its queues must not cost the next contestant."""
        deadline, taken, before = time.monotonic() + _SETTLE_SECONDS, self._cpu_seconds(), -math.inf
        while taken - before > _RESTING_SHARE * _PAUSE_SECONDS and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
            taken, before = self._cpu_seconds(), taken

    def watch_memory(self, timeout_s: float) -> None:
        """One more round, in which `peak_bytes` is looked for: looking costs time, so its rate does not count."""
        self._begin_round()
        started = time.monotonic()
        while self.answer(_MEMORY_SECONDS) is None and time.monotonic() - started < timeout_s:
            if self._process.poll() is not None:
                return
            self.peak_bytes = max(self.peak_bytes, sum(map(_resident_bytes, _with_children(self._process.pid))))

    def _cpu_seconds(self) -> float:
        """Of all its processes that there are."""
        return sum(map(_cpu_seconds, _with_children(self._process.pid)))

    def _begin_round(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has no answer then

    @property
    def last_words(self) -> str:
        """The last line it wrote to standard error."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "it did not answer in time"


def run_load(
    images: Path | None,
    rounds: int,
    batch_size: int,
    size: int,
    threads: int,
    antialias: bool,
    round_s: float,
    against: Collection[str] = (),
) -> None:
    """Measure loaders of images and print: a line of JSON for each contestant, then a table of ratios to the best peer.

    images  an image folder; None: a synthetic one. It is converted to data sets in a temporary folder.
    size    of the square that the random crops are resized to.
    against names of contestants to measure ours against; nothing: all.
    """
    from stagein.formats import convert, scan_imagefolder
    from stagein.formats.seekable_images import SeekableJpegs
    from stagein.formats.sources.images import change_images
    from stagein.loaders.image_bounds import OURS
    from stagein.loaders.image_peers import PEERS
    from stagein.loaders.synthetic import make_image_folder

    with tempfile.TemporaryDirectory(prefix="stagein-bench-") as made:
        folder = Path(made)
        if images is None:
            images = folder / "images"
            make_image_folder(images, images_per_class=max(32, batch_size), height=375, width=500)
        convert(scan_imagefolder(images), folder / "plain.st")
        refuse_less_than_a_batch(folder / "plain.st", batch_size)
        convert(change_images(scan_imagefolder(images), SeekableJpegs()), folder / "seekable.st")
        work = {
            "images": str(images),
            "batch_size": batch_size,
            "size": size,
            "threads": threads,
            "antialias": antialias,
        }
        plain, seekable = str(folder / "plain.st"), str(folder / "seekable.st")
        specs = [{"name": name, "dataset": seekable if "seekable" in name else plain} for name in OURS]
        specs += [{"name": name} for name in PEERS if antialias or name not in _ANTIALIASED_ONLY]
        specs = [{**spec, "kind": "images"} for spec in specs]
        settings = {"size": size, "antialias": antialias, "batch_size": batch_size, "threads": threads}
        _compete(_chosen(specs, against), work, folder, rounds, round_s, "images/s", settings)


_ANTIALIASED_ONLY = ("torch + pillow", "ffcv")
_UNCOMPRESSED_ONLY = ("preadv alone",)


def run_tensors(
    kind: TensorKind,
    codec: str | None,
    rounds: int,
    batch_size: int,
    threads: int,
    round_s: float,
    against: Collection[str] = (),
) -> None:
    """The same for tensors without a graph, of a synthetic data set; `codec` is a codec's name, None for none."""
    from stagein.loaders.tensor_peers import PEERS

    with tempfile.TemporaryDirectory(prefix="stagein-bench-") as made:
        folder = Path(made)
        make_tensors(folder / "records.st", kind, codec)
        refuse_less_than_a_batch(folder / "records.st", batch_size)
        work = {"dataset": str(folder / "records.st"), "batch_size": batch_size, "threads": threads}
        names = [name for name in ("stagein", *PEERS) if codec is None or name not in _UNCOMPRESSED_ONLY]
        specs = [{"name": name, "kind": "tensors"} for name in names]
        settings = {"records": kind, "codec": codec or "none", "batch_size": batch_size, "threads": threads}
        _compete(_chosen(specs, against), work, folder, rounds, round_s, "MB/s", settings)


def refuse_less_than_a_batch(dataset: Path, batch_size: int) -> None:
    """Raise UsageError when a data set fills no batch: what is left over makes none, so a loader would have nothing to give."""
    from stagein.formats import Dataset

    records = len(Dataset(dataset))
    if records < batch_size:
        raise UsageError(
            f"{records} records do not fill a batch of {batch_size}: measure on more, or with --batch-size {records} or less"
        )


def _chosen(specs: list[dict[str, Any]], against: Collection[str]) -> list[dict[str, Any]]:
    names = [spec["name"] for spec in specs]
    if unknown := set(against) - set(names):
        raise UsageError(f"there is no contestant {sorted(unknown)[0]!r}: there are {', '.join(names)}")
    return [spec for spec in specs if not against or spec["name"] == "stagein" or spec["name"] in against]


def make_tensors(path: Path, kind: TensorKind, codec: str | None) -> None:
    """Smooth volumes with a little noise, which a codec shrinks to a third or so."""
    import numpy as np

    from stagein.formats import Writer
    from stagein.formats.codecs import Codec
    from stagein.formats.manifest import Container

    codecs = {} if codec is None else {"record": Codec.model_validate({"name": codec})}
    random, shape = np.random.default_rng(0), SHAPES[kind]
    container: Container = "hdf5" if codec == "lz4" else "hdf5+zarr"  # Zarr has no such codec
    with Writer(path, codec=codecs, container=container) as writer:
        for number in range(_RECORDS):
            smooth = np.sin(np.arange(np.prod(shape)) / 5000 + number).reshape(shape)
            record = 300 * smooth + random.integers(0, 4, shape)
            writer.write({"record": record.astype(kind)})


def _compete(
    specs: list[dict[str, Any]],
    work: dict[str, Any],
    folder: Path,
    rounds: int,
    round_s: float,
    unit: str,
    settings: dict[str, Any],
) -> None:
    rates: dict[str, list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        contestants: dict[str, Contestant] = {}
        for number, spec in enumerate(specs):
            own = folder / f"contestant{number}"
            own.mkdir()
            whole = {**spec, "work": {**work, "folder": str(own)}, "round_s": round_s}
            contestant = stack.enter_context(Contestant(whole, folder / f"{number}.log"))
            ready = contestant.answer(_START_SECONDS)
            if ready is None:
                say(f"{contestant.name} does not take part: {contestant.last_words}")
                continue
            contestants[contestant.name] = contestant
            if spec["kind"] == "images" and spec["name"] not in _BOUNDS:
                with Contestant({**whole, "psnr": True}, folder / f"{number}-psnr.log") as measured:
                    ready |= measured.answer(_START_SECONDS) or {"psnr": measured.last_words}
            rates[contestant.name], facts[contestant.name] = [], ready
            contestant.settle()
        order = random.Random(0)
        for _ in range(rounds):
            for name in in_random_order(list(contestants), order):
                contestant = contestants[name]
                rate = contestant.run_round(_START_SECONDS)
                if rate is not None:
                    rates[name].append(rate)
                contestant.settle()
        for contestant in contestants.values():
            contestant.watch_memory(_START_SECONDS)
    for contestant in contestants.values():
        facts[contestant.name]["peak_mb"] = contestant.peak_bytes // 10**6
    complete = {name: of_rounds for name, of_rounds in rates.items() if len(of_rounds) == rounds}
    for name in rates.keys() - complete.keys():
        say(f"{name} stopped before the end")
    peers = [name for name in complete if not name.startswith("stagein") and name not in _BOUNDS]
    baseline = max(peers or complete, key=lambda name: statistics.median(complete[name]))
    print_rates("load", complete, baseline, unit=unit, **settings)
    for name, other in _PAIRS:
        if name in complete and other in complete:
            ratios = [ours / theirs for ours, theirs in zip(complete[name], complete[other], strict=True)]
            say(f"{name} / {other}: {statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})")
    for name in complete:
        say(f"{name:<20}" + "  ".join(f"{fact} {value}" for fact, value in facts[name].items()))
    shutil.rmtree(folder, ignore_errors=True)


def in_random_order(names: Sequence[str], random: random.Random) -> list[str]:
    """The contestants of a round; those that are compared in pairs come one after the other, in random order too."""
    places = {_first_of_pairs(name): random.random() for name in names}
    return sorted(random.sample(names, len(names)), key=lambda name: places[_first_of_pairs(name)])


def _first_of_pairs(name: str) -> str:
    """The same for all contestants that pairs connect."""
    return next((_first_of_pairs(first) for first, second in _PAIRS if second == name), name)


def read_through(folder: Path) -> None:
    """Read every file below this folder, one after the other, so that all of it is in memory."""
    buffer = bytearray(_READ_BYTES)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _with_children(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def _cpu_seconds(pid: int) -> float:
    """That a process took so far, with its children that ended; 0 where it ended itself."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    """Its share of what it has in memory: pages of several processes count in part for each. Linux."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
