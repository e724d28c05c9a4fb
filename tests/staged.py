"""What a staged copy must be, and where its parts lie: for the tests of stage-in."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stagein.cache import READY_NAME
from stagein.formats.manifest import Manifest


def final_folder(source: Path, to: Path | str) -> Path:
    return Path(to) / "stagein" / Manifest.load(source).id


def work_folder(source: Path, to: Path | str) -> Path:
    return final_folder(source, to).with_suffix(".part")


def assert_staged(source: Path, to: Path | str, files: list[str] | None = None) -> None:
    """Every file (or these) is there with the source's bytes, READY says so, and nothing is left over."""
    final = final_folder(source, to)
    names = files if files is not None else [entry.file for entry in Manifest.load(source).all_files()]
    assert {path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()} == {
        *names,
        "manifest.json",
        "READY",
        "receipt.json",
    }
    for name in names:
        assert (final / name).read_bytes() == (source / name).read_bytes(), name
        assert (final / name).stat().st_mode & 0o777 == 0o444
    assert Manifest.load(final) == Manifest.load(source)
    assert sorted(json.loads((final / READY_NAME).read_text())["files"]) == sorted(names)
    assert not work_folder(source, to).exists()


def flip_byte(path: Path, offset: int) -> None:
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))


def preadv_refusing(names: Sequence[str], error_number: int) -> Callable[..., int]:
    """An os.preadv that fails on files of these names, as where a server or a permission is gone."""
    preadv = os.preadv

    def refusing(descriptor: int, *words: Any) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name in names:
            raise OSError(error_number, os.strerror(error_number))
        return preadv(descriptor, *words)

    return refusing


def journaled_chunks(source: Path, to: Path | str) -> int:
    return sum(len(path.read_text().split()) for path in work_folder(source, to).glob("journal-*"))
