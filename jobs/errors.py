"""What can end a job early, and the exit code each kind has; jobs/cli.py lists them all."""


class JobError(Exception):
    """Something that ends the job with one clear line instead of a traceback."""

    exit_code = 1


class ConfigurationError(JobError):
    """The configuration or the command line cannot be carried out as written."""

    exit_code = 2


class UnavailableError(JobError):
    """Data, weights or storage are missing, damaged or out of reach."""

    exit_code = 3


class NotPromoted(JobError):  # noqa: N818 - an outcome, not a failure
    """The gate is closed: everything is published, and production serves what it did."""

    exit_code = 4


class Interrupted(JobError):  # noqa: N818 - not an error: the state is saved
    """Asked to stop (SIGTERM, SIGINT); the same command resumes from the checkpoint."""

    exit_code = 75


class Divergence(JobError):  # noqa: N818 - an outcome of training, recorded with the variant
    """The loss of one variant is no longer a finite number."""


def first_line(error: Exception) -> str:
    """What another library's error says, as far as it fits into one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
