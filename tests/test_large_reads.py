"""Reads of a source on a shared file system are few and large: counted by strace, which plays the file system."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_system_calls import why_no_strace

from stagein.formats import Field, Schema, Writer

LOADING = Path(__file__).with_name("reading_rank.py")
RECORDS, RECORD_BYTES = 64, 600_000
TOTAL = RECORDS * (RECORDS - 1) // 2 * RECORD_BYTES


@pytest.fixture
def volumes(tmp_path) -> Path:
    path = tmp_path / "volumes.st"
    schema = Schema(fields={"volume": Field(kind="tensor", dtype="uint8", shape=(RECORD_BYTES,))})
    with Writer(path, schema, shard_bytes=16 << 20) as writer:
        for record in range(RECORDS):
            writer.write({"volume": np.full(RECORD_BYTES, record, np.uint8)})
    return path


def reads_of(path: Path, failing: list[str]) -> tuple[list[int], list[int]]:
    """The bytes of each read of shards in an epoch in order, and in one that is shuffled, when these system calls fail."""
    log = path.parent / "log"
    inject = [word for call in failing for word in ("-e", f"inject={call}")]
    command = ["strace", "-f", "-qq", "-y", "-o", log, "-e", "trace=pread64,write,preadv2,mincore", *inject]
    result = subprocess.run([*command, sys.executable, LOADING, path], capture_output=True, text=True, timeout=100)
    assert result.stdout.splitlines() == ["in order", str(TOTAL), "shuffled", str(TOTAL)], result.stderr
    in_order, shuffled = log.read_text().partition('"in order')[2].split('"shuffled')
    in_order = in_order.partition(f'"{TOTAL}')[0]
    return tuple(
        [int(size) for size in re.findall(r"pread64\(\d+<[^>]*/shards/.*\) = (\d+)", part)]
        for part in (in_order, shuffled)
    )


def test_records_of_a_shared_file_system_are_read_whole_and_neighbours_together(volumes):
    if reason := why_no_strace():
        pytest.skip(reason)
    for reads in reads_of(volumes, ["mincore:error=ENOMEM"]):
        assert len(reads) == RECORDS * 3  # in pieces that stay in the processor's cache
        assert sum(reads) == RECORDS * RECORD_BYTES
    in_order, shuffled = reads_of(volumes, ["preadv2:error=EOPNOTSUPP"])  # Lustre and GPFS know no RWF_NOWAIT
    assert sum(in_order) == sum(shuffled) == RECORDS * RECORD_BYTES
    assert len(in_order) <= 8
    assert max(in_order) > 6 << 20
    assert len(shuffled) <= RECORDS


def test_records_of_a_local_file_system_are_copied_from_a_map_and_not_read(volumes):
    if reason := why_no_strace():
        pytest.skip(reason)
    assert reads_of(volumes, []) == ([], [])
