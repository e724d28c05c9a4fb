"""Kernels on disk: compiled once, and never used when something that is compiled into them has changed."""

import subprocess
import sys
from pathlib import Path

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
