"""`stagein info` and `stagein extract`: what is in a data set, and a record of it as files again."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from pictures import png
from terminal import on_a_terminal

from stagein.formats import Dataset, Field, Schema, Writer
from stagein.formats.codecs import Codec


def run(*arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stagein.tools.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    schema = Schema(
        fields={
            "sound": Field(kind="encoded", encoding="flac"),
            "volume": Field(kind="tensor", dtype="int16", shape=(16, 20, 20), codec=Codec(name="zstd")),
            "boxes": Field(kind="ragged", dtype="float32", shape=(None, 4)),
            "caption": Field(kind="text"),
            "answer": Field(kind="text", encoding="json"),
            "weights": Field(kind="tensor", dtype="bfloat16", shape=(3,)),
            "phase": Field(kind="tensor", dtype="complex64"),
            "label": Field(kind="tensor", dtype="int64", meta={"classes": ["cat", "dog"]}),
        }
    )
    with Writer(tmp_path / "x.st", schema) as writer:
        for number in range(7):
            writer.write(
                {
                    "sound": b"fLaC" + bytes(1000),
                    "volume": np.full((16, 20, 20), number),
                    "boxes": np.full((number, 4), 0.5, np.float32),
                    "caption": "schöner Hund " * number,
                    "answer": json.dumps({"number": number}),
                    "weights": np.array([0.5, number, -1], ml_dtypes.bfloat16),
                    "phase": 1j * number,
                    "label": number % 2,
                }
            )
    return tmp_path / "x.st"


def test_info_shows_fields_sizes_and_records(path: Path) -> None:
    result = run("info", path, "--records", 6)
    assert result.returncode == 0, result.stderr
    for text in (
        "7 records in 1 shard",
        "int16 [16, 20, 20]",
        "float32 [?, 4]",
        "bfloat16 [3]",
        "flac",
        "zstd",
        "column",
    ):
        assert text in result.stdout, text
    assert "classes of label: cat, dog" in result.stdout
    first, second = result.stdout.splitlines()[-6:-4]
    assert first.startswith("0: sound flac of 1.0 kB, volume int16 [16, 20, 20], boxes [], caption ''")
    assert second.endswith("weights [0.5, 1.0, -1.0], phase 1j, label 1")
    assert "boxes float32 [5, 4], caption 'schöner Hund" in result.stdout
    summary = json.loads(run("info", path, "--json").stdout)
    stored = int(Dataset(path).readers["volume"].index.nbytes.sum())
    assert summary["sizes"]["volume"] == {"stored_bytes": stored, "raw_bytes": 7 * 16 * 20 * 20 * 2}
    assert summary["sizes"]["boxes"]["stored_bytes"] == sum(range(7)) * 16


def test_info_of_a_data_set_with_a_damaged_record(path: Path) -> None:
    dataset = Dataset(path)
    shard = path / dataset.manifest.shards[0].file
    shard.chmod(0o644)
    with open(shard, "r+b") as file:
        file.seek(int(dataset.index.offset[1]))
        file.write(b"X")
    result = run("info", path)
    assert result.returncode == 0
    assert "record 1 cannot be shown: record 1 in" in result.stderr
    assert "\n2: sound" in result.stdout


def test_extract_gives_every_field_back_as_a_file(path: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    result = run("extract", path, 5, "--to", to)
    assert result.returncode == 0, result.stderr
    assert (to / "sound-00000005.flac").read_bytes() == b"fLaC" + bytes(1000)
    assert np.array_equal(np.load(to / "volume-00000005.npy"), np.full((16, 20, 20), 5, np.int16))
    assert np.array_equal(np.load(to / "boxes-00000005.npy"), np.full((5, 4), 0.5, np.float32))
    assert (to / "caption-00000005.txt").read_text() == "schöner Hund " * 5
    assert json.loads((to / "answer-00000005.json").read_text()) == {"number": 5}
    assert np.load(to / "phase-00000005.npy") == 5j
    small = {"weights": [0.5, 5.0, -1.0], "label": 1}
    assert json.loads((to / "record-00000005.json").read_text()) == small
    assert json.loads(result.stdout.splitlines()[-1]) == small
    assert sorted(map(str, to.iterdir())) == sorted(result.stdout.splitlines()[:-1])


@pytest.mark.parametrize(("dtype", "odd"), [("float32", np.nan), ("float64", -np.inf), ("bfloat16", np.nan)])
def test_extract_writes_no_numbers_into_json_that_json_has_not(dtype: str, odd: float, tmp_path: Path) -> None:
    schema = Schema(
        fields={
            "volume": Field(kind="tensor", dtype="uint8", shape=(9, 9, 9)),
            "target": Field(kind="tensor", dtype=dtype, shape=(2,)),
            "is_good": Field(kind="tensor", dtype="bool"),
        }
    )
    with Writer(tmp_path / "x.st", schema) as writer:
        for value in (1.0, odd):
            target = np.array([0.5, value], getattr(ml_dtypes, dtype, dtype))
            writer.write({"volume": np.zeros((9, 9, 9), np.uint8), "target": target, "is_good": True})
    of_json = []
    for number in range(2):
        result = run("extract", tmp_path / "x.st", number, "--to", tmp_path / "out")
        assert result.returncode == 0, result.stderr
        of_json.append(json.loads((tmp_path / "out" / f"record-{number:08d}.json").read_text()))
    assert of_json == [{"target": [0.5, 1.0], "is_good": True}, {"is_good": True}]
    assert np.array_equal(np.load(tmp_path / "out" / "target-00000001.npy"), [0.5, odd], equal_nan=True)


def test_extract_gives_the_image_back(jpeg_dataset_path: Path, jpeg_folder: Path, tmp_path: Path) -> None:
    result = run("extract", jpeg_dataset_path, 17, "--to", tmp_path)
    assert result.returncode == 0, result.stderr
    original = sorted(jpeg_folder.glob("*/*.jpg"))[17]
    assert (tmp_path / "image-00000017.jpg").read_bytes() == original.read_bytes()
    assert json.loads(result.stdout.splitlines()[-1]) == {"label": 1, "hw": [48, 72]}
    assert run("extract", jpeg_dataset_path, 85, "--to", tmp_path).returncode == 2


def test_the_table_of_fields_fits_a_terminal_of_80_columns(path: Path) -> None:
    shown = on_a_terminal("info", path, "--records", "0")
    assert "…" not in shown and all(len(line) <= 80 for line in shown.splitlines() if not line.startswith(str(path)))
    rows = [line.split() for line in shown.splitlines() if line.startswith(" ")]
    assert ["sound", "(primary)", "flac", "shards", "1.0", "kB", "7.0", "kB"] in rows
    assert ["volume", "int16", "[16,", "20,", "20]", "zstd"] in [row[:6] for row in rows]


@pytest.mark.parametrize("command", [[], ["convert"], ["bench"]])
def test_the_help_lists_commands_on_a_line_each(command: list[str]) -> None:
    shown = on_a_terminal(*command, "--help")
    listed = shown.partition("Commands:\n")[2].splitlines()
    assert len(listed) >= 8 and not any(line.endswith("...") for line in listed), shown


def test_what_fails_at_once_shows_no_bar(tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.png").write_bytes(png(4, 4))
    (tmp_path / "new.st.part").write_text("in the way")
    shown = on_a_terminal("convert", "imagefolder", tmp_path / "images", tmp_path / "new.st")
    assert [line.partition(" ")[0] for line in shown.splitlines()] == [f"{tmp_path / 'images'}:", "stagein:"]
