"""Shows metrics.jsonl to trackers while a run trains: TensorBoard, MLflow, Prometheus."""

import os
import shutil
import socketserver
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from typing import Any

from jobs.config import Config
from jobs.errors import ConfigurationError
from jobs.following import Look
from jobs.runs import TENSORBOARD, Row, RunFolder

VALUES = ("loss", "aux_loss", "accuracy", "images_per_second", "learning_rate")
MLFLOW_METRICS, MLFLOW_PARAMS = 1000, 100  # of one request, at most
MLFLOW_VALUE = 500  # characters of a parameter
# A server that is away is tried again a minute later anyway. Nothing is reported to anybody else.
MLFLOW = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def looks(folder: RunFolder, config: Config) -> dict[str, Look]:
    """What keeps each tracker up to date, for :func:`jobs.following.following`.

    Raises:
        ConfigurationError: a package is missing.
    """
    found: dict[str, Look] = {}
    if config.tracking.tensorboard:
        _require("tensorboard")
        found["TensorBoard's files"] = TensorBoard(folder).look
    if config.tracking.mlflow:
        _require("mlflow")
        found["MLflow"] = MLflow(folder, config).look
    return found


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ConfigurationError(
            f"tracking.{package}: not installed; pip install 'inception-transfer[{package}]'"
        )


class TensorBoard:
    """Writes event files, anew from the first row whenever the job is started."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.shown = folder, 0
        self.writers: dict[str, Any] = {}

    def look(self) -> None:
        if not self.writers:
            shutil.rmtree(self.folder.path / TENSORBOARD, ignore_errors=True)
        for row in self.folder.metrics()[self.shown :]:
            writer, time = self._writer(_part(row)), _seconds(row)
            for name in VALUES:
                if row[name] is not None:
                    writer.add_scalar(f"{name}/{row['split']}", row[name], row["epoch"], time)
            self.shown += 1
        for writer in self.writers.values():
            writer.flush()

    def _writer(self, part: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if part not in self.writers:  # a TensorBoard that knows an earlier file forgets its points
            path = self.folder.path / TENSORBOARD / part
            self.writers[part] = SummaryWriter(path, purge_step=0)
        return self.writers[part]


class MLflow:
    """One run of MLflow for each of the job's, found again by its id and the time of its start."""

    def __init__(self, folder: RunFolder, config: Config) -> None:
        self.folder, self.config = folder, config
        self.id: str | None = None
        self.shown = 0
        self.known: set[tuple[str, int]] = set()  # points that an earlier start has sent
        self.ended = False

    def look(self) -> None:
        if self.ended or not (self.folder.path / "environment.json").is_file():
            return
        for name, value in MLFLOW.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.config.tracking.mlflow)
        try:
            if self.id is None:
                self.id = self._begin(client)
            self._send(client, self.id)
        except Exception:
            self.id = None  # nobody knows what has arrived
            raise

    def _begin(self, client: Any) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "inception-transfer")
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        tags = {"run_id": self.folder.run_id, "started": self.folder.started}
        wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
        runs = client.search_runs([experiment], wanted)
        run = (
            runs[0]
            if runs
            else client.create_run(experiment, tags=tags, run_name=self.folder.run_id)
        )
        id: str = run.info.run_id
        self.shown, self.known = 0, set()
        for key in run.data.metrics:
            self.known |= {(key, point.step) for point in client.get_metric_history(id, key)}
        self._describe(client, id)
        return id

    def _describe(self, client: Any, id: str) -> None:
        from mlflow.entities import Param

        settings = self.config.experiment
        settings["variants"] = {variant["name"]: variant for variant in settings["variants"]}
        params = [Param(key, str(value)[:MLFLOW_VALUE]) for key, value in _flat(settings)]
        for start in range(0, len(params), MLFLOW_PARAMS):
            client.log_batch(id, params=params[start : start + MLFLOW_PARAMS])

    def _send(self, client: Any, id: str) -> None:
        from mlflow.entities import Metric

        rows = self.folder.metrics()
        points = [
            Metric(
                f"{_part(row)}/{row['split']}/{name}", row[name], _seconds(row) * 1000, row["epoch"]
            )
            for row in rows[self.shown :]
            for name in VALUES
            if row[name] is not None
        ]
        fresh = [point for point in points if (point.key, point.step) not in self.known]
        for start in range(0, len(fresh), MLFLOW_METRICS):
            client.log_batch(id, metrics=fresh[start : start + MLFLOW_METRICS])
        self.shown = len(rows)
        if self.folder.finished:
            client.log_artifact(id, str(self.folder.path / "comparison.json"))
            client.set_terminated(id)
            self.ended = True


@contextmanager
def exposed(folder: RunFolder, port: int | None) -> Iterator[None]:
    """Answers Prometheus on a port, whatever the path, while the block works; without one, nobody.

    Raises:
        ConfigurationError: the port is taken.
    """
    if port is None:
        yield
        return

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = exposition(folder.metrics()).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing of requests."""

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


def exposition(rows: Sequence[Row]) -> str:
    """The newest row of each variant, seed and split, in Prometheus's text format."""
    newest = {(row["variant"], row["seed"], row["split"]): row for row in rows}
    lines = []
    for name in ("epoch", *VALUES):
        lines.append(f"# TYPE inception_training_{name} gauge")
        for (variant, seed, split), row in newest.items():
            labels = f'variant="{variant}",seed="{seed}",split="{split}"'
            if row[name] is not None:
                lines.append(f"inception_training_{name}{{{labels}}} {row[name]}")
    return "\n".join(lines) + "\n"


def _part(row: Row) -> str:
    return f"{row['variant']}/seed-{row['seed']}"


def _seconds(row: Row) -> int:
    """Since 1970."""
    return int(datetime.fromisoformat(row["time"]).timestamp())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
