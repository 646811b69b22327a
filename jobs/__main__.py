"""Runs the command line and turns every expected failure into one line and its exit code."""

import sys

from jobs.cli import app
from jobs.errors import JobError


def main() -> None:
    try:
        app()
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
