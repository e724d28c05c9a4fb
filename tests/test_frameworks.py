"""The loader inside Lightning, Accelerate and HF Trainer, and in scripts written for torch, with the import changed."""

import gc
import warnings
from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset, DistributedSampler, TensorDataset

from stagein.formats.errors import UsageError
from stagein.loaders import DataLoader, RecordDataset, image_eval, image_train

pytest.importorskip("nvidia.dali")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks, about each other
SAMPLES = 85


@pytest.fixture(scope="module")
def dataset(jpeg_dataset_path) -> RecordDataset:
    return RecordDataset(jpeg_dataset_path, staged=None)


class NumberedImages(Dataset):
    """An ordinary data set: (image, number)."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        return torch.full((3, 8, 8), float(index)), index


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))


# --- Lightning ---


def lightning_module(**hooks):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_model()
            self.seen: list[list[int]] = []
            self.predicted: list[list[int]] = []

        def loss(self, batch):
            images, labels = batch if isinstance(batch, list | tuple) else (batch["image"], batch["label"])
            return torch.nn.functional.cross_entropy(self.model(images), labels % 5), labels.tolist()

        def training_step(self, batch, _):
            loss, labels = self.loss(batch)
            self.seen.append(labels)
            return loss

        def validation_step(self, batch, _):
            self.log("loss", self.loss(batch)[0])

        def predict_step(self, batch, _):
            return self.loss(batch)[1]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    for name, hook in hooks.items():
        setattr(Module, name, hook)
    return Module()


def lightning_trainer(tmp_path, **arguments):
    lightning = pytest.importorskip("lightning")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        **{"max_epochs": 2, "enable_checkpointing": False, **quiet, **arguments},
    )


@pytest.mark.parametrize("kind", ["ordinary", "records"])
def test_lightning_fits_validates_and_predicts(kind, dataset, tmp_path):
    def make(shuffle: bool):
        if kind == "ordinary":
            return DataLoader(NumberedImages(), batch_size=8, shuffle=shuffle, num_workers=2)
        graph = image_train(8) if shuffle else image_eval(8, resize=8)
        # batch_size by name: in prediction, Lightning makes loaders anew, and cannot where it was given by place
        return DataLoader(dataset, batch_size=8, shuffle=shuffle, num_workers=2, transform=graph, device="cpu", seed=1)

    module = lightning_module(
        train_dataloader=lambda self: make(True),
        val_dataloader=lambda self: make(False),
        predict_dataloader=lambda self: make(False),
    )
    trainer = lightning_trainer(tmp_path)
    trainer.fit(module)
    samples = 20 if kind == "ordinary" else SAMPLES
    steps = -(-samples // 8)
    assert len(module.seen) == 2 * steps
    epochs = [list(chain(*module.seen[:steps])), list(chain(*module.seen[steps:]))]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(epochs[0]) == samples
    assert epochs[0] != epochs[1]
    assert trainer.callback_metrics["loss"] > 0
    predicted = list(chain(*trainer.predict(module)))
    assert predicted == [label for batch in make(False) for label in labels_of(batch).tolist()]


def labels_of(batch):
    return batch["label"] if isinstance(batch, dict) else batch[1]


def test_lightning_makes_loaders_anew_with_a_distributed_sampler(dataset):
    data = pytest.importorskip("lightning.pytorch.utilities.data")

    class Sub(DataLoader):
        pass

    for kind in (DataLoader, Sub):
        loader = kind(dataset, 8, shuffle=True, num_workers=1, transform=image_train(8), device="cpu", seed=5)
        sampler = DistributedSampler(dataset, num_replicas=2, rank=1)
        again = data._update_dataloader(loader, sampler)
        assert type(again) is kind
        assert (again.sampler, again.batch_size, again.num_workers, again.seed) == (sampler, 8, 1, 5)
        assert again.transform == image_train(8)
        assert sum(len(batch["label"]) for batch in again) == 43
    ordinary = data._update_dataloader(DataLoader(NumberedImages(), 4, drop_last=True, collate_fn=len), sampler)
    assert (ordinary.collate_fn, ordinary.drop_last, ordinary.sampler) == (len, True, sampler)


def test_lightning_leaves_a_loader_alone_that_divides_the_samples_itself(dataset, tmp_path):
    pytest.importorskip("lightning")
    loader = DataLoader(dataset, 8, shuffle=True, transform=image_train(8), device="cpu", distributed=(1, 2))
    trainer = lightning_trainer(tmp_path)
    trainer.strategy._lightning_module = None
    connector = trainer._data_connector
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer._accelerator_connector), "is_distributed", property(lambda _: True))
        assert connector._requires_distributed_sampler(DataLoader(NumberedImages(), 4))
        assert not connector._requires_distributed_sampler(loader)


def test_lightning_goes_on_in_the_middle_of_an_epoch(dataset, tmp_path):
    lightning = pytest.importorskip("lightning")

    def make():
        return DataLoader(dataset, 8, shuffle=True, num_workers=2, transform=image_train(8), device="cpu", seed=2)

    whole = lightning_module()
    lightning_trainer(tmp_path, max_epochs=3).fit(whole, make())

    class StopAfter(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 15:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                trainer.should_stop = True
                trainer.limit_train_batches = 0
                raise KeyboardInterrupt

    first = lightning_module()
    trainer = lightning_trainer(tmp_path, max_epochs=3, callbacks=[StopAfter()])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(first, make())
    rest = lightning_module()
    lightning_trainer(tmp_path, max_epochs=3).fit(rest, make(), ckpt_path=tmp_path / "middle.ckpt")
    assert first.seen[:15] + rest.seen == whole.seen


# --- Accelerate ---


def test_accelerate_takes_a_loader_of_our_own_order_as_it_is(dataset):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    loader = DataLoader(dataset, 8, shuffle=True, transform=image_train(8), device="cpu", num_workers=1)
    model, optimizer, prepared = accelerator.prepare(
        small_model(), torch.optim.SGD(small_model().parameters(), 0.1), loader
    )
    assert prepared is loader
    for _ in range(2):
        synced, labels = [], []
        for batch in prepared:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.cross_entropy(model(batch["image"]), batch["label"]))
                optimizer.step()
                optimizer.zero_grad()
            synced.append(accelerator.sync_gradients)
            labels += accelerator.gather_for_metrics(batch["label"]).tolist()
        assert synced == [False, False, False, True] * 2 + [False, False, True]  # the last batch closes the epoch
        assert len(labels) == SAMPLES
    assert not accelerator.gradient_state.in_dataloader


def test_accelerate_prepares_an_ordinary_data_set_as_it_does_torchs_loader():
    accelerate = pytest.importorskip("accelerate")
    results = []
    for kind in (torch.utils.data.DataLoader, DataLoader):
        torch.manual_seed(4)
        prepared = accelerate.Accelerator(cpu=True).prepare(kind(NumberedImages(), 6, shuffle=True))
        results.append([labels.tolist() for _ in range(2) for _, labels in prepared])
    assert results[1] == results[0]


def test_a_plain_loader_made_of_the_parts_is_refused_where_the_transform_would_be_lost(dataset):
    accelerate = pytest.importorskip("accelerate")
    loader = DataLoader(dataset, 8, transform=image_train(8), device="cpu")
    with pytest.raises(UsageError, match="leaves its transform out"):
        next(iter(accelerate.skip_first_batches(loader, 3)))
    ordinary = DataLoader(NumberedImages(), 4)
    assert [labels.tolist() for _, labels in accelerate.skip_first_batches(ordinary, 4)] == [[16, 17, 18, 19]]


# --- HF Trainer ---


def hf_trainer(dataset, tmp_path, callbacks=(), loader=None, **arguments):
    """A Trainer whose loaders are ours; its model notes the labels that it was trained on."""
    transformers = pytest.importorskip("transformers")

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = small_model()
            self.seen: list[int] = []

        def forward(self, image, label, **_):
            if self.training:
                self.seen += label.tolist()
            logits = self.layers(image)
            return {"loss": torch.nn.functional.cross_entropy(logits, label), "logits": logits}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return loader or training_loader(dataset)

        def get_eval_dataloader(self, eval_dataset=None):
            return DataLoader(dataset, 8, transform=image_eval(8, resize=8), device="cpu")

    told = transformers.TrainingArguments(
        str(tmp_path), **{"num_train_epochs": 2, "report_to": [], "save_strategy": "no", "use_cpu": True, "label_names": ["label"],
        "remove_unused_columns": False, "disable_tqdm": True, **arguments},
    )  # fmt: skip
    return Trainer(Classifier(), told, train_dataset=dataset, eval_dataset=dataset, callbacks=list(callbacks))


def training_loader(dataset) -> DataLoader:
    return DataLoader(dataset, 8, shuffle=True, num_workers=1, transform=image_train(8), device="cpu")


def test_hf_trainer_with_our_loader_from_its_hook(dataset, tmp_path):
    trainer = hf_trainer(dataset, tmp_path, gradient_accumulation_steps=2)
    assert trainer.train().global_step == 12
    seen = trainer.model.seen
    assert len(seen) == 2 * SAMPLES
    assert seen[:SAMPLES] != seen[SAMPLES:]
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("stop", [4, 11, 15])
def test_hf_trainer_goes_on_in_the_middle_of_an_epoch(stop, dataset, tmp_path):
    transformers = pytest.importorskip("transformers")

    class WithLoader(transformers.TrainerCallback):
        """What README.md tells users of HF Trainer: the loader's state lies beside each checkpoint."""

        def on_save(self, args, state, control, train_dataloader=None, **_):
            folder = tmp_path / f"checkpoint-{state.global_step}"
            torch.save(train_dataloader.state_dict(), folder / "loader.pt")

    class Stopping(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == stop:
                control.should_save = control.should_training_stop = True

    whole = hf_trainer(dataset, tmp_path / "whole", num_train_epochs=3)
    whole.train()
    first = hf_trainer(dataset, tmp_path, [WithLoader(), Stopping()], num_train_epochs=3)
    first.train()
    checkpoint = tmp_path / f"checkpoint-{stop}"
    loader = training_loader(dataset)
    loader.load_state_dict(torch.load(checkpoint / "loader.pt", weights_only=True))
    rest = hf_trainer(dataset, tmp_path, loader=loader, num_train_epochs=3, ignore_data_skip=True)
    assert rest.train(resume_from_checkpoint=str(checkpoint)).global_step == whole.state.global_step
    assert first.model.seen + rest.model.seen == whole.model.seen


# --- scripts for torch, with the import changed ---


def test_a_script_in_the_manner_of_pytorchs_imagenet_example():
    torch.manual_seed(0)
    images, labels = torch.randn(40, 3, 8, 8), torch.arange(40) % 5
    train = TensorDataset(images, labels)
    sampler = DistributedSampler(train, num_replicas=2, rank=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pin_memory without an accelerator
        train_loader = DataLoader(
            train, batch_size=8, shuffle=(sampler is None), num_workers=2, pin_memory=True, sampler=sampler
        )
        val_loader = DataLoader(train, batch_size=8, shuffle=False, num_workers=2, pin_memory=True)
        model, criterion = small_model(), torch.nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for batch, target in train_loader:
                loss = criterion(model(batch), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            assert len(train_loader) == 3
        with torch.no_grad():
            counted = sum(len(target) for _, target in val_loader)
    assert counted == len(val_loader.dataset) == 40


def test_the_same_script_over_records_as_tuples(jpeg_dataset_path):
    dataset = RecordDataset(jpeg_dataset_path, fields=["image", "label"], as_tuples=True, staged=None)
    loader = DataLoader(dataset, 16, shuffle=True, num_workers=2, transform=image_train(8), device="cpu")
    model, counted = small_model(), 0
    for images, target in loader:
        torch.nn.functional.cross_entropy(model(images), target).backward()
        counted += len(target)
    assert counted == SAMPLES
    image, label = dataset[3]
    assert (image.shape, int(label)) == ((48, 72, 3), 0)
    assert [len(part) for part in next(iter(DataLoader(dataset, 4)))] == [4, 4]
    assert len(next(iter(DataLoader(dataset, 4, tail="pad", transform=image_train(8), device="cpu")))) == 3


def test_a_loader_in_the_manner_of_timm():
    """timm collates to uint8 arrays, normalises behind a prefetcher of its own, and hands a generator of seeds to workers."""

    def fast_collate(samples):
        images, labels = zip(*samples, strict=True)
        return torch.stack([image.to(torch.uint8) for image in images]), torch.tensor(labels)

    class PrefetchLoader:
        def __init__(self, loader) -> None:
            self.loader = loader

        def __iter__(self):
            previous = None
            for images, labels in self.loader:
                if previous is not None:
                    yield previous
                previous = images.float().sub_(2).div_(3), labels
            yield previous

        def __len__(self) -> int:
            return len(self.loader)

        sampler = property(lambda self: self.loader.sampler)
        dataset = property(lambda self: self.loader.dataset)

    loader_class, arguments = DataLoader, {
        "batch_size": 6, "shuffle": True, "num_workers": 2, "sampler": None, "collate_fn": fast_collate, "drop_last": True,
        "worker_init_fn": lambda worker: None, "persistent_workers": True,
    }  # fmt: skip
    loader = PrefetchLoader(loader_class(NumberedImages(), **arguments))
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 3
        assert batches[0][0].dtype == torch.float32
        assert torch.allclose(batches[0][0][:, 0, 0, 0] * 3 + 2, batches[0][1].float())
    del loader


# --- wrappers that read ahead of their caller ---


@pytest.mark.parametrize("own_order", [False, True])
def test_a_prefetching_wrapper_goes_on_where_its_caller_was(own_order, dataset):
    """torchdata's Prefetcher is batches ahead, in a thread of its own; it keeps the state that goes with each batch."""
    nodes = pytest.importorskip("torchdata.nodes")

    class LoaderNode(nodes.BaseNode):
        def reset(self, initial_state=None):
            super().reset(initial_state)
            if own_order:
                self.loader = DataLoader(
                    dataset, 8, shuffle=True, transform=image_train(8), device="cpu", num_workers=2
                )
            else:
                generator = torch.Generator().manual_seed(3)
                self.loader = DataLoader(NumberedImages(), 3, shuffle=True, num_workers=2, generator=generator)
            if initial_state is not None:
                self.loader.load_state_dict(initial_state)
            self.batches = iter(self.loader)

        def next(self):
            return labels_of(next(self.batches)).tolist()

        def get_state(self):
            return self.loader.state_dict()

    def make():
        return nodes.Loader(nodes.Prefetcher(LoaderNode(), prefetch_factor=3))

    whole = list(make())
    interrupted = make()
    batches = iter(interrupted)
    first = [next(batches) for _ in range(2)]
    state = interrupted.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    assert first + list(resumed) == whole
    assert len(whole) > 5
    del batches, interrupted, resumed
    gc.collect()  # its threads end with it
