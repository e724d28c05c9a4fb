"""A manifest is trusted only when it is whole, its own, and adds up."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagein.formats import Dataset, Manifest
from stagein.formats.errors import SourceError


@pytest.fixture
def content(jpeg_dataset: Dataset) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((jpeg_dataset.path / "manifest.json").read_text())
    return parsed


def test_it_survives_a_round_trip(jpeg_dataset: Dataset) -> None:
    assert Manifest.parse(jpeg_dataset.manifest.to_bytes(), "copy") == jpeg_dataset.manifest


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(SourceError, match="not a regular file"):
        Manifest.load(tmp_path)


def _parse(content: dict[str, Any], *, keep_id: bool = False) -> Manifest:
    if not keep_id:  # a manifest whose id fits its bad content: other checks than the id must refuse it
        content = {**content, "id": ""}
        content["id"] = Manifest.model_validate(content).computed_id()
    return Manifest.parse(json.dumps(content).encode(), "manifest.json")


def test_an_edit_is_noticed(content: dict[str, Any]) -> None:
    content["capacity"]["image"] += 65536
    with pytest.raises(SourceError, match="does not belong to its content"):
        _parse(content, keep_id=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../outside", "not a plain path"),
        ("/etc/passwd", "not a plain path"),
        ("shards/../../x", "not a plain path"),
        ("shards//x", "not a plain path"),
        ("nul\0", "not a plain path"),
        ("", "not a plain path"),
        ("manifest.json", "listed twice"),
        ("ZARR.json", "differ only in case"),
        ("shards/00001.h5", "listed twice"),
    ],
)
def test_paths_that_could_leave_or_collide_are_refused(content: dict[str, Any], name: str, reason: str) -> None:
    content["files"][0]["file"] = name if name != "ZARR.json" else content["files"][1]["file"].upper()
    with pytest.raises((SourceError, ValueError), match=reason):
        _parse(content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_records": 84}, "hold 85 records"),
        ({"format": "other"}, "not a manifest of this format"),
        ({"version": [2, 0]}, "install a newer stagein"),
        (
            {"version": [1, 2], "compression": None},
            "format version 1.2, this stagein reads 1.1: install a newer stagein",
        ),
        ({"schema": {"fields": {}, "primary": "x"}}, "a record without fields"),
        ({"chunk_bytes": 8192}, "another number of chunks"),
    ],
)
def test_what_does_not_add_up_is_refused(content: dict[str, Any], change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        _parse({**content, **change}, keep_id=True)


def test_no_manifest_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a stagein data set"):
        Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text("shards: 12")
    with pytest.raises(SourceError, match="is not JSON"):
        Manifest.load(tmp_path)


@given(st.binary(max_size=300))
def test_garbage_is_always_a_sentence(content: bytes) -> None:
    with pytest.raises(SourceError):
        Manifest.parse(content, "garbage")


@given(position=st.integers(0, 10**9), value=st.integers(0, 255))
@settings(max_examples=300)
def test_a_changed_byte_never_passes(jpeg_dataset_path: Path, position: int, value: int) -> None:
    good = (jpeg_dataset_path / "manifest.json").read_bytes()
    damaged = bytearray(good)
    damaged[position % len(good)] = value
    try:
        read = Manifest.parse(bytes(damaged), "damaged")
    except SourceError:
        return
    assert read == Manifest.parse(good, "good")  # only white space may change unnoticed
