"""What a run says: plain lines for people, JSON lines for programs, both by rank 0 only."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from stagein.formats.errors import destination_error

LOG_NAME = "log.jsonl"


def say_at_once(line: str) -> None:
    print(line, flush=True)


class RunLog:
    """Lines by `say`, and events in `folder`/log.jsonl, appended across resumes; `folder` None keeps no file."""

    def __init__(self, folder: Path | None, *, speaks: bool, say: Callable[[str], None] = say_at_once) -> None:
        self._path = None if folder is None else folder / LOG_NAME
        self._speaks = speaks
        self._say = say

    def line(self, text: str) -> None:
        if self._speaks:
            self._say(text)

    def event(self, kind: str, **values: object) -> None:
        """Append one JSON line: `event`, `time` (seconds since 1970) and `values`. Raises StageinError, one sentence."""
        if not self._speaks or self._path is None:
            return
        content = json.dumps({"event": kind, "time": round(time.time(), 3), **values})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(content + "\n")
        except OSError as error:
            raise destination_error(error, "writing the run's log", self._path) from error
