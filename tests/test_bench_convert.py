"""`stagein bench convert`: peers that are installed pack every image, as they themselves read back, and have their line."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Sample = tuple[bytes, int]


def read_mds(folder: Path) -> Iterator[Sample]:
    from streaming import LocalDataset

    dataset: Any = LocalDataset(local=str(folder))
    return ((sample["image"], sample["label"]) for sample in (dataset[number] for number in range(len(dataset))))


def read_webdataset(folder: Path) -> Iterator[Sample]:
    from webdataset import WebDataset

    dataset: Any = WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
    return ((sample["jpg"], int(sample["cls"])) for sample in dataset)


PEERS: dict[str, tuple[str, Callable[[Path], Iterator[Sample]]]] = {
    "mds": ("streaming", read_mds),
    "webdataset": ("webdataset", read_webdataset),
}


@pytest.mark.filterwarnings("ignore")  # what peers warn of is not ours to mend
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("processes", [1, 3])
def test_a_peer_has_every_image_with_its_class_once(
    jpeg_folder: Path, tmp_path: Path, peer: str, processes: int
) -> None:
    library, read = PEERS[peer]
    pytest.importorskip(library, reason=f"{library}, which packs as {peer}, is not installed")
    command = [sys.executable, "-m", "stagein.tools.pack_peers", peer, str(jpeg_folder), str(tmp_path / "x")]
    subprocess.run([*command, str(processes)], check=True, capture_output=True, timeout=100)
    parts = list((tmp_path / "x").iterdir())
    assert len(parts) == processes
    classes = sorted(folder.name for folder in jpeg_folder.iterdir())
    expected = [(file.read_bytes(), classes.index(file.parent.name)) for file in jpeg_folder.glob("*/*.jpg")]
    assert sorted(sample for part in parts for sample in read(part)) == sorted(expected)


def test_a_line_for_each_contestant_that_is_installed(jpeg_folder: Path, tmp_path: Path) -> None:
    options = ["bench", "convert", str(jpeg_folder), "--rounds", "1", "--work", str(tmp_path)]
    command = [sys.executable, "-m", "stagein.tools.cli", *options]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=110).stdout
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    installed = {f"{peer}, sync" for peer, (library, _) in PEERS.items() if importlib.util.find_spec(library)}
    assert {line["contestant"] for line in lines} == {"stagein convert", "cp -r", "cp -r, sync"} | installed
    assert all(min(line["rates"]) > 0 for line in lines)
    assert not list(tmp_path.iterdir())
