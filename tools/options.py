"""Options that several commands share, and how their values are written on the command line."""

from typing import Annotated

import typer

_UNIT_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str | int) -> int:
    """Sizes on the command line: 268435456, 256MiB, 1GB. A default comes as a number already."""
    if isinstance(text, int):
        return text
    number = text.rstrip("bBkKmMgGiI ")
    try:
        size = int(float(number) * _UNIT_BYTES[text[len(number) :].strip().lower()])
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no size: write bytes, or a number with kB, MB, GB, KiB, MiB or GiB")
    return size


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes or threads to use.  [default: all cores]")]
