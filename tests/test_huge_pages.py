"""Memory in huge pages, as Linux itself says of it. Whether it has any to give is up to the machine."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from stagein.formats.huge_pages import WorkMemory, huge_pages

HUGE = 2 << 20
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def flags_of(place: int) -> list[str]:
    """Those of the mapping that this address is in: proc_pid_smaps(5)."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            found = start <= place < stop
        elif found and first == "VmFlags:":
            return rest
    raise AssertionError("it is not mapped")


def test_fresh_memory_is_zeros():
    memory = huge_pages(3 * HUGE + 5)
    assert len(memory) == 3 * HUGE + 5
    assert not np.frombuffer(memory, np.uint8).any()


@pytest.mark.skipif(not ENABLED.exists(), reason="this system has no huge pages")
def test_arrays_lie_in_huge_pages():
    array = WorkMemory().zeros(np.uint8, 600_000)
    assert address(array) % HUGE == 0
    assert "hg" in flags_of(address(array))


def test_arrays_have_their_types_and_shapes_and_share_no_cache_lines():
    memory = WorkMemory()
    asked = [
        (np.float32, (2, 7)),
        (np.uint8, (1,)),
        (np.int64, (3, 5)),
        (np.int16, (0,)),
        (np.uint8, (3 * HUGE,)),
        (np.int32, (9,)),
    ]
    arrays = [memory.zeros(dtype, *shape) for dtype, shape in asked]
    assert [(array.dtype, array.shape) for array in arrays] == [(np.dtype(dtype), shape) for dtype, shape in asked]
    for number, array in enumerate(arrays):
        array[...] = number + 1
    assert all((array == number + 1).all() for number, array in enumerate(arrays))
    places = sorted((address(array), array.nbytes) for array in arrays if array.nbytes)
    for (place, nbytes), (following, _) in itertools.pairwise(places):
        assert place % 128 == 0
        assert (place + nbytes - 1) // 128 < following // 128


def test_small_arrays_share_a_huge_page_and_a_large_one_takes_nothing_from_them():
    memory = WorkMemory()
    first = memory.zeros(np.uint8, 1000)
    memory.zeros(np.uint8, 2 * HUGE - 1000)
    second = memory.zeros(np.uint8, 1000)
    assert address(first) % HUGE == 0
    assert address(second) == address(first) + 1024
