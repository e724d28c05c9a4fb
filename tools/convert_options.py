"""What every kind of source has in common on the command line of `stagein convert`."""

from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Annotated

import typer

from .options import Json, parse_size


class ContainerChoice(StrEnum):
    """Values of --format."""

    HDF5_ZARR = "hdf5+zarr"
    HDF5 = "hdf5"
    ZARR = "zarr"


def parse_split(text: str) -> dict[str, Fraction]:
    """train=0.9,val=0.1 as shares by name, exactly as they are written."""
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            value = Fraction(share)
        except (ValueError, ZeroDivisionError):
            value = None
        if value is None or not name or "/" in name or name in shares:
            raise typer.BadParameter(f"{text!r} is not of the form NAME=SHARE,NAME=SHARE, such as train=0.9,val=0.1")
        shares[name] = value
    return shares


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """The options that all kinds share."""

    container: Annotated[ContainerChoice, typer.Option("--format", help="Containers a shard is valid as.")] = (
        ContainerChoice.HDF5_ZARR
    )
    codec: Annotated[
        str, typer.Option(help="For tensors: auto, none, blosc-lz4, blosc-lz4:bit, zstd, lz4. Images stay as they are.")
    ] = "auto"
    shard_bytes: Annotated[
        int,
        typer.Option(
            parser=parse_size, metavar="SIZE", show_default=False, help="Payload of a shard.  [default: 256MiB]"
        ),
    ] = 256 << 20
    seekable_jpeg: Annotated[
        bool, typer.Option("--seekable-jpeg", help="Let loaders decode crops alone: restart markers, no pixel changed.")
    ] = False
    image_max_side: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="Shrink images whose longer side is above this.")
    ] = None
    image_quality: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="Encode JPEGs again at this quality where that makes them smaller."),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first LIMIT records only.")] = None
    shuffle_seed: Annotated[
        int | None, typer.Option(min=0, help="Shuffle the records by this seed, before --limit takes the first.")
    ] = None
    split: Annotated[
        dict[str, Fraction] | None,
        typer.Option(
            parser=parse_split,
            metavar="NAME=SHARE,...",
            help="Deal the records at random to several data sets, as train=0.9,val=0.1; TARGET holds {split}, their name.",
        ),
    ] = None
    workers: Annotated[int | None, typer.Option(min=1, help="Processes of each rank.  [default: all cores]")] = None
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be a record, and list it.")] = (
        False
    )
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the data set TARGET when the new one is complete.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")] = False
    timeout: Annotated[
        float, typer.Option(min=0.1, help="With mpirun: seconds without a sign of life of a rank, after which all end.")
    ] = 300.0
    json: Json = False
