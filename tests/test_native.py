"""Kernels on disk: compiled once, and never used when something that is compiled into them has changed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent

import pytest
from disks import small_disk

PACKAGE = "stagein.formats.native"


def _run(folder: Path, environment: Mapping[str, str] = os.environ) -> tuple[int, bool]:
    """Call a kernel in a new process: its result, and whether it was found on disk."""
    script = "import using; print(using.total(1)); print(bool(using.total.stats.cache_hits))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
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


def test_a_kernel_runs_where_numba_finds_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "using.py").write_text(
        f"from {PACKAGE} import kernel\n\n@kernel\ndef total(value):\n    return value + 10\n"
    )
    environment = {
        **os.environ,
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
        "NUMBA_CACHE_DIR": "/dev/null/cache",
        "TMPDIR": str(tmp_path),
    }
    assert _run(tmp_path, environment) == (11, False)
    assert _run(tmp_path, environment) == (11, True)
    (tmp_path / f"stagein-kernels-{os.geteuid()}").chmod(0o777)
    assert _run(tmp_path, environment) == (11, False)  # others may have put something there


def test_a_kernel_runs_where_the_disk_is_full(tmp_path: Path) -> None:
    (tmp_path / "using.py").write_text(
        f"from {PACKAGE} import kernel\n\n@kernel\ndef total(value):\n    return value + 10\n"
    )
    (tmp_path / "full").mkdir()
    with small_disk(tmp_path / "full", 4096):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "full")}
        assert _run(tmp_path, environment) == (11, False)


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


COUNTED = 'open("compilers", "a").write("one ")\n' + SUMMING
"""A module that notes each import: only who compiles its kernels imports it."""
HELD = """
import os, time
from pathlib import Path
Path("part").write_text(str(os.getpid()))
Path("part").replace("compiler")
while not Path("go").exists():
    time.sleep(0.01)
"""
"""Put before a module: who compiles its kernels says which process it is, and waits."""
IN_BACKGROUND = (
    USE.partition("print(")[0] + "import os, time\nfrom pathlib import Path\narguments = values, squares, 2, True\n"
)


def _start(folder: Path, script: str) -> "subprocess.Popen[str]":
    settings = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache")}
    return subprocess.Popen([sys.executable, "-c", script], cwd=folder, env=settings, text=True, stdout=subprocess.PIPE)


def _result(process: "subprocess.Popen[str]") -> str:
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    return output.strip()


def _kept(folder: Path) -> list[str]:
    """Files of the kernel in the cache, without what tells sources and machines apart."""
    return [file.name.partition("-")[0] + file.suffix for file in (folder / "cache").glob("sums-*")]


def _compiler(folder: Path, name: str = "compiler") -> int:
    """The process that compiles a module with HELD before it, once it is at it."""
    told, until = folder / name, time.monotonic() + 60
    while not told.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return int(told.read_text())


def test_processes_that_start_at_once_compile_a_kernel_once(kernels: Path) -> None:
    (kernels / "summing.py").write_text(COUNTED)
    processes = [_start(kernels, USE) for _ in range(4)]
    assert [_result(process) for process in processes] == [f"{RESULT} False"] * 4
    assert (kernels / "compilers").read_text() == "one "
    assert _kept(kernels) == ["sums.o"]


def test_a_compiler_that_is_killed_holds_nobody_up(kernels: Path) -> None:
    (kernels / "summing.py").write_text(HELD + SUMMING)
    processes = [_start(kernels, USE) for _ in range(3)]
    os.kill(_compiler(kernels), signal.SIGKILL)
    (kernels / "go").touch()
    results = [_result(process) for process in processes]
    assert sorted(results) == [
        f"{RESULT} False",
        f"{RESULT} False",
        f"{RESULT} True",
    ]  # numba runs it for who started that


def test_a_kernel_is_compiled_while_its_caller_goes_on(kernels: Path) -> None:
    (kernels / "summing.py").write_text(HELD + SUMMING)
    script = IN_BACKGROUND + (
        "print(sums.is_ready(*arguments))\n"
        "open('go', 'w').close()\n"
        "while not sums.is_ready(*arguments): time.sleep(0.01)\n"
        "print(sums(*arguments), squares.tolist(), 'numba' in sys.modules)"
    )
    assert _result(_start(kernels, script)).split("\n") == ["False", f"{RESULT} False"]
    assert _kept(kernels) == ["sums.o"]


def _write_noting(folder: Path, name: str, head: str = "", total: str = "0") -> None:
    """A module with the kernel `name`: who compiles it says so in the file `begun`, and how nice it is."""
    note = f"import os\nprint('{name}', os.getpid(), os.nice(0), file=open('begun', 'a'))\n"
    source = SUMMING.replace("sums", name).replace("total = 0", f"total = {total}")
    (folder / f"{name}.py").write_text(note + head + source)


def _begun(folder: Path) -> list[tuple[str, int, int]]:
    lines = [line.split() for line in (folder / "begun").read_text().splitlines()]
    return [(name, int(compiler), int(niceness)) for name, compiler, niceness in lines]


def test_what_nobody_waits_for_is_compiled_behind_what_somebody_does_and_by_one_process(kernels: Path) -> None:
    (kernels / "summing.py").write_text(HELD + SUMMING)
    _write_noting(kernels, "second", HELD.replace("compiler", "second compiler").replace("go", "go on"), "'none'")
    _write_noting(kernels, "third")
    _write_noting(kernels, "fourth", HELD.replace("go", "go further"))
    script = IN_BACKGROUND + (
        "later = [NativeKernel(name, name) for name in ('second', 'third', 'fourth')]\n"
        "def are_ready(): return [kernel.is_ready(*arguments) for kernel in later]\n"
        "sums.prepare(*arguments)\n"
        "until = time.monotonic() + 0.5\n"
        "while time.monotonic() < until or not os.path.exists('compiler'): assert not any(are_ready())\n"
        "assert not os.path.exists('begun')\n"
        "open('go', 'w').close()\n"
        "print(sums(*arguments), squares.tolist(), 'numba' in sys.modules, flush=True)\n"
        "while are_ready() != [False, True, True]: time.sleep(0.01)\n"
    )
    process = _start(kernels, script)
    first_compiler, second_compiler = _compiler(kernels), _compiler(kernels, "second compiler")
    other = _start(kernels, USE.replace("summing", "third").replace("sums", "third"))
    while not _has_lock_open(other):
        time.sleep(0.01)
    (kernels / "go on").touch()
    assert _result(other) == f"{RESULT} False"
    (kernels / "go further").touch()
    assert _result(process) == f"{RESULT} False" and process.returncode == 0
    begun = _begun(kernels)
    assert [(name, compiler) for name, compiler, _ in begun] == [
        (name, second_compiler) for name in ("second", "third", "fourth")
    ]
    assert all(niceness > os.nice(0) for *_, niceness in begun) and first_compiler != second_compiler
    assert not list((kernels / "cache").glob("*.lock"))


def test_what_somebody_waits_for_is_compiled_beside_what_nobody_does(kernels: Path) -> None:
    _write_noting(kernels, "second", HELD)
    _write_noting(kernels, "third")
    _write_noting(kernels, "fourth")
    script = IN_BACKGROUND + (
        "second, third, fourth = (NativeKernel(name, name) for name in ('second', 'third', 'fourth'))\n"
        "while not os.path.exists('compiler'): assert not second.is_ready(*arguments)\n"
        "assert not fourth.is_ready(*arguments)\n"
        "print(third(*arguments), squares.tolist(), 'numba' in sys.modules, second.is_ready(*arguments))\n"
        "open('go', 'w').close()\n"
        "while not (second.is_ready(*arguments) and fourth.is_ready(*arguments)): time.sleep(0.01)\n"
    )
    process = _start(kernels, script)
    assert _result(process) == f"{RESULT} False False" and process.returncode == 0
    assert {name: niceness > os.nice(0) for name, _, niceness in _begun(kernels)} == {
        "second": True,
        "third": False,
        "fourth": True,
    }


def test_what_is_prepared_together_is_compiled_at_once_by_one_process(kernels: Path) -> None:
    for name in ("second", "third"):
        _write_noting(kernels, name)
    script = IN_BACKGROUND + (
        "from stagein.formats.native_jobs import by_one_process\n"
        "second, third = (NativeKernel(name, name) for name in ('second', 'third'))\n"
        "with by_one_process():\n"
        "    for kernel in (second, third, second): kernel.prepare(*arguments)\n"
        "until = time.monotonic() + 90\n"
        "while not Path('begun').exists(): assert time.monotonic() < until\n"
        "print(third(*arguments), squares.tolist(), 'numba' in sys.modules, second.is_ready(*arguments))\n"
    )
    process = _start(kernels, script)
    assert _result(process) == f"{RESULT} False True" and process.returncode == 0
    (_, compiler, niceness), other = _begun(kernels)
    assert other == ("third", compiler, niceness) and niceness == os.nice(0)
    assert not list((kernels / "cache").glob("*.lock"))


def test_numba_runs_what_is_prepared_together_where_no_process_can_be_started(kernels: Path) -> None:
    prepared = USE.replace(
        "print(",
        "from stagein.formats.native_jobs import by_one_process\n"
        "with by_one_process(): sums.prepare(values, squares, 2, True)\nprint(",
        1,
    )
    assert _use(kernels, "import sys; sys.executable = '/nowhere'\n" + prepared) == f"{RESULT} True"


def test_what_others_have_made_meanwhile_is_not_made_again(kernels: Path) -> None:
    _write_noting(kernels, "second", HELD)
    for name in ("third", "fourth", "fifth"):
        _write_noting(kernels, name)
    script = IN_BACKGROUND + (
        "second, third, fourth, fifth = (NativeKernel(name, name) for name in ('second', 'third', 'fourth', 'fifth'))\n"
        "while not os.path.exists('compiler'): assert not second.is_ready(*arguments)\n"
        "assert not any(kernel.is_ready(*arguments) for kernel in (third, fourth, fifth))\n"
        "open('waits', 'w').close()\n"
        "while not os.path.exists('made'): time.sleep(0.01)\n"
        "while not third.is_ready(*arguments): time.sleep(0.01)\n"
        "open('go', 'w').close()\n"
        "for kernel in (second, fifth, fourth):\n"
        "    while not kernel.is_ready(*arguments): time.sleep(0.01)\n"
    )
    process = _start(kernels, script)
    while not (kernels / "waits").exists():
        time.sleep(0.01)
    for name in ("third", "fourth"):
        assert _use(kernels, USE.replace("summing", name).replace("sums", name)) == f"{RESULT} False"
    (kernels / "made").touch()
    _result(process)
    assert process.returncode == 0
    assert [name for name, *_ in _begun(kernels)] == ["second", "third", "fourth", "fifth"]
    assert not list((kernels / "cache").glob("*.lock"))


NO_NUMBA = """
import os, sys, time
if len(sys.argv) > 1:
    open("compilers", "a").write("one ")
    with open("compiler", "w") as told:
        told.write(str(os.getpid()))
    while not os.path.exists("go"):
        time.sleep(0.01)
raise ImportError("it is broken")
"""
"""A numba that cannot be imported, and keeps those who wait for a compiler waiting."""


def test_without_numba_it_is_tried_once_and_all_who_wait_say_so(kernels: Path) -> None:
    (kernels / "numba.py").write_text(NO_NUMBA)
    processes = [
        _start(kernels, USE.replace("print(", "try: print(") + "except Exception as error: print(error)\n")
        for _ in range(3)
    ]
    _compiler(kernels)
    while sum(map(_has_lock_open, processes)) < 2:
        time.sleep(0.01)
    (kernels / "go").touch()
    said = "numba, which compiles kernel sums, cannot be imported (it is broken): install it anew"
    assert [_result(process) for process in processes] == [said] * 3
    assert (kernels / "compilers").read_text() == "one "
    assert not list((kernels / "cache").glob("*.lock"))


def _has_lock_open(process: "subprocess.Popen[str]") -> bool:
    files = Path(f"/proc/{process.pid}/fd").iterdir()
    return any(os.path.realpath(file).endswith(".lock") for file in files)  # not readlink: it may be closed by now


def test_a_kernel_that_cannot_be_compiled_is_never_ready_not_tried_again_and_said_once(kernels: Path) -> None:
    (kernels / "summing.py").write_text(COUNTED.replace("total = 0", "total = 'none'"))
    script = IN_BACKGROUND + (
        "import warnings\nsaid = []\nwarnings.showwarning = lambda message, *_: said.append(str(message))\n"
        "warnings.simplefilter('always')\nuntil = time.monotonic() + 90\n"
        "while not said: assert not sums.is_ready(*arguments) and time.monotonic() < until\n"
        "until = time.monotonic() + 0.5\n"
        "while time.monotonic() < until: assert not sums.is_ready(*arguments)\n"
        "print(*said)\n"
    )
    process = _start(kernels, script)
    assert _result(process) == (
        "kernel sums could not be compiled ahead: this process goes on without it, or compiles it by itself, and is slower"
    )
    assert process.returncode == 0 and (kernels / "compilers").read_text() == "one "


def test_a_compiler_ends_with_the_process_that_started_it_and_not_with_its_forks(kernels: Path) -> None:
    (kernels / "summing.py").write_text(HELD + SUMMING)
    script = IN_BACKGROUND + (
        "sums.is_ready(*arguments)\n"
        "while not os.path.exists('compiler'): time.sleep(0.01)\n"
        "if (fork := os.fork()) == 0:\n"
        "    time.sleep(0.2)\n"
        "    sys.exit(sums.is_ready(*arguments))\n"
        "print(os.waitpid(fork, 0)[1], os.waitpid(int(open('compiler').read()), os.WNOHANG))"
    )
    assert _result(_start(kernels, script)) == "0 (0, 0)"
    assert not Path(f"/proc/{_compiler(kernels)}").exists()


def test_a_fork_waits_for_the_compiler_of_its_parent(kernels: Path) -> None:
    (kernels / "summing.py").write_text(COUNTED.partition("\n")[0] + HELD + SUMMING)
    script = IN_BACKGROUND + (
        "sums.prepare(*arguments)\n"
        "while not os.path.exists('compiler'): time.sleep(0.01)\n"
        "if (fork := os.fork()) == 0:\n"
        "    assert not sums.is_ready(*arguments)\n"
        "    open('go', 'w').close()\n"
        "    print(sums(*arguments), squares.tolist(), 'numba' in sys.modules)\n"
        "else:\n"
        "    os.waitpid(fork, 0)\n"
    )
    assert _result(_start(kernels, script)) == f"{RESULT} False"
    assert (kernels / "compilers").read_text() == "one "


def test_a_compiler_that_hangs_is_ended_and_numba_runs_the_kernel(kernels: Path) -> None:
    held_there = (
        f"import sys\nif len(sys.argv) > 1:\n{indent(HELD, '    ')}"  # in the compiler, not where numba runs it
    )
    (kernels / "summing.py").write_text(held_there + SUMMING)
    script = (
        "import os\nfrom stagein.formats import native_jobs\nnative_jobs._COMPILE_SECONDS = 2\n"
        f"{USE}print(os.path.exists('/proc/' + open('compiler').read()))"
    )
    assert _use(kernels, script).split("\n") == [f"{RESULT} True", "False"]


@pytest.mark.parametrize("module", [SUMMING, HELD + SUMMING], ids=["made meanwhile", "not made yet"])
def test_who_asks_again_after_a_long_time_gets_what_was_asked_for(kernels: Path, module: str) -> None:
    (kernels / "summing.py").write_text(module)
    script = IN_BACKGROUND + (
        "from stagein.formats import native_jobs\nnative_jobs._COMPILE_SECONDS = 20\n"
        "assert not sums.is_ready(*arguments)\n"
        "clock = time.monotonic\ntime.monotonic = lambda: clock() + 30\n"
        "while not (Path('compiler').exists() or any(Path('cache').glob('*.o'))): time.sleep(0.01)\n"
        "Path('go').touch()\n"
        "until = clock() + 60\n"
        "while not sums.is_ready(*arguments): assert clock() < until; time.sleep(0.01)\n"
        "print(sums(*arguments), squares.tolist(), 'numba' in sys.modules)\n"
    )
    assert _use(kernels, script) == f"{RESULT} False"


def test_machine_code_is_kept_among_temporary_files_where_no_folder_is_to_be_had(kernels: Path) -> None:
    nowhere = {"NUMBA_CACHE_DIR": "/dev/null/cache", "TMPDIR": str(kernels)}
    assert _use(kernels, **nowhere) == f"{RESULT} False"
    folder = kernels / f"stagein-kernels-{os.geteuid()}"
    assert len(list(folder.glob("sums-*"))) == 1
    folder.chmod(0o777)
    assert _use(kernels, **nowhere) == f"{RESULT} True"  # others may have put something there
