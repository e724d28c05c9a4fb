"""SIGUSR1 and SIGTERM to real processes, however early they come: nothing is lost, and the exit code says interrupted."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mpi import rank_pids, start_ranks
from staged import assert_staged, final_folder
from synthetic import CHUNK_BYTES, write_dataset

from stagein.formats.errors import ExitCode, InterruptedRunError
from stagein.staging import stage
from stagein.stop_signals import StopSignals
from stagein.world import Communicator

STAGEIN = (sys.executable, "-m", "stagein.tools")


def test_blocks_nest_and_hand_signals_on() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as outer:
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopSignals() as inner:
            assert inner.received == "SIGUSR1"
    with StopSignals() as outer:
        with StopSignals() as inner:
            assert inner.received is None
            os.kill(os.getpid(), signal.SIGTERM)
        assert outer.received == "SIGTERM"
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "source", (20 * CHUNK_BYTES,))
    return tmp_path / "source"


@pytest.fixture
def to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "nvme").mkdir()
    return tmp_path / "nvme"


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process handles this signal itself."""
    with contextlib.suppress(OSError):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)
    return False


def wait_for_handlers(pids: list[int], number: signal.Signals = signal.SIGUSR1) -> None:
    end = time.monotonic() + 20
    while not all(catches(pid, number) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("command", [("stage", "none", "--to", "none"), ("train", "demo")])
def test_signals_are_noted_before_anything_heavy_is_imported(command: tuple[str, ...]) -> None:
    with subprocess.Popen([*STAGEIN, *command], stderr=subprocess.DEVNULL) as process:
        wait_for_handlers([process.pid])
        loaded = Path(f"/proc/{process.pid}/maps").read_text()
        process.kill()
    assert "numpy" not in loaded and "torch" not in loaded and "libmpi" not in loaded


@contextlib.contextmanager
def held_by_another_job(source: Path, to: Path) -> Iterator[None]:
    """A stage-in of this data set waits, so that it is surely not done before the signal."""
    (to / "stagein").mkdir()
    with open(final_folder(source, to).with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_staging_stops_in_good_order_whenever_the_signal_comes(source: Path, to: Path, name: str) -> None:
    command = [*STAGEIN, "stage", source, "--to", to]
    with held_by_another_job(source, to):
        for delay_seconds in (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8):
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
                wait_for_handlers([process.pid])
                time.sleep(delay_seconds)
                process.send_signal(getattr(signal, name))
                _, stderr = process.communicate(timeout=20)
            assert (process.returncode, stderr.count("stopped by a signal")) == (ExitCode.INTERRUPTED, 1), delay_seconds
            assert "Traceback" not in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "command",
    [
        "convert imagefolder no-source no-target",
        "info no-source",
        "verify no-source",
        "extract no-source 0",
        "adopt no-source no-target",
    ],
)
def test_every_command_ends_in_one_sentence_however_early_the_signal_comes(
    command: str, number: signal.Signals
) -> None:
    """It is busy with what it imports for a quarter of a second then: what it is asked for is a right command."""
    for delay_seconds in (0, 0.03, 0.1):
        words = [*STAGEIN, *command.split()]
        with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            wait_for_handlers([process.pid], signal.SIGTERM)
            time.sleep(delay_seconds)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=20)
        sentence = f"stagein: stopped by {number.name}: run the same command again\n"
        assert (process.returncode, stderr) == (ExitCode.INTERRUPTED, sentence), delay_seconds


def test_before_python_itself_runs_the_signal_kills_as_job_scripts_expect(source: Path, to: Path) -> None:
    with subprocess.Popen([*STAGEIN, "stage", source, "--to", to]) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) in (-signal.SIGUSR1, ExitCode.INTERRUPTED)


def test_a_signal_when_nothing_is_left_to_do_is_not_lost(source: Path, to: Path) -> None:
    stage(source, str(to), world=Communicator())
    with StopSignals():
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(InterruptedRunError, match="finds it complete"):
            stage(source, str(to), world=Communicator())
    assert_staged(source, to)


@pytest.mark.mpi
def test_ranks_that_are_signalled_while_they_import_stop_together(source: Path, tmp_path: Path, to: Path) -> None:
    for node in "ab":
        (tmp_path / f"disk-{node}").mkdir()
    command = [*STAGEIN, "stage", source, "--to", tmp_path / "disk-{node}"]
    with start_ranks(2, *command, nodes="ab") as launcher:
        while len(rank_pids(launcher)) < 2:
            time.sleep(0.001)
        wait_for_handlers(rank_pids(launcher))
        os.kill(launcher.pid, signal.SIGUSR1)
        _, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode == ExitCode.INTERRUPTED, stderr
    assert stderr.count("stopped by a signal") == 1


def test_training_saves_however_early_the_signal_comes(jpeg_dataset_path: Path, tmp_path: Path) -> None:
    settings = {
        "data.train": jpeg_dataset_path,
        "data.global_batch_size": 8,
        "train.checkpoint_folder": tmp_path / "checkpoints",
        "train.run_folder": tmp_path,
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with subprocess.Popen([*STAGEIN, "train", "demo", *words], stderr=subprocess.PIPE, text=True) as process:
        wait_for_handlers([process.pid])
        process.send_signal(signal.SIGUSR1)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED, stderr
    assert "stopped by SIGUSR1 after step 1" in stderr and list((tmp_path / "checkpoints").iterdir())


def test_a_signal_in_a_callback_in_which_nothing_can_be_raised_is_not_lost() -> None:
    script = (
        "import os, signal, sys, time, weakref\n"
        "from stagein.tools import __main__ as command\n"
        "class Watched: pass\n"
        "def run():\n"
        "    watched = Watched()\n"
        "    reference = weakref.ref(watched, lambda _: os.kill(os.getpid(), signal.SIGTERM))\n"
        "    del watched\n"
        "    time.sleep(30)\n"
        "command._run_command = run\n"
        "command.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    sentence = "stagein: stopped by SIGTERM: run the same command again\n"
    assert (result.returncode, result.stderr) == (ExitCode.INTERRUPTED, sentence)
