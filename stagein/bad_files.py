"""Files of the source that cannot be staged, found by whichever rank: one error for all of them, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping

from stagein.formats.errors import ChecksumError, SourceError, StageinError

from .world import Communicator

_LISTED = 20
"""Of a long list of files, an error names this many, the first of the manifest."""


def refuse_bad_files(found: Mapping[int, StageinError], communicator: Communicator) -> None:
    """Raise one error on all ranks when any of them found a bad file; its text lists them, a line each.

    found  what is wrong with which file of the manifest, as this rank sees it. Collective.

    Raises ChecksumError when all of them can be read and differ, else SourceError.
    """
    first = {file: (type(found[file]), str(found[file])) for file in sorted(found)[:_LISTED]}
    reports = communicator.gather_all((sorted(found), first))
    files = sorted({file for numbers, _ in reports for file in numbers})
    if not files:
        return
    known = {file: report for _, listed in reversed(reports) for file, report in listed.items()}
    listed = [known[file] for file in files[:_LISTED]]
    kind = ChecksumError if all(kind is ChecksumError for kind, _ in listed) else SourceError
    error = kind(_sentence([sentence for _, sentence in listed], len(files)))
    error.reported_by_peer = communicator.world.rank != 0
    raise error


def _sentence(listed: list[str], number: int) -> str:
    if number == 1:
        return listed[0]
    more = [f"and {number - len(listed):,} more"] if number > len(listed) else []
    return "\n  ".join([f"{number:,} files of the source cannot be staged:", *listed, *more])
