"""Stage-in on several nodes with disks, names and a network of their own: each fault of a node, as it happens to a node."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from emulated import LOCAL, Cluster, Node
from staged import assert_staged, final_folder, journaled_chunks, work_folder
from synthetic import CHUNK_BYTES, write_dataset

from stagein.formats.errors import ExitCode
from stagein.receipt import Receipt

SHARD_SIZES = (20 * CHUNK_BYTES, 7 * CHUNK_BYTES + 1, 1, 13 * CHUNK_BYTES - 1, 16 * CHUNK_BYTES)
FILE_SIZES = (1000, 0, 2 * CHUNK_BYTES)
STAGEIN = (sys.executable, "-m", "stagein.tools.cli")
RANK = Path(__file__).parent.parent / "staging_rank.py"
TIMEOUT_SECONDS = 2
ENDED_SECONDS = 12
"""All ranks have ended so long after a fault that a timeout of TIMEOUT_SECONDS finds."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "source", SHARD_SIZES, FILE_SIZES)
    return tmp_path / "source"


def stage(cluster: Cluster, source: Path, *options: str, **how: object) -> subprocess.CompletedProcess[str]:
    return cluster.run(*STAGEIN, "stage", source, "--to", LOCAL, "--timeout", "20", *options, **how)


def slow_rank(source: Path, *options: str | Path) -> list[str | Path]:
    """A stage-in that takes a few seconds, so that something can happen to it."""
    words = [sys.executable, RANK, source, LOCAL, "--policy", "replicate", "--slow-seconds", "0.4"]
    return [*words, "--timeout-seconds", str(TIMEOUT_SECONDS), *options]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def wait_for_journals(source: Path, cluster: Cluster) -> None:
    wait_until(
        lambda: all(journaled_chunks(source, node.disk) > 2 for node in cluster.nodes), 30, "chunks on all nodes"
    )


def ranks_on(nodes: list[Node]) -> list[int]:
    return [pid for node in nodes for pid in node.processes(RANK.name)]


def assert_all_complete(source: Path, cluster: Cluster) -> None:
    for node in cluster.nodes:
        assert_staged(source, node.disk)


def test_the_ring_runs_over_tcp_between_nodes_of_two_ranks(source: Path) -> None:
    with Cluster(3) as cluster:
        result = stage(cluster, source, "--policy", "replicate", "--json", ranks_of_node=2)
        assert result.returncode == 0, result.stdout + result.stderr
        receipt = Receipt.model_validate(json.loads(result.stdout))
        assert receipt.read_bytes == receipt.dataset_bytes
        assert [node.node for node in receipt.nodes] == ["node1", "node2", "node3"]
        assert_all_complete(source, cluster)


# Disks


def test_a_disk_too_small_on_one_node_is_named_before_anything_moves(source: Path) -> None:
    with Cluster(2) as cluster:
        cluster.nodes[1].resize_disk(2 << 20)
        result = stage(cluster, source, "--policy", "replicate")
        assert result.returncode == ExitCode.NO_SPACE
        assert result.stderr.count("stagein: ") == 1 and "node node2 has room for 2,097,152" in result.stderr
        assert not any(list(node.disk.iterdir()) for node in cluster.nodes)


def test_a_disk_that_cannot_be_used_on_one_node_is_named_before_anything_moves(source: Path) -> None:
    with Cluster(3) as cluster:
        cluster.nodes[1].do(f"mount -o remount,ro {LOCAL}")
        result = stage(cluster, source)
        assert result.returncode == ExitCode.USAGE
        assert result.stderr.count("stagein: ") == 1 and "on node node2 cannot be written" in result.stderr
        cluster.nodes[1].do(f"umount {LOCAL}")
        result = stage(cluster, source)
        assert result.returncode == ExitCode.USAGE
        assert (
            result.stderr.count("stagein: ") == 1
            and "mounted at /mnt on node node2, but on the one at" in result.stderr
        )
        cluster.nodes[1].do(f"rmdir {LOCAL}")
        result = stage(cluster, source)
        assert result.returncode == ExitCode.USAGE
        assert result.stderr.count("stagein: ") == 1 and "on node node2 is not a folder" in result.stderr
        assert not any(node.disk.exists() and list(node.disk.iterdir()) for node in cluster.nodes)


def test_the_file_system_of_the_source_is_no_destination(source: Path, tmp_path: Path) -> None:
    for node in ("node1", "node2"):
        (tmp_path / node).mkdir()
    with Cluster(2) as cluster:
        result = cluster.run(*STAGEIN, "stage", source, "--to", tmp_path / "{node}")
        assert result.returncode == ExitCode.USAGE
        assert result.stderr.count("stagein: ") == 1 and "is on the file system of the source" in result.stderr


def test_a_disk_that_gets_full_in_the_middle_spoils_nothing_else(source: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "first", (3 * CHUNK_BYTES,), seed=5)
    with Cluster(2) as cluster:
        assert stage(cluster, tmp_path / "first", "--policy", "replicate").returncode == 0
        cluster.nodes[1].resize_disk(2 << 20)
        result = cluster.run(*slow_rank(source, "--slow-seconds", "0", "--disk-gets-full", "--on-rank", "1"))
        assert result.returncode == ExitCode.NO_SPACE
        assert result.stderr.count("stagein: ") == 1 and "no space left while writing" in result.stderr
        assert not work_folder(source, cluster.nodes[1].disk).exists()
        assert journaled_chunks(source, cluster.nodes[0].disk) > 0, "node1 can be resumed"
        assert_all_complete(tmp_path / "first", cluster)
        cluster.nodes[1].resize_disk(256 << 20)
        resumed = stage(cluster, source, "--policy", "replicate", "--json")
        assert resumed.returncode == 0 and json.loads(resumed.stdout)["nodes"][0]["reused_bytes"] > 0
        assert_all_complete(source, cluster)


# Ranks, nodes and the network


@pytest.mark.parametrize("killed", [slice(1, 2), slice(None)], ids=["one rank", "all ranks"])
def test_killed_in_the_middle_and_run_again(source: Path, killed: slice) -> None:
    with Cluster(3) as cluster:
        with cluster.start(*slow_rank(source)) as launcher:
            wait_for_journals(source, cluster)
            for pid in ranks_on(cluster.nodes[killed]):
                with suppress(ProcessLookupError):  # the launcher ends the others when the first is gone
                    os.kill(pid, signal.SIGKILL)
            assert launcher.wait(ENDED_SECONDS) not in (0, 1)
        assert not any(final_folder(source, node.disk).exists() for node in cluster.nodes)
        finished = [journaled_chunks(source, node.disk) for node in cluster.nodes]
        result = stage(cluster, source, "--policy", "replicate", "--json")
        assert result.returncode == 0, result.stdout + result.stderr
        for node, chunks in zip(json.loads(result.stdout)["nodes"], finished, strict=True):
            assert node["reused_bytes"] >= (chunks - 4) * CHUNK_BYTES > 0
        assert_all_complete(source, cluster)


def test_a_node_that_loses_power_ends_the_job_and_comes_back_empty(source: Path) -> None:
    with Cluster(3) as cluster:
        with cluster.start(*slow_rank(source)) as launcher:
            wait_for_journals(source, cluster)
            lost = cluster.nodes.pop(1)
            lost.close()
            wait_until(lambda: not ranks_on(cluster.nodes), ENDED_SECONDS, "the end of the other nodes' ranks")
            launcher.wait(ENDED_SECONDS)  # its exit code is 0 or 255, as it happens: Open MPI 5
        result = stage(cluster, source, "--policy", "replicate", "--json")
        assert result.returncode == 0 and json.loads(result.stdout)["nodes"][1]["reused_bytes"] > 0, (
            result.stdout + result.stderr
        )
        assert_all_complete(source, cluster)


def hang(cluster: Cluster, node: Node) -> None:
    for pid in node.processes():
        os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize("fault", [Cluster.cut, hang])
def test_a_node_that_answers_no_more_is_named_and_the_others_end(
    source: Path, fault: Callable[[Cluster, Node], None]
) -> None:
    """Open MPI's mpirun itself then waits for its daemon on that node: only the ranks are ours to end."""
    with Cluster(3) as cluster, cluster.start(*slow_rank(source)) as launcher:
        wait_for_journals(source, cluster)
        fault(cluster, cluster.nodes[1])
        others = [cluster.nodes[0], cluster.nodes[2]]
        wait_until(lambda: not ranks_on(others), ENDED_SECONDS, "the end of the other nodes' ranks")
        cluster.end(launcher)
        assert "stagein: nothing has moved for" in launcher.communicate()[1]


# Jobs


def test_two_jobs_at_once_on_the_same_nodes_do_the_work_once(source: Path) -> None:
    command = (*STAGEIN, "stage", source, "--to", LOCAL, "--policy", "replicate", "--json")
    with Cluster(2) as cluster, cluster.start(*command) as one, cluster.start(*command) as other:
        reports = [json.loads(job.communicate(timeout=40)[0]) for job in (one, other)]
        assert (one.returncode, other.returncode) == (0, 0)
        assert sorted(report["moved_nothing"] for report in reports) == [False, True]
        assert_all_complete(source, cluster)


def test_status_and_evict_see_all_nodes(source: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "older", (3 * CHUNK_BYTES,), seed=5)
    with Cluster(2) as cluster:
        for dataset in (tmp_path / "older", source):
            assert stage(cluster, dataset, "--policy", "replicate").returncode == 0
        shutil.rmtree(final_folder(source, cluster.nodes[1].disk))
        table = cluster.run(*STAGEIN, "status", "--to", LOCAL).stdout
        assert "node1, node2" in table and table.count("complete") == 2
        result = cluster.run(*STAGEIN, "evict", tmp_path / "older", "--to", LOCAL)
        assert result.returncode == 0 and result.stdout.count("evicted") == 2, result.stdout + result.stderr
        assert [len(list((node.disk / "stagein").glob("*/READY"))) for node in cluster.nodes] == [1, 0]
