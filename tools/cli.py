"""The `stagein` command: parses, calls the module of the command, and turns errors into sentences and exit codes."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from stagein import __version__
from stagein.formats.errors import StageinError

from . import convert_commands
from .console import complain, say
from .options import Json, Workers, parse_age, parse_size, parse_time, path_argument

_ORDER = ("convert", "adopt", "info", "verify", "extract", "stage", "status", "evict", "train", "bench", "demo")
"""Of the commands in the help: as they follow one another in use."""


class _Group(TyperGroup):
    def list_commands(self, ctx: object) -> list[str]:
        return sorted(self.commands, key=_ORDER.index)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From millions of small files on a parallel file system to GPUs that never wait.",
)
app.add_typer(convert_commands.app, name="convert")
bench_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure ours beside its peers, interleaved; prints ratios."
)
app.add_typer(bench_app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"stagein {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def adopt(
    source: Annotated[Path, path_argument("SOURCE", "An HDF5 file, a folder of them, or a Zarr v3 array or group.")],
    target: Annotated[Path, path_argument("TARGET", "The data set to make, on the same file system.")],
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--field", metavar="NAME=PLACE", help="A field and the HDF5 data set or Zarr array it is; repeat it."
        ),
    ] = None,
    primary: Annotated[
        str | None, typer.Option(help="The field that fills the shards.  [default: the largest]")
    ] = None,
    file_per_record: Annotated[
        bool, typer.Option("--file-per-record", help="Each HDF5 file is one record (DeepCAM), not each row in it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the data set TARGET when the new one is complete.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a data set over files of others, where they lie.

    Their records are linked and summed, not rewritten.

    HDF5: contiguous, or one record a chunk, raw or by blosc, zstd or lz4. Zarr v3: one record a chunk, with shards or without,
    raw or by blosc or zstd. Fields of at most 4 KiB a record are copied, whatever their chunks. All else: stagein convert.
    """
    from . import adopt

    adopt.run(
        source,
        target,
        fields=fields,
        primary=primary,
        file_per_record=file_per_record,
        overwrite=overwrite,
        as_json=json,
    )


@app.command()
def info(
    path: Annotated[Path, path_argument("DATASET", "A data set.")],
    records: Annotated[int, typer.Option(min=0, help="How many of the first records to show.")] = 3,
    json: Json = False,
) -> None:
    """Show what a data set holds: fields, sizes, first records."""
    from . import info

    info.run(path, records=records, as_json=json)


@app.command()
def verify(
    path: Annotated[Path, path_argument("DATASET", "A data set, or a staged copy of one.")],
    workers: Workers = None,
    repair: Annotated[bool, typer.Option("--repair", help="First mend what is damaged or missing.")] = False,
    good: Annotated[
        Path | None, typer.Option("--from", help="With --repair: a good copy; a staged one knows its source.")
    ] = None,
    json: Json = False,
) -> None:
    """Check every sum, count, index and container view of a data set.

    Of a staged copy, under mpirun the copies of all nodes; these are mended from each other and from where they came.
    """
    from . import verify

    if good is not None and not repair:
        raise typer.BadParameter("--from is where --repair takes good bytes from: add --repair")
    verify.run(path, workers=workers, repairs=repair, good=good, as_json=json)


@app.command()
def extract(
    dataset: Annotated[Path, path_argument("DATASET", "A data set.")],
    record: Annotated[int, typer.Argument(metavar="RECORD", help="Number of the record, counted from 0.")],
    to: Annotated[Path, typer.Option(help="Folder for the files; made where it is missing.")] = Path(),
) -> None:
    """Give a record back as files.

    An image as it came, arrays as .npy, text as .txt, the small fields as JSON.
    """
    from . import extract

    extract.run(dataset, record, to)


class PolicyChoice(StrEnum):
    """Values of --policy."""

    AUTO = "auto"
    REPLICATE = "replicate"
    PARTITION = "partition"


@app.command()
def stage(
    source: Annotated[Path, path_argument("SOURCE", "A data set on the shared file system.")],
    to: Annotated[str, typer.Option(help="Node-local folder; {node} in it becomes the node's name.")],
    policy: Annotated[
        PolicyChoice, typer.Option(help="Every node gets all shards, or each a part; auto: all where they fit.")
    ] = PolicyChoice.AUTO,
    copies: Annotated[
        int | None, typer.Option(min=1, help="Nodes that get each shard, in place of --policy.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and move nothing.")] = False,
    time_left: Annotated[
        float | None,
        typer.Option(
            parser=parse_time,
            metavar="TIME",
            help="For --dry-run: what the job has left, 90min or 1:30:00.  [default: Slurm]",
        ),
    ] = None,
    make_room: Annotated[
        bool, typer.Option("--make-room", help="Where it does not fit, evict what was unused for longest.")
    ] = False,
    memory: Annotated[
        int,
        typer.Option(
            parser=parse_size, metavar="SIZE", show_default=False, help="Buffers of each rank.  [default: 128MiB]"
        ),
    ] = 128 << 20,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without any progress after which all ranks end.")
    ] = 300.0,
    json: Json = False,
) -> None:
    """Copy a data set to the local disk of every node, verified.

    Started by mpirun or srun in the job script, on one rank a node or more; alone it stages to this node. What is there
    already is not copied again.
    """
    from . import stage

    if time_left is not None and not dry_run:
        raise typer.BadParameter("--time-left is what --dry-run compares with: add --dry-run")
    stage.run(
        source,
        to,
        policy.value,
        copies=copies,
        dry_run=dry_run,
        seconds_left=time_left,
        make_room=make_room,
        memory_bytes=memory,
        timeout_seconds=timeout,
        as_json=json,
    )


To = Annotated[
    str | None,
    typer.Option(help="Folder that data sets were staged to.  [default: STAGEIN_TO, or wherever this user staged to]"),
]


@app.command()
def status(to: To = None, json: Json = False) -> None:
    """Show what is staged, who uses it, and how much room is left.

    On this node, or under mpirun on all nodes.
    """
    from . import status

    status.run(to, as_json=json)


@app.command()
def evict(
    datasets: Annotated[
        list[str] | None, typer.Argument(metavar="DATASETS", help="Data sets to evict, by path or id.")
    ] = None,
    to: To = None,
    free: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="Evict until this much room is free, such as 500GB."),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option(parser=parse_age, metavar="AGE", help="Evict only what was unused for so long, as 12h or 7d."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be evicted, and keep it.")] = False,
    json: Json = False,
) -> None:
    """Remove staged data sets, those unused for longest first.

    From this node, or under mpirun from all nodes. What a job is staging or a loader reads stays.
    """
    from . import evict

    evict.run(datasets or [], to, free_bytes=free, unused_seconds=older_than, dry_run=dry_run, as_json=json)


@app.command()
def train(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a packaged one: cifar10, demo, imagenet."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a setting; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check settings, data, ranks and devices, and train nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a model, on as many ranks as mpirun started."""
    from . import train

    train.run(config, overrides or [], dry_run=dry_run, as_json=json)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where to work; what an earlier demo left there is replaced.")] = Path(
        "demo"
    ),
    ranks: Annotated[int, typer.Option(min=1, help="MPI ranks, each playing a node of its own.")] = 2,
) -> None:
    """Show the whole chain on made-up images.

    Converts them, stages them to two nodes, loads them with DALI and trains with allreduce.
    """
    from . import demo

    demo.run(folder, ranks)


Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds.")]
BenchFolder = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, writable=True, help="Folder to write to.  [default: a temporary one]"),
]


@bench_app.command("convert")
def bench_convert(
    source: Annotated[Path, path_argument("SOURCE", "Folder of class folders of images.")],
    rounds: Rounds = 5,
    work: BenchFolder = None,
) -> None:
    """Packing an image folder, beside `cp -r` and installed peers."""
    from . import bench_convert

    bench_convert.run_convert(source, rounds, work)


RecordBytes = Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help="Size of a record.")]
TotalBytes = Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help="All records together.")]


@bench_app.command("read")
def bench_read(
    record_bytes: RecordBytes = 110_000,
    total_bytes: TotalBytes = 200_000_000,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read at the same time.")] = 1,
    rounds: Rounds = 5,
    work: BenchFolder = None,
) -> None:
    """Random reads from memory, beside os.preadv and installed peers."""
    from . import bench_read

    bench_read.run_read(record_bytes, total_bytes, threads, rounds, work)


@bench_app.command("decode")
def bench_decode(
    codec: Annotated[
        Literal["blosc-lz4", "lz4", "zstd"], typer.Option(help="How the tensors are compressed.")
    ] = "blosc-lz4",
    threads: Annotated[int, typer.Option(min=2, help="Threads that share a batch.")] = 2,
    rounds: Rounds = 5,
    work: BenchFolder = None,
) -> None:
    """Decompressing tensors, beside h5py and tensorstore."""
    from . import bench_decode

    bench_decode.run_decode(codec, threads, rounds, work)


@bench_app.command("write")
def bench_write(
    record_bytes: RecordBytes = 110_000,
    total_bytes: TotalBytes = 800_000_000,
    rounds: Rounds = 5,
    work: BenchFolder = None,
) -> None:
    """Writing shards, beside raw files and installed peers."""
    from . import bench_read

    bench_read.run_write(record_bytes, total_bytes, rounds, work)


BenchImages = Annotated[
    Path | None, typer.Argument(metavar="IMAGES", help="Folder of class folders of JPEGs.  [default: a synthetic one]")
]
BenchTensors = Annotated[Literal["float32", "int16"] | None, typer.Option(help="Load such tensors instead of images.")]
TensorCodec = Literal["blosc-lz4", "lz4", "zstd"]
CropPixels = Annotated[int, typer.Option(min=8, help="Pixels, height and width, that random crops are resized to.")]
RoundSeconds = Annotated[float, typer.Option(min=0.1, help="Seconds of a round.")]


@bench_app.command("load")
def bench_load(
    images: BenchImages = None,
    tensors: BenchTensors = None,
    codec: Annotated[TensorCodec | None, typer.Option(help="Codec of the tensors.  [default: none]")] = None,
    rounds: Rounds = 7,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples in a batch.  [default: 64, tensors: 8]")
    ] = None,
    size: CropPixels = 224,
    antialias: Annotated[bool, typer.Option(help="Resize with an antialiasing filter.")] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads, or worker processes.  [default: all cores]")
    ] = None,
    round_seconds: RoundSeconds = 1.0,
    against: Annotated[
        list[str] | None, typer.Option(help="Only beside this contestant; may be given again.  [default: all]")
    ] = None,
) -> None:
    """Our DataLoader on the CPU, beside installed peers.

    Random crop, resize, flip and normalise of images; or tensors as they are.
    """
    from . import bench_load
    from .convert import usable_cores

    threads = threads or usable_cores()
    if tensors is None:
        bench_load.run_load(images, rounds, batch_size or 64, size, threads, antialias, round_seconds, against or ())
    else:
        bench_load.run_tensors(tensors, codec, rounds, batch_size or 8, threads, round_seconds, against or ())


@bench_app.command("device")
def bench_device(
    images: BenchImages = None,
    tensors: BenchTensors = None,
    codec: Annotated[
        TensorCodec | None,
        typer.Option(help="Codec of the tensors: lz4 is inflated on a GPU.  [default: none]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where batches are wanted.  [default: cuda where there is one, else cpu]")
    ] = None,
    rounds: Rounds = 7,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 64,
    size: CropPixels = 224,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode, or read.  [default: all cores]")
    ] = None,
    round_seconds: RoundSeconds = 1.0,
) -> None:
    """Our DataLoader to the GPU, beside the same from memory.

    Images/s or GB/s, and their share of what the work allows on data that lie in memory.
    """
    from . import bench_device
    from .convert import usable_cores

    work = bench_device.Work(images, tensors, codec, device, batch_size, size, threads or usable_cores())
    bench_device.run_device(work, rounds, round_seconds)


@bench_app.command("stage")
def bench_stage(
    dataset: Annotated[Path, path_argument("DATASET", "A data set.")],
    work: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the copies of all nodes; made, and removed at the end.")
    ],
    rounds: Rounds = 5,
    source_rate: Annotated[
        int | None,
        typer.Option(
            parser=parse_size, metavar="SIZE", help="Bytes a second of the source, as 400MB.  [default: as it is]"
        ),
    ] = None,
) -> None:
    """Stage-in, beside a broadcast of chunks and cp on every node.

    On the ranks that mpirun started; each plays a node.
    """
    from . import bench_stage

    bench_stage.run_stage(dataset, work, rounds, source_rate)


@bench_app.command("allreduce")
def bench_allreduce(
    rounds: Rounds = 15,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a rank in a step.")] = 64,
) -> None:
    """Training steps of our trainer, beside torch's DDP.

    On the ranks that mpirun started.
    """
    from . import bench_allreduce

    bench_allreduce.run_allreduce(rounds, batch_size)


def _has_the_terminal() -> bool:
    """Whether this is the first rank and writes to a terminal: `srun --pty` drops what the others say."""
    from stagein.world import find_rank

    return sys.stderr.isatty() and find_rank().rank == 0


def main() -> None:
    """Run the command that the arguments name, and end this process with its exit code."""
    try:
        app()
    except StageinError as error:
        if not error.reported_by_peer or _has_the_terminal():
            complain(str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
