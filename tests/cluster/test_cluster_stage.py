"""Stage-in on several nodes with disks, names and a network of their own: each fault of a node, as it happens to a node."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emulated import LOCAL, Cluster
from staged import assert_staged
from synthetic import CHUNK_BYTES, write_dataset

from stagein.formats.errors import ExitCode
from stagein.receipt import Receipt

SHARD_SIZES = (20 * CHUNK_BYTES, 7 * CHUNK_BYTES + 1, 1, 13 * CHUNK_BYTES - 1, 16 * CHUNK_BYTES)
FILE_SIZES = (1000, 0, 2 * CHUNK_BYTES)
STAGE = (sys.executable, "-m", "stagein.tools.cli", "stage")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "source", SHARD_SIZES, FILE_SIZES)
    return tmp_path / "source"


def stage(cluster: Cluster, source: Path, *options: str, **how: object) -> subprocess.CompletedProcess[str]:
    return cluster.run(*STAGE, source, "--to", LOCAL, "--timeout", "20", *options, **how)


def test_the_ring_runs_over_tcp_between_nodes_of_two_ranks(source: Path) -> None:
    with Cluster(3) as cluster:
        result = stage(cluster, source, "--policy", "replicate", "--json", ranks_of_node=2)
        assert result.returncode == 0, result.stderr
        receipt = Receipt.model_validate(json.loads(result.stdout))
        assert receipt.read_bytes == receipt.dataset_bytes
        assert [node.node for node in receipt.nodes] == ["node1", "node2", "node3"]
        for node in cluster.nodes:
            assert_staged(source, node.disk)


def test_a_disk_too_small_on_one_node_is_named_before_anything_moves(source: Path) -> None:
    with Cluster(2) as cluster:
        cluster.nodes[1].resize_disk(2 << 20)
        result = stage(cluster, source, "--policy", "replicate")
        assert result.returncode == ExitCode.NO_SPACE
        assert result.stderr.count("stagein: ") == 1 and "node node2 has room for 2,097,152" in result.stderr
        assert not any(list(node.disk.iterdir()) for node in cluster.nodes)


def test_a_read_only_disk_on_one_node_is_named_before_anything_moves(source: Path) -> None:
    with Cluster(2) as cluster:
        cluster.nodes[1].do(f"mount -o remount,ro {LOCAL}")
        result = stage(cluster, source)
        assert result.returncode == ExitCode.USAGE
        assert result.stderr.count("stagein: ") == 1 and "on node node2 cannot be written" in result.stderr
        assert list(cluster.nodes[0].disk.iterdir()) == []
