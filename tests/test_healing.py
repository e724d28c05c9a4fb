"""Staged copies verified and healed: what a disk changed behind everybody's back is found, and made right again."""

import json
import os
import sys
from pathlib import Path

import pytest
from mpi import run_ranks
from staged import assert_staged, final_folder, flip_byte
from synthetic import CHUNK_BYTES, write_dataset

from stagein.cache import READY_NAME, Store, expand_node
from stagein.finding import find_staged
from stagein.formats.errors import ChecksumError, ExitCode, SourceError, StageinError, UsageError
from stagein.formats.manifest import Manifest
from stagein.staging import stage
from stagein.tools.verify import run as run_verify
from stagein.world import Communicator

STAGEIN = (sys.executable, "-m", "stagein.tools.cli")
SHARD_SIZES = (5 * CHUNK_BYTES, 3 * CHUNK_BYTES + 1, 4 * CHUNK_BYTES)


@pytest.fixture(autouse=True)
def no_trace_in_this_users_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("STAGEIN_TO", raising=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "source", SHARD_SIZES, (1000, 0))
    return tmp_path / "source"


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A staged copy of `source`, made by one process."""
    (tmp_path / "nvme").mkdir()
    stage(source, str(tmp_path / "nvme"), world=Communicator())
    return final_folder(source, tmp_path / "nvme")


def flip_quietly(path: Path, offset: int) -> None:
    """Change one bit as a failing disk does: size, time and mode stay."""
    before = path.stat()
    flip_byte(path, offset)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def verify_alone(path: Path, *, repairs: bool = False, good: Path | None = None) -> None:
    run_verify(path, workers=None, repairs=repairs, good=good, as_json=False)


def test_a_whole_copy_is_well(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_alone(copy)
    assert "all is well" in capsys.readouterr().out


def test_a_flipped_bit_is_found_and_healed_from_where_the_copy_came(
    source: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_quietly(copy / "shards/00001.h5", 2 * CHUNK_BYTES + 5)
    with pytest.raises(ChecksumError, match=r"is damaged on .*--repair"):
        verify_alone(copy)
    assert "1 chunk damaged or missing in shards/00001.h5" in capsys.readouterr().out
    verify_alone(copy, repairs=True)
    assert f"mended from {source}" in capsys.readouterr().out
    assert_staged(source, copy.parent.parent)


def truncate(path: Path) -> None:
    os.truncate(path, 7)


@pytest.mark.parametrize("name", ["shards/00000.h5", "index/part0", "index/part1", "manifest.json"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate])
def test_files_lost_or_cut_are_made_again(source: Path, copy: Path, damage, name: str) -> None:
    damage(copy / name)
    verify_alone(copy, repairs=True)
    assert_staged(source, copy.parent.parent)


def test_links_are_made_again(jpeg_dataset_path: Path, tmp_path: Path) -> None:
    stage(jpeg_dataset_path, str(tmp_path), world=Communicator())
    copy = final_folder(jpeg_dataset_path, tmp_path)
    (copy / "image/c/0").unlink()
    with pytest.raises(ChecksumError):
        verify_alone(copy)
    verify_alone(copy, repairs=True)
    assert (copy / "image/c/0").readlink() == (jpeg_dataset_path / "image/c/0").readlink()


def test_a_source_that_is_damaged_too_is_not_believed(source: Path, copy: Path, tmp_path: Path) -> None:
    flip_quietly(copy / "shards/00001.h5", 5)
    flip_quietly(source / "shards/00001.h5", 6)
    with pytest.raises(ChecksumError, match=rf"{source}/shards/00001.h5 differs from the manifest"):
        verify_alone(copy, repairs=True)
    write_dataset(tmp_path / "third", SHARD_SIZES, (1000, 0))
    verify_alone(copy, repairs=True, good=tmp_path / "third")
    verify_alone(copy)
    assert sorted(path.name for path in (copy / "shards").iterdir()) == ["00000.h5", "00001.h5", "00002.h5"]


def test_a_source_that_is_gone_is_named(source: Path, copy: Path) -> None:
    flip_quietly(copy / "shards/00001.h5", 5)
    (source / "shards/00001.h5").rename(source.parent / "shard")
    with pytest.raises(SourceError, match=r"shards/00001.h5"):
        verify_alone(copy, repairs=True)
    (source.parent / "shard").rename(source / "shards/00001.h5")
    source.rename(source.with_name("elsewhere"))
    with pytest.raises(SourceError, match=rf"the source {source} is gone: say with --from where one is"):
        verify_alone(copy, repairs=True)
    verify_alone(copy, repairs=True, good=source.with_name("elsewhere"))


def test_another_data_set_is_no_source(copy: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", SHARD_SIZES, (1000, 0), seed=7)
    flip_quietly(copy / "shards/00000.h5", 5)
    with pytest.raises(UsageError, match=r"other is not a copy of .*: their ids differ"):
        verify_alone(copy, repairs=True, good=tmp_path / "other")


def test_what_another_job_stages_is_not_touched(copy: Path) -> None:
    flip_quietly(copy / "shards/00001.h5", 5)
    lease = Store(copy.parent.parent, Manifest.load(copy)).try_lease()
    assert lease is not None
    with pytest.raises(StageinError, match="is being staged by process"):
        verify_alone(copy, repairs=True)
    lease.close()


def test_a_data_set_that_is_no_copy_needs_a_good_one(source: Path) -> None:
    with pytest.raises(UsageError, match="--from"):
        verify_alone(source, repairs=True)


@pytest.mark.mpi
def test_nodes_heal_each_other_without_the_source(source: Path, tmp_path: Path) -> None:
    nodes = "aabc"
    disks = str(tmp_path / "nvme-{node}")
    for node in "abc":
        expand_node(disks, node).mkdir()
    staged = run_ranks(4, *STAGEIN, "stage", source, "--to", disks, "--policy", "replicate", nodes=nodes)
    assert staged.returncode == 0, staged.stderr
    a, b, c = (final_folder(source, expand_node(disks, node)) for node in "abc")
    flip_quietly(a / "shards/00000.h5", 3 * CHUNK_BYTES)
    (b / "shards/00000.h5").unlink()
    flip_quietly(c / "shards/00002.h5", CHUNK_BYTES)
    (c / READY_NAME).write_text(json.dumps(json.loads((c / READY_NAME).read_text())))
    original = source.rename(tmp_path / "elsewhere")
    everywhere = f"{disks}/stagein/{a.name}"
    found = run_ranks(4, *STAGEIN, "verify", everywhere, nodes=nodes)
    assert found.returncode == ExitCode.CHECKSUM
    assert found.stderr.count("stagein: ") == 1 and "is damaged on a, b, c" in found.stderr
    healed = run_ranks(4, *STAGEIN, "verify", everywhere, "--repair", "--json", nodes=nodes)
    assert healed.returncode == 0, healed.stderr
    reports = {report["node"]: report for report in json.loads(healed.stdout)["nodes"]}
    assert {node: report["healed_from"] for node, report in reports.items()} == {
        "a": ["c"],
        "b": ["a", "c"],
        "c": ["a"],
    }
    assert {node: report["damaged_chunks"] for node, report in reports.items()} == {"a": 1, "b": 5, "c": 1}
    for node in "abc":
        assert_staged(original, expand_node(disks, node))
        assert find_staged(a.name, {"STAGEIN_TO": disks, "STAGEIN_NODE": node}) is not None
