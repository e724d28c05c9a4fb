"""The rooms and owners of ARCHITECTURE.md, read off the imports themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "formats": "stagein.formats",
    "formats/foreign": "stagein.formats.foreign",
    "formats/jpeg": "stagein.formats.jpeg",
    "formats/sources": "stagein.formats.sources",
    "stagein": "stagein",
    "stagein/train": "stagein.train",
    "loaders": "stagein.loaders",
    "tools": "stagein.tools",
    "configs": "stagein.configs",
}
MAY_IMPORT = {
    "formats": set(),
    "formats/foreign": {"stagein.formats"},
    "formats/jpeg": {"stagein.formats"},
    "formats/sources": {"stagein.formats", "stagein.formats.jpeg"},
    "stagein": {"stagein.formats"},
    "stagein/train": {"stagein", "stagein.formats"},
    "loaders": {"stagein", "stagein.formats"},
    "tools": {"stagein", "stagein.formats", "stagein.loaders", "stagein.train", "stagein.configs"},
    "configs": set(),
}
OWNERS = {
    "h5py": "formats",
    "hdf5plugin": "formats",
    "zarr": "formats",
    "numcodecs": "formats",
    "lz4": "formats",
    "xxhash": "formats",
    "google_crc32c": "formats",
    "mpi4py": "stagein",
    "torch.distributed": "stagein",
    "nvidia": "loaders",
    "simplejpeg": "loaders",
    "cv2": "loaders",
    "typer": "tools",
    "rich": "tools",
    "matplotlib": "tools",
}


def _modules(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).glob("*.py")) if not path.is_symlink()]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of everything a module imports, wherever in it; `from a import b` counts as a.b too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
            yield from ((node.level, f"{node.module or ''}.{alias.name}") for alias in node.names)


def _room_of(name: str) -> str:
    """The import name of the folder that a dotted name of ours lies in."""
    candidates = [room for room in FOLDERS.values() if name == room or name.startswith(f"{room}.")]
    return max(candidates, key=len)


def _as_seen_from(folder: str, room: str) -> str:
    """The rooms within formats/ are rooms to each other; to everybody else they are formats."""
    return "stagein.formats" if room.startswith("stagein.formats.") and not folder.startswith("formats") else room


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_between_folders_follow_the_table(folder: str) -> None:
    own = FOLDERS[folder]
    for path in _modules(folder):
        for level, name in _imports(path):
            assert level <= 1, f"{path}: relative import across folders"
            if level == 1 or not (name == "stagein" or name.startswith("stagein.")):
                continue
            room = _as_seen_from(folder, _room_of(name))
            if name == "stagein.__version__" or (folder == "stagein" and room == "stagein"):
                continue
            assert room != own, f"{path}: absolute import {name} within its own folder"
            assert room in MAY_IMPORT[folder], f"{path}: {own} must not import {name}"


@pytest.mark.parametrize("library", OWNERS)
def test_each_library_has_one_owner(library: str) -> None:
    users = set()
    for folder in FOLDERS:
        for path in _modules(folder):
            if any(
                level == 0 and (name == library or name.startswith(f"{library}.")) for level, name in _imports(path)
            ):
                users.add("formats" if folder.startswith("formats/") else folder)
    assert users <= {OWNERS[library]}


def test_links_make_the_checkout_importable() -> None:
    for folder in ("configs", "formats", "loaders", "tools"):
        assert (ROOT / "stagein" / folder).readlink() == Path("..") / folder


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['stagein', '--help']\n"
        "from stagein.tools.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'nvidia.dali', 'mpi4py', 'mpi4py.MPI', 'h5py', 'zarr', 'numpy', 'cv2', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert "convert" in result.stdout


def test_importing_every_module_starts_nothing() -> None:
    """No MPI, no CUDA, no logging set-up, no thread, whatever is imported."""
    names = [
        f"{FOLDERS[folder]}.{path.stem}" for folder in FOLDERS for path in _modules(folder) if path.stem != "__init__"
    ]
    script = (
        "import importlib, logging, sys, threading\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert 'mpi4py.MPI' not in sys.modules\n"
        "assert not logging.getLogger().handlers\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
