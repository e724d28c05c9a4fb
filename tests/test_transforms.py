"""What `transform=` may be: graphs, functions of DALI's nodes, torchvision's Compose, any callable on samples."""

from collections import namedtuple

import numpy as np
import pytest
import torch
import torchvision_lookalikes as tv
from torch.utils.data import IterableDataset, Subset

from stagein import formats
from stagein.formats.errors import UsageError
from stagein.loaders import DataLoader, PerSample, RecordDataset, image_eval, image_train
from stagein.loaders.transforms import understand

pytest.importorskip("nvidia.dali")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def dataset(jpeg_dataset_path) -> RecordDataset:
    return RecordDataset(jpeg_dataset_path, staged=None)


def load(dataset, transform, **arguments):
    return list(DataLoader(dataset, 16, transform=transform, **{"device": "cpu", "seed": 3, **arguments}))


TRAIN = [tv.RandomResizedCrop(24, scale=(0.3, 0.9)), tv.RandomHorizontalFlip(0.25)]
EVAL = [tv.Resize(40), tv.CenterCrop(24)]
TO_FLOAT = [[tv.ToTensor()], [tv.ToImage(), tv.ToDtype(torch.float32, scale=True)]]


@pytest.mark.parametrize("to_float", TO_FLOAT)
@pytest.mark.parametrize("normalized", [False, True])
def test_a_training_compose_is_the_ready_graph(dataset, to_float, normalized):
    compose = tv.Compose([*TRAIN, *to_float, *([tv.Normalize(MEAN, STD)] if normalized else [])])
    mean, std = (MEAN, STD) if normalized else ((0.0,) * 3, (1.0,) * 3)
    assert understand(compose, dataset).graph == image_train(24, area=(0.3, 0.9), flip=0.25, mean=mean, std=std)
    for ours, theirs in zip(
        load(dataset, compose),
        load(dataset, image_train(24, area=(0.3, 0.9), flip=0.25, mean=mean, std=std)),
        strict=True,
    ):
        assert torch.equal(ours["image"], theirs["image"])


@pytest.mark.parametrize("to_float", TO_FLOAT)
def test_an_evaluation_compose_is_the_ready_graph_and_gives_the_pixels_of_pil(dataset, to_float):
    compose = tv.Compose([tv.Compose(EVAL), *to_float, tv.Normalize(MEAN, STD)])
    assert understand(compose, dataset).graph == image_eval(24, resize=40, mean=MEAN, std=STD)
    by_graph, per_sample = load(dataset, compose), load(dataset, PerSample(compose, "image", as_pil=True))
    for ours, pil in zip(by_graph, per_sample, strict=True):
        assert ours["label"].tolist() == pil["label"].tolist()
        difference = (ours["image"] - pil["image"]).abs() * torch.tensor(STD)[:, None, None] * 255
        assert difference.mean() < 1.5  # of 255: another decoder, another resize


def test_modules_in_sequence_are_a_compose(dataset):
    class Step(torch.nn.Module):
        pass

    def module(like):
        step = Step()
        step.__dict__.update(vars(like))
        step.__class__ = type(type(like).__name__, (Step,), {"__module__": type(like).__module__})
        return step

    sequence = torch.nn.Sequential(*(module(each) for each in (*EVAL, tv.ToTensor())))
    assert understand(sequence, dataset).graph == image_eval(24, resize=40, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([*TRAIN, tv.ColorJitter(0.4), tv.ToTensor()], "ColorJitter: has no counterpart"),
        ([*TRAIN, lambda image: image, tv.ToTensor()], "lambda>: has no counterpart"),
        (TRAIN, "it does not end in ToTensor"),
        ([*TRAIN, tv.ToImage(), tv.ToDtype(torch.float32)], "ToDtype: has no counterpart"),
        (
            [tv.RandomResizedCrop(24, interpolation=tv.InterpolationMode.BICUBIC), tv.ToTensor()],
            "'bicubic' is not bilinear",
        ),
        ([tv.RandomResizedCrop((24, 32)), tv.ToTensor()], "24 x 32 is not square"),
        ([tv.Resize((24, 32)), tv.CenterCrop(24), tv.ToTensor()], "changes the aspect ratio"),
        ([tv.Resize(40, max_size=50), tv.CenterCrop(24), tv.ToTensor()], "max_size is not honoured"),
        ([tv.Resize(16), tv.CenterCrop(24), tv.ToTensor()], "pads an image resized to 16"),
        ([tv.CenterCrop(24), tv.ToTensor()], "no ready graph does it"),
        ([tv.CenterCrop(24), tv.Resize(40), tv.ToTensor()], "no ready graph does it"),
        ([*EVAL, tv.RandomHorizontalFlip(), tv.ToTensor()], "no ready graph does it"),
        ([*EVAL, tv.Normalize(MEAN, STD), tv.ToTensor()], "Normalize: does not come last"),
        ([*EVAL, tv.ToTensor(), tv.Normalize((0.5,), (0.5,))], "its mean has 1 values"),
        ([*EVAL, tv.ToTensor(), tv.ToTensor()], "ToTensor: occurs twice"),
    ],
)
def test_what_has_no_counterpart_is_called_for_every_sample_and_explain_says_why(dataset, steps, reason):
    loader = DataLoader(dataset, 16, transform=tv.Compose(steps), device="cpu")
    assert reason in loader.explain()
    assert "called for every sample, on a PIL image" in loader.explain()


def test_a_compose_without_counterpart_gets_pil_images(dataset):
    batches = load(dataset, tv.Compose([*EVAL, tv.ColorJitter(), tv.ToTensor()]), num_workers=2)
    assert (batches[0]["image"].shape, batches[0]["image"].dtype) == ((16, 3, 24, 24), torch.float32)
    assert sorted(batches[0]) == ["hw", "image", "label"]


def test_explain_says_what_became_what(dataset):
    text = DataLoader(dataset, transform=tv.Compose([*TRAIN, tv.ToTensor(), tv.Normalize(MEAN, STD)])).explain()
    assert "RandomResizedCrop: window (0.3, 0.9) of the area" in text
    assert "RandomHorizontalFlip: probability 0.25" in text
    assert "Normalize: part of the last step, mean (0.4, 0.5, 0.6)" in text


def test_a_callable_object_and_per_sample_get_samples_in_the_workers(dataset):
    class Brighten:
        def __call__(self, sample):
            return {"mean": sample["image"].mean(dtype=np.float64), "label": sample["label"]}

    for transform in (Brighten(), PerSample(Brighten().__call__)):
        batches = load(dataset, transform, num_workers=2)
        assert sorted(batches[0]) == ["label", "mean"]
        assert batches[0]["mean"][3].item() == dataset[3]["image"].mean(dtype=np.float64)


Pair = namedtuple("Pair", "pixels label")
NO_DICTS = {
    "tuple": lambda sample: (sample["image"][:9, :9], int(sample["label"])),
    "list": lambda sample: [torch.from_numpy(sample["image"][0, 0]), sample["hw"], "text"],
    "named tuple": lambda sample: Pair(sample["image"][:3, :3], {"label": sample["label"]}),
    "number": lambda sample: sample["image"].mean(dtype=np.float64),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", NO_DICTS)
def test_samples_that_a_transform_makes_no_dicts_of_are_collated_as_in_torch(dataset, kind, num_workers):
    make = NO_DICTS[kind]
    as_tuples = RecordDataset(dataset.records.path, as_tuples=True)
    for batch_size in (16, None):
        arguments = {"batch_size": batch_size, "num_workers": num_workers, "transform": PerSample(make)}
        in_torch = torch.utils.data.DataLoader([make(sample) for sample in dataset], batch_size=batch_size)
        for expected, *batches in zip(
            in_torch, DataLoader(dataset, **arguments), DataLoader(as_tuples, **arguments), strict=True
        ):
            for batch in batches:
                assert type(batch) is type(expected)
                assert repr(batch) == repr(expected)


def test_a_rank_without_samples_gets_no_rows_of_what_is_no_dict(dataset):
    single = DataLoader(
        dataset, 1, distributed=(len(dataset), len(dataset) + 1), transform=PerSample(NO_DICTS["tuple"])
    )
    ((pixels, label),) = single
    assert (pixels.shape, label.shape) == ((0, 9, 9, 3), (0,))


def test_padding_needs_dicts(dataset):
    with pytest.raises(UsageError, match="no place for `valid` in samples that are no dicts"):
        load(dataset, PerSample(NO_DICTS["tuple"]), tail="pad", distributed=(0, 1))


def test_per_sample_of_a_field_leaves_the_others(dataset):
    (batch, *_) = load(dataset, PerSample(lambda image: image.shape[0], "image"))
    assert batch["image"].tolist() == [48] * 16
    assert sorted(batch) == ["hw", "image", "label"]


def test_a_plain_function_makes_a_dali_graph(dataset):
    (batch, *_) = load(dataset, lambda nodes: {"twice": nodes["label"] * 2, "label": nodes["label"]})
    assert batch["twice"].tolist() == [2 * label for label in batch["label"].tolist()]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


def test_over_other_data_sets_any_callable_takes_samples():
    for samples in ([1, 2, 3, 4, 5], Stream()):
        double = (lambda sample: 2 * sample) if samples == [1, 2, 3, 4, 5] else (lambda sample: 2 * sample + 2)
        for batch_size in (2, None):
            batches = DataLoader(samples, batch_size, transform=double)
            values = [value for batch in batches for value in (batch.tolist() if batch_size else [batch])]
            assert values == [2, 4, 6, 8, 10]
    with pytest.raises(UsageError, match="needs a RecordDataset, not a list"):
        DataLoader([1, 2], transform=image_train(16))


def test_part_of_the_records_comes_through_a_graph_by_a_sampler(dataset):
    part = Subset(dataset, [5, 2, 60])
    with pytest.raises(
        UsageError, match=r"not a Subset: give the whole of it, and sampler=.* or subset\.indices in their"
    ):
        DataLoader(part, transform=image_train(16))
    batch = next(iter(DataLoader(dataset, 3, sampler=part.indices, transform=image_train(16))))
    assert batch["label"].tolist() == [int(dataset[number]["label"]) for number in part.indices]


def test_pad_and_collate_functions_without_a_graph(dataset):
    batches = load(dataset, None, tail="pad", collate_fn=lambda samples: [bool(sample["valid"]) for sample in samples])
    assert batches[-1] == [True] * 5 + [False] * 11


def test_collate_fn_gets_the_samples_after_a_graph(dataset):
    collated = load(dataset, image_train(16), collate_fn=lambda samples: samples)
    whole = load(dataset, image_train(16))
    assert [len(samples) for samples in collated] == [16] * 5 + [5]
    assert torch.equal(collated[1][3]["image"], whole[1]["image"][3])
    assert collated[1][3]["label"].shape == ()
    default = load(dataset, image_train(16), collate_fn=torch.utils.data.default_collate)
    assert torch.equal(default[1]["image"], whole[1]["image"])


def test_no_batching_gives_samples_after_a_graph(dataset):
    whole = load(dataset, image_train(16))
    samples = list(DataLoader(dataset, None, transform=image_train(16), device="cpu", seed=3))
    assert len(samples) == 85
    assert torch.equal(samples[20]["image"], whole[1]["image"][4])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_collate_function_gets_rows_of_different_shapes(num_workers, tmp_path):
    import simplejpeg

    with formats.Writer(tmp_path / "d.st") as writer:
        for number in range(20):
            pixels = np.full((16, 16 + number, 3), 10 * number, np.uint8)
            writer.write({"image": simplejpeg.encode_jpeg(pixels, quality=100), "number": np.int64(number)})
    dataset = RecordDataset(tmp_path / "d.st", staged=None)

    def decode_only(nodes):
        from nvidia.dali import fn

        return {"image": fn.decoders.image(nodes["image"]), "number": nodes["number"]}

    loader = DataLoader(dataset, 6, transform=decode_only, device="cpu", collate_fn=list, num_workers=num_workers)
    samples = [sample for batch in loader for sample in batch]  # all are kept while later batches are made
    assert [sample["number"].item() for sample in samples] == list(range(20))
    for number, sample in enumerate(samples):
        assert sample["image"].shape == (16, 16 + number, 3)
        assert (sample["image"].float() - 10 * number).abs().max() < 4
    with pytest.raises(UsageError, match="give a collate_fn"):
        list(DataLoader(dataset, 6, transform=decode_only, device="cpu"))


def test_fields_without_a_type_in_dali_go_past_the_graph(tmp_path):
    schema = formats.Schema(
        fields={
            "x": formats.Field(kind="tensor", dtype="uint8", shape=(5000,)),
            "bf": formats.Field(kind="tensor", dtype="bfloat16", shape=(3,)),
            "c": formats.Field(kind="tensor", dtype="complex64", shape=(2,)),
            "text": formats.Field(kind="text"),
            "boxes": formats.Field(kind="ragged", dtype="float32", shape=(None, 4)),
        }
    )
    with formats.Writer(tmp_path / "d.st", schema) as writer:
        for n in range(4):
            boxes, bf = np.full((n, 4), n, np.float32), torch.full((3,), n + 0.5, dtype=torch.bfloat16)
            writer.write({"x": np.full(5000, n, np.uint8), "bf": bf, "c": np.full(2, n + 1j, np.complex64), "text": "t" * n, "boxes": boxes})  # fmt: skip
    dataset = RecordDataset(tmp_path / "d.st", staged=None)
    (batch,) = DataLoader(dataset, 4, transform=lambda nodes: {"x": nodes["x"]}, device="cpu")
    assert batch["x"].tolist() == [[n] * 5000 for n in range(4)]
    assert (batch["bf"].dtype, batch["bf"][3, 0].item()) == (torch.bfloat16, 3.5)
    assert (batch["c"].dtype, batch["c"][2, 1].item()) == (torch.complex64, 2 + 1j)
    assert batch["text"] == ["", "t", "tt", "ttt"]
    with pytest.raises(UsageError, match="asks for field 'text', DALI was given"):
        list(DataLoader(dataset, 4, transform=lambda nodes: {"x": nodes["text"]}, device="cpu"))
