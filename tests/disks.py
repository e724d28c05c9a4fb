"""Small disks for the tests of what happens when one is full."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """A disk of its own, that small, mounted on `folder`."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    options = ["-t", "tmpfs", "-o", f"size={nbytes}", "none", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
