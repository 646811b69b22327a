"""Runs the command line and turns every expected failure into one line and its exit code."""

import sys

from jobs.cli import app
from jobs.errors import JobError, UnavailableError


def main() -> None:
    try:
        app()
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(UnavailableError.exit_code)


if __name__ == "__main__":
    main()
