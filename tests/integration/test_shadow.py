"""A shadow beside the service: what clients see, what is counted, and what is concluded from it."""

import json
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import pytest
from command import job
from conftest import MakeOnce, free_port, pictures
from prometheus_client import CollectorRegistry
from service import Service, load, running, start

from jobs.delivery import verdict
from jobs.runs import RunFolder
from jobs.statistics import confidence_sequence
from serving import archive as archives
from serving.engines import Shadow
from serving.shadow import Guess, Mirror, Sent, guesses, outcomes

EVERYTHING = {"SERVING_ENGINE": "asgi", "SERVING_SHADOW_SHARE": "1"}


@pytest.mark.parametrize("share", [0.03, 0.5])
def test_the_interval_holds_the_share_at_every_look(share: float) -> None:
    """A fixed interval of 95 % would miss it at one of 500 looks in a third of the series."""
    series, looks = 400, 500
    counts = (np.random.default_rng(5).random((series, looks)) < share).cumsum(axis=1)
    ends = {
        (count, total): confidence_sequence(count, total)
        for total in range(1, looks + 1)
        for count in np.unique(counts[:, total - 1]).tolist()
    }
    missed = sum(
        any(
            not ends[count, total][0] <= share <= ends[count, total][1]
            for total, count in enumerate(row, start=1)
        )
        for row in counts.tolist()
    )
    assert missed / series <= 0.05
    assert confidence_sequence(0, 0) == (0.0, 1.0)
    low, high = confidence_sequence(5_000, 10_000)
    assert 0.48 < low < 0.49 and 0.51 < high < 0.52


def test_guesses_are_found_in_every_form_of_an_answer() -> None:
    one = {"label": None, "top": [{"label": "cat", "probability": 0.7}]}
    v2 = {"name": "probabilities", "shape": [2, 3], "data": [0.1, 0.7, 0.2, 0.5, 0.3, 0.2]}
    cat = Guess("cat", 0.7)
    assert list(guesses(json.dumps(one).encode())) == [cat]
    assert list(guesses(json.dumps({"predictions": [one, one]}).encode())) == [cat, cat]
    assert list(guesses(json.dumps({"outputs": [v2]}).encode())) == [Guess(1, 0.7), Guess(0, 0.5)]


def test_a_picture_on_which_they_differ_is_shared_by_the_probabilities() -> None:
    cat = Guess("cat", 0.7)
    assert outcomes(cat, Guess("cat", 0.1)) == {"agree": 1}
    for probability, share in ((0.7, 0.5), (0.9, 0.6), (0.1, 0.2)):
        shares = outcomes(cat, Guess("dog", probability))
        assert shares == pytest.approx({"shadow_surer": share, "live_surer": 1 - share})


class Engine(BaseHTTPRequestHandler):
    """A shadow's: a request's body says which class it has, and with which probability."""

    def do_GET(self) -> None:
        self._send(b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._send(body, 500 if body == b"fails" else 200)

    def _send(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirrored() -> Iterator[Callable[..., dict[str, float]]]:
    """Sends requests to a mirror; what it has counted afterwards."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    Thread(target=server.serve_forever, daemon=True).start()
    registry = CollectorRegistry()
    versions = {"live": "one", "shadow": "two"}
    shadow = Shadow(port=server.server_port, versions=versions, accuracies={"live": 0.9})
    mirror = Mirror(shadow, 1.0, registry)

    def send(*requests: Sent, counted: int) -> dict[str, float]:
        for request in requests:
            mirror.offer(request)

        def counts() -> dict[str, float]:
            samples = [s for metric in registry.collect() for s in metric.samples]
            return {" ".join([s.name, *s.labels.values()]): s.value for s in samples}

        name = "inception_shadow_requests_total"
        wait_for(lambda: sum(v for k, v in counts().items() if k.startswith(name)) == counted)
        return counts()

    yield send
    server.shutdown()
    server.server_close()


def test_a_mirror_counts_what_both_say(mirrored: Callable[..., dict[str, float]]) -> None:
    def said(label: str, probability: float) -> bytes:
        return json.dumps({"top": [{"label": label, "probability": probability}]}).encode()

    sent = [
        Sent(said("cat", 0.9), {}, said("cat", 0.8), 0.1),
        Sent(said("dog", 0.9), {}, said("cat", 0.8), 0.1),
        Sent(said("dog", 0.5), {}, said("cat", 0.8), 0.1),
        Sent(b"fails", {}, said("cat", 0.8), 0.1),
        Sent(b"no JSON", {}, said("cat", 0.8), 0.1),
        Sent(said("cat", 0.9), {"X-Request-Id": "golden"}, said("cat", 0.8), 0.1),
        Sent(said("cat", 0.9), {"Explain": "True"}, b"a picture", 0.1),
    ]
    counted = mirrored(*sent, counted=5)
    assert counted["inception_shadow_pictures_total agree"] == 1
    assert counted["inception_shadow_pictures_total shadow_surer"] == pytest.approx(0.55 + 0.35)
    assert counted["inception_shadow_pictures_total live_surer"] == pytest.approx(0.45 + 0.65)
    assert counted["inception_shadow_requests_total answered"] == 3
    assert counted["inception_shadow_requests_total failed"] == 2
    assert counted["inception_shadow_probability_sum live"] == pytest.approx(3 * 0.8)
    assert counted["inception_shadow_probability_sum shadow"] == pytest.approx(0.9 + 0.9 + 0.5)
    assert counted["inception_shadow_tested_accuracy live"] == 0.9


def test_a_shadow_that_never_listens_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """… as soon as loading cannot be the reason any more."""
    monkeypatch.setattr("serving.shadow.LOADING", 0.1)
    monkeypatch.setattr("serving.shadow.PAUSE", 0.01)
    registry = CollectorRegistry()
    versions = {"live": "one", "shadow": "two"}
    mirror = Mirror(Shadow(port=free_port(), versions=versions, accuracies={}), 1.0, registry)
    mirror.offer(Sent(b"", {}, b"{}", 0.1))
    name, outcome = "inception_shadow_requests_total", {"outcome": "failed"}
    wait_for(lambda: registry.get_sample_value(name, outcome) == 1)
    assert registry.get_sample_value(name, {"outcome": "answered"}) is None


@pytest.fixture(scope="session")
def other(archive: Path, make_once: MakeOnce) -> Path:
    """The same network as another version, which is less sure of itself."""

    def fill(folder: Path) -> None:
        archives.unpack(archive, folder)
        description = archives.open_model(folder).description
        changes = {"version": "other", "temperature": 3.0}
        archives.write_description(folder, description.model_copy(update=changes))

    return make_once("other", fill)


def test_a_shadow_is_compared_and_costs_no_answer_when_it_is_killed(
    archive: Path, other: Path, exported: RunFolder, tmp_path: Path
) -> None:
    files = pictures(exported, 4)
    given = {**EVERYTHING, "SHADOW_URI": str(other)}
    with running(archive, tmp_path / "state", **given) as service:
        metrics = f"{service.metrics}/metrics"
        label = service.predict(files[0])[1]["label"]
        with load(service, files[0], label, clients=2) as statuses:
            wait_for(lambda: verdict.read([metrics]).answered > 20)
            before = verdict.read([metrics, metrics])
            kill_shadow(service)
            wait_for(lambda: verdict.read([metrics]).failed > 5)
        assert set(statuses) == {200}
        # The supervisor may be waiting for the golden picture's answer.
        wait_for(lambda: [e["event"] for e in service.events()].count("shadow died") == 1)
        assert "the shadow gave no answer" in service.log.read_text()
        done = job("verdict", metrics, "--json")
        assert done.returncode == 4, done.stderr
        said = json.loads(done.stdout)
    assert said["advice"] == "stop" and "fails" in said["reason"]
    assert before.agree >= 40 and before.differ == 0, "two replicas count together"
    assert before.shadow_probability < before.live_probability, (
        "a higher temperature makes it less sure"
    )
    assert before.errors is not None and min(before.live_seconds, before.shadow_seconds) > 0


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.1)


def kill_shadow(service: Service) -> None:
    """The process whose settings are an engine's and that was given no shadow itself."""
    for child in psutil.Process(service.process.pid).children():
        words = child.cmdline()
        if words[1:3] == ["-m", "serving.asgi"] and "/other" in words[3]:
            child.kill()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"SHADOW_URI": "x.mar"}, "SERVING_SHADOW_URI: a shadow needs SERVING_ENGINE=asgi"),
        ({**EVERYTHING, "SHADOW_URI": "no/such.mar"}, "no/such.mar: no such file"),
    ],
)
def test_a_shadow_that_cannot_be_is_told_in_one_line(
    archive: Path, tmp_path: Path, given: dict[str, str], said: str
) -> None:
    service = start(archive, tmp_path / "state", **given)
    assert service.process.wait() in (2, 3)
    [line] = [line for line in service.log.read_text().splitlines() if not line.startswith("{")]
    assert said in line


def test_a_service_without_a_shadow_has_no_verdict(tmp_path: Path) -> None:
    page = tmp_path / "metrics"
    page.write_text("Requests2XX 1.0\n")
    done = job("verdict", page.as_uri())
    assert done.returncode == 3 and "this service has no shadow" in done.stderr
