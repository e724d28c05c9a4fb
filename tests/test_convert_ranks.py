"""`mpirun stagein convert …`: the same bytes as one process makes, and one sentence and exit code when a rank fails."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mpi import descendants, rank_pids, run_ranks, start_ranks

from stagein.formats import verify
from stagein.formats.publish import PART_SUFFIX

pytestmark = pytest.mark.mpi

CONVERT = (sys.executable, "-m", "stagein.tools.cli", "convert", "imagefolder")
OPTIONS = ("--shard-bytes", "64KiB", "--workers", "1")


def tree(root: Path) -> dict[str, bytes | Path]:
    """Every file and link below a folder, with its content or target."""
    return {
        str(path.relative_to(root)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture(scope="module")
def many(jpeg_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough images for all ranks to take part: 850 in some 40 shards."""
    root = tmp_path_factory.mktemp("many") / "images"
    for copy in range(10):
        shutil.copytree(
            jpeg_folder,
            root,
            dirs_exist_ok=True,
            copy_function=lambda a, b, n=copy: os.link(a, f"{b[:-4]} ü{n}.jpg"),
        )
    return root


@pytest.fixture(scope="module")
def expected(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | Path]:
    """What one process makes of them."""
    target = tmp_path_factory.mktemp("expected") / "x.st"
    subprocess.run([*CONVERT, many, target, *OPTIONS], check=True, capture_output=True)
    return tree(target)


def test_ranks_make_the_bytes_of_one_process(many: Path, expected: dict[str, bytes | Path], tmp_path: Path) -> None:
    result = run_ranks(3, *CONVERT, many, tmp_path / "x.st", *OPTIONS, nodes=["a", "b", "b"])
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2, "one rank alone prints"
    assert tree(tmp_path / "x.st") == expected
    assert not list(verify(tmp_path / "x.st").problems)


def test_a_bad_record_on_any_rank_ends_all_with_its_sentence(jpeg_folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(jpeg_folder, tmp_path / "source")
    content = (source / "rings/00005.jpg").read_bytes()
    (source / "rings/00005.jpg").write_bytes(content[: len(content) // 2])
    result = run_ranks(3, *CONVERT, source, tmp_path / "x.st", *OPTIONS)
    assert result.returncode == 3
    assert result.stderr.count("truncated JPEG") == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x.st").exists()


def test_an_error_of_rank_0_alone_ends_all(tmp_path: Path) -> None:
    result = run_ranks(2, *CONVERT, tmp_path / "nowhere", tmp_path / "x.st")
    assert result.returncode == 3
    assert result.stderr.count("cannot be listed") == 1
    (tmp_path / "x.st").mkdir()
    (tmp_path / "c" / "c").mkdir(parents=True)
    result = run_ranks(2, *CONVERT, tmp_path / "c", tmp_path / "x.st")
    assert result.returncode == 2
    assert result.stderr.count("exists and is not a stagein data set") == 1


def test_dry_run_on_ranks_prints_once_and_writes_nothing(jpeg_folder: Path, tmp_path: Path) -> None:
    result = run_ranks(2, *CONVERT, jpeg_folder, tmp_path / "x.st", "--dry-run")
    assert result.returncode == 0
    assert result.stdout.count("would be 85 records") == 1
    assert list(tmp_path.iterdir()) == []


SLOW_RECORDS = """
import time
import numpy as np

class Slow:
    def __len__(self):
        return 401

    def __getitem__(self, number):
        time.sleep(0.025)
        return {"data": np.full(64, number, np.int32), "label": number}
"""
SLOW_OPTIONS = ("--shard-bytes", "1kB", "--codec", "none", "--workers", "1")


@pytest.fixture(scope="module")
def slow_convert(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Converting records that take their time, so that there is a middle to be killed in: 401 in 134 shards."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "slow.py").write_text(SLOW_RECORDS)
    return ["env", f"PYTHONPATH={folder}:{os.environ.get('PYTHONPATH', '')}", *CONVERT[:-1], "python", "slow:Slow"]


@pytest.fixture(scope="module")
def slow_expected(slow_convert: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes | Path]:
    """What one process makes of them."""
    target = tmp_path_factory.mktemp("expected") / "x.st"
    subprocess.run([*slow_convert, target, *SLOW_OPTIONS, "--workers", "5"], check=True, capture_output=True)
    return tree(target)


@pytest.fixture
def half_way(slow_convert: list[str], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Three ranks in the middle of a conversion to tmp_path/x.st, each with its worker at work."""
    with start_ranks(3, *slow_convert, tmp_path / "x.st", *SLOW_OPTIONS, nodes=["a", "b", "c"]) as launcher:
        journal = tmp_path / f"x.st{PART_SUFFIX}" / "journal"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            at_work = [pid for pid in rank_pids(launcher) if workers_of(pid)]
            if len(at_work) == 3 and len(list(journal.glob("*.npz"))) >= 5:
                break
            time.sleep(0.005)
        assert launcher.poll() is None and rank_pids(launcher), "the conversion is not under way"
        yield launcher


def workers_of(pid: int) -> list[int]:
    """The worker processes of a rank: forked of the process that starts them, which may also start others, for a moment, while it imports."""

    def forked(parent: int) -> list[int]:
        return [child for child in descendants(parent) if "forkserver" in read_of_process(child, "cmdline")]

    return [worker for server in forked(pid) for worker in forked(server)]


def tell(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and its descendants, those that have not ended."""
    for each in (pid, *descendants(pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)


def read_of_process(pid: int, name: str) -> str:
    """A file of /proc about a process; nothing when it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def pid_of_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    for pid in rank_pids(launcher):
        if f"OMPI_COMM_WORLD_RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return pid
    raise AssertionError(f"no rank {rank}")


def test_all_ranks_take_part(slow_convert: list[str], tmp_path: Path) -> None:
    script = Path(__file__).parent / "convert_rank.py"
    result = run_ranks(2, *slow_convert[:2], sys.executable, script, tmp_path / "x.st", nodes=["a", "b"])
    assert result.returncode == 0, result.stderr
    made = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("made ")]
    assert sum(made) == 134
    assert min(made) > 20


VICTIMS = {"leader": 0, "follower": 1}


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_rank_is_killed_and_the_same_command_ends_in_the_same_bytes(
    half_way: subprocess.Popen[str],
    slow_convert: list[str],
    slow_expected: dict[str, bytes | Path],
    tmp_path: Path,
    victim: str,
    signal_number: signal.Signals,
) -> None:
    os.kill(pid_of_rank(half_way, VICTIMS[victim]), signal_number)
    _, stderr = half_way.communicate(timeout=40)
    assert half_way.returncode != 0
    if signal_number == signal.SIGTERM:
        assert half_way.returncode == 6, stderr
        assert stderr.count("the same command again resumes") == 1, stderr
    check_resumed(slow_convert, slow_expected, tmp_path)


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_a_worker_of_a_rank_is_killed(
    half_way: subprocess.Popen[str],
    slow_convert: list[str],
    slow_expected: dict[str, bytes | Path],
    tmp_path: Path,
    victim: str,
) -> None:
    (worker,) = workers_of(pid_of_rank(half_way, 2))
    server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(server if victim == "server" else worker, signal.SIGKILL)
    _, stderr = half_way.communicate(timeout=40)
    assert half_way.returncode == 1
    assert "rank 2 on c: a worker process was killed" in stderr
    check_resumed(slow_convert, slow_expected, tmp_path)


def check_resumed(slow_convert: list[str], expected: dict[str, bytes | Path], tmp_path: Path) -> None:
    assert not (tmp_path / "x.st").exists(), "the conversion was over before it was killed"
    deadline = time.monotonic() + 20  # workers of killed ranks see their parent's end and go, and the lock with them
    while True:
        again = run_ranks(2, *slow_convert, tmp_path / "x.st", *SLOW_OPTIONS, "--workers", "3")
        if again.returncode != 2 or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert again.returncode == 0, again.stderr
    assert "kept from an earlier attempt" in again.stdout
    assert tree(tmp_path / "x.st") == expected


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_rank_that_hangs_is_named_in_time(slow_convert: list[str], tmp_path: Path, victim: str) -> None:
    with start_ranks(2, *slow_convert, tmp_path / "x.st", *SLOW_OPTIONS, "--timeout", "7") as launcher:
        while not list(tmp_path.glob(f"x.st{PART_SUFFIX}/journal/*.npz")) and launcher.poll() is None:
            time.sleep(0.01)
        pid = pid_of_rank(launcher, VICTIMS[victim])
        tell(pid, signal.SIGSTOP)
        try:
            _, stderr = launcher.communicate(timeout=40)
        finally:
            tell(pid, signal.SIGCONT)
    assert launcher.returncode == 75
    assert f"rank {VICTIMS[victim]} was not heard of for 7 s" in stderr
