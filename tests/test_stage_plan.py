"""The plan of a stage-in: who gets what, and who reads what."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import manifest_of_sizes

from stagein.formats.errors import NoSpaceError, UsageError
from stagein.formats.manifest import Manifest
from stagein.stage_plan import ChunkTable, NodeSpace, RankWork, StagePlan, make_plan, rank_work, stored_bytes
from stagein.world import World

CHUNK = 4096
PLENTY = 1 << 40

sizes = st.lists(
    st.one_of(st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 7 * CHUNK]), st.integers(0, 9 * CHUNK)), max_size=6
)
ranks_per_node = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def nodes_of(ranks: list[int], free_bytes: int = PLENTY) -> list[NodeSpace]:
    return [NodeSpace(f"n{number}", count, free_bytes) for number, count in enumerate(ranks)]


def all_work(plan: StagePlan, table: ChunkTable, missing: np.ndarray) -> list[tuple[World, RankWork]]:
    """Work of every rank when every node misses the same chunks."""
    names = [node.name for node in plan.nodes for _ in range(node.ranks)]
    worlds = [World.of_rank(rank, names) for rank in range(len(names))]
    return [(world, rank_work(plan, table, world, missing, missing)) for world in worlds]


@given(sizes, sizes, ranks_per_node, st.sampled_from(["replicate", "partition"]), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=200)
def test_every_missing_chunk_is_read_once_and_reaches_its_nodes(shards, files, ranks, policy, random):
    manifest = manifest_of_sizes(shards, files, CHUNK)
    plan, table = make_plan(manifest, nodes_of(ranks), policy), ChunkTable(manifest)
    missing = np.array([random.random() < 0.7 for _ in range(len(table))], dtype=np.bool_)
    work = all_work(plan, table, missing)

    read = np.concatenate([rank.reads(world.node) for world, rank in work])
    assert sorted(read) == list(np.flatnonzero(missing))

    for node in range(len(ranks)):
        got = [
            chunk
            for world, rank in work
            if world.node == node
            for chunk in np.concatenate([*rank.by_origin, rank.local])
        ]
        wanted = np.flatnonzero(missing & table.of_files(plan.files_of(node)))
        assert sorted(got) == list(wanted)

    for ring in range(plan.rings):
        of_one_ring = [[list(chunks) for chunks in rank.by_origin] for world, rank in work if world.local_rank == ring]
        assert all(chunks == of_one_ring[0] for chunks in of_one_ring), "the ranks of a ring expect the same messages"


@given(sizes, sizes, ranks_per_node)
def test_partition_gives_each_shard_to_one_node_and_the_other_files_to_all(shards, files, ranks):
    plan = make_plan(manifest_of_sizes(shards, files, CHUNK), nodes_of(ranks), "partition")
    assert sorted(shard for owned in plan.owned for shard in owned) == list(range(len(shards)))
    assert plan.shared == tuple(range(len(shards), len(shards) + len(files)))


@given(sizes, sizes)
def test_the_chunks_are_the_manifest(shards, files):
    manifest = manifest_of_sizes(shards, files, CHUNK)
    table = ChunkTable(manifest)
    places = [table.place(chunk) for chunk in range(len(table))]
    covered = {entry.file: 0 for entry in manifest.all_files()}
    for place in places:
        assert place.offset == covered[place.name] and 0 < place.nbytes <= CHUNK
        covered[place.name] += place.nbytes
    assert covered == {entry.file: entry.nbytes for entry in manifest.all_files()}


def test_reading_is_balanced_in_bytes_whatever_the_file_sizes():
    manifest = manifest_of_sizes([CHUNK + 1] * 40, [], CHUNK)  # every second chunk has one byte
    plan, table = make_plan(manifest, nodes_of([1, 1]), "replicate"), ChunkTable(manifest)
    loads = [table.total_bytes(rank.reads(world.node)) for world, rank in all_work(plan, table, table.nbytes > 0)]
    assert loads == [20 * (CHUNK + 1)] * 2


def test_partition_balances_bytes():
    plan = make_plan(manifest_of_sizes([5000, 100, 100, 4900, 200, 4700], [], CHUNK), nodes_of([1, 1, 1]), "partition")
    assert sorted(map(len, plan.owned)) == [2, 2, 2]
    assert {shard for owned in plan.owned for shard in owned[:1]} | {3, 5} >= {0, 3, 5}


def needs(manifest: Manifest) -> int:
    return sum(stored_bytes(entry) for entry in manifest.all_files())


def test_auto_replicates_where_it_fits_and_partitions_where_it_does_not():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [100], CHUNK)
    assert make_plan(manifest, nodes_of([1, 1], needs(manifest)), "auto").policy == "replicate"
    assert make_plan(manifest, nodes_of([1, 1], needs(manifest) - 1), "auto").policy == "partition"


def test_what_is_held_already_counts_as_room():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [100], CHUNK)
    nodes = [NodeSpace("a", 1, free_bytes=0, held_bytes=needs(manifest))]
    assert make_plan(manifest, nodes, "auto").policy == "replicate"


def test_a_small_node_gets_what_fits():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [], CHUNK)
    small, large = stored_bytes(manifest.shards[0]), 3 * stored_bytes(manifest.shards[0])
    plan = make_plan(manifest, [NodeSpace("small", 1, small), NodeSpace("large", 1, large)], "auto")
    assert list(map(len, plan.owned)) == [1, 3]


def test_no_room_is_refused_with_need_room_and_node():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [100], CHUNK)
    nodes = [NodeSpace("big", 1, PLENTY), NodeSpace("tiny", 1, 5000)]
    with pytest.raises(NoSpaceError, match=rf"needs {needs(manifest):,} bytes, but node tiny has room for 5,000"):
        make_plan(manifest, nodes, "replicate")
    with pytest.raises(NoSpaceError, match=r"over 2 nodes .*least on node n0"):
        make_plan(manifest, nodes_of([1, 1], 12 * CHUNK), "auto")
    with pytest.raises(NoSpaceError, match="node n0"):
        make_plan(manifest, nodes_of([1, 1], 10), "partition")


def test_an_unknown_policy_is_refused():
    with pytest.raises(UsageError, match="'sprinkle' is unknown"):
        make_plan(manifest_of_sizes([1], []), nodes_of([1]), "sprinkle")


def test_the_summary_adds_up():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [100], CHUNK)
    summary = make_plan(manifest, nodes_of([2, 1]), "replicate").summary(manifest)
    assert [node.gets_bytes for node in summary.nodes] == [manifest.nbytes] * 2
    assert sum(node.reads_bytes for node in summary.nodes) == manifest.nbytes
