"""The node cache: what status says, what evict removes and never removes, and copies that grow while they are read."""

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disks import small_disk
from staged import assert_staged, final_folder, work_folder
from synthetic import CHUNK_BYTES, write_dataset

from stagein import leases
from stagein.cache import READY_NAME, Store, remove_leftovers
from stagein.finding import find_staged
from stagein.formats.errors import NoSpaceError, StageinError, UsageError
from stagein.formats.manifest import Manifest
from stagein.inventory import CacheEntry, choose_evicted, read_cache
from stagein.leases import Owner, WriterLease
from stagein.loaders import RecordDataset
from stagein.receipt import Receipt
from stagein.stage_plan import NodeSpace, make_plan
from stagein.staging import stage
from stagein.tools.evict import run as run_evict
from stagein.tools.options import parse_age, parse_size
from stagein.tools.status import run as run_status
from stagein.world import Communicator

SHARD_BYTES = 4 * CHUNK_BYTES
HOLD = (
    "import sys; from pathlib import Path; from stagein.leases import *\n"
    "lease = {kind}(Path(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def no_trace_in_this_users_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("STAGEIN_TO", raising=False)


@pytest.fixture
def to(tmp_path: Path) -> Path:
    (tmp_path / "nvme").mkdir()
    return tmp_path / "nvme"


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Three data sets of a little more than 1 MiB."""
    for seed in range(3):
        write_dataset(tmp_path / f"source{seed}", (SHARD_BYTES,) * 4, seed=seed)
    return [tmp_path / f"source{seed}" for seed in range(3)]


def stage_alone(source: Path, to: Path, **options: object) -> Receipt:
    return stage(source, str(to), world=Communicator(), **options)


def stage_all(sources: list[Path], to: Path) -> list[str]:
    """Stage them, the last one used an hour after the one before; returns their ids."""
    ids = []
    for number, source in enumerate(sources):
        stage_alone(source, to)
        used = time.time() - 3600 * (len(sources) - number)
        os.utime(final_folder(source, to) / READY_NAME, (used, used))
        ids.append(Manifest.load(source).id)
    return ids


def entries(to: Path) -> dict[str, CacheEntry]:
    return {entry.id: entry for entry in read_cache(to, "here").entries}


@contextlib.contextmanager
def holding(kind: str, path: Path) -> Iterator[int]:
    """Another process that holds a lease; yields its id."""
    code = HOLD.format(kind=kind)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        yield holder.pid
        holder.kill()


# Status


def test_status_says_what_is_here_and_how_complete(sources: list[Path], to: Path, tmp_path: Path) -> None:
    whole, part, damaged = stage_all(sources, to)
    half = Manifest.load(sources[1])
    ready = final_folder(sources[1], to) / READY_NAME
    content = json.loads(ready.read_text()) | {"policy": "partition"}
    ready.write_text(json.dumps(content | {"files": content["files"][1:]}))
    os.truncate(final_folder(sources[2], to) / "shards/00002.h5", 5)
    write_dataset(tmp_path / "killed", (SHARD_BYTES,) * 4, seed=9)
    unfinished = Manifest.load(tmp_path / "killed")
    killed = Store(to, unfinished)
    killed.prepare(range(5))
    with killed.journal(0) as note:
        note(3)
    found = entries(to)
    assert [found[each].state for each in (whole, part, damaged)] == ["complete", "part", "damaged"]
    assert found[unfinished.id].state == "unfinished" and found[unfinished.id].held_bytes == CHUNK_BYTES
    assert found[whole].held_bytes == found[whole].dataset_bytes == half.nbytes <= found[whole].disk_bytes
    assert found[part].held_bytes == half.nbytes - SHARD_BYTES
    assert found[whole].source == str(sources[0]) and found[whole].last_used == pytest.approx(
        time.time() - 3 * 3600, abs=60
    )


def test_status_names_who_stages_and_who_reads(sources: list[Path], to: Path) -> None:
    (dataset_id,) = stage_all(sources[:1], to)
    final = final_folder(sources[0], to)
    assert (entries(to)[dataset_id].writer, entries(to)[dataset_id].readers) == (None, ())
    with holding("ReaderLease", final) as reader, holding("WriterLease.take", final.with_suffix(".lock")) as writer:
        entry = entries(to)[dataset_id]
        assert entry.state == "staging" and entry.writer is not None and entry.writer.pid == writer
        assert entry.readers == (reader,)
    assert (entries(to)[dataset_id].writer, entries(to)[dataset_id].readers) == (None, ())


def test_the_commands_print_tables_and_json(sources: list[Path], to: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_status(None, as_json=False)
    assert "--to DIR" in capsys.readouterr().out
    ids = stage_all(sources, to)
    run_status(None, as_json=False)
    printed = capsys.readouterr().out
    assert all(dataset_id[:12] in printed for dataset_id in ids) and "complete" in printed and "free of" in printed
    run_status(str(to), as_json=True)
    (cache,) = json.loads(capsys.readouterr().out)["caches"]
    assert [entry["id"] for entry in cache["entries"]] == ids[::-1]
    run_evict([ids[0][:8]], None, dry_run=True, as_json=True)
    assert [each["id"] for each in json.loads(capsys.readouterr().out)["evicted"]] == ids[:1]
    assert set(entries(to)) == set(ids)
    run_evict([str(sources[1])], None)
    assert f"evicted {ids[1][:12]}" in capsys.readouterr().out and set(entries(to)) == {ids[0], ids[2]}


def test_a_node_with_two_copies_is_named_once(
    sources: list[Path], to: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ssd").mkdir()
    for place in (to, tmp_path / "ssd"):
        stage_alone(sources[0], place)
    run_status(None, as_json=False)
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if "complete" in line]
    assert row.split().count(Communicator().world.node_name) == 1 and printed.count(f"is a copy of {sources[0]}") == 1


# Evict


def test_the_one_unused_for_longest_goes_first_and_no_more_than_it_takes(sources: list[Path], to: Path) -> None:
    with small_disk(to, 16 << 20):
        ids = stage_all(sources, to)
        free_bytes = read_cache(to, "here").free_bytes
        find_staged(ids[0], {"STAGEIN_TO": str(to)})  # used just now
        run_evict([], str(to), free_bytes=free_bytes + entries(to)[ids[1]].disk_bytes // 2)
        assert set(entries(to)) == {ids[0], ids[2]}
        kept = [each + suffix for each in (ids[0], ids[2]) for suffix in ("", ".lock")]
        assert sorted(path.name for path in (to / "stagein").iterdir()) == sorted(kept)


def test_what_is_in_use_does_not_count_as_room(sources: list[Path], to: Path) -> None:
    stage_all(sources, to)
    status = read_cache(to, "here")
    newest, middle, oldest = status.entries
    read = status.model_copy(update={"entries": (newest, middle, oldest.model_copy(update={"readers": (1,)}))})
    wanted_bytes = status.free_bytes + oldest.disk_bytes
    assert choose_evicted(status, wanted_free_bytes=wanted_bytes) == [oldest]
    assert choose_evicted(read, wanted_free_bytes=wanted_bytes) == [middle]
    assert choose_evicted(status, wanted_free_bytes=wanted_bytes, spared=oldest.id) == [middle]


def test_only_what_is_old_enough_goes(sources: list[Path], to: Path) -> None:
    ids = stage_all(sources, to)
    run_evict([], str(to), unused_seconds=1.5 * 3600)
    assert set(entries(to)) == {ids[2]}


def test_room_that_cannot_be_made_is_said_and_everything_kept(sources: list[Path], to: Path) -> None:
    ids = stage_all(sources[:1], to)
    with pytest.raises(
        NoSpaceError, match=r"on node \S+ cannot have 1000000\.0 TB free: .* are, and .* could be evicted"
    ):
        run_evict([], str(to), free_bytes=10**18)
    assert set(entries(to)) == set(ids)


def test_what_a_loader_reads_is_not_evicted(jpeg_dataset_path: Path, to: Path) -> None:
    stage_alone(jpeg_dataset_path, to)
    dataset = pickle.loads(pickle.dumps(RecordDataset(jpeg_dataset_path)))
    assert dataset.records.staged_path == final_folder(jpeg_dataset_path, to)
    with pytest.raises(StageinError, match=f"is read by {os.getpid()}: end that first"):
        run_evict([str(jpeg_dataset_path)], str(to))
    run_evict([], str(to), unused_seconds=0.0)
    assert len(dataset[84]["image"]) == 48
    del dataset
    run_evict([str(jpeg_dataset_path)], str(to))
    assert not final_folder(jpeg_dataset_path, to).exists()
    assert RecordDataset(jpeg_dataset_path).records.staged_path is None


def test_what_another_job_stages_is_not_evicted(sources: list[Path], to: Path) -> None:
    stage_all(sources[:1], to)
    final = final_folder(sources[0], to)
    with holding("WriterLease.take", final.with_suffix(".lock")) as writer:
        with pytest.raises(StageinError, match=f"is being staged by process {writer} on {socket.gethostname()}"):
            run_evict([str(sources[0])], str(to))
        run_evict([], str(to), unused_seconds=0)
    assert_staged(sources[0], to)


def test_an_eviction_cut_short_is_finished_by_the_next_job(sources: list[Path], to: Path) -> None:
    stage_all(sources[:1], to)
    final = final_folder(sources[0], to)
    final.rename(final.with_suffix(".evicted"))
    assert not entries(to) and find_staged(final.name, {"STAGEIN_TO": str(to)}) is None
    stage_alone(sources[0], to)
    assert_staged(sources[0], to)
    assert not final.with_suffix(".evicted").exists()


@pytest.mark.parametrize("name", ["abc", "0123456789", "/nowhere"])
def test_a_name_that_is_nothing_evicts_nothing(sources: list[Path], to: Path, name: str) -> None:
    stage_all(sources[:1], to)
    with pytest.raises(UsageError, match="stagein status"):
        run_evict([name], str(to))
    assert entries(to)


def test_a_data_set_that_is_not_staged_is_not_said_to_be_missing(sources: list[Path], to: Path) -> None:
    with pytest.raises(UsageError, match=f"{sources[0]} is not staged: "):
        run_evict([str(sources[0])], str(to))


def test_stage_evicts_only_when_asked_and_only_what_it_takes(sources: list[Path], to: Path) -> None:
    with small_disk(to, 3 << 20):
        ids = stage_all(sources[:2], to)
        with pytest.raises(NoSpaceError):
            stage_alone(sources[2], to, policy="replicate")
        assert set(entries(to)) == set(ids)
        receipt = stage_alone(sources[2], to, policy="replicate", make_room=True)
        assert set(entries(to)) == {ids[1], Manifest.load(sources[2]).id}
        assert receipt.nodes[0].evicted_bytes > 4 * SHARD_BYTES


def test_stage_evicts_nothing_where_that_would_not_be_enough(sources: list[Path], to: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "large", (16 * SHARD_BYTES,))
    with small_disk(to, 3 << 20):
        ids = stage_all(sources[:2], to)
        with pytest.raises(NoSpaceError):
            stage_alone(tmp_path / "large", to, make_room=True)
        assert set(entries(to)) == set(ids)


# Copies that grow


def partition_and_lack(source: Path, to: Path) -> Store:
    """A published copy that a partition over two nodes left here, without some shards."""
    manifest = Manifest.load(source)
    plan = make_plan(manifest, [NodeSpace("here", 1, 1 << 40), NodeSpace("there", 1, 1 << 40)], "partition")
    stage_alone(source, to)
    files = [entry.file for entry in manifest.all_files()]
    final = final_folder(source, to)
    for number in set(range(len(files))) - set(plan.files_of(0)):
        (final / files[number]).unlink()
    content = json.loads((final / READY_NAME).read_text())
    here = [files[number] for number in plan.files_of(0)]
    (final / READY_NAME).write_text(json.dumps(content | {"policy": "partition", "files": here}))
    return Store(to, manifest)


def test_a_copy_is_completed_while_it_is_read(sources: list[Path], to: Path) -> None:
    store = partition_and_lack(sources[0], to)
    manifest, seen = Manifest.load(sources[0]), []
    before = find_staged(manifest.id, {"STAGEIN_TO": str(to)})
    assert before is not None and len(before.files) == 3
    inode = (before.path / "shards/00000.h5").stat().st_ino

    def look(done: int, total: int) -> None:
        copy = find_staged(manifest.id, {"STAGEIN_TO": str(to)})
        seen.append(
            copy is not None and copy.files == before.files and all((copy.path / f).exists() for f in copy.files)
        )

    stage_alone(sources[0], to, progress=look)
    assert seen and all(seen)
    assert_staged(sources[0], to)
    assert (store.final / "shards/00000.h5").stat().st_ino == inode, "it was there, and was made again"
    assert json.loads((store.final / READY_NAME).read_text())["policy"] == "replicate"


def test_a_crash_while_a_copy_is_completed_loses_nothing(
    sources: list[Path], to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = partition_and_lack(sources[0], to)
    with monkeypatch.context() as patch:
        patch.setattr("stagein.cache._fsync_folders", lambda _: (_ for _ in ()).throw(OSError(5, "the machine stops")))
        with pytest.raises(StageinError, match="the machine stops"):
            stage_alone(sources[0], to)
    assert len(json.loads((store.final / READY_NAME).read_text())["files"]) == 3
    assert (store.final / "shards/00001.h5").exists(), "moved in, but READY does not vouch for it"
    receipt = stage_alone(sources[0], to)
    assert receipt.read_bytes == 0 and receipt.nodes[0].reused_bytes == receipt.dataset_bytes
    assert_staged(sources[0], to)
    assert not work_folder(sources[0], to).exists()


# Owners


def test_the_dead_are_told_from_the_living() -> None:
    me = Owner.this_process()
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not me.is_dead()
    assert me.model_copy(update={"pid": gone.pid}).is_dead()
    assert me.model_copy(update={"boot": "another"}).is_dead()
    assert not me.model_copy(update={"pid": gone.pid, "host": "elsewhere"}).is_dead()


def test_marks_of_the_dead_are_collected(tmp_path: Path) -> None:
    me = Owner.this_process()
    (tmp_path / ".mark.alive").write_bytes(me.to_bytes())
    (tmp_path / ".mark.dead").write_bytes(me.model_copy(update={"boot": "another"}).to_bytes())
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.glob(".mark*")] == [".mark.alive"]


def at_the_next_lock(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Have something happen between the opening of a lease and its locking."""
    lock = leases._lock

    def act_and_lock(descriptor: int, kind: int) -> bool:
        monkeypatch.setattr(leases, "_lock", lock)
        action()
        return lock(descriptor, kind)

    monkeypatch.setattr(leases, "_lock", act_and_lock)


def test_a_lease_whose_file_was_removed_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.lock"
    at_the_next_lock(monkeypatch, path.unlink)
    lease = WriterLease.take(path)
    assert lease is not None and WriterLease.take(path) is None
    lease.close()
    assert WriterLease.take(path) is not None


def test_a_reader_of_what_is_being_evicted_finds_nothing(
    sources: list[Path], to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset_id,) = stage_all(sources[:1], to)
    at_the_next_lock(monkeypatch, lambda: run_evict([dataset_id], str(to)))
    assert find_staged(dataset_id, {"STAGEIN_TO": str(to)}) is None
    stage_alone(sources[0], to)
    at_the_next_lock(monkeypatch, lambda: (run_evict([dataset_id], str(to)), stage_alone(sources[0], to)))
    assert find_staged(dataset_id, {"STAGEIN_TO": str(to)}) is None, "what it holds is not the copy that is there now"


def test_sizes_and_ages_on_the_command_line() -> None:
    assert [parse_size(text) for text in ("1.5TB", "2TiB", "3 GB", "7")] == [1_500_000_000_000, 2 << 40, 3 * 10**9, 7]
    assert [parse_age(text) for text in ("90s", "30min", "12h", "7d")] == [90, 1800, 43200, 604800]
