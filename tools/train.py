"""`stagein train`: a data set, a model and the allreduce trainer, put together from a settings file."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from stagein.formats.errors import UsageError
from stagein.formats.publish import publish_bytes
from stagein.world import Communicator, World, connect, machine_name

from .console import complain, count_text, say, seconds_text
from .settings import DataSettings, OptimSettings, Settings, load_settings

if TYPE_CHECKING:
    import torch

    from stagein.loaders import DataLoader, RecordDataset
    from stagein.train import Summary

SUMMARY_NAME = "summary.json"


def run(config: str | Path, overrides: Sequence[str] = (), *, dry_run: bool = False, as_json: bool = False) -> None:
    """Train as `config` (a TOML file or a packaged name) and `overrides` say, on the ranks that the launcher started.

    With `dry_run` everything is put together and nothing is trained: mistakes show before hours of staging or waiting.

    Prints what was chosen and why, progress, and a summary: lines of text, or with `as_json` the summary as one object
    on standard output and the rest on standard error. Raises StageinError, one sentence, the same on every rank.
    """
    import torch

    from stagein.collectives import choose_backend, make_collective
    from stagein.loaders import RecordDataset
    from stagein.train import Trainer, build_model

    communicator = connect()
    world = communicator.world
    tell = (complain if as_json else say) if world.rank == 0 else _say_nothing

    with communicator.together():
        settings = load_settings(config, overrides)
        batch_size = share_of_batch(settings.data.global_batch_size, world.size)
    device, device_reason = _choose_device(settings.train.device, communicator)
    threads = threads_of_rank(communicator.gather_all((machine_name(), frozenset(os.sched_getaffinity(0)))), world.rank)
    torch.set_num_threads(threads)
    with communicator.together():
        train_set = RecordDataset(settings.data.train)
        train = _train_loader(train_set, settings.data, batch_size, world, device)
        test = None if settings.data.test is None else _test_loader(train_set, settings.data, batch_size, world, device)
        torch.manual_seed(settings.data.seed)
        model = build_model(settings.model.name, len(train_set.classes))
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = _make_optimizer(model, settings.optim)
        schedule = _plan_schedule(settings, len(train))
    torch.manual_seed(settings.data.seed + world.rank)  # dropout and the like differ from rank to rank

    backend = choose_backend(world, device.type)
    backend_text = (
        f"{backend.backend} ({backend.reason})" if settings.train.backend == "auto" else settings.train.backend
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tell(
        f"ranks: {world.size} on {world.nodes} {'node' if world.nodes == 1 else 'nodes'}, {device.type} ({device_reason}), {threads} threads a rank"
    )
    tell(f"allreduce: {backend_text}")
    tell(
        f"data: {settings.data.train}{_staged_text(train_set)}, {len(train_set)} images of {len(train_set.classes)} classes, {batch_size} a rank and step, {len(train)} steps an epoch"
    )
    tell(f"model: {settings.model.name}, {parameters:,} parameters, {settings.train.precision}")

    collective = make_collective(settings.train.backend, communicator, device.type)
    try:
        trainer = Trainer(
            model,
            optimizer,
            functools.partial(
                torch.nn.functional.cross_entropy, reduction="none", label_smoothing=settings.optim.label_smoothing
            ),
            collective=collective,
            schedule=schedule,
            accumulate=settings.train.accumulate,
            clip_norm=settings.optim.clip_norm,
            precision=settings.train.precision,
            checkpoint_folder=settings.train.checkpoint_folder,
            checkpoint_every_steps=settings.train.checkpoint_every_steps,
            keep_checkpoints=settings.train.keep_checkpoints,
            run_folder=settings.train.run_folder,
            log_every_steps=settings.train.log_every_steps,
            say=tell,
        )
        if dry_run:
            tell("all of it fits together; nothing was trained")
            return
        summary = trainer.fit(
            train, settings.optim.epochs, validation=test, target_accuracy=settings.optim.target_accuracy
        )
    finally:
        collective.close()
    if world.rank == 0:
        _report(summary, settings.train.run_folder, as_json)


def share_of_batch(global_batch_size: int, world_size: int) -> int:
    """The images of one rank in a step. Raises UsageError where they cannot be divided evenly."""
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        raise UsageError(
            f"data.global_batch_size = {global_batch_size} cannot be divided by {world_size} ranks: "
            f"choose a multiple, such as {(share + 1) * world_size}"
        )
    return share


def threads_of_rank(cores_of_ranks: Sequence[tuple[str, frozenset[int]]], rank: int) -> int:
    """How many threads `rank` may keep busy: its cores, divided by the ranks of its machine that may use the same ones.

    cores_of_ranks  for each rank its machine and the cores it may run on; a launcher may or may not have bound it to some.
    """
    machine, cores = cores_of_ranks[rank]
    sharing = sum(1 for other, other_cores in cores_of_ranks if other == machine and other_cores & cores)
    return max(1, len(cores) // sharing)


def _staged_text(dataset: RecordDataset) -> str:
    staged = dataset.records.staged_path
    return " (not staged on this node)" if staged is None else f" (staged in {staged.parent.parent})"


def _say_nothing(text: str) -> None:
    return


def _choose_device(wanted: str, communicator: Communicator) -> tuple[torch.device, str]:
    """The device to train on, one GPU a rank, and why; the same kind on every rank. Raises UsageError on all of them."""
    import torch

    world = communicator.world
    num_gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    enough = all(communicator.gather_all(num_gpus >= world.local_size))
    if wanted == "cuda" and not enough:
        with communicator.together():
            raise UsageError(
                f"train.device = 'cuda' needs a GPU for each rank, but node {world.node_name} has {num_gpus} for {world.local_size} ranks: "
                "start fewer ranks on a node, or use cpu"
            )
    if not enough:
        return torch.device("cpu"), "as asked for" if wanted == "cpu" else "there is not a GPU for each rank"
    torch.cuda.set_device(world.local_rank)
    return torch.device(
        "cuda", world.local_rank
    ), "as asked for" if wanted == "cuda" else "there is a GPU for each rank"


def _train_loader(
    dataset: RecordDataset, data: DataSettings, batch_size: int, world: World, device: torch.device
) -> DataLoader:
    from stagein.loaders import DataLoader, image_train

    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        num_workers=data.workers,
        persistent_workers=data.workers > 0,
        transform=image_train(size=data.image_size, area=data.crop_area),
        seed=data.seed,
        distributed=(world.rank, world.size),
        tail="pad",  # BatchNorm needs more than the one sample that the tail can leave a rank
        device=device,
    )


def _refuse_other_classes(train: RecordDataset, test: RecordDataset) -> None:
    """Raise UsageError where a label of the test set stands for another class, as where one lacks a folder of the other's."""
    for label, (trained, tested) in enumerate(zip_longest(train.classes, test.classes)):
        if trained != tested:
            raise UsageError(
                f"data.test has other classes than data.train: label {label} is {tested!r} in {test.records.path} and {trained!r} in "
                f"{train.records.path}; convert both from folders of the same classes, an empty one where there are no images"
            )


def _test_loader(
    train_set: RecordDataset, data: DataSettings, batch_size: int, world: World, device: torch.device
) -> DataLoader:
    from stagein.loaders import DataLoader, RecordDataset, image_eval

    assert data.test is not None
    dataset = RecordDataset(data.test)
    _refuse_other_classes(train_set, dataset)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=data.workers,
        transform=image_eval(size=data.image_size, resize=data.test_resize or data.image_size),
        distributed=(world.rank, world.size),
        tail="pad",
        device=device,
    )


def _make_optimizer(model: torch.nn.Module, optim: OptimSettings) -> torch.optim.Optimizer:
    """Weight decay for what multiplies inputs, none for biases and normalisation (Goyal et al., 2017)."""
    import torch

    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, fused=True)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.momentum > 0, fused=True)


def _plan_schedule(settings: Settings, batches_in_epoch: int) -> Callable[[int], float]:
    from stagein.train import Schedule

    steps_in_epoch = -(-batches_in_epoch // settings.train.accumulate)
    optim = settings.optim
    if optim.warmup_epochs > optim.epochs:
        raise UsageError(f"optim.warmup_epochs = {optim.warmup_epochs} exceeds optim.epochs = {optim.epochs}")
    return Schedule(optim.epochs * steps_in_epoch, round(optim.warmup_epochs * steps_in_epoch), optim.schedule)


def _report(summary: Summary, run_folder: Path | None, as_json: bool) -> None:
    content = json.dumps(asdict(summary))
    if run_folder is not None:
        publish_bytes(run_folder / SUMMARY_NAME, content.encode())
    if as_json:
        say(content)
        return
    accuracy = "" if summary.accuracy is None else f", accuracy {summary.accuracy:.2%}"
    say(
        f"done: {count_text(summary.epochs, 'epoch')}, {count_text(summary.steps, 'step')} in {seconds_text(summary.seconds)}{accuracy}; "
        f"{summary.images_per_second:.0f} images/s, data wait {summary.data_wait_share:.1%} "
        f"(without it x{summary.speedup_without_data_wait:.2f}), allreduce {summary.allreduce_share:.1%}"
    )
