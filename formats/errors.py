"""The error tree of stagein and the exit codes of its commands.

Every error a user can cause or meet is one sentence: what happened, on which path and value, and what to do.
"""

import contextlib
import errno
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Exit codes of every stagein command, as the README lists them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    SOURCE = 3
    NO_SPACE = 4
    CHECKSUM = 5
    INTERRUPTED = 6
    NO_TIME = 7
    WATCHDOG = 75


class StageinError(Exception):
    """Base of all errors that stagein raises on purpose; its text is a sentence for the user."""

    exit_code = ExitCode.FAILED
    reported_by_peer = False
    """Set on the ranks that only hear of another rank's failure, so that one rank alone prints it."""


class UsageError(StageinError):
    """What was asked for cannot be done as asked: a wrong option, an existing target, a missing extra."""

    exit_code = ExitCode.USAGE


class SourceError(StageinError):
    """The source is incomplete, unreadable, or not what it claims to be."""

    exit_code = ExitCode.SOURCE


class NoSpaceError(StageinError):
    """The destination has, or will have, no room."""

    exit_code = ExitCode.NO_SPACE


class ChecksumError(StageinError):
    """Bytes differ from what the manifest or the index says they are."""

    exit_code = ExitCode.CHECKSUM


class InterruptedRunError(StageinError):
    """Stopped by a signal or by a peer; the same command again resumes."""

    exit_code = ExitCode.INTERRUPTED


class NoTimeError(StageinError):
    """What was to be done takes longer than the job has left."""

    exit_code = ExitCode.NO_TIME


class WatchdogError(StageinError):
    """A rank made no progress within the limit; all ranks were ended."""

    exit_code = ExitCode.WATCHDOG


class LoadTimeoutError(StageinError, RuntimeError):
    """A batch took longer than the loader's `timeout`; torch raises a RuntimeError for that."""


def add_note(error: BaseException, note: str) -> None:
    """Note where it happened on an error of the user's code, should it take notes: one that is frozen does not."""
    with contextlib.suppress(Exception):
        error.add_note(note)


def source_error(error: OSError, action: str, path: Path | str) -> SourceError:
    """A sentence about a source that cannot be read: what was being done with which path, and why it failed."""
    return SourceError(f"{action} {path} failed: {error.strerror or error}")


def destination_error(error: OSError, action: str, path: Path | str) -> StageinError:
    """A sentence about trouble where something is written: NoSpaceError when that is what it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            f"no space left while {action} {path}: free some room or choose another place, then run it again"
        )
    return StageinError(f"{action} {path} failed: {error.strerror or error}")
