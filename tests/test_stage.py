"""Stage-in with real files, real ranks and real faults: what is published is right, or nothing is."""

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from disks import small_disk
from mpi import run_ranks, start_ranks
from staged import assert_staged, final_folder, flip_byte, journaled_chunks, preadv_refusing, work_folder
from synthetic import CHUNK_BYTES, write_dataset

from stagein import chunk_io, chunk_threads
from stagein.cache import READY_NAME, Store, expand_node
from stagein.finding import find_staged, note_destination
from stagein.formats.errors import (
    ChecksumError,
    ExitCode,
    NoSpaceError,
    SourceError,
    UsageError,
    WatchdogError,
)
from stagein.formats.manifest import Manifest
from stagein.probes import direct_is_faster
from stagein.receipt import Receipt
from stagein.stage_plan import MINIMUM_BUFFERS, PlanSummary
from stagein.staging import plan_stage, stage
from stagein.tools.stage import run as run_command
from stagein.world import Communicator

COMMAND = (sys.executable, "-m", "stagein.tools")
RANK = Path(__file__).with_name("staging_rank.py")
SHARD_SIZES = (20 * CHUNK_BYTES, 7 * CHUNK_BYTES + 1, 1, 13 * CHUNK_BYTES - 1, 16 * CHUNK_BYTES)
FILE_SIZES = (1000, 0, 2 * CHUNK_BYTES)
CALL_OVERHEAD_BYTES = 1 << 20
"""Reads beside the data itself: the manifest, /proc, Python modules, MPI."""


@pytest.fixture(autouse=True)
def no_trace_in_this_users_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("STAGEIN_TO", raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "source", SHARD_SIZES, FILE_SIZES)
    return tmp_path / "source"


@pytest.fixture
def to(tmp_path: Path) -> Path:
    (tmp_path / "nvme").mkdir()
    return tmp_path / "nvme"


@pytest.fixture
def node_disks(tmp_path: Path) -> Iterator[str]:
    """A destination with {node} in it, and a folder for each of the nodes a, b and c."""
    for node in "abc":
        (tmp_path / f"nvme-{node}").mkdir()
    yield str(tmp_path / "nvme-{node}")


def stage_alone(source: Path, to: Path, **options: object) -> Receipt:
    return stage(source, str(to), world=Communicator(), **options)


def stage_over_ranks(
    source: Path, to: str, nodes: str, *options: str | float
) -> tuple[subprocess.CompletedProcess[str], dict | None]:
    """The launcher's result, and what rank 0 reported. Each letter of `nodes` is a rank on the node of that name."""
    result = run_ranks(len(nodes), sys.executable, RANK, source, to, *map(str, options), nodes=nodes)
    lines = result.stdout.strip().splitlines()
    return result, json.loads(lines[-1]) if result.returncode == 0 else None


def start_alone(source: Path, to: Path, *options: str | float) -> subprocess.Popen[str]:
    command = [sys.executable, str(RANK), str(source), str(to), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Alone: one process, no MPI


def test_alone_every_file_arrives(source: Path, to: Path) -> None:
    receipt = stage_alone(source, to)
    assert_staged(source, to)
    total = sum(SHARD_SIZES) + sum(FILE_SIZES)
    (node,) = receipt.nodes
    assert (receipt.read_bytes, receipt.written_bytes, node.sent_bytes) == (total, total, 0)
    assert node.verified_chunks == 20 + 8 + 1 + 13 + 16 + 1 + 2
    assert Receipt.model_validate_json((final_folder(source, to) / "receipt.json").read_bytes()) == receipt


def test_alone_mpi_is_not_even_imported(source: Path, to: Path) -> None:
    code = "import sys; from stagein import stage; stage(*sys.argv[1:]); assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(source), str(to)], check=True)
    assert_staged(source, to)


@pytest.mark.parametrize("shard_sizes", [(), (0,), (1,), (CHUNK_BYTES,), (0, CHUNK_BYTES, 0, CHUNK_BYTES + 1)])
def test_sizes_at_the_edges(tmp_path: Path, to: Path, shard_sizes: tuple[int, ...]) -> None:
    write_dataset(tmp_path / "edge", shard_sizes, ())
    stage_alone(tmp_path / "edge", to)
    assert_staged(tmp_path / "edge", to)


def test_memory_of_four_chunks_is_enough(source: Path, to: Path) -> None:
    stage_alone(source, to, memory_bytes=1)
    assert_staged(source, to)


def test_a_converted_data_set_reads_the_same_from_its_copy(jpeg_dataset_path: Path, to: Path) -> None:
    import zarr

    from stagein.formats import Dataset, verify

    stage_alone(jpeg_dataset_path, to)
    copy = final_folder(jpeg_dataset_path, to)
    assert verify(copy).problems == []
    ids = list(range(len(Dataset(copy))))
    pairs = zip(Dataset(copy).read_records(ids), Dataset(jpeg_dataset_path).read_records(ids), strict=True)
    assert all(bytes(ours) == bytes(theirs) for ours, theirs in pairs)
    primary = Manifest.load(copy).record_schema.primary
    assert (zarr.open_group(copy)[primary][:] == zarr.open_group(jpeg_dataset_path)[primary][:]).all()


def test_again_moves_nothing(source: Path, to: Path) -> None:
    first = stage_alone(source, to)
    ready = final_folder(source, to) / READY_NAME
    before = {path: path.stat().st_mtime_ns for path in ready.parent.rglob("*")}
    again = stage_alone(source, to)
    assert not first.moved_nothing and again.moved_nothing
    assert (again.read_bytes, again.written_bytes, again.nodes[0].reused_bytes) == (0, 0, first.dataset_bytes)
    after = {path: path.stat().st_mtime_ns for path in ready.parent.rglob("*")}
    assert after.pop(ready) > before.pop(ready), "the time of its last use"
    assert after == before


def test_two_versions_of_a_data_set_do_not_mix(tmp_path: Path, source: Path, to: Path) -> None:
    write_dataset(tmp_path / "other", SHARD_SIZES, FILE_SIZES, seed=1)
    stage_alone(source, to)
    stage_alone(tmp_path / "other", to)
    assert_staged(source, to)
    assert_staged(tmp_path / "other", to)


# The source


def test_a_flipped_byte_in_the_source_is_named_and_nothing_published(source: Path, to: Path) -> None:
    flip_byte(source / "shards/00003.h5", 5 * CHUNK_BYTES + 17)
    with pytest.raises(
        ChecksumError, match=rf"00003.h5 .* from {5 * CHUNK_BYTES}: .* is [0-9a-f]{{32}}, not [0-9a-f]{{32}}"
    ):
        stage_alone(source, to)
    assert not final_folder(source, to).exists()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "bytes, the manifest says"),
        (grow, "bytes, the manifest says"),
        (Path.unlink, "No such file"),
        (replace_by_folder, "not a regular file"),
    ],
)
def test_a_wrong_source_file_is_refused_before_anything_moves(source: Path, to: Path, damage, sentence: str) -> None:
    damage(source / "shards/00001.h5")
    with pytest.raises(SourceError, match=f"00001.h5 .*{sentence}"):
        stage_alone(source, to)
    assert list(to.iterdir()) == []


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR], ids=["fifo", "socket", "device"])
@pytest.mark.parametrize("name", ["shards/00001.h5", "index/part1"], ids=["a shard", "an empty file"])
def test_what_is_no_file_is_refused_and_not_waited_for(source: Path, to: Path, name: str, kind: int) -> None:
    if kind == stat.S_IFCHR and os.geteuid() != 0:
        pytest.skip("making a device takes root")
    (source / name).unlink()
    os.mknod(source / name, kind | 0o644, os.makedev(1, 5))  # a device is /dev/zero
    with pytest.raises(SourceError, match=f"{name} is not a regular file"):
        stage_alone(source, to)
    assert list(to.iterdir()) == []


def test_a_folder_that_is_a_link_is_followed_inside_the_data_set_only(source: Path, to: Path, tmp_path: Path) -> None:
    (source / "shards").rename(source / "elsewhere")
    (source / "shards").symlink_to("elsewhere")
    stage_alone(source, to)
    assert_staged(source, to)
    (source / "elsewhere").rename(tmp_path / "outside")
    (source / "shards").unlink()
    (source / "shards").symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match=r"(?s)5 files .*00000\.h5 lies outside the data set, in /\S*/outside"):
        stage_alone(source, to)
    (source / "shards").unlink()
    (source / "shards").symlink_to("shards")
    with pytest.raises(SourceError, match="symbolic links"):
        stage_alone(source, to)


def test_a_link_left_in_the_work_folder_leads_nowhere(source: Path, to: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "precious", SHARD_SIZES, FILE_SIZES, seed=1)
    before = (tmp_path / "precious/shards/00000.h5").read_bytes()
    work_folder(source, to).mkdir(parents=True)
    (work_folder(source, to) / "shards").symlink_to(tmp_path / "precious/shards")
    stage_alone(source, to)
    assert_staged(source, to)
    assert (tmp_path / "precious/shards/00000.h5").read_bytes() == before


def test_all_bad_files_are_listed(source: Path, to: Path) -> None:
    (source / "shards/00001.h5").unlink()
    truncate(source / "shards/00003.h5")
    with pytest.raises(SourceError, match=r"00001\.h5 failed: No such.*\n.*00003\.h5 has "):
        stage_alone(source, to)


def test_of_very_many_bad_files_the_first_are_listed_and_all_counted(tmp_path: Path, to: Path) -> None:
    write_dataset(tmp_path / "many", [CHUNK_BYTES] * 30)
    for number in range(1, 30):
        truncate(tmp_path / f"many/shards/{number:05d}.h5")
    with pytest.raises(SourceError, match=r"(?s)^29 files .*00001\.h5 has .*00020\.h5 has [^\n]*\n  and 9 more$"):
        stage_alone(tmp_path / "many", to)


@pytest.mark.parametrize("error_number", [errno.EACCES, errno.EIO])
def test_all_files_that_cannot_be_read_are_listed_and_the_others_kept(
    source: Path, to: Path, monkeypatch: pytest.MonkeyPatch, error_number: int
) -> None:
    monkeypatch.setattr(chunk_io, "RETRY_PAUSES_SECONDS", (0.01, 0.01))
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", preadv_refusing(["00000.h5", "00003.h5"], error_number))
        why = os.strerror(error_number)
        with pytest.raises(SourceError, match=rf"(?s)^2 files .*00000\.h5 failed: {why}\n.*00003\.h5 failed: {why}$"):
            stage_alone(source, to)
    bad_bytes = SHARD_SIZES[0] + SHARD_SIZES[3]
    assert stage_alone(source, to).read_bytes == bad_bytes
    assert_staged(source, to)


def test_a_source_that_is_gone_is_not_tried_for_ever(tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "many", [CHUNK_BYTES] * 200)
    names = [f"{number:05d}.h5" for number in range(200)]
    monkeypatch.setattr(os, "preadv", preadv_refusing(names, errno.EACCES))
    with pytest.raises(SourceError, match=r"^2\d files of the source"):
        stage_alone(tmp_path / "many", to)


@pytest.mark.parametrize(
    ("shard_sizes", "new_bytes"),
    [((20 * CHUNK_BYTES, 20 * CHUNK_BYTES), 21 * CHUNK_BYTES), ((20 * CHUNK_BYTES,), 100)],
    ids=["grown before it is opened", "truncated while it is open"],
)
def test_a_shard_that_changes_while_it_is_copied(
    tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch, shard_sizes: tuple[int, ...], new_bytes: int
) -> None:
    last = tmp_path / f"changing/shards/{len(shard_sizes) - 1:05d}.h5"
    write_dataset(tmp_path / "changing", shard_sizes, ())
    monkeypatch.setitem(chunk_threads._THREADS, "read", 1)  # so that we know which file is open
    with pytest.raises(SourceError, match=f"{last.name} has {new_bytes} bytes, the manifest says {shard_sizes[-1]}"):
        stage_alone(tmp_path / "changing", to, memory_bytes=1, progress=lambda *_: os.truncate(last, new_bytes))
    assert not final_folder(tmp_path / "changing", to).exists()


def test_a_shard_that_turns_into_something_to_wait_for_is_not_waited_for(
    tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "changing"
    write_dataset(source, (20 * CHUNK_BYTES, 20 * CHUNK_BYTES), ())
    monkeypatch.setitem(chunk_threads._THREADS, "read", 1)  # so that the second one is not open yet

    def replace(done: int, total: int) -> None:
        if (source / "shards/00001.h5").is_file():
            (source / "shards/00001.h5").unlink()
            os.mkfifo(source / "shards/00001.h5")

    with pytest.raises(SourceError, match=r"00001\.h5 is not a regular file"):
        stage_alone(source, to, memory_bytes=1, progress=replace)


def test_a_shard_that_is_replaced_while_it_is_copied(tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "changing"
    write_dataset(source, (20 * CHUNK_BYTES, 20 * CHUNK_BYTES), ())
    write_dataset(tmp_path / "other", (20 * CHUNK_BYTES, 20 * CHUNK_BYTES), (), seed=1)
    monkeypatch.setitem(chunk_threads._THREADS, "read", 1)  # so that we know which file is open

    def replace(done: int, total: int) -> None:
        if (tmp_path / "other/shards/00001.h5").exists():
            (tmp_path / "other/shards/00001.h5").replace(source / "shards/00001.h5")

    with pytest.raises(ChecksumError, match=r"00001\.h5 differs from the manifest"):
        stage_alone(source, to, memory_bytes=1, progress=replace)
    assert not final_folder(source, to).exists()


def test_a_manifest_that_is_no_json(source: Path, to: Path) -> None:
    (source / "manifest.json").write_text("{")
    with pytest.raises(SourceError, match="not JSON"):
        stage_alone(source, to)


def test_trouble_that_passes_is_waited_for(source: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, troubles = os.preadv, [errno.EIO, errno.ESTALE]

    def preadv_with_trouble(*words):
        if troubles:
            raise OSError(troubles.pop(), "trouble")
        return preadv(*words)

    monkeypatch.setattr(os, "preadv", preadv_with_trouble)
    stage_alone(source, to)
    assert not troubles
    assert_staged(source, to)


# The destination


def test_a_missing_destination_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere on node .* is not a folder"):
        stage_alone(source, tmp_path / "nowhere")


def test_a_destination_inside_the_source_is_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="lies inside the source"):
        stage_alone(source, source / "shards")


def test_a_read_only_destination_is_refused(source: Path, to: Path) -> None:
    with small_disk(to, 1 << 20):
        subprocess.run(["mount", "-o", "remount,ro", str(to)], check=True)
        with pytest.raises(UsageError, match="cannot be written"):
            stage_alone(source, to)


def test_a_destination_without_room_is_refused_before_anything_moves(source: Path, to: Path) -> None:
    with small_disk(to, 1 << 20):
        with pytest.raises(NoSpaceError, match=r"needs [\d,]+ bytes, but node \S+ has room for 1,048,576"):
            stage_alone(source, to, policy="replicate")
        assert list(to.iterdir()) == []


@pytest.mark.parametrize("reserve", [True, False], ids=["when reserving", "when writing"])
def test_a_destination_that_gets_full_is_cleaned_up(
    source: Path, to: Path, monkeypatch: pytest.MonkeyPatch, reserve: bool
) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1 << 40)  # somebody else took the room after we looked
    if reserve:  # as on a disk: a tmpfs is not asked to, for the time that it takes
        monkeypatch.setattr(
            "stagein.cache.allocate", lambda descriptor, nbytes: os.posix_fallocate(descriptor, 0, nbytes or 1)
        )
    with small_disk(to, 2 << 20):
        with pytest.raises(NoSpaceError, match=f"no space left while {'making room' if reserve else 'writing'}"):
            stage_alone(source, to)
        assert not work_folder(source, to).exists() and not final_folder(source, to).exists()


def test_a_dry_run_writes_nothing(source: Path, to: Path) -> None:
    summary = plan_stage(source, str(to), world=Communicator(), probe_seconds=0.05)
    assert summary.policy == "replicate" and summary.dataset_id == Manifest.load(source).id
    (node,) = summary.nodes
    assert node.rates.source > 0 and node.rates.disk > 0 and node.rates.network is None
    slowest = max(node.reads_bytes / node.rates.source, node.gets_bytes / node.rates.disk)
    assert summary.predicted.seconds == pytest.approx(slowest) and summary.predicted.fits is None
    assert list(to.iterdir()) == []


def test_a_dry_run_over_a_complete_copy_predicts_nothing(source: Path, to: Path) -> None:
    stage_alone(source, to)
    summary = plan_stage(source, str(to), world=Communicator())
    assert summary.is_there and summary.predicted is None


def test_a_dry_run_says_whether_it_fits_the_job(source: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 3600))
    assert plan_stage(source, str(to), world=Communicator(), probe_seconds=0.05).predicted.fits
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) - 1))
    assert plan_stage(source, str(to), world=Communicator(), probe_seconds=0.05).predicted.fits is False


def test_a_dry_run_counts_what_an_earlier_run_brought(source: Path, to: Path) -> None:
    start_alone(source, to, "--signal", "SIGKILL", "--memory-bytes", 1).communicate(timeout=30)
    before = sorted(work_folder(source, to).rglob("*"))
    summary = plan_stage(source, str(to), world=Communicator(), probe_seconds=0.05)
    (node,) = summary.nodes
    moved = stage_alone(source, to)
    assert before and 0 < node.gets_bytes == node.reads_bytes == moved.read_bytes < summary.dataset_bytes
    assert node.has_bytes == moved.nodes[0].reused_bytes == summary.dataset_bytes - node.gets_bytes
    slowest = max(node.reads_bytes / node.rates.source, node.gets_bytes / node.rates.disk)
    assert summary.predicted.seconds == pytest.approx(slowest)


@pytest.mark.mpi
@pytest.mark.parametrize(("time_left", "exit_code"), [("1:00:00", ExitCode.OK), ("0:00", ExitCode.NO_TIME)])
def test_a_dry_run_fails_where_the_time_does_not_suffice(
    source: Path, node_disks: str, time_left: str, exit_code: ExitCode
) -> None:
    command = [*COMMAND, "stage", source, "--to", node_disks, "--dry-run", "--time-left", time_left]
    result = run_ranks(2, *command, nodes="ab")
    assert result.returncode == exit_code, result.stderr
    assert "replicate" in result.stdout and ("it fits" in result.stdout) == (exit_code == ExitCode.OK)
    assert result.stderr.count("but the job has 0.0 s left: ask for more") == (exit_code == ExitCode.NO_TIME)


def opened_directly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The access modes of all files opened with O_DIRECT from now on."""
    modes: list[int] = []
    real_open = os.open

    def noting_open(path, flags, *words, **named):
        if flags & os.O_DIRECT:
            modes.append(flags & os.O_ACCMODE)
        return real_open(path, flags, *words, **named)

    monkeypatch.setattr(os, "open", noting_open)
    return modes


@pytest.mark.parametrize("direct", [True, False])
def test_past_the_page_cache_the_bytes_are_the_same(
    source: Path, to: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    modes = opened_directly(monkeypatch)
    monkeypatch.setattr("stagein.chunk_io.WayChoice.next_is_direct", lambda self: direct)
    monkeypatch.setattr("stagein.staging._PROBED_BYTES", 0)
    monkeypatch.setattr("stagein.staging.direct_is_faster", lambda *_: direct)
    stage_alone(source, to)
    assert_staged(source, to)
    assert set(modes) == ({os.O_RDONLY, os.O_WRONLY} if direct else set())


def test_a_disk_that_is_slow_gets_no_more_memory(tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same four buffers are used again and again, as long as chunks wait to be written."""
    write_dataset(tmp_path / "source", [40 * CHUNK_BYTES], ())
    write, addresses = chunk_io.ChunkWriter.write, set()

    def slow_write(writer: chunk_io.ChunkWriter, chunk: int, buffer: memoryview) -> None:
        addresses.add(np.frombuffer(buffer, np.uint8).ctypes.data)
        time.sleep(0.01)
        write(writer, chunk, buffer)

    monkeypatch.setattr(chunk_io.ChunkWriter, "write", slow_write)
    stage_alone(tmp_path / "source", to)
    assert_staged(tmp_path / "source", to)
    assert len(addresses) == MINIMUM_BUFFERS


def test_the_faster_way_is_found(to: Path) -> None:
    for seconds_past, seconds_through in ((1.0, 2.0), (2.0, 1.0)):
        way = chunk_io.WayChoice()
        for _ in range(2 * chunk_io._TRIED_CHUNKS):
            direct = way.next_is_direct()
            way.note(direct, 1000, seconds_past if direct else seconds_through)
        assert way.next_is_direct() == way.direct == (seconds_past < seconds_through)
    assert isinstance(direct_is_faster(to, 0.01, 1 << 30), bool) and list(to.iterdir()) == []


def test_a_source_that_cannot_be_read_directly(source: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refusing_open(path, flags, *words, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *words, **named)

    monkeypatch.setattr(os, "open", refusing_open)
    stage_alone(source, to)
    assert_staged(source, to)


# What an earlier run left


def test_killed_in_the_middle_and_run_again(source: Path, to: Path) -> None:
    killed = start_alone(source, to, "--signal", "SIGKILL", "--memory-bytes", 1)
    killed.communicate(timeout=30)
    assert killed.returncode == -signal.SIGKILL
    finished = journaled_chunks(source, to)
    assert finished > 5 and not final_folder(source, to).exists()
    receipt = stage_alone(source, to)
    assert_staged(source, to)
    assert receipt.nodes[0].reused_bytes > (finished - 5) * CHUNK_BYTES
    assert receipt.read_bytes == receipt.dataset_bytes - receipt.nodes[0].reused_bytes


def test_killed_half_way_the_next_run_moves_half(tmp_path: Path, to: Path) -> None:
    write_dataset(tmp_path / "larger", (100 * CHUNK_BYTES,) * 3)
    killed = start_alone(tmp_path / "larger", to, "--signal", "SIGKILL", "--memory-bytes", 1)
    killed.communicate(timeout=30)
    assert killed.returncode == -signal.SIGKILL
    receipt = stage_alone(tmp_path / "larger", to)
    assert 0.4 * receipt.dataset_bytes < receipt.written_bytes == receipt.read_bytes < 0.55 * receipt.dataset_bytes
    assert_staged(tmp_path / "larger", to)


def test_what_the_journal_says_is_not_believed_without_a_look(source: Path, to: Path) -> None:
    killed = start_alone(source, to, "--signal", "SIGKILL", "--memory-bytes", 1)
    killed.communicate(timeout=30)
    flip_byte(work_folder(source, to) / "shards/00000.h5", 100)
    (work_folder(source, to) / "journal-7").write_text("3\n99999\nnonsense\n4")
    (work_folder(source, to) / "stray").write_text("of another time")
    stage_alone(source, to)
    assert_staged(source, to)


def test_sigterm_stops_cleanly_and_resumes(source: Path, to: Path) -> None:
    stopped = start_alone(source, to, "--signal", "SIGTERM", "--memory-bytes", 1)
    _, stderr = stopped.communicate(timeout=30)
    assert stopped.returncode == ExitCode.INTERRUPTED
    assert stderr.count("run the same command again") == 1 and "Traceback" not in stderr
    assert journaled_chunks(source, to) < 50, "it went on to the end"
    assert stage_alone(source, to).nodes[0].reused_bytes > 0
    assert_staged(source, to)


def test_a_copy_that_lost_a_file_is_repaired(source: Path, to: Path) -> None:
    stage_alone(source, to)
    (final_folder(source, to) / "shards/00001.h5").unlink()
    assert stage_alone(source, to).read_bytes == SHARD_SIZES[1]
    assert_staged(source, to)


def test_without_ready_a_copy_is_not_trusted(source: Path, to: Path) -> None:
    stage_alone(source, to)
    (final_folder(source, to) / READY_NAME).unlink()
    flip_byte(final_folder(source, to) / "shards/00000.h5", 3 * CHUNK_BYTES)
    assert find_staged(Manifest.load(source).id, {"STAGEIN_TO": str(to)}) is None
    assert stage_alone(source, to).read_bytes == CHUNK_BYTES
    assert_staged(source, to)


# Two jobs


def test_two_jobs_at_once_do_the_work_once(source: Path, to: Path) -> None:
    jobs = [start_alone(source, to, "--slow-seconds", 0.01) for _ in range(2)]
    reports = [json.loads(job.communicate(timeout=60)[0]) for job in jobs]
    assert sorted(report["receipt"]["moved_nothing"] for report in reports) == [False, True]
    assert sorted(report["receipt"]["nodes"][0]["prepare_seconds"] > 0 for report in reports) == [False, True]
    assert_staged(source, to)


def test_waiting_for_another_job_is_bounded_and_names_it(source: Path, to: Path) -> None:
    (to / "stagein").mkdir()
    with open(final_folder(source, to).with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write('{"pid": 123, "host": "somewhere", "boot": "", "since": 0}')
        lock.flush()
        views = []
        with pytest.raises(WatchdogError, match=r"process 123 on somewhere .* is staging the same data set"):
            stage_alone(source, to, timeout_seconds=1.5, watch=views.append)
        assert views[-1].phase == "waiting" and "process 123 on somewhere" in views[-1].waits_for


# Finding the copy


def test_a_loader_finds_the_copy(source: Path, to: Path) -> None:
    dataset_id = Manifest.load(source).id
    assert find_staged(dataset_id) is None
    stage_alone(source, to)
    copy = find_staged(dataset_id)
    assert copy is not None and copy.path == final_folder(source, to)
    assert copy.files == {entry.file for entry in Manifest.load(source).all_files()}
    assert find_staged("0" * 64) is None


def test_a_ready_of_another_data_set_does_not_count(source: Path, to: Path) -> None:
    stage_alone(source, to)
    final_folder(source, to).rename(to / "stagein" / ("1" * 64))
    assert find_staged("1" * 64, {"STAGEIN_TO": str(to)}) is None


def test_a_loader_looks_where_it_is_told(source: Path, to: Path, tmp_path: Path) -> None:
    (tmp_path / "nvme-here").mkdir()
    stage_alone(source, tmp_path / "nvme-here")
    told = {"STAGEIN_TO": os.pathsep.join([str(to), str(tmp_path / "nvme-{node}")]), "STAGEIN_NODE": "here"}
    copy = find_staged(Manifest.load(source).id, told)
    assert copy is not None and copy.path.is_relative_to(tmp_path / "nvme-here")
    assert find_staged(Manifest.load(source).id, {"STAGEIN_TO": str(to)}) is None


def test_a_note_that_others_could_have_written_is_ignored(source: Path, to: Path, tmp_path: Path) -> None:
    environment = {"TMPDIR": str(tmp_path), "STAGEIN_NODE": "n"}
    stage_alone(source, to)
    note_destination(to, "n", environment)
    assert find_staged(Manifest.load(source).id, environment) is not None
    (tmp_path / f"stagein-{os.getuid()}" / "n").chmod(0o777)
    assert find_staged(Manifest.load(source).id, environment) is None


# The command


def test_the_command_prints_plan_and_receipt(source: Path, to: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(source, str(to), dry_run=True)
    assert "replicate" in capsys.readouterr().out and list(to.iterdir()) == []
    run_command(source, str(to), dry_run=True, as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert plan["nodes"][0]["gets_bytes"] == sum(SHARD_SIZES) + sum(FILE_SIZES)
    run_command(source, str(to))
    assert "read from the source" in capsys.readouterr().out
    run_command(source, str(to))
    assert "nothing was moved" in capsys.readouterr().out
    run_command(source, str(to), as_json=True)
    assert Receipt.model_validate_json(capsys.readouterr().out).moved_nothing


@pytest.mark.parametrize("shard_sizes", [(), (0,)])
def test_of_an_empty_data_set_nothing_is_said_to_have_been_there(
    tmp_path: Path, to: Path, capsys: pytest.CaptureFixture[str], shard_sizes: tuple[int, ...]
) -> None:
    write_dataset(tmp_path / "empty", shard_sizes, ())
    for _ in range(2):
        run_command(tmp_path / "empty", str(to))
        said = capsys.readouterr().out
        assert f"is an empty data set: it is on {final_folder(tmp_path / 'empty', to)} (replicate)" in said
        assert "already" not in said


# Several ranks on several nodes


@pytest.mark.mpi
@pytest.mark.parametrize("nodes", ["ab", "aabb", "aab", "abc"])
def test_replicate_reads_each_byte_once(source: Path, node_disks: str, nodes: str) -> None:
    result, report = stage_over_ranks(source, node_disks, nodes, "--policy", "replicate")
    assert report is not None, result.stderr
    names = sorted(set(nodes))
    for node in names:
        assert_staged(source, expand_node(node_disks, node))
    receipt = Receipt.model_validate(report["receipt"])
    assert receipt.read_bytes == receipt.dataset_bytes
    assert report["read_call_bytes"] < receipt.dataset_bytes + CALL_OVERHEAD_BYTES * len(nodes)
    assert [node.node for node in receipt.nodes] == names
    assert sum(node.sent_bytes for node in receipt.nodes) == (len(names) - 1) * receipt.dataset_bytes
    shares = [node.read_bytes for node in receipt.nodes]
    assert max(shares) - min(shares) <= 2 * CHUNK_BYTES


@pytest.mark.mpi
@pytest.mark.parametrize("shard_sizes", [(), (1,)])
def test_more_ranks_than_chunks(tmp_path: Path, node_disks: str, shard_sizes: tuple[int, ...]) -> None:
    write_dataset(tmp_path / "edge", shard_sizes, ())
    result, report = stage_over_ranks(tmp_path / "edge", node_disks, "aabc")
    assert report is not None, result.stderr
    for node in "abc":
        assert_staged(tmp_path / "edge", expand_node(node_disks, node))


@pytest.mark.mpi
def test_a_dry_run_probes_all_nodes_and_leaves_nothing(source: Path, node_disks: str) -> None:
    command = [sys.executable, "-m", "stagein.tools.cli", "stage", source, "--to", node_disks, "--dry-run", "--json"]
    result = run_ranks(3, *command, "--time-left", "1:00:00", nodes="aab")
    assert result.returncode == 0, result.stderr
    summary = PlanSummary.model_validate_json(result.stdout)
    assert all(min(node.rates.source, node.rates.network, node.rates.disk) > 0 for node in summary.nodes)
    assert summary.predicted.seconds > 0 and summary.predicted.fits and summary.predicted.seconds_left == 3600
    for node in "ab":
        assert list(Path(expand_node(node_disks, node)).iterdir()) == []


@pytest.mark.mpi
def test_the_memory_of_each_rank_stays_within_its_budget(tmp_path: Path, node_disks: str) -> None:
    """However slowly one node reads: of 64 MiB, each rank holds the 8 it may, and little beside them."""
    write_dataset(tmp_path / "large", [16 << 20] * 4, (), chunk_bytes=1 << 20)
    words = [
        "--policy",
        "replicate",
        "--memory-bytes",
        8 << 20,
        "--slow-seconds",
        "0.02",
        "--slow-alone",
        "--on-rank",
        1,
    ]
    result, report = stage_over_ranks(tmp_path / "large", node_disks, "abc", *words)
    assert report is not None, result.stderr
    assert max(report["grown_bytes"]) < 16 << 20


@pytest.mark.mpi
def test_reads_that_take_long_get_more_memory(tmp_path: Path, node_disks: str) -> None:
    """Two chunks under way at a rank are too few there: more than the first four buffers come into use."""
    write_dataset(tmp_path / "large", [16 << 20] * 4, (), chunk_bytes=4 << 20)
    words = ["--policy", "replicate", "--memory-bytes", 64 << 20, "--slow-seconds", "0.05"]
    result, report = stage_over_ranks(tmp_path / "large", node_disks, "ab", *words)
    assert report is not None, result.stderr
    assert min(report["grown_bytes"]) >= 24 << 20


@pytest.mark.mpi
def test_partition_gives_each_shard_to_one_node(source: Path, node_disks: str) -> None:
    result, report = stage_over_ranks(source, node_disks, "aab", "--policy", "partition")
    assert report is not None, result.stderr
    here = {
        node: find_staged(Manifest.load(source).id, {"STAGEIN_TO": node_disks, "STAGEIN_NODE": node}) for node in "ab"
    }
    manifest = Manifest.load(source)
    small = {entry.file for entry in manifest.files}
    assert here["a"].files & here["b"].files == small
    assert here["a"].files | here["b"].files == {entry.file for entry in manifest.all_files()}
    for node in "ab":
        assert_staged(source, expand_node(node_disks, node), sorted(here[node].files))
    receipt = Receipt.model_validate(report["receipt"])
    assert receipt.read_bytes == receipt.dataset_bytes and receipt.policy == "partition"
    again, report = stage_over_ranks(source, node_disks, "ab", "--policy", "replicate")
    assert report is not None, again.stderr
    for node in "ab":
        assert_staged(source, expand_node(node_disks, node))


@pytest.mark.mpi
def test_ranks_of_one_node_share_its_work(source: Path, to: Path) -> None:
    result, report = stage_over_ranks(source, str(to), "aaa")
    assert report is not None, result.stderr
    assert_staged(source, to)
    assert report["receipt"]["nodes"][0]["sent_bytes"] == 0
    assert report["read_call_bytes"] < report["receipt"]["dataset_bytes"] + 3 * CALL_OVERHEAD_BYTES
    again, report = stage_over_ranks(source, str(to), "aa")
    assert report is not None and report["receipt"]["moved_nothing"], again.stderr


@pytest.mark.mpi
def test_a_flipped_byte_ends_every_rank_with_one_sentence(source: Path, node_disks: str) -> None:
    flip_byte(source / "shards/00003.h5", 5 * CHUNK_BYTES + 17)
    result, _ = stage_over_ranks(source, node_disks, "aab", "--policy", "replicate")
    assert result.returncode == ExitCode.CHECKSUM
    assert result.stderr.count("stagein: ") == 1 and "00003.h5" in result.stderr and "Traceback" not in result.stderr
    for node in "ab":
        assert not final_folder(source, expand_node(node_disks, node)).exists()


@pytest.mark.mpi
@pytest.mark.parametrize("nodes", ["abc", "aab", "aa"])
def test_bad_files_that_several_ranks_meet_are_listed_once_and_the_others_kept(
    tmp_path: Path, source: Path, node_disks: str, nodes: str
) -> None:
    shutil.copytree(source, tmp_path / "good")
    result, _ = stage_over_ranks(source, node_disks, nodes, "--policy", "replicate", "--damage-source")
    assert result.returncode == ExitCode.SOURCE
    assert result.stderr.count("stagein: ") == 1 and "3 files of the source" in result.stderr
    named = [line for line in result.stderr.splitlines() if "/shards/" in line]
    assert ["00000.h5" in named[0], "00001.h5" in named[1], "00003.h5" in named[2]] == [True] * 3 and len(named) == 3
    result, report = stage_over_ranks(tmp_path / "good", node_disks, nodes, "--policy", "replicate")
    assert report is not None, result.stderr
    assert Receipt.model_validate(report["receipt"]).read_bytes <= SHARD_SIZES[0] + SHARD_SIZES[1] + SHARD_SIZES[3]
    for node in set(nodes):
        assert_staged(source=tmp_path / "good", to=expand_node(node_disks, node))


@pytest.mark.mpi
def test_chunks_that_one_rank_cannot_read_are_not_taken_for_damage_on_the_way(tmp_path: Path, node_disks: str) -> None:
    write_dataset(tmp_path / "many", [300 * CHUNK_BYTES], ())
    result, _ = stage_over_ranks(
        tmp_path / "many", node_disks, "ab", "--policy", "replicate", "--unreadable", "00000.h5"
    )
    assert result.returncode == ExitCode.SOURCE
    assert result.stderr.count("stagein: ") == 1 and "00000.h5 failed: Permission denied" in result.stderr


@pytest.mark.mpi
def test_damage_on_the_way_is_mended_and_goes_no_further(source: Path, node_disks: str) -> None:
    result, report = stage_over_ranks(source, node_disks, "abc", "--policy", "replicate", "--flip-arrivals", 7)
    assert report is not None, result.stderr
    for node in "abc":
        assert_staged(source, expand_node(node_disks, node))
    damaged = {node["node"]: node["damaged_chunks"] for node in report["receipt"]["nodes"]}
    assert damaged["a"] > 0 and damaged["b"] == damaged["c"] == 0


@pytest.mark.mpi
def test_a_link_that_damages_everything_is_given_up(tmp_path: Path, node_disks: str) -> None:
    write_dataset(tmp_path / "many", [100 * CHUNK_BYTES] * 2, ())
    result, _ = stage_over_ranks(tmp_path / "many", node_disks, "ab", "--policy", "replicate", "--flip-arrivals", 1)
    assert result.returncode == ExitCode.CHECKSUM
    assert "65 chunks from rank 1 on b differed from the manifest as they arrived" in result.stderr


@pytest.mark.mpi
@pytest.mark.parametrize(("nodes", "copies"), [("abc", 2), ("aabbc", 2), ("aabb", 1), ("abc", 3)])
def test_each_shard_on_so_many_nodes(source: Path, node_disks: str, nodes: str, copies: int) -> None:
    result, report = stage_over_ranks(source, node_disks, nodes, "--copies", copies)
    assert report is not None, result.stderr
    manifest, names = Manifest.load(source), sorted(set(nodes))
    found = [find_staged(manifest.id, {"STAGEIN_TO": node_disks, "STAGEIN_NODE": node}) for node in names]
    for node, copy in zip(names, found, strict=True):
        assert_staged(source, expand_node(node_disks, node), sorted(copy.files))
    for shard in manifest.shards:
        assert sum(shard.file in copy.files for copy in found) == copies
    receipt = Receipt.model_validate(report["receipt"])
    assert receipt.copies == copies and receipt.read_bytes == receipt.dataset_bytes
    assert receipt.bound.percent <= 100


@pytest.mark.mpi
def test_a_rank_killed_in_the_middle_ends_the_job_and_the_next_run_resumes(source: Path, node_disks: str) -> None:
    start = time.monotonic()
    result, _ = stage_over_ranks(
        source, node_disks, "ab", "--policy", "replicate", "--signal", "SIGKILL", "--on-rank", 1, "--memory-bytes", 1
    )
    assert result.returncode != 0 and time.monotonic() - start < 60
    assert journaled_chunks(source, expand_node(node_disks, "b")) > 5
    result, report = stage_over_ranks(source, node_disks, "ab", "--policy", "replicate")
    assert report is not None, result.stderr
    for node in "ab":
        assert_staged(source, expand_node(node_disks, node))
    receipt = Receipt.model_validate(report["receipt"])
    assert all(node.reused_bytes > 0 for node in receipt.nodes)
    assert receipt.read_bytes < receipt.dataset_bytes


@pytest.mark.mpi
def test_sigterm_on_one_rank_stops_all_resumably(source: Path, node_disks: str) -> None:
    result, _ = stage_over_ranks(
        source, node_disks, "ab", "--policy", "replicate", "--signal", "SIGTERM", "--memory-bytes", 1
    )
    assert result.returncode == ExitCode.INTERRUPTED
    assert result.stderr.count("run the same command again") == 1
    assert work_folder(source, expand_node(node_disks, "b")).exists()


@pytest.mark.mpi
@pytest.mark.parametrize(("name", "exit_code"), [("SIGUSR1", ExitCode.INTERRUPTED), ("SIGTERM", 1)])
def test_a_signal_to_the_launcher_stops_all_resumably(source: Path, node_disks: str, name: str, exit_code: int) -> None:
    """Open MPI's mpirun hands SIGUSR1 on; a SIGTERM it handles itself, and says 1 whatever the ranks say."""
    command = [sys.executable, RANK, source, node_disks, "--policy", "replicate", "--slow-seconds", "0.3"]
    disks = [expand_node(node_disks, node) for node in "ab"]
    with start_ranks(2, *command, nodes="ab") as launcher:
        while not all(journaled_chunks(source, disk) for disk in disks):
            assert launcher.poll() is None
            time.sleep(0.05)
        os.kill(launcher.pid, getattr(signal, name))
        assert launcher.wait(timeout=20) == exit_code
    result, report = stage_over_ranks(source, node_disks, "ab", "--policy", "replicate")
    assert report is not None and all(node["reused_bytes"] > 0 for node in report["receipt"]["nodes"]), result.stderr


@pytest.mark.mpi
def test_ranks_that_share_no_chunk_hear_of_a_failure_at_once(source: Path, to: Path) -> None:
    result, _ = stage_over_ranks(source, str(to), "aaa", "--signal", "SIGTERM", "--slow-seconds", 0.1)
    assert result.returncode == ExitCode.INTERRUPTED
    assert journaled_chunks(source, to) < 45, "they went on to the end"


@pytest.mark.mpi
def test_a_node_that_gets_full_cleans_up_and_leaves_the_others_resumable(source: Path, node_disks: str) -> None:
    full, other = expand_node(node_disks, "b"), expand_node(node_disks, "a")
    with small_disk(full, 2 << 20):
        result, _ = stage_over_ranks(source, node_disks, "aabb", "--disk-gets-full", "--on-rank", 2)
        assert result.returncode == ExitCode.NO_SPACE
        assert result.stderr.count("no space left while writing") == 1
        assert not work_folder(source, full).exists() and not final_folder(source, full).exists()
    assert work_folder(source, other).exists() and not final_folder(source, other).exists()


@pytest.mark.mpi
def test_a_node_without_room_is_named_or_the_data_set_partitioned(source: Path, node_disks: str) -> None:
    full = expand_node(node_disks, "b")
    with small_disk(full, 2 << 20):
        result, _ = stage_over_ranks(source, node_disks, "ab", "--policy", "replicate")
        assert result.returncode == ExitCode.NO_SPACE
        assert result.stderr.count("stagein: ") == 1 and "node b has room for 2,097,152" in result.stderr
        result, report = stage_over_ranks(source, node_disks, "ab")
        assert report is not None and report["receipt"]["policy"] == "partition", result.stderr


@pytest.mark.mpi
def test_a_source_that_hangs_is_named_and_ends_all(source: Path, node_disks: str) -> None:
    result, _ = stage_over_ranks(
        source, node_disks, "ab", "--policy", "replicate", "--hang-reading", "--on-rank", 1, "--timeout-seconds", 2
    )
    assert result.returncode == ExitCode.WATCHDOG
    assert "waiting for the source to deliver shards/" in result.stderr


@pytest.mark.mpi
def test_a_node_whose_reads_are_slow_is_named(source: Path, node_disks: str) -> None:
    words = ["--policy", "replicate", "--slow-seconds", "0.2", "--slow-alone", "--on-rank", 1]
    result, report = stage_over_ranks(source, node_disks, "abc", *words)
    assert report is not None, result.stderr
    bound = report["receipt"]["bound"]
    assert (bound["resource"], bound["node"]) == ("source", "b") and bound["percent"] > 80


@pytest.mark.mpi
def test_a_rank_that_stands_still_is_named_and_ends_all(source: Path, node_disks: str) -> None:
    command = [sys.executable, RANK, source, node_disks, "--policy", "replicate", "--timeout-seconds", "2"]
    with start_ranks(
        2, *command, "--signal", "SIGSTOP", "--on-rank", "1", "--memory-bytes", "1", nodes="ab"
    ) as launcher:
        _, stderr = launcher.communicate(timeout=40)
    assert launcher.returncode == ExitCode.WATCHDOG
    assert "rank 1" in stderr


@pytest.mark.mpi
def test_a_destination_that_nodes_share_is_refused(source: Path, to: Path) -> None:
    result, _ = stage_over_ranks(source, str(to), "ab")
    assert result.returncode == ExitCode.USAGE
    assert "the nodes a, b share the destination" in result.stderr
    assert list((to / "stagein").iterdir()) == []
