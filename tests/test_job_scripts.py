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
case "$1 $*" in
*--dry-run) code=${{CHECK_CODE:-0}} ;;
"stage "*) code=${{STAGE_CODE:-}} ;;
"status "*) [ -z "${{STATUS_CODE:-}}" ] || kill -USR1 $PPID ;;
"train "*) code=${{TRAIN_CODE:-0}} ;;
esac
if [ "${{SIGNAL:-no}}" = yes ] && [ "${{code:-0}}" -ne 0 ]; then
    [ "$code" -eq 138 ] || trap 'exit $code' USR1
    kill -USR1 $PPID  # the script, which hands it on
    for _ in {{1..100}}; do sleep 0.1; done
    exit 99
fi
[ -z "${{code:-}}" ] || exit "$code"
exec {sys.executable} -m stagein.tools "$@" """,
}
"""The training is only played; with SIGNAL=yes the step that is to fail does so when the script hands it the signal."""


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
@pytest.mark.parametrize("code", [int(ExitCode.INTERRUPTED), 138])
def test_what_the_signal_interrupts_goes_back_to_the_queue(
    tmp_path: Path, script: str, job: str, step: str, code: int
) -> None:
    """138: the step died of SIGUSR1 before it could take it."""
    exit_code, calls = run_script(script, tmp_path, **{step: str(code), "SIGNAL": "yes"})
    assert exit_code == code and calls[-1] == f"scontrol requeue {job}"
    assert len([call for call in calls if call.startswith("stagein train")]) == (2 if step == "TRAIN_CODE" else 1)


def test_a_signal_between_two_steps_is_not_lost(tmp_path: Path) -> None:
    exit_code, calls = run_script("train.sbatch", tmp_path, STATUS_CODE="yes")
    assert exit_code == ExitCode.INTERRUPTED and calls[-1] == "scontrol requeue 7"
    assert calls[-2].startswith("stagein status")


@pytest.mark.parametrize("script", ["train.sbatch", "array.sbatch"])
@pytest.mark.parametrize("signal", ["yes", "no"])
def test_what_failed_does_not(tmp_path: Path, script: str, signal: str) -> None:
    exit_code, calls = run_script(script, tmp_path, STAGE_CODE=str(int(ExitCode.NO_SPACE)), SIGNAL=signal)
    assert exit_code == ExitCode.NO_SPACE and len(calls) == 2


@pytest.mark.parametrize("script", ["train.sbatch", "array.sbatch"])
def test_what_was_cancelled_does_not_either(tmp_path: Path, script: str) -> None:
    """scancel ends the steps by SIGTERM, and gives the script no signal before the time limit."""
    exit_code, calls = run_script(script, tmp_path, TRAIN_CODE=str(int(ExitCode.INTERRUPTED)))
    assert exit_code == ExitCode.INTERRUPTED and calls[-1].startswith("stagein train")


@pytest.mark.parametrize("script", ["train.sbatch", "array.sbatch"])
def test_wrong_settings_end_the_job_before_anything_is_staged(tmp_path: Path, script: str) -> None:
    exit_code, calls = run_script(script, tmp_path, CHECK_CODE=str(int(ExitCode.USAGE)))
    assert exit_code == ExitCode.USAGE and len(calls) == 1 and calls[0].endswith("--dry-run")
