"""The plan of a stage-in: who gets what, and who reads what."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import manifest_of_fields, manifest_of_sizes

from stagein.formats.errors import NoSpaceError, UsageError
from stagein.formats.manifest import Manifest
from stagein.stage_plan import (
    ChunkTable,
    NodeRates,
    NodeSpace,
    PlanSummary,
    RankWork,
    StagePlan,
    buffers_within,
    make_plan,
    rank_work,
    shard_families,
    stored_bytes,
)
from stagein.staging import DEFAULT_MEMORY_BYTES
from stagein.time_left import job_seconds_left, parse_duration
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
    return [(world, rank_work(plan, table, world, missing)) for world in worlds]


def summary_of(plan: StagePlan, manifest: Manifest, **known: object) -> PlanSummary:
    """The summary when no node has anything yet."""
    table = ChunkTable(manifest)
    gets_bytes = [sum(table.files[file].nbytes for file in plan.files_of(node)) for node in range(len(plan.nodes))]
    return plan.summary(manifest, gets_bytes, np.ones(len(table), dtype=np.bool_), **known)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Manifest, StagePlan, ChunkTable]:
    """A plan of any policy and any number of copies that 1 to 5 nodes of plenty allow."""
    manifest = manifest_of_sizes(draw(sizes), draw(sizes), CHUNK)
    nodes = nodes_of(draw(ranks_per_node))
    policy, copies = draw(
        st.sampled_from([("replicate", None), ("partition", None), *(("auto", n) for n in range(1, len(nodes) + 1))])
    )
    return manifest, make_plan(manifest, nodes, policy, copies), ChunkTable(manifest)


@given(plans(), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_every_missing_chunk_is_read_once_and_reaches_its_nodes(made, random):
    """Carries the plan out with lists in place of messages."""
    _, plan, table = made
    missing = np.array([random.random() < 0.7 for _ in range(len(table))], dtype=np.bool_)
    work = all_work(plan, table, missing)
    assert sorted(np.concatenate([rank.reads for _, rank in work])) == list(np.flatnonzero(missing))

    got = {node: [] for node in range(len(plan.nodes))}
    of_places = {(rank.position, world.local_rank): rank for world, rank in work}
    for world, rank in work:
        got[world.node] += list(rank.local)
        for chunk in rank.traveling:
            for distance in range(rank.hops[chunk] + 1):
                got[plan.ring[(rank.position + distance) % len(plan.ring)]].append(chunk)
        for place, expected in enumerate(rank.by_origin):
            sent = of_places[place, world.local_rank].traveling
            reaching = sent[rank.hops[sent] >= (rank.position - place) % len(plan.ring)]
            assert list(reaching) == list(expected), "a rank expects other messages than it gets"
    for node, chunks in got.items():
        assert sorted(chunks) == list(np.flatnonzero(missing & table.of_files(plan.files_of(node))))


@given(plans())
def test_each_shard_has_its_number_of_copies_and_other_files_are_everywhere(made):
    manifest, plan, _ = made
    owners = [
        [node for node in range(len(plan.nodes)) if file in plan.files_of(node)]
        for file in range(len(manifest.shards) + len(manifest.files))
    ]
    assert all(len(nodes) == plan.copies for nodes in owners[: len(manifest.shards)])
    assert all(len(nodes) == len(plan.nodes) for nodes in owners[len(manifest.shards) :])


@given(st.data(), st.integers(1, 3), ranks_per_node)
def test_all_fields_of_a_record_are_on_the_same_nodes(data, fields, ranks):
    """Of several large fields, the shards that hold the same records stay together, whatever their sizes."""
    count = data.draw(st.integers(0, 6))
    names = [f"field{number}" for number in range(fields)]
    sizes_of = {name: data.draw(st.lists(st.integers(0, 9 * CHUNK), min_size=count, max_size=count)) for name in names}
    manifest = manifest_of_fields(sizes_of, CHUNK)
    copies = data.draw(st.integers(1, len(ranks)))
    plan = make_plan(manifest, nodes_of(ranks), "auto", copies)
    owners = {
        shard.file: {node for node in range(len(ranks)) if number in plan.files_of(node)}
        for number, shard in enumerate(manifest.shards)
    }
    assert all(len(nodes) == copies for nodes in owners.values())
    for together in zip(*(manifest.shards_of(name) for name in names), strict=True):
        assert len({frozenset(owners[shard.file]) for shard in together}) == 1
    families = shard_families(manifest)
    assert sorted(file for family in families for file in family) == list(range(len(manifest.shards)))


@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_copies_are_balanced(rounds, nodes, data):
    """Equal shards, as many as the nodes or a multiple: every node reads and holds the same."""
    copies = data.draw(st.integers(1, nodes))
    manifest = manifest_of_sizes([CHUNK] * (rounds * nodes), [], CHUNK)
    summary = summary_of(make_plan(manifest, nodes_of([1] * nodes), "auto", copies), manifest)
    assert {node.gets_bytes for node in summary.nodes} == {rounds * copies * CHUNK}
    assert {node.reads_bytes for node in summary.nodes} == {rounds * CHUNK}


@given(sizes, sizes, st.lists(st.integers(0, 60 * CHUNK), min_size=1, max_size=5), st.booleans())
def test_a_plan_fits_or_is_refused(shards, files, rooms, evenly):
    manifest = manifest_of_sizes(shards, files, CHUNK)
    nodes = [NodeSpace(f"n{number}", 1, room) for number, room in enumerate(rooms)]
    entries = list(manifest.all_files())
    try:
        plan = make_plan(manifest, nodes, "auto", 1 if evenly else None)
    except NoSpaceError as error:
        assert any(node.name in str(error) for node in nodes)
        assert any(room < needs(manifest) for room in rooms), "refused although all of it fits everywhere"
        return
    for number, room in enumerate(rooms):
        assert sum(stored_bytes(entries[file]) for file in plan.files_of(number)) <= room


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
    loads = [table.total_bytes(rank.reads) for world, rank in all_work(plan, table, table.nbytes > 0)]
    assert loads == [20 * (CHUNK + 1)] * 2


def test_partition_balances_bytes():
    plan = make_plan(manifest_of_sizes([5000, 100, 100, 4900, 200, 4700], [], CHUNK), nodes_of([1, 1, 1]), "partition")
    assert sorted(map(len, plan.first_read)) == [2, 2, 2]
    assert {shard for owned in plan.first_read for shard in owned[:1]} | {3, 5} >= {0, 3, 5}


def needs(manifest: Manifest) -> int:
    return sum(stored_bytes(entry) for entry in manifest.all_files())


def test_auto_replicates_where_it_fits_and_partitions_where_it_does_not():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [100], CHUNK)
    assert make_plan(manifest, nodes_of([1, 1], needs(manifest)), "auto").policy == "replicate"
    assert make_plan(manifest, nodes_of([1, 1], needs(manifest) - 1), "auto").policy == "partition"


def test_auto_takes_as_many_copies_as_fit():
    manifest = manifest_of_sizes([10 * CHUNK] * 8, [100], CHUNK)
    for copies in (1, 2, 3, 4):
        room = needs(manifest) * copies // 4 + stored_bytes(manifest.files[0])
        plan = make_plan(manifest, nodes_of([1, 1, 1, 1], room), "auto")
        assert (plan.copies, plan.policy) == (copies, {1: "partition", 4: "replicate"}.get(copies, "copies"))


def test_copies_go_round_nodes_without_room():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [], CHUNK)
    nodes = [NodeSpace("a", 1, PLENTY), NodeSpace("full", 1, 0), NodeSpace("b", 1, PLENTY), NodeSpace("full too", 1, 0)]
    plan = make_plan(manifest, nodes, "auto", 2)
    assert [len(plan.files_of(node)) for node in range(4)] == [4, 0, 4, 0]


@pytest.mark.parametrize(("policy", "copies"), [("auto", 0), ("auto", 3), ("partition", 1)])
def test_copies_that_cannot_be_are_refused(policy, copies):
    with pytest.raises(UsageError, match=f"{copies} copies of each shard cannot be: .* 1 to 2"):
        make_plan(manifest_of_sizes([1], []), nodes_of([1, 1]), policy, copies)


def test_what_is_held_already_counts_as_room():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [100], CHUNK)
    nodes = [NodeSpace("a", 1, free_bytes=0, held_bytes=needs(manifest))]
    assert make_plan(manifest, nodes, "auto").policy == "replicate"


def test_a_small_node_gets_what_fits():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [], CHUNK)
    small, large = stored_bytes(manifest.shards[0]), 3 * stored_bytes(manifest.shards[0])
    plan = make_plan(manifest, [NodeSpace("small", 1, small), NodeSpace("large", 1, large)], "auto")
    assert list(map(len, plan.first_read)) == [1, 3]


def test_no_room_is_refused_with_need_room_and_node():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [100], CHUNK)
    nodes = [NodeSpace("big", 1, PLENTY), NodeSpace("tiny", 1, 5000)]
    with pytest.raises(NoSpaceError, match=rf"needs {needs(manifest):,} bytes, but node tiny has room for 5,000"):
        make_plan(manifest, nodes, "replicate")
    with pytest.raises(NoSpaceError, match=r"over 2 nodes .*least on node n0"):
        make_plan(manifest, nodes_of([1, 1], 12 * CHUNK), "auto")
    with pytest.raises(NoSpaceError, match="node n0"):
        make_plan(manifest, nodes_of([1, 1], 10), "partition")
    with pytest.raises(
        NoSpaceError, match=r"the data set needs .* bytes, but node n0 has room for 10: make room there"
    ):
        make_plan(manifest, nodes_of([1], 10), "auto")


def test_an_unknown_policy_is_refused():
    with pytest.raises(UsageError, match="'sprinkle' is unknown"):
        make_plan(manifest_of_sizes([1], []), nodes_of([1]), "sprinkle")


def test_the_summary_adds_up():
    manifest = manifest_of_sizes([10 * CHUNK] * 4, [100], CHUNK)
    summary = summary_of(make_plan(manifest, nodes_of([2, 1]), "replicate"), manifest)
    assert [node.gets_bytes for node in summary.nodes] == [manifest.nbytes] * 2
    assert sum(node.reads_bytes for node in summary.nodes) == manifest.nbytes


@given(plans(), st.data())
def test_the_prediction_is_the_bound(made, data):
    """With one rate for all: the source shares out its reads, the others get what they hold at their own rate."""
    manifest, plan, _ = made
    source, network, disk = (data.draw(st.integers(1, 1000)) for _ in range(3))
    rates = [NodeRates(source=source, network=network, disk=disk)] * len(plan.nodes)
    summary = summary_of(plan, manifest, rates=rates, seconds_left=10.0)
    reads = max(node.reads_bytes for node in summary.nodes) / source
    writes = max(node.gets_bytes for node in summary.nodes) / disk
    receives = max(node.gets_bytes - node.reads_bytes for node in summary.nodes) / network
    assert summary.predicted.seconds == pytest.approx(max(reads, writes, receives))
    assert summary.predicted.fits == (summary.predicted.seconds < 10)
    assert sum(node.reads_bytes for node in summary.nodes) == manifest.nbytes


def test_the_slowest_resource_is_named():
    plan = make_plan(manifest_of_sizes([10 * CHUNK] * 4, []), nodes_of([1, 1]), "replicate")
    rates = [NodeRates(source=100, network=100, disk=100), NodeRates(source=100, network=100, disk=10)]
    predicted = summary_of(plan, manifest_of_sizes([10 * CHUNK] * 4, []), rates=rates).predicted
    assert (predicted.resource, predicted.node, predicted.fits) == ("disk", "n1", None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", None),
        ("1:30", 90),
        ("2:00:05", 7205),
        ("1-02:00:05", 93605),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_times_as_slurm_prints_them(text, seconds):
    assert parse_duration(text) == seconds


def test_time_left_by_squeue(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text('#!/bin/sh\n[ "$*" = "-h -j 17 -o %L" ] && echo 1:30\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert job_seconds_left({"SLURM_JOB_ID": "17"}) == 90
    assert job_seconds_left({"SLURM_JOB_ID": "18"}) is None
    assert job_seconds_left({}) is None


def test_a_rank_of_a_thousand_nodes_stays_within_its_memory():
    """10 TB over 1,024 nodes of 4 ranks: the buffers keep to their budget, and what the plan holds is small beside them."""
    chunk_bytes, shard_bytes, memory_bytes = 8 << 20, 2 << 30, DEFAULT_MEMORY_BYTES
    manifest = manifest_of_sizes([shard_bytes] * 5000, [1000], chunk_bytes)
    nodes = nodes_of([4] * 1024, 20 << 40)
    table = ChunkTable(manifest)
    names = [node.name for node in nodes for _ in range(4)]
    for copies in (1024, 3):
        plan = make_plan(manifest, nodes, copies=copies)
        work = rank_work(plan, table, World.of_rank(2049, names), np.ones(len(table), dtype=np.bool_))
        passing = sum(map(len, work.by_origin)) + len(work.local)
        assert buffers_within(memory_bytes, chunk_bytes, passing) * chunk_bytes <= memory_bytes
        held = [*work.by_origin, work.local, work.hops, table.first, table.file_of, table.nbytes]
        assert sum(array.nbytes for array in held) < memory_bytes // 2
