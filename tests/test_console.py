"""What commands show: nothing that a terminal obeys, nothing wider than it is, in any encoding."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from pictures import jpeg
from terminal import on_a_terminal

from stagein.tools.console import printable
from stagein.tools.options import parse_age, parse_size

RAW = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
HOSTILE = "r\x1b[31med\n\r\t\x9b2J[blue]\u202e"
"""A name that colours, moves the cursor, breaks lines, is markup to Rich, and turns what follows around."""


def run(*arguments: str | Path, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "stagein.tools", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=60, encoding=encoding)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, schön, 日本", "plain, schön, 日本"),
        ("a\x1b[2Jb\x07", "a\\x1b[2Jb\\x07"),
        ("no\nway\r\t", "no\\nway\\r\\t"),
        ("two:\n  a\x00\n  b", "two:\n  a\\x00\n  b"),
        ("\udcff\x9b\u202e\ud800", r"\xff\x9b\u202e\ud800"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_names_of_files_do_nothing_to_a_terminal(tmp_path: Path) -> None:
    images, data, local = tmp_path / "images", tmp_path / f"{HOSTILE}.st", tmp_path / HOSTILE
    (images / HOSTILE).mkdir(parents=True)
    local.mkdir()
    (images / HOSTILE / f"{HOSTILE}.jpg").write_bytes(jpeg(1))
    (images / HOSTILE / f"bad{HOSTILE}.jpg").write_bytes(b"no image")
    for exit_code, *command in (
        (3, "convert", "imagefolder", images, data),
        (0, "convert", "imagefolder", images, data, "--skip-bad"),
        (2, "convert", "imagefolder", images, data),
        (0, "info", data),
        (3, "info", tmp_path / f"no{HOSTILE}"),
        (0, "stage", data, "--to", local, "--dry-run"),
        (0, "stage", data, "--to", local),
        (0, "status", "--to", local),
        (0, "verify", data),
        (0, "extract", data, "0", "--to", local / "out"),
        (2, "train", HOSTILE),
        (2, "train", "demo", "--set", f"data.{HOSTILE}=1"),
        (0, "evict", data, "--to", local),
    ):
        result = run(*command)
        assert result.returncode == exit_code, result.stderr
        assert not RAW.search(result.stdout + result.stderr) and "\u202e" not in result.stdout + result.stderr, command
        assert result.stderr.count("\n") < 7, result.stderr


def test_names_of_files_do_nothing_to_bars_and_the_live_view(tmp_path: Path) -> None:
    images, local = tmp_path / "images", tmp_path / "[" / "x]\x07"
    (images / "a").mkdir(parents=True)
    local.mkdir(parents=True)
    for number in range(8):
        (images / "a" / f"{number}.jpg").write_bytes(jpeg(number))
    split = ["--split", "[blue]\x07=0.5,b=0.5"]
    shown = on_a_terminal("convert", "imagefolder", images, tmp_path / "{split}.st", *split)
    assert r"converting [blue]\x07.st" in shown and "\x07" not in shown
    shown = on_a_terminal("stage", tmp_path / "b.st", "--to", local)
    assert r"[/x]\x07/stagein" in shown and "\x07" not in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_an_encoding_lacks_are_no_reason_to_fail(encoding: str, tmp_path: Path) -> None:
    for name in ("日本", "ä"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.jpg").write_bytes(jpeg(1))
    data = tmp_path / "日本.st"
    for command in (
        ["convert", "imagefolder", tmp_path / "images", data],
        ["info", data],
        ["info", data, "--json"],
        ["stage", data, "--to", tmp_path],
        ["status", "--to", tmp_path],
        ["convert", "imagefolder", "--help"],
    ):
        result = run(*command, encoding=encoding)
        assert result.returncode == 0, result.stderr
    result = run("stage", data, "--to", tmp_path, "--json", encoding=encoding)
    assert json.loads(result.stdout)["source"] == str(data)


@pytest.mark.parametrize("command", ["info", "info --json", "verify"])
def test_a_log_on_a_full_disk_is_told_in_a_sentence(command: str, jpeg_dataset_path: Path) -> None:
    name, *options = command.split()
    words = [sys.executable, "-m", "stagein.tools", name, jpeg_dataset_path, *options]
    with open("/dev/full", "w") as full:
        result = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 4
    assert result.stderr.splitlines()[-1].startswith(
        "stagein: no space left while writing to standard output: free some room"
    )
    assert "Traceback" not in result.stderr


def test_what_is_staged_and_a_plan_fit_a_terminal_of_80_columns(jpeg_dataset_path: Path, tmp_path: Path) -> None:
    local = tmp_path / ("long" * 20)
    local.mkdir()
    shown = on_a_terminal("stage", jpeg_dataset_path, "--to", local, "--dry-run")
    first, names, node, prediction = shown.splitlines()
    assert str(local) in first and prediction.startswith("at least")
    assert names.split() == ["node", "files", "gets", "has", "free", "reads", "source/s", "network/s", "disk/s"]
    assert len(names) <= 80 and len(node) <= 80 and "…" not in shown
    on_a_terminal("stage", jpeg_dataset_path, "--to", local)
    shown = on_a_terminal("status", "--to", local)
    table, paths = shown.splitlines()[:5], shown.splitlines()[5:]
    assert all(len(line) <= 80 for line in table) and "complete" in table[3], shown
    assert paths[0].endswith(f" is a copy of {jpeg_dataset_path}") and str(local) in paths[1], shown


@pytest.mark.parametrize("text", ["inf", "nan", "-1", "1e400", "0", "", "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="no size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["infs", "nanh", "-5min", "1e400d", "", "d", "5"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="no duration"):
        parse_age(text)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_reason_to_fail(closed: str, jpeg_folder: Path, tmp_path: Path) -> None:
    stagein = f"{sys.executable} -m stagein.tools"
    for command in (
        f"convert imagefolder {jpeg_folder} {tmp_path / 'x.st'}",
        f"verify {tmp_path / 'x.st'}",
        f"info {tmp_path / 'x.st'}",
    ):
        subprocess.run(f"{stagein} {command} {closed}", shell=True, check=True, timeout=100)
