"""Each sum and check has a planted fault that it must find, and a sentence that names the place."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from disks import small_disk

from stagein.formats import Dataset, Manifest, convert, scan_imagefolder, verify
from stagein.formats.errors import ChecksumError, SourceError, UsageError
from stagein.formats.repair import repair


@pytest.fixture
def copy(jpeg_dataset_path: Path, tmp_path: Path) -> Path:
    """A copy of the data set, to damage."""
    target = shutil.copytree(jpeg_dataset_path, tmp_path / "x.st", symlinks=True)
    for shard in (target / "shards").iterdir():
        shard.chmod(0o644)
    return target


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x40]))


def problems(path: Path) -> list[str]:
    return [str(problem) for problem in verify(path, workers=2).problems]


def run(*arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stagein.tools.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_good_data_set_has_no_problems(jpeg_dataset_path: Path) -> None:
    report = verify(jpeg_dataset_path)
    assert report.problems == []
    assert report.nbytes == report.manifest.nbytes
    assert report.sums > report.manifest.num_records
    result = run("verify", jpeg_dataset_path)
    assert result.returncode == 0
    assert "all is well" in result.stdout


def test_a_flipped_byte_in_a_record_names_shard_and_record(copy: Path) -> None:
    dataset = Dataset(copy)
    record = 40
    shard = dataset.manifest.shards[int(dataset.index.shard[record])].file
    flip(copy / shard, int(dataset.index.offset[record]) + 100)
    found = problems(copy)
    assert any(f"{shard}: record {record} is damaged" in text for text in found)
    assert any(f"{shard}: bytes " in text for text in found)
    with pytest.raises(ChecksumError, match=f"record {record} in .*{shard} is damaged"):
        Dataset(copy).read_records([record])
    result = run("verify", copy)
    assert result.returncode == 5
    assert f"record {record}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("offset", [0, 700, -1], ids=["signature", "HDF5 metadata", "Zarr index"])
def test_a_flipped_byte_anywhere_in_a_shard_is_found(copy: Path, offset: int) -> None:
    flip(copy / Manifest.load(copy).shards[1].file, offset)
    assert len(problems(copy)) == 1


def test_a_flipped_byte_in_every_other_file_is_found(copy: Path) -> None:
    for entry in Manifest.load(copy).files:
        flip(copy / entry.file, 0)
        assert any(text.startswith(f"{entry.file}: bytes 0 to") for text in problems(copy)), entry.file
        flip(copy / entry.file, 0)
    assert problems(copy) == []


def test_missing_truncated_and_grown_shards(copy: Path) -> None:
    shards = [copy / shard.file for shard in Manifest.load(copy).shards]
    shards[0].unlink()
    os.truncate(shards[1], 5000)
    with open(shards[2], "ab") as file:
        file.write(b"x")
    found = problems(copy)
    assert len(found) == 3
    assert "it is missing" in found[0]
    assert "it has 5000 bytes" in found[1]
    result = run("verify", copy)
    assert result.returncode == 5
    dataset = Dataset(copy)
    in_second = dataset.manifest.shards[2].first - 1
    with pytest.raises(SourceError, match="cannot be opened"):
        dataset.read_records([0])
    with pytest.raises(SourceError, match=f"record {in_second} in .* is cut off"):
        dataset.read_records([in_second])


def test_a_fifo_in_the_place_of_a_shard_is_not_waited_for(copy: Path) -> None:
    shard = copy / Manifest.load(copy).shards[0].file
    shard.unlink()
    os.mkfifo(shard)
    assert "it has 0 bytes" in problems(copy)[0]
    with pytest.raises(SourceError, match=r"record 0 in .* cannot be read"):
        Dataset(copy).read_records([0])


def test_a_long_list_of_problems_is_cut(copy: Path) -> None:
    for column in [*(copy / "index").rglob("*"), *(copy / "label").rglob("*"), *(copy / "shards").iterdir()]:
        if column.is_file():
            column.unlink()
    number = len(problems(copy))
    result = run("verify", copy)
    assert number > 20 and result.returncode == 3
    lines = result.stderr.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("stagein: "))
    assert lines[first].endswith(
        f"has {number} problems: mend it by `stagein verify --repair --from GOOD_COPY`, or convert it again"
    )
    assert len(lines) == first + 22 and lines[-1] == f"  and {number - 20} more"


def test_a_missing_shard_alone_is_a_source_error(copy: Path) -> None:
    (copy / Manifest.load(copy).shards[0].file).unlink()
    result = run("verify", copy, "--json")
    assert result.returncode == 3
    assert [problem["file"] for problem in json.loads(result.stdout)["problems"]] == ["shards/00000.h5"]


def test_an_index_that_leads_elsewhere_is_refused_before_it_is_used(copy: Path) -> None:
    index = copy / "index/image/offset/c/0"
    flip(index, 7)  # the top byte of the first offset
    with pytest.raises(ChecksumError, match="index"):
        Dataset(copy)
    assert any("index" in text for text in problems(copy))


def test_a_broken_link_is_found(copy: Path) -> None:
    link = copy / "image/c/0"
    link.unlink()
    link.symlink_to("../../shards/00001.h5")
    assert problems(copy) == ["image/c/0: it is not a link to ../../shards/00000.h5"]


def test_commands_on_damaged_manifests_are_sentences(copy: Path) -> None:
    (copy / "manifest.json").write_text("{")
    for command in ("info", "verify"):
        result = run(command, copy)
        assert result.returncode == 3
        assert "is not JSON" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_repair_takes_just_the_damaged_chunks_from_the_other_copy(copy: Path, jpeg_dataset_path: Path) -> None:
    shards = [copy / shard.file for shard in Manifest.load(copy).shards]
    flip(shards[0], 20_000)
    shards[1].unlink()
    flip(copy / "label/c/0", 3)
    (copy / "image/c/2").unlink()
    chunks = -(-Manifest.load(copy).shards[1].nbytes // Manifest.load(copy).chunk_bytes)
    result = run("verify", copy, "--repair", "--from", jpeg_dataset_path)
    assert result.returncode == 0, result.stderr
    assert f"3 files made again, {chunks + 2} chunks taken" in result.stdout
    assert verify(copy).problems == []
    assert not list(copy.rglob("*.part"))


def test_repair_of_a_damaged_manifest(copy: Path, jpeg_dataset_path: Path) -> None:
    (copy / "manifest.json").write_text("{")
    assert repair(copy, jpeg_dataset_path).files == ()
    assert verify(copy).problems == []


def test_repair_refuses_another_data_set_and_damage_in_both(copy: Path, jpeg_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.st"
    convert(scan_imagefolder(jpeg_folder), other)
    with pytest.raises(UsageError, match="their ids differ"):
        repair(copy, other)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match="no shard of the good copy"):
        repair(copy, other)
    good = shutil.copytree(other, tmp_path / "good.st", symlinks=True)
    for place in (other, good):
        shard = place / "shards/00000.h5"
        shard.chmod(0o644)
        flip(shard, 9000)
    before = (good / "shards/00000.h5").read_bytes()
    with pytest.raises(ChecksumError, match=r"chunk 0 of shards/00000\.h5"):
        repair(good, other)
    assert (good / "shards/00000.h5").read_bytes() == before


def test_repair_without_room_is_a_sentence_and_leaves_what_is_there(jpeg_dataset_path: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, 1 << 20):
        copy = shutil.copytree(jpeg_dataset_path, disk / "x.st", symlinks=True)
        (copy / "shards/00001.h5").unlink()
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "fill").write_bytes(bytes(room - 20_000))
        result = run("verify", copy, "--repair", "--from", jpeg_dataset_path)
        assert result.returncode == 4
        assert result.stderr.startswith(f"stagein: no space left while mending {copy}")
        assert len(result.stderr.splitlines()) == 1
        (disk / "fill").unlink()
        assert run("verify", copy, "--repair", "--from", jpeg_dataset_path).returncode == 0
