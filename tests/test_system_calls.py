"""Stage-in when system calls fail, and what a loss of power leaves: strace fails the calls and tells their order."""

import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from mpi import run_ranks
from staged import assert_staged, final_folder, journaled_chunks, work_folder
from synthetic import CHUNK_BYTES, write_dataset

from stagein.formats.errors import ExitCode

RANK = Path(__file__).with_name("staging_rank.py")
READS = "preadv,preadv2,pread64"


@functools.cache
def why_no_strace() -> str | None:
    if shutil.which("strace") is None:
        return "no strace (Debian: strace)"
    result = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True, text=True)
    return f"strace may not trace here: {result.stderr.strip()}" if result.returncode else None


@pytest.fixture(autouse=True)
def traceable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if reason := why_no_strace():
        pytest.skip(reason)
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "source", (5 * CHUNK_BYTES, 3 * CHUNK_BYTES + 1), (1000, 0))
    return tmp_path / "source"


@pytest.fixture
def to(tmp_path: Path) -> Path:
    (tmp_path / "nvme").mkdir()
    return tmp_path / "nvme"


def failing(calls: str, how: str, *paths: Path) -> list[str | Path]:
    """What to write before a command for these system calls (on these paths) to fail, or to be held, as `how` says."""
    only = [word for path in paths for word in ("-P", path)]
    return ["strace", "-f", "-qq", "-o", "/dev/null", *only, "-e", f"trace={calls}", "-e", f"inject={calls}:{how}"]


def stage_under(prefix: Sequence[str | Path], source: Path, to: Path) -> subprocess.CompletedProcess[str]:
    words = [*prefix, sys.executable, RANK, source, to]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60)


def assert_one_sentence(result: subprocess.CompletedProcess[str], exit_code: int, *parts: str) -> None:
    assert result.returncode == exit_code, result.stderr
    assert result.stderr.count("stagein: ") == 1 and "Traceback" not in result.stderr
    assert all(part in result.stderr for part in parts), result.stderr


# Calls that fail


@pytest.mark.parametrize("error", ["EIO", "ESTALE", "ETIMEDOUT"])
def test_reads_that_fail_for_a_while_are_tried_again(source: Path, to: Path, error: str) -> None:
    result = stage_under(failing(READS, f"error={error}:when=1..2", source / "shards/00001.h5"), source, to)
    assert result.returncode == 0, result.stderr
    assert_staged(source, to)


@pytest.mark.mpi
def test_a_read_that_goes_on_failing_on_one_node_ends_all_with_its_name(source: Path, tmp_path: Path) -> None:
    for node in "ab":
        (tmp_path / f"nvme-{node}").mkdir()
    to = str(tmp_path / "nvme-{node}")
    prefix = failing(READS, "error=EIO", source / "shards/00001.h5")
    result = run_ranks(2, *prefix, sys.executable, RANK, source, to, "--policy", "replicate", nodes="ab")
    assert result.returncode == ExitCode.SOURCE
    assert "shards/00001.h5 failed: Input/output error" in result.stderr and "Traceback" not in result.stderr
    assert not any(final_folder(source, tmp_path / f"nvme-{node}").exists() for node in "ab")


@pytest.mark.parametrize("error", ["EACCES", "EMFILE"])
def test_a_source_that_cannot_be_opened_is_named(source: Path, to: Path, error: str) -> None:
    result = stage_under(failing("openat", f"error={error}", source / "shards/00001.h5"), source, to)
    assert_one_sentence(result, ExitCode.SOURCE, "shards/00001.h5 failed: ", os.strerror(getattr(errno, error)))
    assert not final_folder(source, to).exists()


def test_a_disk_that_gets_full_while_it_is_written_is_cleaned_up(source: Path, to: Path) -> None:
    path = work_folder(source, to) / "shards/00001.h5"
    result = stage_under(failing("pwrite64", "error=ENOSPC:when=2+", path), source, to)
    assert_one_sentence(result, ExitCode.NO_SPACE, f"no space left while writing {path}")
    assert not work_folder(source, to).exists() and not final_folder(source, to).exists()


@pytest.mark.parametrize(("calls", "error"), [("pwrite64", "EIO"), ("fsync", "EIO"), ("rename", "EROFS")])
def test_a_disk_that_fails_publishes_nothing_and_resumes(source: Path, to: Path, calls: str, error: str) -> None:
    path = work_folder(source, to)
    path = path if calls == "rename" else path / "shards/00001.h5"
    result = stage_under(failing(calls, f"error={error}", path), source, to)
    assert_one_sentence(result, ExitCode.FAILED, str(path if calls != "rename" else final_folder(source, to)))
    assert not final_folder(source, to).exists() and journaled_chunks(source, to) > 0
    assert stage_under([], source, to).returncode == 0
    assert_staged(source, to)


# Power


class Disk:
    """What is on a disk for good, told from the order of system calls: contents after fsync, names after the fsync of their folder."""

    def __init__(self) -> None:
        self.dirty: set[str] = set()
        """Files written since their last fsync."""
        self.unnamed: set[str] = set()
        """Names made since the last fsync of their folder."""

    def apply(self, call: str, paths: list[str]) -> None:
        if call in ("write", "pwrite64", "fallocate", "ftruncate"):
            self.dirty.add(paths[0])
        elif call == "fsync":
            self.dirty.discard(paths[0])
            self.unnamed = {name for name in self.unnamed if os.path.dirname(name) != paths[0]}  # noqa: PTH120
        elif call == "rename":
            old, new = paths
            self.dirty, self.unnamed = (
                {_moved(name, old, new) for name in names} for names in (self.dirty, self.unnamed)
            )
            self.unnamed.add(new)
        elif call == "unlink":
            self.dirty.discard(paths[0])
            self.unnamed.discard(paths[0])
        else:
            self.unnamed.add(paths[-1])


def _moved(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name == old or name.startswith(f"{old}/") else name


_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (\d+)")
_UNFINISHED = re.compile(r"^(\d+) +(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")


def calls_below(folder: Path, log: Path) -> Iterator[tuple[str, list[str]]]:
    """The system calls of a log of strace that succeeded, with those of their paths that are below a folder, in order."""
    begun: dict[str, str] = {}
    for line in log.read_text(errors="replace").splitlines():
        if found := _UNFINISHED.match(line):
            begun[found[1]] = found[2]
            continue
        if found := _RESUMED.match(line):
            line = f"{found[1]} {begun.pop(found[1])}{found[2]}"
        if not (found := _CALL.match(line)):
            continue
        call, words, _ = found.groups()
        paths = [path for path in re.findall(r'["<](/[^">]*)[">]', words) if path.startswith(f"{folder}")]
        if paths and (call != "openat" or "O_CREAT" in words):
            yield call, paths


def lost_with_the_power(to: Path, log: Path) -> set[str]:
    """What would be lost of the copy if the power went when READY got its name, from a log of strace."""
    disk = Disk()
    for call, paths in calls_below(to, log):
        if call == "rename" and paths[1].endswith("/READY"):
            final = str(Path(paths[1]).parent)
            mine = {
                name
                for name in disk.dirty | disk.unnamed
                if f"{name}/".startswith(f"{final}/") or f"{final}/".startswith(f"{name}/")
            }
            return {name for name in mine if "/journal-" not in name and name != paths[0]} | (disk.dirty & {paths[0]})
        disk.apply(call, paths)
    raise AssertionError("READY never got its name")


def tracing(log: Path) -> list[str | Path]:
    """What to write before a command for its changes to the file system to be logged."""
    calls = "openat,write,pwrite64,fallocate,ftruncate,fsync,rename,mkdir,symlink,unlink"
    return ["strace", "-f", "-y", "-qq", "-s", "4", "-o", log, "-e", f"trace={calls}"]


def traced(source: Path, to: Path, log: Path) -> None:
    result = stage_under(tracing(log), source, to)
    assert result.returncode == 0, result.stderr


def test_ready_stands_only_for_what_survives_a_loss_of_power(jpeg_dataset_path: Path, to: Path, tmp_path: Path) -> None:
    traced(jpeg_dataset_path, to, tmp_path / "log")
    assert lost_with_the_power(to, tmp_path / "log") == set()


def test_a_copy_that_is_completed_survives_a_loss_of_power(jpeg_dataset_path: Path, to: Path, tmp_path: Path) -> None:
    traced(jpeg_dataset_path, to, tmp_path / "log")
    final = final_folder(jpeg_dataset_path, to)
    ready = json.loads((final / "READY").read_text())
    (final / ready["files"][0]).unlink()
    (final / "READY").write_text(json.dumps(ready | {"policy": "partition", "files": ready["files"][1:]}))
    traced(jpeg_dataset_path, to, tmp_path / "log")
    assert lost_with_the_power(to, tmp_path / "log") == set()


def test_a_converted_data_set_has_its_name_only_when_it_survives_a_loss_of_power(
    jpeg_folder: Path, to: Path, tmp_path: Path
) -> None:
    log, target, part = tmp_path / "log", to / "x.st", to / "x.st.part"
    convert = [sys.executable, "-m", "stagein.tools.cli", "convert", "imagefolder", jpeg_folder, target]
    words = [*tracing(log), *convert, "--shard-bytes", "64KiB", "--workers", "2"]
    subprocess.run(list(map(str, words)), check=True, capture_output=True, timeout=60)
    disk, renamed = Disk(), False
    for call, paths in calls_below(to, log):
        if call == "rename" and paths == [str(part), str(target)]:
            lost = {name for name in disk.dirty | disk.unnamed if name.startswith(f"{part}/")}
            assert {name for name in lost if not name.startswith(f"{part}/journal")} == set()
            renamed = True
        disk.apply(call, paths)
    assert renamed and str(target) not in disk.unnamed


PUBLISH = "import sys; from pathlib import Path; from stagein.formats.publish import publish_bytes; publish_bytes(Path(sys.argv[1]), b'new')"


def test_a_published_file_has_its_name_only_when_its_bytes_survive_and_then_its_name_does(
    to: Path, tmp_path: Path
) -> None:
    log, file = tmp_path / "log", to / "file"
    subprocess.run([*map(str, tracing(log)), sys.executable, "-c", PUBLISH, str(file)], check=True, timeout=60)
    disk, renamed = Disk(), False
    for call, paths in calls_below(to, log):
        disk.apply(call, paths)
        if call == "rename":
            assert paths[1] == str(file) and not disk.dirty
            renamed = True
    assert renamed and not disk.dirty | disk.unnamed and file.read_bytes() == b"new"


def test_a_file_whose_bytes_do_not_reach_the_disk_is_not_published(to: Path) -> None:
    (to / "file").write_bytes(b"old")
    words = [*map(str, failing("fsync", "error=EIO")), sys.executable, "-c", PUBLISH, str(to / "file")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "OSError: [Errno 5]" in result.stderr
    assert {path.name: path.read_bytes() for path in to.iterdir()} == {"file": b"old"}
