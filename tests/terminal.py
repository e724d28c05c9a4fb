"""Run a stagein command on a terminal, and see what it shows."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path


def on_a_terminal(*arguments: str | Path, columns: int = 80) -> str:
    """What a command shows on a terminal."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    command = [sys.executable, "-m", "stagein.tools", *map(str, arguments)]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=terminal, env=environment):
        os.close(terminal)
        shown = b""
        with open(controller, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # the other end is closed
            while part := screen.read(1 << 16):
                shown += part
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n")
