"""Runs the command line and turns every expected failure into one line and its exit code."""

import sys

from jobs.cli import app
from jobs.errors import ConfigurationError, JobError, UnavailableError


def main() -> None:
    try:
        app()
    except (JobError, OSError) as error:  # such as a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", UnavailableError.exit_code))
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        print("error: a path begins with ~, a folder that is not known", file=sys.stderr)
        sys.exit(ConfigurationError.exit_code)


if __name__ == "__main__":
    main()
