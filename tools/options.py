"""Options that several commands share, and how their values are written on the command line."""

import math
from typing import Annotated, Any

import typer

_UNIT_BYTES = {"": 1, "b": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for unit, base in (("b", 1000), ("ib", 1024))
}
_UNIT_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def parse_size(text: str | int) -> int:
    """Sizes on the command line: 268435456, 256MiB, 1GB. A default comes as a number already."""
    if isinstance(text, int):
        return text
    number = text.rstrip("bBkKmMgGtTiI ")
    try:
        size = int(float(number) * _UNIT_BYTES[text[len(number) :].strip().lower()])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise typer.BadParameter(
            f"{text!r} is no size: write bytes, or a number with kB, MB, GB, TB, KiB, MiB, GiB or TiB"
        )
    return size


def parse_age(text: str) -> float:
    """Durations on the command line, in seconds: 30min, 12h, 7d."""
    number = text.rstrip("smindh ")
    try:
        seconds = float(number) * _UNIT_SECONDS[text[len(number) :].strip()]
    except (KeyError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise typer.BadParameter(f"{text!r} is no duration: write a number with s, min, h or d, such as 7d")
    return seconds


def parse_time(text: str) -> float:
    """Times on the command line, in seconds: durations, or [[days-]hours:]minutes:seconds as Slurm prints them."""
    from stagein.time_left import parse_duration

    seconds = parse_duration(text)
    return parse_age(text) if seconds is None else seconds


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes or threads to use.  [default: all cores]")]


def path_argument(name: str, help_text: str) -> Any:
    """An argument that is a path, shown as `name`. What cannot be read is for the command to say, and with its exit code."""
    return typer.Argument(metavar=name, readable=False, help=help_text)
