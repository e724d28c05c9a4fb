"""Threads that help their caller: all at work at once, none left behind, none missed in a process that is forked."""

import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_forks import held_by_another_thread, in_fork

from stagein.formats import Dataset, Field, Schema, Writer
from stagein.formats.codecs import Codec
from stagein.formats.helper_threads import HelperThreads
from stagein.formats.kernel_crew import ENTRY, FRAME, LEFT, LOOKING, SEATS, WORDS

SHAPE = (40, 40)


def _helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("stagein-helper", "stagein-crew"))]


def _wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    field = Field(kind="tensor", dtype="float32", shape=SHAPE, codec=Codec(name="zstd"))
    with Writer(tmp_path / "x.st", Schema(fields={"x": field}, primary="x"), container="hdf5") as writer:
        for number in range(20):
            writer.write({"x": np.full(SHAPE, number, np.float32)})
    with Dataset(tmp_path / "x.st") as other:  # kernels are compiled, as they are on any machine from some seconds on
        _wait_for(
            lambda: bool(len(other.reader.read_tensors(range(20), threads=2)) and other.reader._crew._desk[ENTRY])
        )
    return Dataset(tmp_path / "x.st")


def test_all_work_at_once_and_the_same_threads_the_next_time() -> None:
    team = HelperThreads()
    seen = []
    for _ in range(5):
        meeting = threading.Barrier(3, timeout=20)

        def work(meeting: threading.Barrier = meeting) -> int:
            meeting.wait()
            return threading.get_ident()

        seen.append(set(team.run(work, 3)))
    assert all(threads == seen[0] for threads in seen)
    assert len(seen[0]) == 3
    team.close()
    assert not _helpers()


@pytest.mark.parametrize("failing", ["caller", "helper"])
def test_an_error_of_one_is_raised_when_nobody_is_at_work_any_more(failing: str) -> None:
    team, caller, meeting, done = HelperThreads(), threading.get_ident(), threading.Barrier(2, timeout=20), []

    def work() -> None:
        meeting.wait()
        if (threading.get_ident() == caller) == (failing == "caller"):
            raise OSError("no")
        time.sleep(0.2)
        done.append(True)

    with pytest.raises(OSError, match="no"):
        team.run(work, 2)
    assert done == [True]
    team.close()


def test_a_caller_does_not_wait_for_threads_that_are_busy_for_others() -> None:
    team, leave, begun = HelperThreads(), threading.Event(), threading.Barrier(3, timeout=20)

    def hold() -> None:
        begun.wait()
        leave.wait(20)

    other = threading.Thread(target=team.run, args=(hold, 2))
    other.start()
    begun.wait()
    assert team.run(lambda: 7, 2) == [7]
    leave.set()
    other.join()
    team.close()


def test_threads_end_with_their_reader(dataset: Dataset) -> None:
    order = list(range(20))
    dataset.reader.read_tensors(order, threads=3)
    assert len(_helpers()) == 2
    dataset.close()
    assert not _helpers()
    again = Dataset(dataset.path)
    again.reader.read_tensors(order, threads=2)
    assert len(_helpers()) == 1
    del again
    _wait_for(lambda: not _helpers())


def test_threads_of_a_crew_have_a_part_in_each_call_and_sleep_in_between(dataset: Dataset) -> None:
    reader, order = dataset.reader, list(range(20)) * 50
    expected = np.repeat(np.array(order, np.float32), SHAPE[0] * SHAPE[1]).reshape(-1, *SHAPE)
    helped = 0

    def both_have_helped_often() -> bool:  # how soon is the scheduler's choice: there may be fewer cores than threads
        nonlocal helped
        assert np.array_equal(reader.read_tensors(order, threads=3), expected)
        helped += reader._crew._desk[LEFT] == 2
        return bool(helped > 20)

    _wait_for(both_have_helped_often)
    _wait_for(lambda: reader._crew._desk[LOOKING] == 0)


def test_a_crew_helps_one_caller_at_a_time_and_each_gets_its_own_records(dataset: Dataset) -> None:
    reader, wrong = dataset.reader, []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(100):
            order = random.integers(0, 20, 600)
            if not np.array_equal(reader.read_tensors(order, threads=3)[:, 0, 0], order):
                wrong.append(order)

    callers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_crew_is_not_asked_while_it_helps_another_caller(dataset: Dataset) -> None:
    reader, order = dataset.reader, list(range(20))
    expected = reader.read_tensors(order, threads=3)
    reader._crew._desk[ENTRY] = 0
    with reader._crew._calling:  # as that caller does
        assert np.array_equal(reader.read_tensors(order, threads=3), expected)
    assert reader._crew._desk[ENTRY] == 0
    assert np.array_equal(reader.read_tensors(order, threads=3), expected)
    assert reader._crew._desk[ENTRY] != 0


def test_a_thread_that_comes_late_still_finds_the_arguments(dataset: Dataset) -> None:
    """It may have taken a seat, and be without a processor until all is done: results take the place of arguments."""
    reader, order = dataset.reader, list(range(20)) * 1000
    expected = reader.read_tensors(order, threads=2)
    reader._crew.close()
    late, desk = reader._crew, reader._crew._desk
    late._threads = [threading.current_thread()]  # as if it were one of them
    tensors: list[NDArray[np.generic]] = []
    caller = threading.Thread(target=lambda: tensors.append(reader.read_tensors(order, threads=2)))
    caller.start()
    _wait_at_once_for(lambda: desk.item(SEATS) == 1)
    desk[SEATS] = -1  # a seat is taken, and another one that is not there
    arguments = _words(desk.item(FRAME), desk.item(WORDS))
    _wait_for(lambda: desk.item(SEATS) == 0)  # the caller has done it all, and waits
    assert _words(desk.item(FRAME), desk.item(WORDS)) == arguments
    assert caller.is_alive()
    desk[LEFT] = 1
    caller.join(20)
    assert np.array_equal(tensors[0], expected)
    late._threads = []


def _wait_at_once_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))


def test_a_call_does_not_wait_for_threads_that_do_not_come(dataset: Dataset) -> None:
    """They are asleep in the kernel when they are told to end, and are asked for once more."""
    reader, order = dataset.reader, list(range(20))
    expected = reader.read_tensors(order, threads=3)
    crew = reader._crew
    threads = list(crew._threads)
    crew.close()
    crew._threads = threads  # as if they were on their way
    assert np.array_equal(reader.read_tensors(order, threads=3), expected)
    crew._threads = []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_reads_with_threads_of_its_own(dataset: Dataset) -> None:
    reader, order = dataset.reader, list(range(20))
    expected = reader.read_tensors(order, threads=2)
    crew = reader._crew
    with held_by_another_thread(reader._files._changed, reader._helpers._starting, crew._starting, crew._calling):
        assert in_fork(lambda: np.array_equal(reader.read_tensors(order, threads=2), expected) and len(_helpers()) == 1)
    assert np.array_equal(reader.read_tensors(order, threads=2), expected)


def test_the_interpreter_exits_with_readers_open(dataset: Dataset) -> None:
    script = (
        "import sys; from stagein.formats import Dataset; from stagein.formats.kernel_crew import ENTRY\n"
        "dataset = Dataset(sys.argv[1])\n"
        "while not dataset.reader._crew._desk[ENTRY]: dataset.reader.read_tensors(range(20), threads=3)\n"
        "print('read')\n"
    )
    command = [sys.executable, "-c", script, str(dataset.path)]
    result = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("read\n", "")
