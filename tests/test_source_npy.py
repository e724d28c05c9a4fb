"""Files of numpy as sources: look-alikes of CosmoFlow and DeepCAM, archives, rows, and files that are no records."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lookalikes import (
    COSMOFLOW_SHAPE,
    NUM_SAMPLES,
    ODD_NAN,
    assert_all_same,
    assert_same_bits,
    cosmoflow_names,
    cosmoflow_samples,
    deepcam_samples,
    read_source,
    refusals,
    write_cosmoflow_npy,
    write_deepcam_npy,
)

from stagein.formats import Dataset, convert
from stagein.formats.errors import SourceError, UsageError
from stagein.formats.source import RefusedRecord
from stagein.formats.sources.npy import scan_npy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A look-alike of CosmoFlow without lists."""
    write_cosmoflow_npy(tmp_path / "cosmo flow")
    return tmp_path / "cosmo flow"


def write_lists(folder: Path, order: list[int], with_sizes: bool) -> None:
    for field in ("data", "label"):
        lines = [f"{cosmoflow_names()[number]}_{field}.npy" for number in order]
        if with_sizes:
            lines = [f"{line} {(folder / line).stat().st_size}" for line in lines]
        (folder / f"files_{field}.lst").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_cosmoflow_by_names(folder: Path) -> None:
    source = scan_npy(folder)
    assert source.schema.fields["data"].shape == COSMOFLOW_SHAPE
    assert source.schema.fields["label"].dtype == "float32"
    assert_all_same(source, cosmoflow_samples())


@pytest.mark.parametrize("with_sizes", [False, True])
def test_cosmoflow_by_lists_in_their_order(folder: Path, with_sizes: bool) -> None:
    order = [3, 0, 6, 2]
    write_lists(folder, order, with_sizes)
    samples = cosmoflow_samples()
    assert_all_same(scan_npy(folder), [samples[number] for number in order])


def test_lists_that_do_not_match_are_sentences(folder: Path) -> None:
    write_lists(folder, [0, 1, 2], with_sizes=True)
    data, label = folder / "files_data.lst", folder / "files_label.lst"
    shorter = folder / f"{cosmoflow_names()[1]}_data.npy"
    os.truncate(shorter, 1000)
    source = scan_npy(folder)
    listed_bytes = np.prod(COSMOFLOW_SHAPE) * 2 + 128
    assert source.refused == (RefusedRecord(shorter.name, f"it has 1000 bytes, its list says {listed_bytes}"),)
    assert len(source.nbytes) == 2
    label.write_text(label.read_text().splitlines()[0])
    with pytest.raises(SourceError, match=r"files_data\.lst names 3 files, files_label\.lst names 1"):
        scan_npy(folder)
    label.unlink()
    data.write_text("missing_data.npy\n")
    with pytest.raises(SourceError, match=r"missing_data\.npy failed: No such file"):
        scan_npy(folder)
    data.write_text("a_data.npy\nsome prose\n")
    with pytest.raises(SourceError, match=r"files_data\.lst line 2 is 'some prose': write NAME\.npy"):
        scan_npy(folder)
    data.write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="not text in UTF-8"):
        scan_npy(folder)
    data.write_text("\n")
    with pytest.raises(SourceError, match="no complete record"):
        scan_npy(folder)


def test_deepcam_by_names(tmp_path: Path) -> None:
    samples = write_deepcam_npy(tmp_path / "train")
    assert_all_same(scan_npy(tmp_path / "train"), samples)
    labels = [{"mask": sample["label"]} for sample in samples]
    assert_all_same(scan_npy(tmp_path / "train", fields={"mask": "label-*.npy"}), labels)


def test_what_has_no_partner_is_refused(folder: Path) -> None:
    names = cosmoflow_names()
    (folder / f"{names[2]}_label.npy").unlink()
    (folder / f"{names[5]}_data.npy").unlink()
    np.save(folder / "mean.npy", np.zeros(3))
    assert {refused.name: refused.reason for refused in scan_npy(folder).refused} == {
        f"{names[2]}_data.npy": f"there is no {names[2]}_label.npy beside it",
        f"{names[5]}_label.npy": f"there is no {names[5]}_data.npy beside it",
        "mean.npy": "its name is not *_data.npy or *_label.npy",
    }
    assert len(scan_npy(folder).nbytes) == NUM_SAMPLES - 2


def test_plain_files_and_fields_by_pattern(tmp_path: Path) -> None:
    samples = cosmoflow_samples()
    for number, sample in enumerate(samples):
        np.save(tmp_path / f"{number}.npy", sample["data"])
    assert_all_same(scan_npy(tmp_path), [{"data": sample["data"]} for sample in samples])


def test_a_pattern_fits_whole_names_alone(tmp_path: Path) -> None:
    for name in ("x-1-x.npy", "x-x.npy", "x-2-x.npy.npy", ".x-3-x.npy"):
        np.save(tmp_path / name, np.zeros(3))
    (sample,) = scan_npy(tmp_path, fields={"data": "x-*-x.npy"}).samples
    assert sample[0].path.name == "x-1-x.npy"
    assert len(scan_npy(tmp_path).samples) == 3


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("data", "label"), ("data", "labels"), ("x", "y")])
def test_archives(tmp_path: Path, save: object, names: tuple[str, str]) -> None:
    samples = deepcam_samples()
    for number, sample in enumerate(samples):
        save(tmp_path / f"{number} ü.npz", **{names[0]: sample["data"], names[1]: sample["label"]})
    source = scan_npy(tmp_path)
    assert_all_same(source, [dict(zip(source.schema.fields, sample.values(), strict=True)) for sample in samples])
    only = scan_npy(tmp_path, fields={"mask": names[1]})
    assert_all_same(only, [{"mask": sample["label"]} for sample in samples])


def test_rows_of_files(tmp_path: Path) -> None:
    samples = deepcam_samples()
    for field in ("data", "label"):
        np.save(tmp_path / f"{field}s.npy", np.stack([sample[field] for sample in samples]))
    source = scan_npy(tmp_path, fields={"data": "datas.npy", "label": "labels.npy"})
    assert_all_same(source, samples)
    assert_all_same(scan_npy(tmp_path / "datas.npy"), [{"data": sample["data"]} for sample in samples])
    np.save(tmp_path / "labels.npy", np.arange(6))
    with pytest.raises(SourceError, match=r"datas\.npy has 7 rows, labels\.npy has 6 rows"):
        scan_npy(tmp_path, fields={"data": "datas.npy", "label": "labels.npy"})


def test_rows_that_are_cut_off_while_they_are_read_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(15.0).reshape(3, 5))
    room = bytearray(40)
    records = scan_npy(tmp_path / "rows.npy").part(np.arange(0, 3)).read(lambda name, nbytes: memoryview(room))
    next(records)
    os.truncate(tmp_path / "rows.npy", 128 + 60)
    assert next(records) == RefusedRecord("rows.npy row 1", "it ends after 20 of the 40 bytes of its array")


def awkward_arrays() -> dict[str, np.ndarray]:
    values = np.linspace(-3, 3, 7 * 24).reshape(7, 2, 3, 4)
    floats = values.astype(np.float32)
    floats.view(np.uint32)[4, 1, 2, 3] = ODD_NAN
    swapped = floats.view(np.uint32).byteswap().view(">f4")
    return {
        "Fortran": np.asfortranarray(floats),
        "big-endian": swapped,
        "big-endian Fortran": np.asfortranarray(swapped),
        "big-endian integers": values.astype(">i8"),
        "half": values.astype(np.float16),
        "complex": (values + 2j).astype(">c16"),
        "bool": np.asfortranarray(values > 0),
        "bytes": values.astype(np.uint8),
    }


@pytest.mark.parametrize("name", awkward_arrays())
@pytest.mark.parametrize("way", ["file", "archive", "compressed archive", "rows"])
def test_order_and_type_of_the_elements(tmp_path: Path, name: str, way: str) -> None:
    array = awkward_arrays()[name]
    if way == "rows":
        np.save(tmp_path / "rows.npy", array)
        source = scan_npy(tmp_path / "rows.npy")
    else:
        for number, row in enumerate(array):
            row = np.asfortranarray(row) if "Fortran" in name else row
            if way == "file":
                np.save(tmp_path / f"{number}.npy", row)
            else:
                (np.savez if way == "archive" else np.savez_compressed)(tmp_path / f"{number}.npz", row)
        source = scan_npy(tmp_path)
    bits = array.dtype.newbyteorder("<")
    expected = [row.byteswap().view(bits) if array.dtype.byteorder == ">" else row for row in array]
    assert_all_same(source, [{"data": np.ascontiguousarray(row)} for row in expected])


def test_a_single_number_a_file(tmp_path: Path) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.float64(number))
    assert_all_same(scan_npy(tmp_path), [{"data": np.array(float(number))} for number in range(3)])


def test_files_that_are_no_records_are_refused_by_name(folder: Path) -> None:
    data, label = sorted(folder.glob("*_data.npy")), sorted(folder.glob("*_label.npy"))
    size = data[0].stat().st_size
    os.truncate(data[0], size - 7)
    data[1].write_bytes(b"garbage")
    np.save(data[3], np.zeros((12, 12, 12), np.int16))
    np.save(label[4], np.array([{"an": "object"}, None]), allow_pickle=True)
    data[5].write_bytes(data[2].read_bytes() + b"more")
    os.truncate(label[6], 0)
    source = scan_npy(folder)
    assert source.refused == (RefusedRecord(label[6].name, "the file is empty"),)
    reasons = refusals(source)
    assert list(reasons) == [data[0].name, data[1].name, data[3].name, label[4].name, data[5].name]
    assert f"it has {size - 7} bytes, its header promises {size}" in reasons[data[0].name]
    assert "it has no .npy header" in reasons[data[1].name]
    assert (
        "its array is int16 of shape (12, 12, 12), expected int16 of shape (12, 12, 12, 4)" in (reasons[data[3].name])
    )
    assert "holds Python objects" in reasons[label[4].name]
    assert f"it has {size + 4} bytes, its header promises {size}" in reasons[data[5].name]
    assert_same_bits(read_source(source)[2], cosmoflow_samples()[2])


def test_archives_that_are_no_records_are_refused_by_name(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((8, 9))
    for number in range(7):
        np.savez_compressed(tmp_path / f"{number}.npz", data=values, label=np.float32(number))
    content = (tmp_path / "1.npz").read_bytes()
    (tmp_path / "1.npz").write_bytes(content[: len(content) // 2])
    np.savez(tmp_path / "2.npz", data=values)
    np.savez(tmp_path / "3.npz", data=values, label=np.array([None]))
    damaged = bytearray(content)
    damaged[300] ^= 1
    (tmp_path / "4.npz").write_bytes(damaged)
    with zipfile.ZipFile(tmp_path / "5.npz", "w") as archive:
        archive.writestr("data.npy", b"no header")
        archive.writestr("label.npy", b"none here")
    with zipfile.ZipFile(tmp_path / "0.npz") as whole, zipfile.ZipFile(tmp_path / "6.npz", "w") as archive:
        archive.writestr("data.npy", whole.read("data.npy")[:-8])
        archive.writestr("label.npy", whole.read("label.npy"))
    reasons = refusals(scan_npy(tmp_path))
    assert list(reasons) == [f"{number}.npz" for number in range(1, 7)]
    assert "cannot be opened as .npz" in reasons["1.npz"]
    assert reasons["2.npz"] == "it has no array label: it has data"
    assert "holds Python objects" in reasons["3.npz"]
    assert "its array data cannot be read" in reasons["4.npz"]
    assert "it has no .npy header" in reasons["5.npz"]
    assert "it has 696 bytes, its header promises 704" in reasons["6.npz"]


def test_a_flipped_byte_of_a_stored_archive_is_noticed(tmp_path: Path) -> None:
    for number in range(2):
        np.savez(tmp_path / f"{number}.npz", data=np.arange(1000.0))
    content = bytearray((tmp_path / "1.npz").read_bytes())
    content[4000] ^= 1
    (tmp_path / "1.npz").write_bytes(content)
    assert "Bad CRC-32" in refusals(scan_npy(tmp_path))["1.npz"]


def test_a_file_of_rows_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.zeros((7, 5)))
    os.truncate(path, 200)
    with pytest.raises(SourceError, match=r"rows\.npy: it has 200 bytes, its header promises 408"):
        scan_npy(path)
    path.write_bytes(b"")
    with pytest.raises(SourceError, match="the file is empty"):
        scan_npy(path)
    np.save(path, np.float32(1))
    with pytest.raises(SourceError, match="single value where there should be rows"):
        scan_npy(path)
    np.save(path, np.array([None, 1]), allow_pickle=True)
    with pytest.raises(SourceError, match="holds Python objects"):
        scan_npy(path)
    np.save(path, np.array(["text"]))
    with pytest.raises(SourceError, match="<U4, no plain numbers"):
        scan_npy(path)
    np.save(path, np.zeros(3, [("x", "f4")]))
    with pytest.raises(SourceError, match="no plain numbers"):
        scan_npy(path)
    np.save(path, np.zeros(3, np.longdouble))
    with pytest.raises(SourceError, match=r"its array cannot be a field: dtype 'float128' is not .* take one of"):
        scan_npy(path)


def test_no_object_is_ever_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    np.save(tmp_path / "0.npy", np.zeros(3))
    np.save(tmp_path / "1.npy", np.array([Evil()]), allow_pickle=True)
    np.savez(tmp_path / "rows.npz", data=np.array([Evil()]))
    assert "holds Python objects" in refusals(scan_npy(tmp_path, fields={"data": "*.npy"}))["1.npy"]
    with pytest.raises(SourceError, match="holds Python objects"):
        scan_npy(tmp_path, fields={"data": "data"})
    assert not (tmp_path / "unpickled").exists()


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 127), value=st.integers(0, 255))
def test_a_damaged_header_is_a_refusal_whatever_it_says(tmp_path: Path, place: int, value: int) -> None:
    np.save(tmp_path / "0.npy", np.arange(12.0).reshape(3, 4))
    content = bytearray((tmp_path / "0.npy").read_bytes())
    content[place] = value
    (tmp_path / "1.npy").write_bytes(content)
    source = scan_npy(tmp_path)
    assert set(refusals(source)) <= {"1.npy"}


def test_what_cannot_be_guessed_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere failed: No such file"):
        scan_npy(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"holds no \.npy and no \.npz"):
        scan_npy(tmp_path)
    np.savez(tmp_path / "0.npz", density=np.zeros(3), velocity=np.zeros(3))
    with pytest.raises(UsageError, match="holds the arrays density, velocity: say by --field NAME=ARRAY which"):
        scan_npy(tmp_path)
    with pytest.raises(SourceError, match="it has no array energy: it has density, velocity"):
        scan_npy(tmp_path, fields={"data": "energy"})
    np.save(tmp_path / "0.npy", np.zeros(3))
    with pytest.raises(UsageError, match=r"holds \.npy and \.npz files"):
        scan_npy(tmp_path)
    with pytest.raises(UsageError, match="in different ways"):
        scan_npy(tmp_path, fields={"data": "*.npy", "label": "velocity"})
    with pytest.raises(UsageError, match="to choose fields by name, give the folder"):
        scan_npy(tmp_path / "0.npy", fields={"data": "0.npy"})
    with pytest.raises(UsageError, match="primary field 'nothing' is not among"):
        scan_npy(tmp_path, fields={"data": "*.npy"}, primary="nothing")


def test_a_file_that_changes_after_the_scan_is_noticed(folder: Path) -> None:
    source = scan_npy(folder)
    changed = sorted(folder.glob("*_label.npy"))[3]
    changed.write_bytes(changed.read_bytes() + b"x")
    with pytest.raises(SourceError, match="changed while it was converted"):
        read_source(source)
    changed.unlink()
    with pytest.raises(SourceError, match="No such file"):
        read_source(source)


def test_marks_tell_versions_apart_and_identity_is_the_same_elsewhere(folder: Path, tmp_path: Path) -> None:
    source = scan_npy(folder)
    moved = scan_npy(folder.rename(tmp_path / "elsewhere"))
    assert moved.identity() == source.identity()
    assert moved.part(np.arange(0, 2)).mark() != source.part(np.arange(0, 2)).mark()
    assert moved.part(np.arange(0, 2)).mark() != moved.part(np.arange(1, 3)).mark()


@pytest.mark.parametrize("workers", [1, 2])
def test_converted_records_are_the_samples(folder: Path, tmp_path: Path, workers: int) -> None:
    convert(scan_npy(folder), tmp_path / "x.st", codec="auto", shard_bytes=64 << 10, workers=workers)
    dataset = Dataset(tmp_path / "x.st")
    assert len(dataset.manifest.shards) > 1
    assert dataset.schema.fields["data"].codec is not None
    for record, sample in zip(dataset, cosmoflow_samples(), strict=True):
        assert record["data"].tobytes() == sample["data"].tobytes()
        assert np.array_equal(record["label"], sample["label"])


def test_bad_files_are_left_out_on_request(folder: Path, tmp_path: Path) -> None:
    bad = sorted(folder.glob("*_data.npy"))[2]
    os.truncate(bad, 500)
    with pytest.raises(SourceError, match=r"1 thing in it is no record(.|\n)*it has 500 bytes, its header promises"):
        convert(scan_npy(folder), tmp_path / "x.st")
    converted = convert(scan_npy(folder), tmp_path / "x.st", skip_bad=True)
    assert [refused.name for refused in converted.skipped] == [bad.name]
    assert len(Dataset(tmp_path / "x.st")) == NUM_SAMPLES - 1


def test_the_odd_one_is_refused_even_if_it_is_the_first(tmp_path: Path) -> None:
    expected = write_cosmoflow_npy(tmp_path / "x")
    np.save(tmp_path / "x" / "0 odd_data.npy", np.zeros(3))
    np.save(tmp_path / "x" / "0 odd_label.npy", np.zeros(4, np.float32))
    source = scan_npy(tmp_path / "x")
    assert refusals(source).keys() == {"0 odd_data.npy"}
    for record, sample in zip(read_source(source)[1:], expected, strict=True):
        assert_same_bits(record, sample)
