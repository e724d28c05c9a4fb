"""How much memory there is for files: what Linux says is available, within the limits of the job."""

from pathlib import Path

_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def memory_for_files_bytes() -> int:
    """Memory that files may fill before others have to leave it: 0 where nobody says."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) << 10
        return min([available, *_limits(Path("/proc/self/cgroup").read_text())])
    except (OSError, KeyError):
        return 0


def _limits(groups: str) -> list[int]:
    """What the control groups of this process allow, and those that they are in, of both versions (control groups, man cgroups(7))."""
    limits = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (
            (_CONTROL_GROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CONTROL_GROUPS, "memory.max")
        )
        group = root / path.lstrip("/")
        while group.is_relative_to(root):
            file = group / name
            if file.exists() and (limit := file.read_text().strip()) != "max":
                limits.append(int(limit))
            group = group.parent
    return limits
