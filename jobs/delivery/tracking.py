"""Shows metrics.jsonl to trackers while a run trains: TensorBoard, MLflow, Prometheus."""

import os
import shutil
import socketserver
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.config import Config
from jobs.errors import ConfigurationError
from jobs.following import Look
from jobs.runs import TENSORBOARD, Row, RunFolder, Shown

SILENCE = 10.0  # seconds that a client of Prometheus's port may say nothing
VALUES = ("loss", "aux_loss", "accuracy", "images_per_second", "learning_rate")
MLFLOW = {  # unless the environment says otherwise
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_EXPERIMENT_NAME": "inception-transfer",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the follower tries again
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def looks(folder: RunFolder, config: Config) -> dict[str, Look]:
    """A function for each tracker that sends it what is new, by its name, for
    :func:`jobs.following.following`.

    Raises:
        ConfigurationError: a package is missing.
    """
    kinds: dict[str, type[TensorBoard | MLflow]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
    wanted = [name for name in kinds if getattr(config.tracking, name)]
    for name in wanted:
        if find_spec(name) is None:
            raise ConfigurationError(
                f"tracking.{name}: not installed; pip install 'inception-transfer[{name}]'"
            )
    return {kinds[name].__name__: kinds[name](folder, config).look for name in wanted}


class TensorBoard:
    """Writes event files, anew from the first row whenever the job is started."""

    def __init__(self, folder: RunFolder, _: Config) -> None:
        self.folder, self.shown = folder, Shown()
        self.writers: dict[Path, Any] = {}

    def look(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        root = self.folder.path / TENSORBOARD
        if not self.writers:
            shutil.rmtree(root, ignore_errors=True)
        for _, row in self.shown.new(self.folder.metrics()):
            path = root / row["variant"] / f"seed-{row['seed']}"
            if path not in self.writers:  # purge_step: readers of an earlier file forget its points
                self.writers[path] = SummaryWriter(path, purge_step=0)
            for name, value in _values(row):
                tag = f"{name}/{row['split']}"
                self.writers[path].add_scalar(tag, value, row["epoch"], _seconds(row))
        for writer in self.writers.values():
            writer.flush()


class MLflow:
    """One run of MLflow for each of the job's, found again by its id and the time of its start.

    Its tags `rows` and `newest` say how many it has and until when, and arrive together with them.
    """

    def __init__(self, folder: RunFolder, config: Config) -> None:
        self.folder, self.config = folder, config
        self.run: Any = None
        self.shown, self.newest = Shown(), ""

    def look(self) -> None:
        if not (self.folder.path / "environment.json").is_file():
            return
        for name, value in MLFLOW.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.config.tracking.mlflow)
        try:
            self.run = self.run or self._begin(client)
            self._send(client, self.run.info.run_id)
        except Exception:
            self.run = None  # nobody knows what has arrived
            raise

    def _begin(self, client: Any) -> Any:
        from mlflow.entities import Param

        name = os.environ["MLFLOW_EXPERIMENT_NAME"]
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        tags = {"run_id": self.folder.run_id, "started": self.folder.started}
        # A filter takes a time, but not every name.
        runs = client.search_runs([experiment], f"tags.started = '{tags['started']}'")
        [run, *_] = [run for run in runs if run.data.tags.get("run_id") == tags["run_id"]] or [
            client.create_run(experiment, tags=tags, run_name=self.folder.run_id)
        ]
        sent, self.newest = int(run.data.tags.get("rows", 0)), run.data.tags.get("newest", "")
        # What has taken the place of a row since then is newer.
        rows = self.folder.metrics()[:sent]
        self.shown = Shown(row for row in rows if row["time"] <= self.newest)
        settings = self.config.experiment
        settings["variants"] = {variant["name"]: variant for variant in settings["variants"]}
        params = [Param(key, str(value)[:500]) for key, value in _flat(settings)]
        for start in range(0, len(params), 100):  # as many as a request may have
            client.log_batch(run.info.run_id, params=params[start : start + 100])
        return run

    def _send(self, client: Any, id: str) -> None:
        from mlflow.entities import Metric, RunTag

        for count, row in self.shown.new(self.folder.metrics()):
            place = f"{row['variant']}/seed-{row['seed']}/{row['split']}"
            metrics = [
                Metric(f"{place}/{name}", value, _seconds(row) * 1000, row["epoch"])
                for name, value in _values(row)
            ]
            self.newest = max(self.newest, row["time"])
            tags = [RunTag("rows", str(count)), RunTag("newest", self.newest)]
            client.log_batch(id, metrics=metrics, tags=tags)
        if self.folder.finished:
            client.log_artifact(id, str(self.folder.path / "comparison.json"))
            client.set_terminated(id)


@contextmanager
def exposed(folder: RunFolder, port: int | None) -> Iterator[None]:
    """Answers Prometheus on a port, whatever the path, while the block works; does nothing without
    a port.

    Raises:
        ConfigurationError: the port is taken.
    """
    if port is None:
        yield
        return

    class Page(BaseHTTPRequestHandler):
        timeout = SILENCE

        def do_GET(self) -> None:
            self.send_response_only(200)  # without a line in the log
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(exposition(folder.metrics()).encode())

        def log_message(self, *_: Any) -> None:
            """A client that was silent for too long is nothing to tell."""

    try:
        server = _Server(("", port), Page)
    except OSError as error:
        raise ConfigurationError(f"tracking.prometheus: port {port}: {error.strerror}") from None
    threading.Thread(target=server.serve_forever, name="Prometheus", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, *of: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a scraper may go at any time
            super().handle_error(*of)


def exposition(rows: Sequence[Row]) -> str:
    """The newest row of each variant, seed and split, in Prometheus's text format."""
    newest = {(row["variant"], row["seed"], row["split"]): row for row in rows}
    lines = []
    for name in ("epoch", *VALUES):
        lines.append(f"# TYPE inception_training_{name} gauge\n")
        for (variant, seed, split), row in newest.items():
            labels = f'variant="{variant}",seed="{seed}",split="{split}"'
            if row[name] is not None:
                lines.append(f"inception_training_{name}{{{labels}}} {row[name]}\n")
    return "".join(lines)


def _values(row: Row) -> list[tuple[str, float]]:
    return [(name, row[name]) for name in VALUES if row[name] is not None]


def _seconds(row: Row) -> int:
    """Since 1970."""
    return int(datetime.fromisoformat(row["time"]).timestamp())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
