"""The supervisor's log."""

import json
import sys
import time
from contextlib import suppress
from typing import Any


def log(event: str, **details: Any) -> None:
    """One line of JSON, as the gateway writes them, in one piece: both write to the same file."""
    record = {"time": time.time(), "logger": "supervisor", "event": event, **details}
    with suppress(OSError):  # the terminal is closed, and what it was told to do has to go on
        sys.stderr.write(json.dumps(record, default=str) + "\n")  # `print` writes the end by itself
        sys.stderr.flush()
