"""Trackers get every value of metrics.jsonl once, and can neither stop nor hold up a run."""

import io
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

import pytest
from conftest import copy_of, free_port
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from service import LONGEST

from jobs import config, following, pipeline
from jobs.delivery import tracking
from jobs.delivery.tracking import VALUES, MLflow, TensorBoard
from jobs.errors import ConfigurationError
from jobs.runs import Row, RunFolder
from serving import progress

Points = dict[tuple[str, int], float]


def points_of(run: RunFolder, form: str) -> Points:
    return {
        (form.format(**row, name=name), row["epoch"]): row[name]
        for row in run.metrics()
        for name in VALUES
        if row[name] is not None
    }


def with_tracking(run: RunFolder, **settings: object) -> config.Config:
    tracked = config.Tracking.model_validate(settings)
    return run.config().model_copy(update={"tracking": tracked})


@pytest.fixture
def run(compared: RunFolder, tmp_path: Path) -> RunFolder:
    return copy_of(compared, tmp_path)


@pytest.fixture
def unfinished(run: RunFolder) -> RunFolder:
    """All is trained; the comparison, the report and the manifest are left to do."""
    for name in ("manifest.json", "comparison.json"):
        (run.path / name).unlink()
    return run


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Takes connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def event_points(run: RunFolder) -> Points:
    """Asserts that each is there once."""
    found = list(events_of(run))
    assert len(dict(found)) == len(found), "a point is there twice"
    return dict(found)


def events_of(run: RunFolder) -> Iterator[tuple[tuple[str, int], float]]:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="extra tensorboard"
    )
    for part in {path.parent for path in (run.path / "tensorboard").rglob("events*")}:
        events = accumulator.EventAccumulator(str(part)).Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                yield (
                    (f"{part.relative_to(run.path / 'tensorboard')}/{tag}", event.step),
                    event.value,
                )


def test_event_files_have_every_value_once_however_often_the_job_is_started(
    run: RunFolder,
) -> None:
    pytest.importorskip("tensorboard", reason="extra tensorboard")
    expected = points_of(run, "{variant}/seed-{seed}/{name}/{split}")
    for _ in range(2):
        tracker = TensorBoard(run, run.config())
        tracker.look()
        tracker.look()
        assert event_points(run) == pytest.approx(expected)  # they are float32 there
    later = {**run.metrics()[0], "epoch": 7}
    run.append_metrics([later])
    tracker.look()
    assert len(event_points(run)) - len(expected) == sum(later[name] is not None for name in VALUES)


def done_again(run: RunFolder) -> Row:
    """The first row as it comes out another time; it is the last one then, of fewer."""
    before = run.metrics()
    run.append_metrics([{**before[0], "loss": 9.0}])
    *others, again = run.metrics()
    assert len(others) < len(before) - 1 and again["loss"] == 9.0
    return again


def test_a_row_that_comes_out_differently_when_done_again_is_in_event_files_as_it_came_out(
    run: RunFolder,
) -> None:
    pytest.importorskip("tensorboard", reason="extra tensorboard")
    tracker = TensorBoard(run, run.config())
    tracker.look()
    row, before = done_again(run), event_points(run)
    tracker.look()
    tracker.look()
    key = "{variant}/seed-{seed}/loss/{split}".format(**row), row["epoch"]
    losses = [value for found, value in events_of(run) if found == key]
    assert losses == [before[key], 9.0]


class FakeMLflow(ThreadingHTTPServer):
    """As much of MLflow's REST API as a client needs that tracks one run."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.experiments: list[str] = []
        self.runs: list[dict[str, Any]] = []
        self.artifacts: dict[str, bytes] = {}
        self.failing: str | None = None  # an endpoint that answers 500 after its work is done

    def experiments_get_by_name(self, given: dict[str, Any]) -> dict[str, Any] | None:
        if given["experiment_name"] not in self.experiments:
            return None
        return {"experiment": {"experiment_id": "1", "name": given["experiment_name"]}}

    def experiments_create(self, given: dict[str, Any]) -> dict[str, Any]:
        self.experiments.append(given["name"])
        return {"experiment_id": "1"}

    def runs_search(self, given: dict[str, Any]) -> dict[str, Any] | None:
        """Takes a filter of one tag, whose value has no quote in it."""
        asked = re.fullmatch(r"tags\.(?P<key>\w+) = '(?P<value>[^']*)'", given["filter"])
        if asked is None:
            return None
        return {"runs": [run for run in self.runs if asked.groupdict() in run["data"]["tags"]]}

    def runs_create(self, given: dict[str, Any]) -> dict[str, Any]:
        id = uuid4().hex  # the client remembers where which run's artifacts go
        info = {"run_id": id, "run_uuid": id, "experiment_id": "1", "status": "RUNNING"}
        info |= {"artifact_uri": f"mlflow-artifacts:/1/{id}/artifacts", "lifecycle_stage": "active"}
        self.runs.append(
            {"info": info, "data": {"tags": given["tags"], "metrics": [], "params": []}}
        )
        return {"run": self.runs[-1]}

    def runs_get(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"run": self._run(given)}

    def runs_update(self, given: dict[str, Any]) -> dict[str, Any]:
        self._run(given)["info"]["status"] = given["status"]
        return {"run_info": self._run(given)["info"]}

    def runs_log_batch(self, given: dict[str, Any]) -> dict[str, Any]:
        data, tags = self._run(given)["data"], given.get("tags", [])
        assert len(given.get("params", ())) <= 100, "as MLflow has it"
        data["params"] += given.get("params", ())
        data["metrics"] += given.get("metrics", ())
        changed = {tag["key"] for tag in tags}
        data["tags"] = [tag for tag in data["tags"] if tag["key"] not in changed] + tags
        return {}

    def _run(self, given: dict[str, Any]) -> dict[str, Any]:
        return next(run for run in self.runs if run["info"]["run_id"] == given["run_id"])


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeMLflow

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def do_PUT(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body: bytes) -> None:
        where = urlsplit(self.path)
        if "mlflow-artifacts" in where.path:
            self.server.artifacts[where.path.rpartition("/")[2]] = body
            return self.reply(200, {})
        endpoint = where.path.partition("/mlflow/")[2].replace("/", "_").replace("-", "_")
        given = json.loads(body) if body else dict(parse_qsl(where.query))
        found = getattr(self.server, endpoint)(given)
        if endpoint == self.server.failing:
            return self.reply(500, {"error_code": "INTERNAL_ERROR", "message": "it is lost"})
        if found is None:
            return self.reply(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"})
        return self.reply(200, found)

    def reply(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mlflow() -> Iterator[FakeMLflow]:
    pytest.importorskip("mlflow", reason="extra mlflow")
    server = FakeMLflow()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def sent(mlflow: FakeMLflow) -> Points:
    [run] = mlflow.runs
    points = [((point["key"], point["step"]), point["value"]) for point in run["data"]["metrics"]]
    assert len(dict(points)) == len(points), "a point is there twice"
    return dict(points)


def test_mlflow_gets_parameters_every_point_once_and_the_comparison(
    run: RunFolder, mlflow: FakeMLflow, capsys: pytest.CaptureFixture[str]
) -> None:
    """… from a run that is begun twice, and then found finished."""
    wanted = with_tracking(run, mlflow=mlflow.address)
    expected = points_of(run, "{variant}/seed-{seed}/{split}/{name}")
    manifest = run.path / "manifest.json"
    manifest.rename(run.path / "elsewhere")
    for _ in range(2):
        tracker = MLflow(run, wanted)
        tracker.look()
        tracker.look()
        assert sent(mlflow) == expected
    [there] = mlflow.runs
    assert there["info"]["status"] == "RUNNING" and not mlflow.artifacts
    params = {param["key"]: param["value"] for param in there["data"]["params"]}
    assert params["variants.frozen.trainable"] == "head" and params["data.train_images"] == "80"
    (run.path / "elsewhere").rename(manifest)
    tracker.look()
    assert there["info"]["status"] == "FINISHED"
    assert mlflow.artifacts == {"comparison.json": (run.path / "comparison.json").read_bytes()}
    assert not capsys.readouterr().out, "that is for the result"


def test_what_arrived_though_the_answer_got_lost_is_not_sent_again(
    run: RunFolder, mlflow: FakeMLflow
) -> None:
    tracker = MLflow(run, with_tracking(run, mlflow=mlflow.address))
    mlflow.failing = "runs_log_batch"
    with pytest.raises(Exception, match="log-batch"):
        tracker.look()
    mlflow.failing = None
    tracker.look()
    assert sent(mlflow) == points_of(run, "{variant}/seed-{seed}/{split}/{name}")


def test_a_row_that_comes_out_differently_when_done_again_is_sent_again_and_once(
    run: RunFolder, mlflow: FakeMLflow
) -> None:
    wanted = with_tracking(run, mlflow=mlflow.address)
    tracker = MLflow(run, wanted)
    tracker.look()
    row, before = done_again(run), sent(mlflow)
    for one in (tracker, tracker, MLflow(run, wanted)):
        one.look()
    [there] = mlflow.runs
    key = "{variant}/seed-{seed}/{split}/loss".format(**row)
    losses = [point["value"] for point in there["data"]["metrics"] if point["key"] == key]
    assert losses == [before[key, row["epoch"]], 9.0]


def test_what_was_done_again_while_nobody_was_looking_is_sent_by_the_next_process(
    run: RunFolder, mlflow: FakeMLflow
) -> None:
    wanted = with_tracking(run, mlflow=mlflow.address)
    MLflow(run, wanted).look()
    first = {name: value for name, value in run.metrics()[0].items() if name != "time"}
    run.append_metrics([*run.metrics()[1:], {**first, "loss": 9.0}])
    MLflow(run, wanted).look()
    [there] = mlflow.runs
    assert [point["value"] for point in there["data"]["metrics"]].count(9.0) == 1


def test_another_run_with_the_same_id_is_another_one_there(
    run: RunFolder, mlflow: FakeMLflow
) -> None:
    wanted = with_tracking(run, mlflow=mlflow.address)
    MLflow(run, wanted).look()
    environment = run.path / "environment.json"
    environment.write_text(environment.read_text().replace(run.started, "2026-01-31T00:00:00"))
    MLflow(run, wanted).look()
    assert len(mlflow.runs) == 2


def test_a_run_with_a_quote_in_its_id_is_found_again(run: RunFolder, mlflow: FakeMLflow) -> None:
    strange = RunFolder(run.path.rename(run.path.with_name('it\'s "one"')))
    for _ in range(2):
        MLflow(strange, with_tracking(strange, mlflow=mlflow.address)).look()
    assert sent(mlflow) == points_of(strange, "{variant}/seed-{seed}/{split}/{name}")


@pytest.mark.usefixtures("undrawn")
def test_a_tracker_that_never_answers_keeps_no_run_from_its_end_and_no_other_from_its_rows(
    unfinished: RunFolder, silent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="extra mlflow")
    pytest.importorskip("torch.utils.tensorboard", reason="extra tensorboard")  # takes seconds
    lines: list[str] = []
    monkeypatch.setattr(following, "log", lines.append)
    monkeypatch.setattr(following, "SECONDS_AT_THE_END", 15.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "6000")
    pipeline.run(with_tracking(unfinished, mlflow=address_of(silent), tensorboard=True), unfinished)
    assert lines == ["warning: the last metrics are not in MLflow: no answer for 15 s"]
    silent.close()
    [waiting] = [one for one in threading.enumerate() if one.name == "metrics to MLflow"]
    waiting.join()  # what it says then belongs to no other test
    assert unfinished.finished and event_points(unfinished)
    listed = unfinished.manifest().files
    assert not [name for name in listed if "tensorboard" in name], "they may change until the end"


LEFT_BEHIND = """
import sys
from pathlib import Path
from jobs import config, following
from jobs.delivery.tracking import MLflow
from jobs.runs import RunFolder

following.SECONDS_AT_THE_END = 0.5
run = RunFolder(Path(sys.argv[1]))
tracked = run.config().model_copy(update={"tracking": config.Tracking(mlflow=sys.argv[2])})
with following.following({"MLflow": MLflow(run, tracked).look}):
    sys.stdin.readline()
"""


def test_a_process_ends_though_its_tracker_still_waits(
    run: RunFolder, silent: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="extra mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "6000")
    silent.settimeout(600)
    command: list[str | Path] = [sys.executable, "-c", LEFT_BEHIND, run.path, address_of(silent)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        silent.accept()[0],
    ):
        _, errors = process.communicate(b"\n", timeout=600)
    assert process.returncode == 0
    assert b"the last metrics are not in MLflow: no answer" in errors


def test_the_end_does_not_wait_for_a_tracker_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(following, "log", lines.append)
    monkeypatch.setattr(following, "SECONDS_AT_THE_END", 2)
    over = threading.Event()

    def hang() -> None:
        over.wait()

    begin = time.monotonic()
    hanging = [f"place {n}" for n in range(20)]
    with following.following({**dict.fromkeys(hanging, hang), "one more": lambda: None}):
        pass
    assert time.monotonic() - begin < 30, "once for all of them, else 40"
    assert [line.rpartition(": ")[0] for line in lines] == [
        f"warning: the last metrics are not in {place}" for place in hanging
    ]
    over.set()


def test_a_tracker_that_is_refused_costs_a_line_and_a_last_try(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow", reason="extra mlflow")
    lines: list[str] = []
    monkeypatch.setattr(following, "log", lines.append)
    monkeypatch.setattr(following, "SECONDS_BETWEEN_LOOKS", 0.05)
    tracker = MLflow(run, with_tracking(run, mlflow=f"http://127.0.0.1:{free_port()}"))
    with following.following({"MLflow": tracker.look}):
        while not lines:
            time.sleep(0.02)
    assert [line.partition(": ")[2].partition(": ")[0] for line in lines] == [
        "metrics are not in MLflow yet, training continues",
        "the last metrics are not in MLflow",
    ]
    assert all("refused" in line for line in lines) and not caplog.records


@pytest.mark.parametrize(
    ("package", "setting"), [("tensorboard", True), ("mlflow", "http://127.0.0.1:9")]
)
def test_a_missing_package_is_said_before_anything_is_trained(
    package: str, setting: object, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == package else name)
    folder = RunFolder(tmp_path / "new")
    with pytest.raises(ConfigurationError, match=rf"tracking.{package}: .*\[{package}\]"):
        pipeline.run(with_tracking(run, **{package: setting}), folder)
    assert {path.name for path in folder.path.iterdir()} == {".lock", "config.yaml"}


def test_prometheus_reads_the_newest_row_of_each_variant_and_split(run: RunFolder) -> None:
    port = free_port()
    with (
        tracking.exposed(run, port),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONGEST) as answer,
    ):
        assert answer.headers["Content-Type"].startswith("text/plain")
        families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    rows = {(r["variant"], str(r["seed"]), r["split"]): r for r in run.metrics()}
    for name in ("epoch", "loss", "accuracy", "images_per_second"):
        family = families[f"inception_training_{name}"]
        assert family.type == "gauge"
        labels = ("variant", "seed", "split")
        got = {tuple(s.labels[label] for label in labels): s.value for s in family.samples}
        assert got == {key: row[name] for key, row in rows.items() if row[name] is not None}
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONGEST)


def test_that_a_scraper_went_is_not_in_the_log(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    port, others = free_port(), set(threading.enumerate())
    with tracking.exposed(run, port):
        with socket.create_connection(("127.0.0.1", port)) as scraper:
            scraper.sendall(b"GET /metr")
            reset = struct.pack("ii", 1, 0)  # closing then ends a connection at once
            scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONGEST):
            for thread in set(threading.enumerate()) - others:
                if "process_request_thread" in thread.name:
                    thread.join()
    assert capfd.readouterr().err == ""


def test_a_client_that_says_nothing_is_let_go_without_a_word(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "SILENCE", 0.2)
    port = free_port()
    with (
        tracking.exposed(run, port),
        socket.create_connection(("127.0.0.1", port), timeout=60) as silent,
    ):
        assert silent.recv(1) == b"", "it is closed at the other end"
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_is_a_configuration_error(run: RunFolder) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"tracking.prometheus: port {port}: Address already in use"
        with pytest.raises(ConfigurationError, match=message), tracking.exposed(run, port):
            pass


def test_on_a_terminal_all_variants_are_above_the_bar_while_they_train(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(force_terminal=True, file=io.StringIO(), width=80)
    monkeypatch.setattr(pipeline, "console", terminal)
    monkeypatch.setattr(following, "SECONDS_BETWEEN_LOOKS", 0.05)
    with pipeline._followed(run.config(), run):
        while not progress.above:
            time.sleep(0.02)
        terminal.print(*progress.above)
    assert not progress.above
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert all(shown.count(name) == 2 for name in ("scratch", "finetune", "frozen"))
