"""The Slurm scripts of configs/, run by bash with stand-ins for srun, scontrol and the training; staging is real."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from staged import assert_staged
from synthetic import CHUNK_BYTES, write_dataset

from stagein.formats.errors import ExitCode

CONFIGS = Path(__file__).parent.parent / "configs"
STAND_INS = {
    "srun": 'shift; exec "$@"',
    "scontrol": 'echo "scontrol $*" >>"$LOG"',
    "stagein": f"""echo "stagein $*" >>"$LOG"
case "$1" in
stage) [ "${{STAGE_CODE:-0}}" -eq 0 ] || exit "$STAGE_CODE" ;;
train) exit "${{TRAIN_CODE:-0}}" ;;
esac
exec {sys.executable} -m stagein.tools.cli "$@" """,
}


def run_script(script: str, tmp_path: Path, **codes: str) -> tuple[int, list[str]]:
    """The exit code of a script, and what it called."""
    commands, local = tmp_path / "bin", tmp_path / "nvme"
    for folder in (commands, local, tmp_path / "data"):
        folder.mkdir(exist_ok=True)
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    for seed, name in enumerate(("train", "val")):
        write_dataset(tmp_path / f"data/{name}.st", (3 * CHUNK_BYTES,), seed=seed)
    text = (CONFIGS / script).read_text().replace("/local/nvme", str(local))
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    result = subprocess.run(["bash", "-c", text], env=environment | codes, timeout=60)
    return result.returncode, (tmp_path / "log").read_text().splitlines()


@pytest.mark.parametrize(("script", "sets"), [("train.sbatch", ["train", "val"]), ("array.sbatch", ["train"])])
def test_a_script_stages_and_trains(tmp_path: Path, script: str, sets: list[str]) -> None:
    exit_code, calls = run_script(script, tmp_path)
    assert exit_code == 0 and not [call for call in calls if call.startswith("scontrol")]
    assert [call.split()[2] for call in calls if call.startswith("stagein stage")] == [
        str(tmp_path / f"data/{name}.st") for name in sets
    ]
    for name in sets:
        assert_staged(tmp_path / f"data/{name}.st", tmp_path / "nvme")
    assert calls[-1].startswith("stagein train") and "checkpoint_folder" in calls[-1]


def test_tasks_of_an_array_differ(tmp_path: Path) -> None:
    _, calls = run_script("array.sbatch", tmp_path)
    assert "--set optim.lr=0.1 " in calls[-1] and "runs/7/3" in calls[-1]


@pytest.mark.parametrize(("script", "job"), [("train.sbatch", "7"), ("array.sbatch", "7_3")])
@pytest.mark.parametrize("step", ["STAGE_CODE", "TRAIN_CODE"])
def test_what_was_interrupted_goes_back_to_the_queue(tmp_path: Path, script: str, job: str, step: str) -> None:
    exit_code, calls = run_script(script, tmp_path, **{step: str(int(ExitCode.INTERRUPTED))})
    assert exit_code == ExitCode.INTERRUPTED and calls[-1] == f"scontrol requeue {job}"
    assert any(call.startswith("stagein train") for call in calls) == (step == "TRAIN_CODE")


@pytest.mark.parametrize("script", ["train.sbatch", "array.sbatch"])
def test_what_failed_does_not(tmp_path: Path, script: str) -> None:
    exit_code, calls = run_script(script, tmp_path, STAGE_CODE=str(int(ExitCode.NO_SPACE)))
    assert exit_code == ExitCode.NO_SPACE and len(calls) == 1
