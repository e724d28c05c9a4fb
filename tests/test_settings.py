"""Settings files and overrides, and what `stagein train` makes of them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mpi import run_ranks

from stagein.formats import convert, scan_imagefolder
from stagein.formats.errors import ExitCode, UsageError
from stagein.tools.settings import load_settings
from stagein.tools.train import share_of_batch, threads_of_rank

NEEDED = ["data.train=/data/train.st"]


@pytest.mark.parametrize("name", ["cifar10", "demo", "imagenet"])
def test_packaged_settings_need_only_the_data(name: str) -> None:
    assert load_settings(name, NEEDED).data.train == Path("/data/train.st")
    with pytest.raises(UsageError, match=r"data\.train is missing: .* --set data\.train=VALUE"):
        load_settings(name)


def test_a_file_of_ones_own_and_overrides_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[data]\ntrain = "a"\n[optim]\nlr = 0.5\n')
    settings = load_settings(path, ["optim.lr=0.25", "optim.epochs=3", "data.crop_area=[0.2, 0.9]", "model.name=tiny"])
    assert (settings.optim.lr, settings.optim.epochs, settings.data.crop_area, settings.model.name) == (
        0.25,
        3,
        (0.2, 0.9),
        "tiny",
    )
    assert load_settings(path).optim.lr == 0.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=1", r"no setting optim\.learning_rate: known are name, lr, momentum"),
        ("optimizer.lr=1", r"no setting optimizer: known are \[data\], \[model\], \[optim\], \[train\]"),
        ("optim.lr=fast", r"optim\.lr = 'fast' does not fit: input should be a valid number"),
        ("train.backend=horovod", r"train\.backend = 'horovod' does not fit: input should be 'auto'"),
        ("optim.lr=inf", r"optim\.lr = inf does not fit: input should be a finite number"),
        ("data.crop_area=[0.5]", r"data\.crop_area = \[0\.5\] does not fit: it has too few values"),
        ("data.test=5", r"data\.test = 5 is not a path: write it in quotes"),
        ("train.checkpoint_every_steps=5", r"train: checkpoint_every_steps needs a checkpoint_folder"),
        ("optim.target_accuracy=0.5", r"demo: optim\.target_accuracy needs data\.test, on which it is reached"),
        ("lr=1", r"--set 'lr=1' is not of the form table\.key=value"),
        ("optim.lr", r"is not of the form table\.key=value"),
    ],
)
def test_a_wrong_override_is_told_with_what_is_known(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_settings("demo", [*NEEDED, override])


def test_a_missing_file_and_one_that_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="or one of cifar10, demo, imagenet"):
        load_settings("cifar100")
    (tmp_path / "bad.toml").write_text("[data\n")
    with pytest.raises(UsageError, match="is not TOML"):
        load_settings(tmp_path / "bad.toml")


def test_the_global_batch_is_divided_evenly_or_not_at_all() -> None:
    assert share_of_batch(128, 4) == 32
    with pytest.raises(UsageError, match=r"data\.global_batch_size = 128 cannot be divided by 3 ranks: .* such as 129"):
        share_of_batch(128, 3)


def test_threads_are_the_cores_that_no_other_rank_uses() -> None:
    everything = frozenset(range(8))
    assert threads_of_rank([("a", everything)], 0) == 8
    assert threads_of_rank([("a", everything), ("a", everything)], 1) == 4
    assert threads_of_rank([("a", frozenset({0, 1})), ("a", frozenset({2, 3}))], 1) == 2
    assert threads_of_rank([("a", everything), ("b", everything)], 0) == 8
    assert threads_of_rank([("a", frozenset({0}))] * 4, 0) == 1


@pytest.mark.mpi
def test_the_command_trains_on_two_ranks_and_writes_its_summary(jpeg_dataset_path: Path, tmp_path: Path) -> None:
    sets = [f"data.train={jpeg_dataset_path}", f"data.test={jpeg_dataset_path}", f"train.run_folder={tmp_path}"]
    sets += ["optim.epochs=2", "data.global_batch_size=16", "train.log_every_steps=2", "data.image_size=32"]
    command = [sys.executable, "-m", "stagein.tools.cli", "train", "demo", *(f"--set={each}" for each in sets)]
    finished = run_ranks(2, *command)
    assert finished.returncode == ExitCode.OK, finished.stderr
    assert "allreduce: mpi (gradients are in host memory" in finished.stdout
    assert finished.stdout.count("epoch 2/2") == 4, "three lines of steps, one of the epoch, by one rank"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"], summary["images"]) == (2, 12, 170)
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["step"] * 3 + ["epoch"] + ["step"] * 3 + ["epoch", "end"]


def test_a_test_set_in_which_labels_stand_for_other_classes_is_refused(
    jpeg_folder: Path, jpeg_dataset_path: Path, tmp_path: Path, stagein: Callable[..., tuple[int, str, str]]
) -> None:
    first, second, *_ = sorted(folder.name for folder in jpeg_folder.iterdir())
    shutil.copytree(jpeg_folder, tmp_path / "test", ignore=lambda _folder, names: {first} & set(names))
    convert(scan_imagefolder(tmp_path / "test"), tmp_path / "test.st")
    command = ["train", "demo", "--dry-run", "--set", f"data.train={jpeg_dataset_path}", "--set"]
    code, _, complaint = stagein(*command, f"data.test={tmp_path / 'test.st'}")
    assert code == ExitCode.USAGE
    assert f"label 0 is '{second}' in {tmp_path / 'test.st'} and '{first}' in {jpeg_dataset_path}" in complaint
    (tmp_path / "test" / first).mkdir()
    convert(scan_imagefolder(tmp_path / "test"), tmp_path / "empty.st")
    assert stagein(*command, f"data.test={tmp_path / 'empty.st'}")[0] == ExitCode.OK


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("data.global_batch_size=9", "cannot be divided by 2 ranks"),
        ("model.name=colossal", "colossal"),
        ("optim.warmup_epochs=99", "exceeds optim.epochs"),
        ("data.crop_area=[1.0, 0.5]", "area=(1.0, 0.5) is not the smallest and the largest share of an image"),
        ("data.train=/nowhere.st", "/nowhere.st"),
        ("train.run_folder=/dev/null/run", "writing the run's log to /dev/null/run failed: Not a directory"),
        ("train.checkpoint_folder=/dev/null/c", "writing checkpoints to /dev/null/c failed: Not a directory"),
        ("data.global_batch_size=8", None),
    ],
)
def test_a_dry_run_finds_mistakes_and_trains_nothing(
    jpeg_dataset_path: Path, tmp_path: Path, setting: str, sentence: str | None
) -> None:
    words = ["--set", f"data.train={jpeg_dataset_path}", "--set", f"train.run_folder={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "stagein.tools", "train", "demo", *words, "--set", setting, "--dry-run"]
    result = run_ranks(2, *command)
    assert (result.returncode == 0) == (sentence is None) and (sentence or "") in result.stderr, result.stderr
    assert ("nothing was trained" in result.stdout) == (sentence is None)
    assert result.stderr.count("stagein: ") == (sentence is not None) and not (tmp_path / "run").exists()
