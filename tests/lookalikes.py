"""Small look-alikes of DeepCAM and CosmoFlow in the layouts they have on disk, and how tests read sources of them.

Values are like the real ones where it matters to bytes: smooth fields whose scales span seven decades with one NaN of an
odd payload among them, counts over a correlated density; counts are prime; names have spaces and letters beyond ASCII.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from stagein.formats.schema import Field
from stagein.formats.source import RefusedRecord, Source

DEEPCAM_SHAPE = (24, 36, 16)
COSMOFLOW_SHAPE = (12, 12, 12, 4)
NUM_SAMPLES = 7
ODD_NAN = np.array(0x7FA12345, np.uint32)
"""A signalling NaN: arithmetic would quieten it, a copy keeps it."""

Arrays = dict[str, NDArray[np.generic]]


def deepcam_samples() -> list[Arrays]:
    """Fields of a climate model and the label of every point: 98.6 % background, the rest storms and rivers."""
    generator = np.random.default_rng(1)
    samples = []
    for _ in range(NUM_SAMPLES):
        noise = generator.standard_normal(DEEPCAM_SHAPE)
        data = (noise.cumsum(0).cumsum(1) * np.logspace(-3, 4, DEEPCAM_SHAPE[-1])).astype(np.float32)
        label = generator.choice(3, DEEPCAM_SHAPE[:2], p=[0.9865, 0.0005, 0.013]).astype(np.float32)
        samples.append({"data": data, "label": label})
    samples[2]["data"].view(np.uint32)[3, 5, 7] = ODD_NAN
    return samples


def cosmoflow_samples() -> list[Arrays]:
    """Counts of particles in cells over a lognormal density at four redshifts, and the four parameters behind them."""
    generator = np.random.default_rng(2)
    edge = COSMOFLOW_SHAPE[0]
    frequency = np.fft.fftfreq(edge) ** 2
    power = frequency[:, None, None] + frequency[:, None] + np.fft.rfftfreq(edge) ** 2
    power[0, 0, 0] = np.inf
    samples = []
    for _ in range(NUM_SAMPLES):
        waves = np.fft.rfftn(generator.standard_normal((edge, edge, edge))) * power**-0.6
        density = np.fft.irfftn(waves)  # the edge is even: its shape needs no telling
        density /= density.std()
        counts = [generator.poisson(np.exp(sigma * density - sigma**2 / 2)) for sigma in (0.7, 0.9, 1.1, 1.4)]
        label = generator.uniform(-1, 1, 4).astype(np.float32)
        samples.append({"data": np.stack(counts, -1).astype(np.int16), "label": label})
    return samples


def deepcam_names() -> list[str]:
    """Sorted; with a space in one and letters beyond ASCII in another."""
    return [f"1996-06-{day:02d}-00-{['1', '1 copy', 'größe'][day % 3]}" for day in range(NUM_SAMPLES)]


def cosmoflow_names() -> list[str]:
    """Sorted; with a space in one and letters beyond ASCII in another."""
    return [f"univ_ics_2019-03_a1000{number}_{['000', '0 0', 'ñ'][number % 3]}" for number in range(NUM_SAMPLES)]


def write_deepcam_hdf5(root: Path) -> list[Arrays]:
    """One HDF5 file a sample."""
    root.mkdir()
    samples = deepcam_samples()
    for name, sample in zip(deepcam_names(), samples, strict=True):
        with h5py.File(root / f"data-{name}.h5", "w") as file:
            file["climate/data"], file["climate/labels_0"] = sample["data"], sample["label"]
    return samples


def write_deepcam_single(path: Path, chunks: tuple[int, ...] | None = None, **storage: object) -> list[Arrays]:
    """All samples in one HDF5 file; `chunks` are cut to the extents of each data set, `storage` is h5py's."""
    samples = deepcam_samples()
    with h5py.File(path, "w") as file:
        for name, field in (("data", "data"), ("labels", "label")):
            stacked = np.stack([sample[field] for sample in samples])
            file.create_dataset(name, data=stacked, chunks=chunks and chunks[: stacked.ndim], **storage)
    return samples


def write_deepcam_npy(root: Path) -> list[Arrays]:
    """`data-NAME.npy` and `label-NAME.npy`."""
    root.mkdir()
    samples = deepcam_samples()
    for name, sample in zip(deepcam_names(), samples, strict=True):
        for field, array in sample.items():
            np.save(root / f"{field}-{name}.npy", array)
    return samples


def write_cosmoflow_npy(root: Path) -> list[Arrays]:
    """`NAME_data.npy` and `NAME_label.npy`, without lists."""
    root.mkdir()
    samples = cosmoflow_samples()
    for name, sample in zip(cosmoflow_names(), samples, strict=True):
        for field, array in sample.items():
            np.save(root / f"{name}_{field}.npy", array)
    return samples


def read_source(
    source: Source, first: int = 0, count: int | None = None
) -> list[dict[str, NDArray[np.generic]] | RefusedRecord]:
    """Records as another process would read them, in the fields' own types."""
    numbers = np.arange(first, len(source.nbytes) if count is None else first + count)
    part = pickle.loads(pickle.dumps(source.part(numbers)))
    rooms: dict[str, bytearray] = {}
    records: list[dict[str, NDArray[np.generic]] | RefusedRecord] = []

    def room(name: str, nbytes: int) -> memoryview:
        rooms[name] = bytearray(b"\xaa" * nbytes)
        return memoryview(rooms[name])

    for record in part.read(room):
        if isinstance(record, RefusedRecord):
            records.append(record)
        else:
            assert not rooms.keys() & record.values.keys()
            assert rooms.keys() | record.values.keys() == source.schema.fields.keys()
            contents = {
                name: _as_declared(source.schema.fields[name], content, record.shapes.get(name))
                for name, content in rooms.items()
            }
            records.append(contents | {name: np.asarray(value) for name, value in record.values.items()})
        rooms.clear()
    return records


def _as_declared(field: Field, content: bytearray, shape: tuple[int, ...] | None) -> NDArray[np.generic]:
    assert field.is_variable or len(content) == field.record_bytes
    assert (shape is not None) == field.has_shapes
    declared = (-1, *field.row_shape) if field.is_variable else field.fixed_shape
    return np.frombuffer(bytes(content), field.stored_dtype).reshape(shape or declared)


def assert_same_bits(record: object, expected: Mapping[str, NDArray[np.generic]]) -> None:
    """Every field has the type, the shape and the very bits that are expected."""
    assert isinstance(record, dict), record
    assert record.keys() == expected.keys()
    for name, array in expected.items():
        assert (record[name].dtype, record[name].shape) == (array.dtype.newbyteorder("<"), array.shape), name
        native = array.astype(record[name].dtype) if array.dtype.byteorder == ">" else array
        assert record[name].tobytes() == native.tobytes(), name


def assert_all_same(source: Source, expected: list[Arrays]) -> None:
    """The records of a source are these, read at once and in two parts."""
    assert len(source.nbytes) == len(expected)
    half = len(expected) // 2
    for records in (read_source(source), read_source(source, 0, half) + read_source(source, half)):
        for record, sample in zip(records, expected, strict=True):
            assert_same_bits(record, sample)


def refusals(source: Source) -> dict[str, str]:
    """What is refused when a source is read, and why."""
    return {record.name: record.reason for record in read_source(source) if isinstance(record, RefusedRecord)}
