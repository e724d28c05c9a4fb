"""`stagein convert KIND SOURCE TARGET`: the kinds of source, each with options of its own beside those that all share."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .convert_options import ConvertOptions
from .options import path_argument

if TYPE_CHECKING:
    from stagein.formats.source import Source
    from stagein.formats.sources.python import RecordStream

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pack a source into a data set of verified shards.")


Fields = Annotated[
    list[str] | None,
    typer.Option("--field", metavar="NAME=PLACE", help="A field and its place in the source; repeat it."),
]
Primary = Annotated[str | None, typer.Option(help="The field that fills the shards.")]
AnyShape = Annotated[
    bool, typer.Option("--any-shape", help="Look at all files: records may differ in shape, also where few do.")
]


def parse_fields(texts: list[str] | None) -> dict[str, str] | None:
    """NAME=PLACE options as a mapping; None when there are none."""
    for text in texts or []:
        if not all(text.partition("=")):
            raise typer.BadParameter(f"{text!r} is not of the form NAME=PLACE", param_hint="--field")
    return dict(text.split("=", 1) for text in texts) if texts else None


_Scan: TypeAlias = Callable[..., "Source | RecordStream"]


def _kind(name: str) -> Callable[[_Scan], _Scan]:
    """Make `stagein convert NAME` of a function that finds a source.

    The command takes the function's arguments, the first of which is SOURCE, then TARGET and the shared options; its help
    is the function's docstring. The function is called when the conversion begins, on one rank.
    """

    def register(scan: _Scan) -> _Scan:
        source, *own = _parameters(scan)
        target = inspect.Parameter(
            "target",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=Annotated[Path, path_argument("TARGET", "The data set to make.")],
        )
        shared = _parameters(ConvertOptions)

        def command(target: Path, **values: Any) -> None:
            from . import convert

            options = ConvertOptions(**{field.name: values.pop(field.name) for field in fields(ConvertOptions)})
            place = values["source"] if isinstance(values["source"], Path) else None
            convert.run(lambda: scan(**values), target, options, place)

        parameters = [source, target, *own, *shared]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # as inspect documents it
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, help=inspect.getdoc(scan))(command)
        return scan

    return register


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    """The parameters of a function, or of a dataclass's constructor."""
    return [
        parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for parameter in inspect.signature(function).parameters.values()
    ]


@_kind("imagefolder")
def _imagefolder(
    source: Annotated[Path, path_argument("SOURCE", "Folder of class folders of JPEG or PNG files.")],
) -> "Source":
    """Pack a folder of class folders of images.

    Labels number the sorted class folders. Interrupted, the same command resumes.
    """
    from stagein.formats.sources.imagefolder import scan_imagefolder

    return scan_imagefolder(source)


@_kind("webdataset")
def _webdataset(
    source: Annotated[Path, path_argument("SOURCE", "A .tar archive, or a folder of them.")],
    fields: Fields = None,
    primary: Primary = None,
) -> "Source":
    """Pack the samples of tar archives.

    Images, .cls, .txt, .json and .npy; any other extension by --field.
    """
    from stagein.formats.sources.webdataset import scan_webdataset

    return scan_webdataset(source, parse_fields(fields), primary=primary)


@_kind("tfrecord")
def _tfrecord(
    source: Annotated[Path, path_argument("SOURCE", "A TFRecord file, plain or gzip, or a folder of them.")],
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--field", metavar="NAME=FEATURE", help="A field and its feature, of arrays FEATURE:TYPE:SHAPE; repeat it."
        ),
    ] = None,
    primary: Primary = None,
    first_label: Annotated[int, typer.Option(help="The number that the classes of images are counted from.")] = 1,
) -> "Source":
    """Pack TFRecord files.

    As CosmoFlow and ResNet-50 have them, or any features by --field, such as x=x:int16:8x8x4.
    """
    from stagein.formats.sources.tfrecord import scan_tfrecord

    return scan_tfrecord(source, fields=parse_fields(fields), primary=primary, first_label=first_label)


@_kind("parquet")
def _parquet(
    source: Annotated[
        Path, path_argument("SOURCE", "A Parquet file, or a folder with Parquet files in it or below it.")
    ],
    fields: Fields = None,
    primary: Primary = None,
) -> "Source":
    """Pack the rows of Parquet files.

    Numbers, texts, lists, images as Hugging Face stores them.
    """
    from stagein.formats.sources.parquet import scan_parquet

    return scan_parquet(source, fields=parse_fields(fields), primary=primary)


@_kind("lmdb")
def _lmdb(
    source: Annotated[
        Path, path_argument("SOURCE", "An LMDB environment, a folder or a file, or a folder of such files.")
    ],
    fields: Fields = None,
    primary: Primary = None,
) -> "Source":
    """Pack the values of LMDB databases.

    Images, .npy arrays, texts; --field image=image-* where keys differ by field.
    """
    from stagein.formats.sources.lmdb import scan_lmdb

    return scan_lmdb(source, fields=parse_fields(fields), primary=primary)


@_kind("hdf5")
def _hdf5(
    source: Annotated[Path, path_argument("SOURCE", "A folder of HDF5 files, or one file.")],
    fields: Fields = None,
    primary: Primary = None,
    pattern: Annotated[str | None, typer.Option(help="Which files of the folder, such as data-*.h5.")] = None,
    any_shape: AnyShape = False,
) -> "Source":
    """Pack HDF5 files.

    Of a folder one record a file (DeepCAM), of any shape; of one file one record a row.
    """
    from stagein.formats.sources.hdf5 import scan_hdf5

    return scan_hdf5(source, fields=parse_fields(fields), primary=primary, pattern=pattern, any_shape=any_shape)


@_kind("npy")
def _npy(
    source: Annotated[Path, path_argument("SOURCE", "A folder of .npy or .npz files, or one .npy file.")],
    fields: Fields = None,
    primary: Primary = None,
    any_shape: AnyShape = False,
) -> "Source":
    """Pack .npy or .npz files.

    Of a folder one record a file (CosmoFlow), of any shape (U-Net3D); of one file one record a row.
    """
    from stagein.formats.sources.npy import scan_npy

    return scan_npy(source, fields=parse_fields(fields), primary=primary, any_shape=any_shape)


@_kind("python")
def _python(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="MODULE:FUNCTION, called without arguments.")],
    primary: Primary = None,
) -> "Source | RecordStream":
    """Pack what a function of yours returns.

    A torch Dataset, any sequence of records, or a generator of them.
    """
    from stagein.formats.sources.python import scan_python

    return scan_python(source, primary=primary)
