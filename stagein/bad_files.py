"""Files of the source that cannot be staged, found by whichever rank: one error for all of them, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from stagein.formats.errors import ChecksumError, SourceError, StageinError

_LISTED = 20
"""Of a long list of files, an error names this many, the first of the manifest."""


BadFiles: TypeAlias = tuple[list[int], dict[int, tuple[type[StageinError], str]]]
"""All bad files that a rank found, by number, and of the first of them what is wrong."""


def bad_files_word(found: Mapping[int, StageinError]) -> BadFiles:
    """What a rank tells the others. `found` is what is wrong with which file of the manifest, as this rank sees it."""
    first = {file: (type(found[file]), str(found[file])) for file in sorted(found)[:_LISTED]}
    return sorted(found), first


def refuse_bad_files(reports: Sequence[BadFiles], rank: int) -> None:
    """Raise the same error on all ranks when any of them found a bad file; its text lists them, a line each.

    reports  every rank's `bad_files_word`; `rank` is this one's number.

    Raises ChecksumError when all of them can be read and differ, else SourceError.
    """
    files = sorted({file for numbers, _ in reports for file in numbers})
    if not files:
        return
    known = {file: report for _, listed in reversed(reports) for file, report in listed.items()}
    listed = [known[file] for file in files[:_LISTED]]
    kind = ChecksumError if all(kind is ChecksumError for kind, _ in listed) else SourceError
    error = kind(_sentence([sentence for _, sentence in listed], len(files)))
    error.reported_by_peer = rank != 0
    raise error


def _sentence(listed: list[str], number: int) -> str:
    if number == 1:
        return listed[0]
    more = [f"and {number - len(listed):,} more"] if number > len(listed) else []
    return "\n  ".join([f"{number:,} files of the source cannot be staged:", *listed, *more])
