"""Data sets of chosen file sizes, made without converting anything, for the tests of stage-in."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from stagein.formats.checksums import chunk_sums
from stagein.formats.manifest import FileEntry, Manifest, Origin, ShardEntry
from stagein.formats.schema import Field, Schema

CHUNK_BYTES = 64 << 10


def write_dataset(
    root: Path,
    shard_sizes: Sequence[int],
    file_sizes: Sequence[int] = (1000,),
    *,
    chunk_bytes: int = CHUNK_BYTES,
    seed: int = 0,
) -> Manifest:
    """A data set below `root` whose shards and other files have these sizes in bytes and random content."""
    generator = random.Random(seed)
    root.mkdir(parents=True)
    shards = []
    for number, nbytes in enumerate(shard_sizes):
        entry = _write_file(root, f"shards/{number:05d}.h5", generator.randbytes(nbytes), chunk_bytes)
        shards.append(ShardEntry(**entry.model_dump(), field="image", records=1, first=number, data_offset=0))
    files = [
        _write_file(root, f"index/part{number}", generator.randbytes(nbytes), chunk_bytes)
        for number, nbytes in enumerate(file_sizes)
    ]
    manifest = make_manifest(shards, files, chunk_bytes)
    manifest.save(root)
    return manifest


def manifest_of_sizes(
    shard_sizes: Sequence[int], file_sizes: Sequence[int], chunk_bytes: int = CHUNK_BYTES
) -> Manifest:
    """The manifest of such a data set without the data: all its sums are zero."""
    shards = [
        ShardEntry(
            **_entry(f"shards/{number:05d}.h5", nbytes, chunk_bytes),
            field="image",
            records=1,
            first=number,
            data_offset=0,
        )
        for number, nbytes in enumerate(shard_sizes)
    ]
    files = [
        FileEntry(**_entry(f"index/part{number}", nbytes, chunk_bytes)) for number, nbytes in enumerate(file_sizes)
    ]
    return make_manifest(shards, files, chunk_bytes)


def manifest_of_fields(sizes_of: Mapping[str, Sequence[int]], chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    """The manifest, without data, of a data set with these large fields and the sizes of their shards."""
    shards = [
        ShardEntry(
            **_entry(f"shards/{name}/{number:05d}.h5", nbytes, chunk_bytes),
            field=name,
            records=1,
            first=number,
            data_offset=0,
        )
        for name, sizes in sizes_of.items()
        for number, nbytes in enumerate(sizes)
    ]
    return make_manifest(shards, [], chunk_bytes, tuple(sizes_of))


def make_manifest(
    shards: Sequence[ShardEntry], files: Sequence[FileEntry], chunk_bytes: int, names: Sequence[str] = ("image",)
) -> Manifest:
    """A sealed manifest of one record a shard, with large fields of these names."""
    image = Field(kind="encoded", dtype="uint8", shape=(None, None, 3), encoding="jpeg")
    return Manifest(
        container="hdf5",
        schema=Schema(fields=dict.fromkeys(names, image), primary=names[0]).resolved(dict.fromkeys(names[1:], 1 << 40)),
        num_records=len(shards) // len(names),
        capacity=dict.fromkeys(names, 1 << 20),
        chunk_bytes=chunk_bytes,
        shards=tuple(shards),
        files=tuple(files),
        source=Origin(kind="synthetic", records_sha256="0" * 64),
    ).sealed()


def _entry(name: str, nbytes: int, chunk_bytes: int) -> dict[str, str | int]:
    return {"file": name, "nbytes": nbytes, "xxh3_128": "00" * 16 * -(-nbytes // chunk_bytes)}


def _write_file(root: Path, name: str, content: bytes, chunk_bytes: int) -> FileEntry:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return FileEntry(file=name, nbytes=len(content), xxh3_128=b"".join(chunk_sums([content], chunk_bytes)).hex())
