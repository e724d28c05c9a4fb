"""Parquet files as pyarrow and Hugging Face's datasets write them, converted and compared; damaged ones, named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import jpeg, png

from stagein.formats import Dataset, convert, verify
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.sources.parquet import scan_parquet
from stagein.formats.sources.selection import select

COUNT = 13
CLASSES = ["cat", "dög"]


def rows(first: int = 0, count: int = COUNT) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": png(n) if n % 5 == 2 else jpeg(n, 8 + n), "path": f"größe {n}.jpg"},
            "label": n % 2,
            "caption": "" if n == 3 else f"ein Bild, {n} ☃",
            "boxes": [[float(n), 1.5, 2.0, float("nan")]] * (n % 4),
            "tokens": list(range(n)),
            "weight": float("nan") if n == 1 else n / 8,
            "mean": [0.5, n, -n],
            "flag": n % 3 == 0,
            "audio": b"fLaC" + bytes([n]) * n,
        }
        for n in range(first, first + count)
    ]


SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int64()),
        ("caption", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("tokens", pa.large_list(pa.uint16())),
        ("weight", pa.float32()),
        ("mean", pa.list_(pa.float64(), 3)),
        ("flag", pa.bool_()),
        ("audio", pa.binary()),
    ]
)
FEATURES = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}}}


def write(path: Path, content: list[dict[str, Any]], group_rows: int = 4, schema: pa.Schema = SCHEMA) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = schema.with_metadata({"huggingface": json.dumps(FEATURES)})
    pq.write_table(pa.Table.from_pylist(content, schema), path, row_group_size=group_rows)
    return path


def assert_is_row(record: Any, row: dict[str, Any]) -> None:
    assert record["image"].tobytes() == row["image"]["bytes"]
    assert tuple(record["hw"]) == ((8, 12) if row["image"]["bytes"][:1] == b"\x89" else (8 + row["label_of"], 12))
    assert record["label"] == row["label"]
    assert record["caption"] == row["caption"]
    assert np.array_equal(record["boxes"], np.array(row["boxes"], np.float32).reshape(-1, 4), equal_nan=True)
    assert record["boxes"].dtype == np.float32
    assert record["tokens"].tolist() == row["tokens"]
    assert record["tokens"].dtype == np.uint16
    assert np.array_equal(record["weight"], np.float32(row["weight"]), equal_nan=True)
    assert record["mean"].tolist() == row["mean"]
    assert bool(record["flag"]) == row["flag"]
    assert record["audio"].tobytes() == row["audio"]


def test_rows_of_all_kinds_come_back(tmp_path: Path) -> None:
    write(tmp_path / "in" / "data" / "train 0-of-2.parquet", rows())
    write(tmp_path / "in" / "data" / "träin 1-of-2.parquet", rows(COUNT, 4), group_rows=100)
    write(tmp_path / "in" / "data" / "x empty.parquet", [])
    source = scan_parquet(tmp_path / "in")
    assert source.schema.primary == "image"
    assert source.schema.fields["label"].meta["classes"] == CLASSES
    assert source.schema.fields["audio"].encoding == "flac"
    convert(source, tmp_path / "x.st", shard_bytes=4096, workers=2)
    assert not list(verify(tmp_path / "x.st").problems)
    dataset = Dataset(tmp_path / "x.st")
    assert len(dataset) == COUNT + 4
    for number, (record, row) in enumerate(zip(dataset, rows(0, COUNT + 4), strict=True)):
        assert_is_row(record, row | {"label_of": number})


def test_rows_in_another_order(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows())
    source = select(scan_parquet(tmp_path / "a.parquet"), shuffle_seed=1)
    convert(source, tmp_path / "x.st", shard_bytes=4096)
    numbers = source.numbers.tolist()  # type: ignore[attr-defined]
    for number, record in zip(numbers, Dataset(tmp_path / "x.st"), strict=True):
        assert_is_row(record, rows()[number] | {"label_of": number})


def test_chosen_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows())
    source = scan_parquet(tmp_path / "a.parquet", fields={"words": "tokens", "y": "label"}, primary="words")
    assert set(source.schema.fields) == {"words", "y"}
    convert(source, tmp_path / "x.st")
    assert [record["words"].tolist() for record in Dataset(tmp_path / "x.st")] == [row["tokens"] for row in rows()]
    with pytest.raises(UsageError, match="has no column 'colour': it has image, label"):
        scan_parquet(tmp_path / "a.parquet", fields={"colour": "colour"})


def test_a_column_that_can_be_no_field(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"when": pa.array([0], pa.timestamp("us")), "y": [1]}), path)
    with pytest.raises(UsageError, match=r"'when' of .* its type is timestamp\[us\]; name the others by --field"):
        scan_parquet(path)
    pq.write_table(pa.table({"a b": [1]}), path)
    with pytest.raises(UsageError, match="choose by --field"):
        scan_parquet(path)
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], names=["x", "x", "y"]), path)
    with pytest.raises(UsageError, match="several columns 'x': name the others by --field"):
        scan_parquet(path)
    assert set(scan_parquet(path, fields={"y": "y"}).schema.fields) == {"y"}


def test_rows_with_something_missing_are_refused(tmp_path: Path) -> None:
    content = rows()
    content[1]["image"] = None
    content[2]["image"] = {"bytes": None, "path": "elsewhere.jpg"}
    content[4]["label"] = None
    content[5]["tokens"] = None
    content[6]["image"] = {"bytes": jpeg(6)[:-30], "path": "cut.jpg"}
    content[7]["image"] = {"bytes": b"", "path": "empty.jpg"}
    content[9]["tokens"] = [1, None]
    source = scan_parquet(write(tmp_path / "a.parquet", content))
    with pytest.raises(SourceError, match="7 things in it are no records") as refusal:
        convert(source, tmp_path / "x.st")
    for reason in (
        "row 1 of row group 0: its image is null",
        "only its path is here",
        "row 0 of row group 1: its label is null",
        "its tokens is null",
        "truncated JPEG",
        "the file is empty",
        "its tokens is no array of numbers",
    ):
        assert reason in str(refusal.value)
    convert(source, tmp_path / "x.st", skip_bad=True)
    kept = [number for number in range(COUNT) if number not in (1, 2, 4, 5, 6, 7, 9)]
    for number, record in zip(kept, Dataset(tmp_path / "x.st"), strict=True):
        assert_is_row(record, rows()[number] | {"label_of": number})


@pytest.mark.parametrize(
    ("arrow_type", "good", "bad"),
    [
        (pa.list_(pa.float32()), [1.5, float("nan")], [1.5, None]),
        (pa.list_(pa.bool_()), [True], [True, None]),
        (pa.list_(pa.bool_(), 2), [True, False], [None, True]),
        (pa.list_(pa.list_(pa.float64(), 2)), [[1.0, 2.0]], [[1.0, None]]),
        (pa.list_(pa.list_(pa.int8())), [[1, 2], [3, 4]], [[1, 2], None]),
        (pa.large_list(pa.list_(pa.int8())), [[1, 2]], [[1, 2], [3]]),
    ],
    ids=str,
)
def test_a_null_among_numbers_is_refused_and_no_number(arrow_type: Any, good: Any, bad: Any, tmp_path: Path) -> None:
    values = [*[good] * 70, bad, good]  # rows that the type of a field is not told from
    pq.write_table(pa.table({"x": pa.array(values, arrow_type)}), tmp_path / "a.parquet")
    source = scan_parquet(tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="row 70 of row group 0: its x is no array of numbers"):
        convert(source, tmp_path / "x.st")
    convert(source, tmp_path / "x.st", skip_bad=True)
    assert len(Dataset(tmp_path / "x.st")) == 71
    for record in Dataset(tmp_path / "x.st"):
        assert np.array_equal(record["x"], np.array(good, record["x"].dtype), equal_nan=record["x"].dtype.kind == "f")


def test_cells_of_a_dictionary_are_what_they_stand_for(tmp_path: Path) -> None:
    files = [jpeg(1), jpeg(2), jpeg(1)]
    columns = {"image": files, "caption": ["a", "b", "a"], "y": [7, 8, 7]}
    table = pa.table({name: pa.array(values).dictionary_encode() for name, values in columns.items()})
    pq.write_table(table, tmp_path / "a.parquet")
    convert(scan_parquet(tmp_path / "a.parquet"), tmp_path / "x.st")
    records = list(Dataset(tmp_path / "x.st"))
    assert [record["image"].tobytes() for record in records] == files
    assert [(record["caption"], int(record["y"])) for record in records] == [("a", 7), ("b", 8), ("a", 7)]


def test_files_that_are_damaged_or_odd_are_refused(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"{number + 1}.parquet", rows(10 * number, 5))
    content = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "0 truncated.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "0 empty.parquet").write_bytes(b"")
    write(tmp_path / "0 odd.parquet", [{"label": 1}], schema=pa.schema([("label", pa.int64())]))
    damaged = bytearray(content)
    damaged[200:600] = bytes(400)
    (tmp_path / "4 damaged.parquet").write_bytes(damaged)
    source = scan_parquet(tmp_path)
    reasons = {Path(refused.name).name: refused.reason for refused in source.refused}
    assert reasons.keys() == {"0 truncated.parquet", "0 empty.parquet", "0 odd.parquet", "4 damaged.parquet"}
    assert reasons["0 empty.parquet"] == "the file is empty"
    assert "its columns are label: int64, those of most files image: struct" in reasons["0 odd.parquet"]
    convert(source, tmp_path / "x.st", skip_bad=True)
    assert len(Dataset(tmp_path / "x.st")) == 15


def test_nothing_to_convert(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no Parquet files"):
        scan_parquet(tmp_path)
    (tmp_path / "a.parquet").write_text("no such file")
    with pytest.raises(SourceError, match="no Parquet file that can be read"):
        scan_parquet(tmp_path)


def test_numbers_alone(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"x": np.arange(5, dtype=np.float16), "y": pa.array([1, 2, 3, 4, 5], pa.int8())}),
        tmp_path / "a.parquet",
    )
    convert(scan_parquet(tmp_path / "a.parquet"), tmp_path / "x.st")
    dataset = Dataset(tmp_path / "x.st")
    assert [(float(record["x"].item()), int(record["y"])) for record in dataset] == [(n, n + 1) for n in range(5)]
