"""The batch job: trains, compares and reports variants of Inception-v3.

>>> from jobs import load_config, run
>>> run(load_config("quickstart", ["optim.epochs=2"]))
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# With it, OpenVINO and NNCF report to Intel what is exported, by Google Analytics and unasked; both
# do without it.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from jobs.config import Config
    from jobs.config import load as load_config
    from jobs.results import Comparison
    from jobs.runs import RunFolder

__all__ = ["RunFolder", "load_config", "run"]


def run(config: "Config", out: "Path | str" = "runs", run_id: str | None = None) -> "Comparison":
    """Trains, tests, compares and reports every variant; resumes where an earlier call stopped.

    Args:
        config: as `load_config` gives it.
        out: the folder that holds the runs.
        run_id: the run's folder in it; by default the digest of the configuration, so that the
            same call continues the same run.

    Returns:
        What is in comparison.json; the files are those of `RunFolder(out / its run_id)`.

    Raises:
        JobError: it cannot be done, or was interrupted; the message says what to do.
    """
    from jobs import pipeline
    from jobs.interruption import graceful
    from jobs.runs import RunFolder

    with graceful():
        return pipeline.run(config, RunFolder(Path(out) / (run_id or config.digest)))


def __getattr__(name: str) -> Any:
    """Loads pydantic and NumPy for those alone who ask for what needs them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jobs.config import load
    from jobs.runs import RunFolder

    return {"RunFolder": RunFolder, "load_config": load}[name]
