"""A terminal of 80 columns for what tests start."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence

from conftest import ROOT

COLOUR = re.compile(r"\x1b\[[\d;]*\b(3|4|9|10)[0-8]\b[\d;]*m")


def on_a_terminal(command: Sequence[str], **environment: str) -> str:
    """What a command that ends well writes to its terminal, control sequences included."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "COLUMNS", "LINES")}
    variables = {**kept, "TERM": "xterm-256color", **environment}
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdin=its, stdout=its, stderr=its) as p:
        os.close(its)
        written = b""
        try:
            while data := os.read(ours, 65536):
                written += data
        except OSError:  # nobody has it open any more
            pass
    os.close(ours)
    assert p.returncode == 0, written.decode()
    return written.decode()
