"""`stagein convert imagefolder` on real files: labels, bad files, kills, restarts, full disks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import jpeg, png

from stagein.formats import Dataset, convert, scan_imagefolder
from stagein.formats.conversion import Progress
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.images import BadImageError, read_header
from stagein.formats.publish import PART_SUFFIX
from stagein.formats.source import SourcePart
from stagein.formats.sources import imagefolder
from stagein.formats.sources.imagefolder import ImageFolder
from stagein.formats.write_kernels import jpeg_size
from stagein.loaders.synthetic import PATTERNS

SMALL_SHARDS = ["--shard-bytes", "64KiB"]


def run_convert(source: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stagein.tools.cli", "convert", "imagefolder", str(source), str(target), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def tree(root: Path) -> dict[str, bytes | Path]:
    """Every file and link below a folder, with its content or target."""
    return {
        str(path.relative_to(root)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_records_are_the_files_in_order(jpeg_folder: Path, jpeg_dataset: Dataset) -> None:
    files = sorted(jpeg_folder.glob("*/*.jpg"))
    classes = sorted(PATTERNS[:5])
    assert jpeg_dataset.schema.fields["label"].meta["classes"] == classes
    assert len(jpeg_dataset) == len(files)
    for file, record in zip(files, jpeg_dataset, strict=True):
        assert record["image"].tobytes() == file.read_bytes()
        assert classes[int(record["label"])] == file.parent.name
        assert tuple(record["hw"]) == simplejpeg.decode_jpeg_header(file.read_bytes())[:2]


@pytest.mark.parametrize("workers", [2, 5])
def test_bytes_do_not_depend_on_the_number_of_workers(
    jpeg_folder: Path, jpeg_dataset_path: Path, tmp_path: Path, workers: int
) -> None:
    convert(
        scan_imagefolder(jpeg_folder), tmp_path / "x.st", shard_bytes=64 << 10, chunk_bytes=16 << 10, workers=workers
    )
    assert tree(tmp_path / "x.st") == tree(jpeg_dataset_path)


@pytest.fixture
def source(jpeg_folder: Path, tmp_path: Path) -> Path:
    """A copy of the image folder, to spoil."""
    return shutil.copytree(jpeg_folder, tmp_path / "source")


BAD_FILES = {
    "circle/truncated.jpg": lambda good: good[: len(good) // 2],
    "circle/cut in header.jpg": lambda good: good[:100],
    "rings/empty.jpg": lambda good: b"",
    "rings/text.jpg": lambda good: b"this is no image\n" * 50,
    "rings/notes.txt": lambda good: b"notes",
    "stray.jpg": lambda good: good,
}


def spoil(source: Path) -> None:
    good = (source / "circle/00000.jpg").read_bytes()
    for name, make in BAD_FILES.items():
        (source / name).write_bytes(make(good))


def test_bad_files_are_all_listed_and_refused(source: Path, tmp_path: Path) -> None:
    spoil(source)
    for name in ("rings/empty.jpg", "rings/notes.txt", "stray.jpg"):
        result = run_convert(source, tmp_path / "x.st", *SMALL_SHARDS)
        assert result.returncode == 3
        assert name in result.stderr
        (source / name).unlink()
    result = run_convert(source, tmp_path / "x.st", *SMALL_SHARDS)
    assert result.returncode == 3
    assert "3 things in it are no records" in result.stderr
    for name, reason in {
        "circle/truncated.jpg": "truncated JPEG: it has no end marker",
        "circle/cut in header.jpg": "truncated JPEG: it ends within its header",
        "rings/text.jpg": "starts like neither JPEG nor PNG",
    }.items():
        assert f"{name}: " in result.stderr
        assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x.st").exists()


def test_bad_files_are_skipped_on_request_and_listed(source: Path, jpeg_dataset: Dataset, tmp_path: Path) -> None:
    spoil(source)
    result = run_convert(source, tmp_path / "x.st", "--skip-bad", "--workers", "2", *SMALL_SHARDS)
    assert result.returncode == 0
    assert "6 things were left out" in result.stderr
    listed = (tmp_path / "x.st" / "skipped.tsv").read_text()
    assert {line.split("\t")[0] for line in listed.splitlines()} == set(BAD_FILES)
    dataset = Dataset(tmp_path / "x.st")
    assert np.array_equal(dataset.columns["label"], jpeg_dataset.columns["label"])
    assert [record["image"].tobytes() for record in dataset] == [record["image"].tobytes() for record in jpeg_dataset]


def test_links_are_followed_but_in_no_circle(source: Path, jpeg_dataset: Dataset, tmp_path: Path) -> None:
    (source / "circle").rename(tmp_path / "elsewhere")
    (source / "circle").symlink_to(tmp_path / "elsewhere")
    reasons = {
        "rings/nowhere.jpg": "it is a link that leads nowhere",
        "rings/self.jpg": "it is a link that leads nowhere",
        "rings/up": "it is a link to a folder that it lies in",
        "rings/up and up": "it is a link to a folder that it lies in",
    }
    targets = ("nothing.jpg", "self.jpg", "..", source.parent)
    for name, target in zip(reasons, targets, strict=True):
        (source / name).symlink_to(target)
    found = scan_imagefolder(source)
    assert {refused.name: refused.reason for refused in found.refused} == reasons
    converted = convert(found, tmp_path / "x.st", skip_bad=True)
    assert converted.manifest.num_records == len(jpeg_dataset)


def test_odd_names_are_listed_a_line_each(source: Path, tmp_path: Path) -> None:
    (source / "rings" / "a\tb\nc.txt").touch()
    Path(os.fsdecode(os.fsencode(source) + b"/rings/\xff.txt")).touch()
    result = run_convert(source, tmp_path / "x.st", "--skip-bad", *SMALL_SHARDS)
    assert result.returncode == 0
    listed = (tmp_path / "x.st" / "skipped.tsv").read_bytes().splitlines()
    assert [line.split(b"\t")[0] for line in listed] == [b"rings/a\\tb\\nc.txt", b"rings/\xff.txt"]


def test_one_thing_is_left_out_in_the_singular(source: Path, tmp_path: Path) -> None:
    (source / "rings" / "notes.txt").touch()
    assert "1 thing was left out" in run_convert(source, tmp_path / "x.st", "--skip-bad").stderr


def test_a_class_whose_name_is_no_text_is_refused_at_once(source: Path, tmp_path: Path) -> None:
    (source / "rings").rename(Path(os.fsdecode(os.fsencode(source) + b"/r\xff")))
    result = run_convert(source, tmp_path / "x.st")
    assert result.returncode == 3
    assert "is no UTF-8" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "x.st.part").exists()


def test_a_png_is_an_image_whatever_its_name(source: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (31, 17)).save(source / "circle/zz.jpg", "PNG")
    convert(scan_imagefolder(source), tmp_path / "x.st")
    dataset = Dataset(tmp_path / "x.st")
    assert [int(h * w) for h, w in dataset.columns["hw"] if h * w != 48 * 72] == [31 * 17]


@dataclass(frozen=True)
class OneByOne:
    """A source whose parts read their records one by one."""

    whole: ImageFolder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def part(self, numbers: NDArray[np.int64]) -> SourcePart:
        part = self.whole.part(numbers)
        return SimpleNamespace(mark=part.mark, read=part.read)  # type: ignore[return-value]


def test_files_read_in_batches_give_the_same_as_one_by_one(source: Path, tmp_path: Path) -> None:
    spoil(source)
    (source / "circle/00001.jpg").write_bytes((source / "circle/00001.jpg").read_bytes() + b"appended by a camera")
    (source / "rings/also png.jpg").write_bytes(png(1, 3, 70_000))
    found = scan_imagefolder(source)
    for name, each in {"batches": found, "one by one": OneByOne(found)}.items():
        for shard_bytes in (10_000, 64 << 10, 10 << 20):
            convert(each, tmp_path / f"{name} {shard_bytes}", shard_bytes=shard_bytes, skip_bad=True)
    for shard_bytes in (10_000, 64 << 10, 10 << 20):
        assert tree(tmp_path / f"batches {shard_bytes}") == tree(tmp_path / f"one by one {shard_bytes}")
    assert len(Dataset(tmp_path / "batches 10000")) == 86


@given(
    image=st.sampled_from(range(3)), cut=st.integers(1, 400), position=st.integers(0, 400), value=st.integers(0, 255)
)
@settings(max_examples=300)
def test_sizes_of_damaged_jpegs_are_those_of_their_headers_or_unknown(
    image: int, cut: int, position: int, value: int
) -> None:
    content = bytearray(jpeg(image, 8 + image, 300 - image)[:-cut] + b"\xff\xd9")
    content[position % len(content)] = value
    size = jpeg_size(np.frombuffer(content, np.uint8).copy())
    try:
        header = read_header(memoryview(content))
    except BadImageError:
        assert size == (0, 0)
    else:
        assert size in ((header.height, header.width), (0, 0))
        assert content[-2:] != b"\xff\xd9" or content[2] != 0xFF or all(size)


def test_an_image_larger_than_a_shard_gets_its_own(source: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    large = simplejpeg.encode_jpeg(random, quality=95)
    (source / "circle/large.jpg").write_bytes(large)
    convert(scan_imagefolder(source), tmp_path / "x.st", shard_bytes=64 << 10)
    assert len(large) > 64 << 10
    assert sum(record["image"].tobytes() == large for record in Dataset(tmp_path / "x.st")) == 1


def test_an_existing_target_is_kept(jpeg_folder: Path, jpeg_dataset_path: Path, tmp_path: Path) -> None:
    target = shutil.copytree(jpeg_dataset_path, tmp_path / "x.st", symlinks=True)
    before = tree(target)
    with pytest.raises(UsageError, match="pass --overwrite"):
        convert(scan_imagefolder(jpeg_folder), target)
    assert tree(target) == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="not a stagein data set"):
        convert(scan_imagefolder(jpeg_folder), tmp_path / "mine", overwrite=True)


def test_overwrite_replaces_only_when_the_new_one_is_complete(
    source: Path, jpeg_dataset_path: Path, tmp_path: Path
) -> None:
    target = shutil.copytree(jpeg_dataset_path, tmp_path / "x.st", symlinks=True)
    before = tree(target)
    (source / "circle/00000.jpg").write_bytes(b"no image")
    with pytest.raises(SourceError):
        convert(scan_imagefolder(source), target, overwrite=True)
    assert tree(target) == before
    (source / "circle/00000.jpg").unlink()
    convert(scan_imagefolder(source), target, overwrite=True)
    assert len(Dataset(target)) == 84
    assert [path.name for path in tmp_path.iterdir() if path.name != "source"] == ["x.st"]


class _StopError(Exception):
    pass


def test_a_restart_keeps_what_holds_and_redoes_the_rest(source: Path, jpeg_dataset_path: Path, tmp_path: Path) -> None:
    def stop_after_two(progress: Progress) -> None:
        if progress.records >= 40:
            raise _StopError

    options = {"shard_bytes": 64 << 10, "chunk_bytes": 16 << 10}
    target = tmp_path / "x.st"
    with pytest.raises(_StopError):
        convert(scan_imagefolder(source), target, on_progress=stop_after_two, **options)
    assert not target.exists()
    shards = sorted((tmp_path / f"x.st{PART_SUFFIX}" / "shards").iterdir())
    assert len(shards) >= 2
    shards[0].chmod(0o644)
    with open(shards[0], "r+b") as file:  # a flipped byte: this shard must be made again
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([file.read(1)[0] ^ 1]))
    converted = convert(scan_imagefolder(source), target, **options)
    assert converted.reused_shards == len(shards) - 1
    assert tree(target) == tree(jpeg_dataset_path)


def test_a_restart_after_the_source_changed_takes_nothing_stale(source: Path, tmp_path: Path) -> None:
    def stop_after_one(progress: Progress) -> None:
        raise _StopError

    target = tmp_path / "x.st"
    with pytest.raises(_StopError):
        convert(scan_imagefolder(source), target, shard_bytes=64 << 10, on_progress=stop_after_one)
    edited = source / "checker/00000.jpg"
    content = bytearray(edited.read_bytes())
    content[-10] ^= 1  # another image of the same size
    edited.write_bytes(content)
    assert convert(scan_imagefolder(source), target, shard_bytes=64 << 10).reused_shards == 0
    assert Dataset(target)[0]["image"].tobytes() == content


def test_a_target_that_cannot_be_made_is_a_sentence(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run_convert(source, tmp_path / "file" / "x.st")
    assert result.returncode == 1
    assert result.stderr.startswith("stagein: writing ")
    assert len(result.stderr.splitlines()) == 1


STOPPED_AT_ONCE = """
import os, signal, sys, threading
from pathlib import Path
from stagein.formats import convert, scan_imagefolder
from stagein.formats.errors import InterruptedRunError

if __name__ == "__main__":
    source = scan_imagefolder(Path(sys.argv[1]))
    for number, delay in enumerate((0.02, 0.1, 0.2, 0.4, 0.03, 0.06)):
        stopper = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM))
        stopper.start()
        try:
            convert(source, Path(sys.argv[2]) / f"{number}.st", shard_bytes=4000, workers=2)
            stopper.cancel()
        except InterruptedRunError:
            print("stopped")
"""


def test_stopped_while_its_processes_start_it_leaves_none_half_started(jpeg_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED_AT_ONCE)
    command = [sys.executable, str(tmp_path / "stopped.py"), str(jpeg_folder), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.count("stopped") > 3


WITHOUT_NUMBA = """
import sys
from pathlib import Path

from stagein.formats import convert, scan_imagefolder
from stagein.formats import worker_preload
from stagein.formats.seekable_images import SeekableJpegs
from stagein.formats.sources.images import change_images

source = scan_imagefolder(Path(sys.argv[1]))
assert convert(source, Path(sys.argv[2]) / "plain.st", shard_bytes=64 << 20).manifest.num_records == 65
seekable = change_images(source, SeekableJpegs())
assert convert(seekable, Path(sys.argv[2]) / "seekable.st").counts["JPEGs made seekable"] == 65
assert "numba" not in sys.modules
"""


def test_neither_workers_nor_a_conversion_by_kernels_load_numba(tmp_path: Path) -> None:
    folder = tmp_path / "images/class"
    folder.mkdir(parents=True)
    large = np.random.default_rng(0).integers(0, 255, (700, 700, 3), np.uint8)
    (folder / "0.jpg").write_bytes(simplejpeg.encode_jpeg(large, quality=99))
    for number in range(1, 65):  # above 32 MiB together
        shutil.copy(folder / "0.jpg", folder / f"{number}.jpg")
    command = [sys.executable, "-c", WITHOUT_NUMBA, str(folder.parent), str(tmp_path)]
    subprocess.run(command, check=True, timeout=100)
    assert max(shard.nbytes for shard in Dataset(tmp_path / "plain.st").manifest.shards) > 32 << 20


def test_a_kernel_that_reads_images_is_machine_code() -> None:
    """numba runs what cannot be, an array made in a kernel for one, unnoticed but for the second that it takes to load in each worker."""
    memory, numbers = np.zeros(3, np.int64), np.empty(0, np.int32)
    content, places = np.empty(0, np.uint8), np.empty(0, np.int64)
    arguments = -1, content, places, places, content, numbers.reshape(0, 2), numbers, memory
    assert imagefolder._read_images(*arguments) == (0, 0)
    assert imagefolder._read_images.entry(*arguments) is not None


def test_the_command_ends_with_all_that_it_started(source: Path, tmp_path: Path) -> None:
    start = [sys.executable, "-m", "stagein.tools", "convert", "imagefolder"]
    for name, folder in (("good.st", source), ("none.st", tmp_path / "nothing")):
        with subprocess.Popen(
            [*start, str(folder), str(tmp_path / name)], stderr=subprocess.PIPE, start_new_session=True
        ) as process:
            assert process.stderr is not None
            process.stderr.read()  # until the last of its processes ends
            assert process.wait(timeout=30) == (0 if folder == source else 3)
        deadline = time.monotonic() + 20
        while group_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert group_of(process.pid) == {}


@pytest.mark.parametrize(("workers", "is_started"), [("1", False), ("2", True)])
def test_what_workers_are_forked_from_is_started_for_several_and_ends_before_the_command(
    source: Path, tmp_path: Path, workers: str, is_started: bool
) -> None:
    command = [sys.executable, "-m", "stagein.tools", "convert", "imagefolder", str(source), str(tmp_path / "x.st")]
    servers: set[int] = set()
    with (
        open(tmp_path / "output", "w") as output,
        subprocess.Popen([*command, "--workers", workers], stdout=output, start_new_session=True) as process,
    ):
        while process.poll() is None:
            servers |= {pid for pid, command in group_of(process.pid).items() if "forkserver" in command}
    assert not any("forkserver" in command for command in group_of(process.pid).values())
    assert process.returncode == 0
    assert bool(servers) == is_started


def group_of(leader: int) -> dict[int, str]:
    """The processes of a process group that live, and their command lines."""
    found = subprocess.run(
        ["ps", "-eww", "-o", "pid=,pgid=,stat=,args="], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split(maxsplit=3) for line in found.splitlines()]
    return {int(pid): args for pid, group, state, args in rows if int(group) == leader and not state.startswith("Z")}


def test_what_workers_are_forked_from_starts_first_and_ignores_ctrl_c() -> None:
    script = """
import time
from multiprocessing import forkserver
from stagein.formats import worker_server
import sys
assert "numpy" not in sys.modules
worker_server.start()
print(forkserver._forkserver._forkserver_pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            server = Path("/proc") / process.stdout.readline().strip()
            blocked = int((server / "status").read_text().split("SigBlk:")[1].split()[0], 16)
            assert blocked & 1 << (signal.SIGINT - 1)
        finally:
            process.kill()
    deadline = time.monotonic() + 30
    while server.exists() and "Z" not in (server / "stat").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server.exists() or "Z" in (server / "stat").read_text()


def test_a_link_of_an_earlier_attempt_is_not_written_through(source: Path, tmp_path: Path) -> None:
    attempt = tmp_path / "x.st.part/label/c"
    attempt.mkdir(parents=True)
    (tmp_path / "victim").write_bytes(b"kept")
    (attempt / "0").symlink_to(tmp_path / "victim")
    assert run_convert(source, tmp_path / "x.st").returncode == 0
    assert (tmp_path / "victim").read_bytes() == b"kept"
    assert not (tmp_path / "x.st/label/c/0").is_symlink()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_time_the_same_command_ends_in_the_same_bytes(
    jpeg_folder: Path, tmp_path: Path, signal_number: signal.Signals
) -> None:
    source = tmp_path / "many"
    for copy in range(12):
        shutil.copytree(
            jpeg_folder,
            source,
            dirs_exist_ok=True,
            copy_function=lambda a, b, n=copy: shutil.copy(a, f"{b[:-4]}_{n}.jpg"),
        )
    command = [sys.executable, "-m", "stagein.tools.cli", "convert", "imagefolder", str(source)]
    options = ["--workers", "2", *SMALL_SHARDS]
    target = tmp_path / "x.st"
    part = tmp_path / f"x.st{PART_SUFFIX}"
    with subprocess.Popen([*command, str(target), *options], stderr=subprocess.PIPE, text=True) as process:
        while len(list(part.glob("journal/*.npz"))) < 4 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal_number)
        _, stderr = process.communicate(timeout=30)
    assert not target.exists(), "the conversion was over before it was killed"
    if signal_number == signal.SIGTERM:
        assert process.returncode == 6
        assert "the same command again resumes" in stderr
    deadline = time.monotonic() + 20  # the workers see their parent's end and go, and the lock with them
    while (again := run_convert(source, target, *options)).returncode == 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert again.returncode == 0, again.stderr
    assert "kept from an earlier attempt" in again.stdout
    straight = run_convert(source, tmp_path / "straight.st", *options)
    assert straight.returncode == 0
    assert tree(target) == tree(tmp_path / "straight.st")


def test_two_processes_do_not_write_one_target(source: Path, tmp_path: Path) -> None:
    def second(progress: Progress) -> None:
        with pytest.raises(UsageError, match="being written by another process"):
            convert(scan_imagefolder(source), tmp_path / "x.st")

    convert(scan_imagefolder(source), tmp_path / "x.st", on_progress=second)


def test_a_file_that_changes_while_it_is_read_is_noticed(source: Path, tmp_path: Path) -> None:
    plan = scan_imagefolder(source)
    with open(source / "circle/00003.jpg", "ab") as file:
        file.write(b"more")
    with pytest.raises(SourceError, match=r"circle/00003.jpg changed its size"):
        convert(plan, tmp_path / "x.st")


def test_a_file_that_vanishes_is_named(source: Path, tmp_path: Path) -> None:
    plan = scan_imagefolder(source)
    (source / "circle/00003.jpg").unlink()
    with pytest.raises(SourceError, match=r"circle/00003.jpg cannot be read"):
        convert(plan, tmp_path / "x.st", workers=2, shard_bytes=64 << 10)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_made(jpeg_folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], check=True)
    try:
        result = run_convert(jpeg_folder, disk / "x.st", *SMALL_SHARDS)
        assert result.returncode == 4
        assert "no space left" in result.stderr
        assert "Traceback" not in result.stderr
        assert not (disk / "x.st").exists()
        assert all(not path.name.endswith(PART_SUFFIX) for path in (disk / f"x.st{PART_SUFFIX}").rglob("*"))
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert run_convert(jpeg_folder, disk / "x.st", *SMALL_SHARDS).returncode == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be listed"):
        scan_imagefolder(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="no class folders"):
        scan_imagefolder(tmp_path)
