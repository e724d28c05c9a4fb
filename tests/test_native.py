"""Kernels on disk: compiled once, and never used when something that is compiled into them has changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "stagein.formats.native"


def _run(folder: Path) -> tuple[int, bool]:
    """Call a kernel in a new process: its result, and whether it was found on disk."""
    script = "import using; print(using.total(1)); print(bool(using.total.stats.cache_hits))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, check=True, capture_output=True, text=True, timeout=100
    )
    total, was_found = result.stdout.split()
    return int(total), was_found == "True"


def test_a_kernel_is_compiled_anew_when_a_module_it_imports_changes(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "using.py").write_text("from package.total import total\n")
    (package / "parts.py").write_text(
        f"from {PACKAGE} import kernel\n\nSTEP = 10\n\n@kernel\ndef part(value):\n    return value + STEP\n"
    )
    (package / "total.py").write_text(
        f"from {PACKAGE} import kernel\nfrom .parts import part\n\n@kernel\ndef total(value):\n    return part(value)\n"
    )
    assert _run(tmp_path) == (11, False)
    assert _run(tmp_path) == (11, True)
    parts = package / "parts.py"
    parts.write_text(parts.read_text().replace("10", "20"))
    assert _run(tmp_path) == (21, False)


USE = """
import sys
import numpy as np
from stagein.formats.native_code import NativeKernel
sums = NativeKernel("summing", "sums")
values, squares = np.arange(6, dtype=np.uint32).reshape(2, 3), np.empty((2, 3))
print(sums(values, squares, 2, True), squares.tolist(), "numba" in sys.modules)
"""
SUMMING = """
from stagein.formats.native import kernel

@kernel
def square(value):
    return value * value

@kernel
def sums(values, squares, factor, is_negative):
    total = 0
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            total += values[row, column]
            squares[row, column] = square(values[row, column])
    return -factor * total if is_negative else factor * total, values[1, 2]
"""
RESULT = "(-30, 5) [[0.0, 1.0, 4.0], [9.0, 16.0, 25.0]]"


def _use(folder: Path, script: str = USE, **environment: str) -> str:
    """What a new process prints, with `folder` as its cache."""
    settings = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache"), **environment}
    command = [sys.executable, "-c", script]
    return subprocess.check_output(command, cwd=folder, env=settings, text=True, timeout=100).strip()


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    (tmp_path / "summing.py").write_text(SUMMING)
    return tmp_path


def test_a_kernel_runs_as_machine_code_without_numba_and_is_kept(kernels: Path) -> None:
    assert _use(kernels) == f"{RESULT} False"
    (kept,) = (kernels / "cache").glob("sums-*.o")
    before = kept.stat().st_mtime_ns
    assert _use(kernels) == f"{RESULT} False"
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", [lambda code: code[: len(code) // 2], lambda code: code[:-9] + b"x" + code[-8:]])
def test_damaged_machine_code_is_never_run_but_made_again(kernels: Path, damage) -> None:
    _use(kernels)
    (kept,) = (kernels / "cache").glob("sums-*.o")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert _use(kernels) == f"{RESULT} False"
    assert kept.read_bytes() == whole


def test_machine_code_is_made_again_when_its_source_changes(kernels: Path) -> None:
    _use(kernels)
    (kernels / "summing.py").write_text(SUMMING.replace("return value * value", "return value + value"))
    assert _use(kernels) == "(-30, 5) [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]] False"


def test_numba_runs_kernels_itself_where_they_are_tried_out(kernels: Path) -> None:
    assert _use(kernels, NUMBA_BOUNDSCHECK="1") == f"{RESULT} True"


def test_numba_runs_a_kernel_itself_where_no_process_can_be_started_to_compile_it(kernels: Path) -> None:
    assert _use(kernels, "import sys; sys.executable = '/nowhere'\n" + USE) == f"{RESULT} True"


def test_machine_code_takes_no_array_whose_elements_lie_apart(kernels: Path) -> None:
    apart = USE.replace("sums(values,", "sums(values[:, ::2],")
    with pytest.raises(subprocess.CalledProcessError):
        _use(kernels, apart)


def test_a_kernel_that_raises_is_an_error(kernels: Path) -> None:
    (kernels / "summing.py").write_text(SUMMING.replace("total = 0", "total = 1 // (factor - 2)"))
    raises = USE.replace(
        "print(sums(values, squares, 2, True)",
        "try: sums(values, squares, 2, True)\nexcept RuntimeError: print('raised'",
    )
    assert _use(kernels, raises).startswith("raised")
