"""Large records are copied from memory maps of published shards: the same bytes, and no map where it would be a danger."""

import ctypes
import mmap
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_system_calls import failing, why_no_strace

from stagein.formats import Field, RecordIndex, free_memory, shard_files
from stagein.formats.checksums import crc32c
from stagein.formats.errors import ChecksumError, SourceError
from stagein.formats.record_reader import RecordReader

BYTES = Field(kind="encoded", dtype="uint8", shape=(None,), encoding="bytes")
SIZES = [3, 300_001, 70_000, 70_001, 1_000_000, 0, 320 << 10, 500]
NOBODY = 65534


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A published file with records that lie back to back."""
    path = tmp_path / "shard"
    path.write_bytes(np.random.default_rng(0).bytes(sum(SIZES)))
    path.chmod(0o444)
    return path


def contents_of(shard: Path) -> list[bytes]:
    content, ends = shard.read_bytes(), np.cumsum(SIZES).tolist()
    return [content[end - size : end] for size, end in zip(SIZES, ends, strict=True)]


def open_reader(shard: Path, contents: list[bytes]) -> RecordReader:
    sizes = np.array(SIZES, np.uint32)
    offset = (np.cumsum(sizes) - sizes).astype(np.uint64)
    sums = np.array([crc32c(content) for content in contents], np.uint32)
    return RecordReader(BYTES, RecordIndex(np.zeros(len(sizes), np.uint32), offset, sizes, sums), [shard])


def maps_of(shard: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{shard}\n")


def evict(shard: Path) -> None:
    with open(shard, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("order", [[1], [0, 1, 2, 3, 4, 5, 6, 7], [2, 3, 1, 6, 4, 4, 0]], ids=str)
@pytest.mark.parametrize("check", [True, False])
def test_records_come_from_a_map_as_they_are_and_wherever_they_go(shard: Path, order: list[int], check: bool) -> None:
    contents = contents_of(shard)
    reader = open_reader(shard, contents)
    expected = b"".join(contents[number] for number in order)
    for shift in (0, 1, 31, 64):
        buffer = bytearray(b"\xaa" * (len(expected) + 200))
        packed = reader.read_packed(order, memoryview(buffer)[shift:-100], check=check)
        assert [view.tobytes() for view in packed] == [contents[number] for number in order]
        assert buffer[:shift] + buffer[shift + len(expected) :] == b"\xaa" * 200
    assert maps_of(shard) == 1


def held_bytes(shard: Path) -> int:
    """What of its map counts as memory of this process."""
    maps = Path("/proc/self/smaps").read_text()
    return int(maps[maps.index(f"{shard}\n") :].split("Rss:")[1].split()[0]) << 10


@pytest.mark.parametrize("order", [[4], [4, 5, 6]], ids=str)
@pytest.mark.parametrize("check", [True, False])
def test_pages_count_as_memory_of_the_process_only_where_all_maps_together_are_small(
    shard: Path, order: list[int], check: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, contents = shard.with_name("other"), contents_of(shard)
    shutil.copy(shard, other)
    monkeypatch.setattr(shard_files, "_KEPT_BYTES", 3 * sum(SIZES) // 2)
    small = open_reader(shard, contents)
    small.read_packed(order, check=check)
    assert held_bytes(shard) >= SIZES[4]
    small.close()
    sizes = np.array(SIZES * 2, np.uint32)
    index = RecordIndex(
        np.repeat([0, 1], len(SIZES)).astype(np.uint32),
        np.tile(np.cumsum(SIZES) - SIZES, 2).astype(np.uint64),
        sizes,
        np.array([crc32c(content) for content in contents * 2], np.uint32),
    )
    large = RecordReader(BYTES, index, [shard, other])
    large.read_packed(order, check=check)
    large.read_packed([number + len(SIZES) for number in order], check=check)
    assert held_bytes(other) == 0
    large.read_packed(order)
    assert held_bytes(shard) == 0


def test_a_map_is_closed_with_its_shard(shard: Path) -> None:
    reader = open_reader(shard, contents_of(shard))
    for _ in range(3):
        reader.read_packed([1, 4])
        assert maps_of(shard) == 1
        reader._files.forget(0)
        assert maps_of(shard) == 0
    reader.read_packed([1, 4])
    reader.close()
    assert maps_of(shard) == 0


COLD = """
import resource, sys
from pathlib import Path
from test_mapped_reads import contents_of, evict, maps_of, open_reader
from stagein.formats import shard_files
shard_files._FITTING_SHARE = 0
shard, other_name = Path(sys.argv[1]), Path(sys.argv[2])
contents = contents_of(other_name)
reader = open_reader(shard, contents)
reader.read_packed([0])
evict(other_name)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
packed = reader.read_packed([4, 1, 2, 3])
assert resource.getrusage(resource.RUSAGE_SELF).ru_majflt == faults
assert maps_of(shard) == 1
assert [view.tobytes() for view in packed] == [contents[number] for number in (4, 1, 2, 3)]
"""


def test_what_is_not_in_memory_is_read_and_not_waited_for_page_by_page(shard: Path) -> None:
    """strace has the kernel fetch nothing ahead, which would be in time for some."""
    if reason := why_no_strace():
        pytest.skip(reason)
    other_name = shard.with_name("other name")
    other_name.hardlink_to(shard)
    command = [*failing("fadvise64", "retval=0", shard), sys.executable, "-c", COLD, shard, other_name]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, timeout=100)


def pages_in_memory(shard: Path) -> NDArray[np.bool_]:
    """Which pages of a file are, [pages]. Asked for by a map, which leaves no trace: a read fetches the page."""
    with open(shard, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        found = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        assert mincore(view.ctypes.data, len(view), found.ctypes.data) == 0
        del view
    return found & 1 == 1


LARGE_PAGE = 2 << 20


def fully_in_memory(shard: Path) -> set[int]:
    """Numbers of the large pages of which every page is in memory."""
    pages = pages_in_memory(shard)
    return {number for number in range(-(-len(pages) // 512)) if pages[512 * number : 512 * (number + 1)].all()}


@pytest.mark.parametrize("fits", [True, False])
def test_what_is_cold_is_fetched_by_large_pages_where_all_of_it_fits_into_memory(
    tmp_path: Path, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fits:
        monkeypatch.setattr(shard_files, "_FITTING_SHARE", 1e-9)
    shard, size = tmp_path / "shard", 100_000
    shard.write_bytes(np.random.default_rng(0).bytes(4 * LARGE_PAGE + 100_000))
    shard.chmod(0o444)
    content = shard.read_bytes()
    starts = [LARGE_PAGE + 700_000, 4 * LARGE_PAGE - 50_000]
    sums = np.array([crc32c(content[start : start + size]) for start in starts], np.uint32)
    starts_and_sizes = np.array(starts, np.uint64), np.full(2, size, np.uint32)
    index = RecordIndex(np.zeros(2, np.uint32), *starts_and_sizes, sums)
    for order in ([0], [1]):
        evict(shard)
        if pages_in_memory(shard).any():
            pytest.skip("what was read cannot be made cold here")
        reader = RecordReader(BYTES, index, [shard])
        (record,) = reader.read_packed(order)
        assert record.tobytes() == content[starts[order[0]] : starts[order[0]] + size]
        wanted = [{1}, {3, 4}][order[0]] if fits else set()
        until = time.monotonic() + 10
        while not wanted <= fully_in_memory(shard):  # some of it may be on its way
            assert time.monotonic() < until
            time.sleep(0.01)
        assert 0 not in fully_in_memory(shard) and (fits or 1 not in fully_in_memory(shard))
        assert held_bytes(shard) == 0
        reader.close()


def test_memory_for_files_is_what_the_job_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    assert 0 < free_memory.memory_for_files_bytes() <= whole
    monkeypatch.setattr(free_memory, "_CONTROL_GROUPS", tmp_path)
    (tmp_path / "job/step").mkdir(parents=True)
    (tmp_path / "job/memory.max").write_text("7000\n")
    (tmp_path / "job/step/memory.max").write_text("max\n")
    (tmp_path / "memory/slurm").mkdir(parents=True)
    (tmp_path / "memory/slurm/memory.limit_in_bytes").write_text("9000\n")
    assert free_memory._limits("0::/job/step\n") == [7000]
    assert free_memory._limits("3:cpu,memory:/slurm/task\n4:cpuset:/slurm\n") == [9000]
    assert free_memory._limits("0::/other\n") == []


@pytest.mark.parametrize("order", [[4], [2, 3, 4]], ids=str)
def test_a_flipped_bit_is_found(shard: Path, order: list[int]) -> None:
    reader = open_reader(shard, contents_of(shard))
    reader.read_packed(order)
    shard.chmod(0o644)
    with open(shard, "r+b") as file:
        file.seek(sum(SIZES[:4]) + 700_000)
        file.write(bytes(100))
    with pytest.raises(ChecksumError, match=r"record 4 in .*/shard is damaged"):
        reader.read_packed(order)


def test_before_a_record_is_called_damaged_it_is_read_from_the_disk(shard: Path) -> None:
    contents = contents_of(shard)
    evict(shard)
    if bytes_from_disk(lambda: shard.read_bytes()) == 0:
        pytest.skip("no disk is read here")
    contents[4] = bytes(SIZES[4])  # not what the index says
    reader = open_reader(shard, contents)
    assert reader.read_packed([4], check=False)
    with open(shard, "rb") as file:
        os.fsync(file.fileno())

    def read() -> None:
        with pytest.raises(ChecksumError, match=r"record 4 in .*/shard is damaged"):
            reader.read_packed([4])

    assert bytes_from_disk(read) > SIZES[4] // 2  # pages at its ends may be shared with what stays


def bytes_from_disk(read: Callable[[], object]) -> int:
    def count() -> int:
        return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])

    before = count()
    read()
    return count() - before


CUT_WHILE_MAPPED = """
import os, sys
from pathlib import Path
from test_mapped_reads import contents_of, maps_of, open_reader
from stagein.formats.errors import SourceError
shard, size, order, check = Path(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3]), eval(sys.argv[4])
reader = open_reader(shard, contents_of(shard))
reader.read_packed(order, check=check)
shard.chmod(0o644)
os.truncate(shard, size)
assert maps_of(shard) == 1
try:
    reader.read_packed(order, check=check)
except SourceError as error:
    print(error)
"""


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("order", [[3], [2, 3]], ids=str)
@pytest.mark.parametrize("missing", [1, 40_000, 200_000])
def test_a_shard_cut_while_it_is_mapped_is_an_error_and_no_signal(
    shard: Path, order: list[int], missing: int, check: bool
) -> None:
    """In the page where a file ends, what is behind its end is zeros; in the pages behind that it is SIGBUS."""
    size = sum(SIZES[:4]) - missing
    command = [sys.executable, "-c", CUT_WHILE_MAPPED, shard, str(size), str(order), str(check)]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")
    assert "shard is cut off: the shard has fewer bytes than its manifest says" in result.stdout


CUT_WHILE_COPIED = """
import os, sys, threading
from pathlib import Path
from test_mapped_reads import contents_of, open_reader
from stagein.formats.errors import SourceError
shard, order, check = Path(sys.argv[1]), eval(sys.argv[2]), eval(sys.argv[3])
reader = open_reader(shard, contents_of(shard))
later = threading.Timer(0.5, os.truncate, (shard, sum(map(len, contents_of(shard))) - 600))
reader.read_packed([0], check=False)
later.start()
try:
    reader.read_packed(order, check=check)
except SourceError as error:
    print(error)
"""


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("order", [[6], [6, 7]], ids=str)
def test_a_shard_cut_between_the_question_and_the_copy(shard: Path, order: list[int], check: bool) -> None:
    """strace holds the process for two seconds where it has just learnt that the file is whole."""
    if reason := why_no_strace():
        pytest.skip(reason)
    hold = failing("lseek", "delay_exit=2000000", shard)
    command = [*hold, sys.executable, "-c", CUT_WHILE_COPIED, shard, str(order), str(check)]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=100)
    assert "shard is cut off: the shard has fewer bytes than its manifest says" in result.stdout, result.stderr


def test_no_more_maps_than_a_process_may_have(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "_MOST_MAPS", 1)
    other = shard.with_name("other")
    shutil.copy(shard, other)
    contents, size = contents_of(shard), sum(SIZES)
    index = RecordIndex(
        np.arange(2, dtype=np.uint32),
        np.zeros(2, np.uint64),
        np.full(2, size, np.uint32),
        np.full(2, crc32c(b"".join(contents)), np.uint32),
    )
    reader = RecordReader(BYTES, index, [shard, other])
    assert reader.read_packed([0, 1]).buffer.tobytes() == b"".join(contents) * 2
    assert (maps_of(shard), maps_of(other)) == (1, 0)


def test_a_record_behind_the_end_of_the_file(shard: Path) -> None:
    contents = contents_of(shard)
    shard.chmod(0o644)
    os.truncate(shard, sum(SIZES[:4]) + 500_000)
    shard.chmod(0o444)
    reader = open_reader(shard, contents)
    with pytest.raises(SourceError, match=r"record 4 in .* is cut off"):
        reader.read_packed([4])
    with pytest.raises(SourceError, match=r"record 6 in .* is cut off"):
        reader.read_packed([6], check=False)


def test_a_forked_process_reads_from_the_map_and_closes_its_own(shard: Path) -> None:
    contents = contents_of(shard)
    reader = open_reader(shard, contents)
    reader.read_packed([4])
    child = os.fork()
    if child == 0:
        is_right = maps_of(shard) == 1 and [view.tobytes() for view in reader.read_packed([4, 1])] == [
            contents[4],
            contents[1],
        ]
        reader.close()
        os._exit(0 if is_right and maps_of(shard) == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert reader.read_packed([4])[0].tobytes() == contents[4]
    assert maps_of(shard) == 1


def test_a_file_that_somebody_may_write_to_is_not_mapped(shard: Path) -> None:
    contents = contents_of(shard)
    shard.chmod(0o464)
    reader = open_reader(shard, contents)
    assert reader.read_packed([4])[0].tobytes() == contents[4]
    assert maps_of(shard) == 0


NOT_MAPPED = """
import resource, sys
from pathlib import Path
from test_mapped_reads import contents_of, maps_of, open_reader
shard, most_memory_bytes = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (most_memory_bytes, most_memory_bytes))
contents = contents_of(shard)
reader = open_reader(shard, contents)
assert reader.read_packed([4])[0].tobytes() == contents[4]
assert maps_of(shard) == 0
"""


def test_nothing_is_mapped_where_addresses_are_rationed(shard: Path) -> None:
    command = [sys.executable, "-c", NOT_MAPPED, shard, str(1 << 40)]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, timeout=100)


def test_a_file_system_that_maps_nothing(shard: Path) -> None:
    if reason := why_no_strace():
        pytest.skip(reason)
    command = [
        *failing("mmap", "error=ENODEV", shard),
        sys.executable,
        "-c",
        NOT_MAPPED,
        shard,
        str(resource.RLIM_INFINITY),
    ]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, timeout=100)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can read: those of pytest are its user's."""
    folder = Path(tempfile.mkdtemp(prefix="stagein-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


ANOTHER_USER = f"""
import os, sys
from pathlib import Path
from test_mapped_reads import contents_of, evict, maps_of, open_reader
shard, is_mapped = Path(sys.argv[1]), sys.argv[2] == "mapped"
contents = contents_of(shard)
reader = open_reader(shard, contents)
open_reader(Path(sys.executable), contents).read_packed([0], check=False)  # another user cannot import what that imports
reader.read_packed([0] if is_mapped else [])
evict(shard)
os.setuid({NOBODY})
assert [view.tobytes() for view in reader.read_packed([4, 1])] == [contents[4], contents[1]]
assert maps_of(shard) == is_mapped
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
@pytest.mark.parametrize("when", ["not mapped", "mapped"])
def test_the_kernel_does_not_tell_what_is_in_memory_of_a_file_of_others(
    shard: Path, open_folder: Path, when: str
) -> None:
    """It is not mapped; if it was while it was ours, its bytes are right nevertheless."""
    shutil.copy(shard, open_folder / "shard")
    subprocess.run(
        [sys.executable, "-c", ANOTHER_USER, open_folder / "shard", when],
        cwd=Path(__file__).parent,
        check=True,
        timeout=100,
    )
