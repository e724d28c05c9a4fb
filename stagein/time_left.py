"""How long the job may still run, by the word of Slurm."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping

_SQUEUE_SECONDS = 10.0
_DURATION = re.compile(r"(?:(?:(?P<days>\d+)-)?(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)")


def job_seconds_left(environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds until Slurm ends this job; None outside a job, without a limit, or when Slurm does not say in time."""
    if end := environment.get("SLURM_JOB_END_TIME"):
        return float(end) - time.time()
    if job := environment.get("SLURM_JOB_ID"):
        try:
            words = ["squeue", "-h", "-j", job, "-o", "%L"]
            answer = subprocess.run(words, capture_output=True, text=True, timeout=_SQUEUE_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return parse_duration(answer.stdout.strip())
    return None


def parse_duration(text: str) -> float | None:
    """Seconds of `[[days-]hours:]minutes:seconds`, as squeue prints it; None for other text."""
    match = _DURATION.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
