"""What the supervisor makes of a service that is slow, busy, wrong or frozen."""

import errno
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, free_port, pictures, predictions
from service import LONGEST, Service, get, load, running

from jobs import demo
from jobs.runs import RunFolder
from serving import processes, readiness, supervisor
from serving.archive import Counts, Data, Description, Golden, Model, ModelError
from serving.log import log
from serving.readiness import Readiness
from serving.settings import Settings, SettingsError
from serving.supervisor import Supervisor


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A supervisor that runs in this process takes them."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


DESCRIPTION = Description(
    name="m",
    version="1",
    variant="frozen",
    seed=0,
    weights="random weights",
    data=Data(
        source="generated",
        classes=("cat", "dog"),
        image_size=(32, 32),
        images=Counts(train=8, validation=2, test=2),
        test_digest="d",
    ),
    selected_on="validation",
    forms=("float", "program"),
)
MODEL = Model(Path("m.mar"), DESCRIPTION, [Golden(b"picture", (0.9, 0.1))])
RIGHT = {"top": [{"label": "cat", "probability": 0.91}, {"label": "dog", "probability": 0.09}]}
Reply = tuple[int, bytes] | None  # status and body, or silence


class Fake:
    """A gateway and TorchServe's metrics in one, which answer what the test says."""

    def __init__(self) -> None:
        self.golden: Reply = (200, json.dumps(RIGHT).encode())
        self.metrics: Reply = (200, b"")
        self.over = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.reply(fake.golden)

            def do_GET(self) -> None:
                self.reply(fake.metrics)

            def reply(self, reply: Reply) -> None:
                if reply is None:
                    fake.over.wait()
                    return
                self.send_response(reply[0])
                self.send_header("Content-Length", str(len(reply[1])))
                self.end_headers()
                self.wfile.write(reply[1])

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{self.server.server_port}"
        self.readiness = Readiness(MODEL, f"{address}/predictions/m", f"{address}/metrics")

    def count(self, answers: int) -> None:
        self.metrics = (200, f'inception_predictions_total{{ModelName="m"}} {answers}.0\n'.encode())


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    yield fake
    fake.over.set()
    fake.server.shutdown()
    fake.server.server_close()


BUSY = (503, b'{"error": {"code": "busy"}}')
SILENCE = None


def test_the_expected_answer_is_ready_and_another_is_not(fake: Fake) -> None:
    assert fake.readiness.problem(ready=False) is None
    fake.golden = (200, b'{"top": [{"label": "dog", "probability": 0.9}]}')
    assert fake.readiness.problem(ready=True) == "the golden picture is dog with 0.900"


def test_one_and_the_same_answer_for_everything_is_found_out(fake: Fake) -> None:
    golden = [Golden(b"a cat", (0.9, 0.1)), Golden(b"a dog", (0.2, 0.8))]
    model = Model(Path("m.mar"), DESCRIPTION, golden)
    look = Readiness(model, fake.readiness.url, fake.readiness.metrics)
    assert look.problem(ready=False) is None
    assert look.problem(ready=True) == "the golden picture is cat with 0.910"


@pytest.mark.parametrize(
    "answer",
    [
        *(b'{"label": "cat"}', b"[]", b"null", b"no JSON", b'{"top": [{"label": "cat"}]}'),
        b'{"top": [{"label": "cat", "probability": null}]}',
        b'{"top": [{"label": "cow", "probability": 0.9}]}',
    ],
)
def test_an_answer_that_is_none_is_a_problem_and_no_crash(fake: Fake, answer: bytes) -> None:
    fake.golden = (200, answer)
    assert "the golden picture got" in (fake.readiness.problem(ready=True) or "")


@pytest.mark.parametrize(
    "answer", [b"what?\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n1"]
)
def test_what_is_no_http_is_a_problem_and_no_crash(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(answer)

        threading.Thread(target=answer_once, daemon=True).start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        problem = Readiness(MODEL, address, address).problem(ready=True)
    assert problem is not None and "got no answer" in problem


def test_nobody_there_is_a_problem_at_once(fake: Fake) -> None:
    assert fake.readiness.problem(ready=True) is None
    fake.server.shutdown()
    fake.server.server_close()
    assert "got no answer" in (fake.readiness.problem(ready=True) or "")


def test_whatever_a_look_raises_ends_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(fake.readiness, "_ask", fail)
    assert "planted" in (fake.readiness.problem(ready=True) or "")


@pytest.mark.parametrize("golden", [BUSY, SILENCE], ids=["full", "long queue"])
def test_a_busy_engine_is_ready_as_long_as_it_answers_others(
    fake: Fake, golden: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(readiness, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(readiness, "START_SECONDS", readiness.LOOK_SECONDS)
    assert fake.readiness.problem(ready=True) is None
    fake.golden = golden
    for count in (1, 2):
        now += 0.6 * readiness.BUSY_SECONDS
        fake.count(count)
        assert fake.readiness.problem(ready=True) is None
    now += readiness.BUSY_SECONDS
    assert fake.readiness.problem(ready=True) is not None, "nobody is answered any more"
    fake.count(9)
    assert fake.readiness.problem(ready=False) is not None, "who was not ready has to answer"


def test_looks_at_the_metrics_which_torchserve_counts_are_no_answers(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(readiness, "time", SimpleNamespace(monotonic=lambda: now))
    assert fake.readiness.problem(ready=True) is None
    fake.golden, problems = BUSY, []
    for looks in range(4):
        now += 0.4 * readiness.BUSY_SECONDS
        fake.metrics = (200, b"Requests2XX{} %d.0\ninception_predictions_total{} 7.0\n" % looks)
        problems.append(fake.readiness.problem(ready=True))
    assert problems[:2] == [None, None] and None not in problems[2:]


def watched(monkeypatch: pytest.MonkeyPatch, *problems: str | None) -> tuple[int, int]:
    """What a supervisor ends with that looks every five minutes, finds these and then is told to
    stop; and how many of them it has not seen."""
    left = list(problems)
    one = Supervisor(Settings(model_uri="m.mar"))

    def problem(ready: bool) -> str | None:
        if len(left) == 1:
            one.stopping.set()
        return left.pop(0)

    def minutes() -> float:
        return 300.0 * (len(problems) - len(left))

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=minutes))
    for name in ("WATCH_SECONDS", "INTERVAL_SECONDS"):
        monkeypatch.setattr(supervisor, name, 0.0)
    monkeypatch.setattr(one, "_drain", lambda: 0)
    one.readiness = SimpleNamespace(problem=problem)  # type: ignore[assignment]
    return one._watch(), len(left)


def test_a_service_that_was_ready_and_is_not_any_more_for_long_ends_to_be_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watched(monkeypatch, *["starting"] * 5) == (0, 0), "it may take its time"
    assert watched(monkeypatch, *[None] * 5) == (0, 0)
    assert watched(monkeypatch, None, "wrong", "wrong", None, "wrong", "wrong", None) == (0, 0)
    assert watched(monkeypatch, None, *["wrong"] * 5) == (1, 2)
    said = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert said["event"] == "not ready for too long"


def test_told_to_stop_while_it_fetches_it_does_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def located(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("it goes on")

    monkeypatch.setattr(supervisor, "located", located)
    settings = Settings(
        model_uri="m.mar", state_dir=tmp_path, port=free_port(), metrics_port=free_port()
    )
    with pytest.raises(SystemExit) as ended:
        Supervisor(settings).run()
    assert ended.value.code == 0 and not list(tmp_path.iterdir())


def test_the_gateway_takes_a_folder_with_a_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, str] = {}
    monkeypatch.setattr(processes, "spawn", lambda _, __, some: given.update(some))
    one = Supervisor(Settings(model_uri="m.mar"))
    one.model = MODEL
    one._gateway(tmp_path, {"inference": 1, "metrics": 2}, 3)
    command: list[str | Path] = [processes.caddy(), "adapt", "--adapter", "caddyfile"]
    command += ["--config", supervisor.GATEWAY / "Caddyfile"]
    environment = {**os.environ, **given, "PAGES": "/a b"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and '"root":"/a b"' in done.stdout, done.stderr


def test_answers_of_long_ago_do_not_make_an_engine_busy(fake: Fake) -> None:
    fake.golden = BUSY
    fake.count(1000)
    assert fake.readiness.problem(ready=True) is not None


@pytest.mark.parametrize(
    "metrics", [SILENCE, (500, b""), (200, b"inception_predictions_total x\n")]
)
def test_metrics_that_are_late_or_broken_end_nothing_that_speaks(
    fake: Fake, metrics: Reply
) -> None:
    assert fake.readiness.problem(ready=True) is None
    fake.golden, fake.metrics = BUSY, metrics
    assert fake.readiness.problem(ready=True) is None, "it was right a moment ago"


def test_an_engine_that_says_nothing_at_all_is_frozen(fake: Fake) -> None:
    assert fake.readiness.problem(ready=True) is None
    fake.golden = fake.metrics = SILENCE
    assert "timed out" in (fake.readiness.problem(ready=True) or "")


def test_a_frozen_engine_is_found_within_ten_seconds() -> None:
    assert readiness.INTERVAL_SECONDS + 0.25 + 2 * readiness.LOOK_SECONDS < 10


def test_a_gateway_that_does_not_stop_in_time_is_no_failure() -> None:
    """… of the service: it was told to stop, and stops with 0."""
    settings = Settings(model_uri="m.mar", endpoint_seconds=0)
    # It gets five seconds more than clients do: here half a second in all.
    supervisor = Supervisor(settings.model_copy(update={"drain_seconds": -4.5}))
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(); time.sleep(60)"
    command = [sys.executable, "-u", "-c", stubborn]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as gateway:
        assert gateway.stdout is not None
        gateway.stdout.readline()  # from here on it does not listen
        supervisor.children["gateway"] = gateway
        try:
            assert supervisor._drain() == 0
        finally:
            gateway.kill()


def test_memory_that_is_just_too_much_is_not_said_to_be_the_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = Supervisor(Settings(model_uri="m.mar", memory_mb=1500))
    monkeypatch.setattr("serving.supervisor.processes.held_memory", lambda _: 1_500_100_000)
    assert supervisor._is_too_large()
    said = json.loads(capsys.readouterr().err)
    assert (said["used_mb"], said["limit_mb"]) == (1501, 1500)


def test_where_memory_runs_short_the_shadow_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Supervisor(Settings(model_uri="m.mar", memory_mb=1500))
    monkeypatch.setattr("serving.supervisor.processes.held_memory", lambda _: 2_000_000_000)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as shadow:
        one.shadow = shadow
        assert not one._is_too_large() and shadow.poll() == -signal.SIGKILL
    one.shadow = None  # as the next look finds
    assert one._is_too_large()


def java_of(service: Service) -> int:
    """TorchServe's Java process: the child of its launcher, which the supervisor started."""
    pattern = f"java.*{service.log.parent}"
    done = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
    return min(map(int, done.stdout.split()), key=lambda pid: not is_java(pid))


def is_java(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "java"


def seconds_until(condition: Callable[[], bool]) -> float:
    start = time.monotonic()
    while not condition():
        time.sleep(0.1)
    return time.monotonic() - start


@pytest.mark.slow
def test_a_frozen_torchserve_is_soon_not_ready_and_a_busy_one_stays_so(
    archive: Path, exported: RunFolder, tmp_path: Path
) -> None:
    file, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    with running(archive, tmp_path / "state", SERVING_WORKERS="1") as service:

        def ready() -> bool:
            return get(f"{service.address}/readyz")[0] == 200

        with load(service, file, label, clients=10):
            for _ in range(60):  # 12 s, longer than it takes to call it frozen
                assert ready()
                time.sleep(0.2)
        os.kill(java_of(service), signal.SIGSTOP)
        try:
            took = seconds_until(lambda: not ready())
        finally:
            os.kill(java_of(service), signal.SIGCONT)
        assert took < 30, "three times what it is set to, for a busy machine"
        seconds_until(ready)


def test_golden_pictures_and_the_key_go_to_no_proxy(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert fake.readiness.problem(ready=False) is None
    fake.count(1)
    assert fake.readiness._count_answers() == 1, "its metrics are asked, too"


def test_it_says_that_it_drains_while_a_look_still_takes() -> None:
    supervisor = Supervisor(Settings(model_uri="m.mar"))
    supervisor.problem = None
    assert supervisor._problem_now() is None
    supervisor.stopping.set()
    assert supervisor._problem_now() == "draining"


def test_a_state_directory_that_is_not_there_is_a_wrong_setting(tmp_path: Path) -> None:
    supervisor = Supervisor(Settings(model_uri="m.mar", state_dir=tmp_path / "none"))
    with pytest.raises(SettingsError, match="SERVING_STATE_DIR: No such file or directory"):
        supervisor.run()


@pytest.mark.parametrize("name", ["SERVING_PORT", "SERVING_METRICS_PORT"])
def test_a_port_that_somebody_has_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    """The gateway would share it."""
    with socket.create_server(("", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        done = serve(
            {
                "MODEL_URI": "no/such.mar",
                "SERVING_PORT": str(free_port()),
                "SERVING_METRICS_PORT": str(free_port()),
                "SERVING_STATE_DIR": str(tmp_path),
                name: str(port),
            }
        )
    assert done.returncode == 2
    assert done.stderr == f"error: port {port}: Address already in use\n"


def serve(given: dict[str, str], prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """A service that cannot start."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "serving"],
        cwd=ROOT,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST,
    )


def test_a_disk_that_takes_nothing_is_told_in_one_line(archive: Path, tmp_path: Path) -> None:
    given = {
        "MODEL_URI": str(archive),
        "SERVING_PORT": str(free_port()),
        "SERVING_METRICS_PORT": str(free_port()),
        "SERVING_STATE_DIR": str(tmp_path),
    }
    done = serve(given, prefix=["sh", "-c", 'ulimit -f 0; exec "$@"', "sh"])
    assert done.returncode == 3
    assert done.stderr == "error: [Errno 27] File too large\n"
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("serving.supervisor.located", fill)
    settings = Settings(
        model_uri="m.mar", state_dir=tmp_path, port=free_port(), metrics_port=free_port()
    )
    with pytest.raises(ModelError, match=f"No space left on device: '{tmp_path}/"):
        Supervisor(settings).run()


def test_a_port_that_is_bound_and_not_listened_to_is_free() -> None:
    """As `jobs demo` keeps one for its service."""
    port = free_port()
    assert demo._reserved(port)
    supervisor._refuse_taken(port)


def test_a_log_that_nobody_reads_any_more_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    terminal = os.fdopen(theirs, "w")
    os.close(ours)
    monkeypatch.setattr(sys, "stderr", terminal)
    log("draining")
    with pytest.raises(OSError, match="Input/output error"):
        terminal.close()


def test_a_hangup_is_a_wish_to_stop_unless_it_is_to_be_ignored(tmp_path: Path) -> None:
    """… as nohup wants it."""
    ignored, by_default = signal.SIG_IGN, signal.SIG_DFL
    for number, found, stops in (
        (signal.SIGHUP, ignored, False),
        (signal.SIGHUP, by_default, True),
        (signal.SIGINT, ignored, True),  # as a shell starts what is to run in the background
    ):
        one = Supervisor(Settings(model_uri="m.mar", state_dir=tmp_path / "none"))
        for each in (signal.SIGHUP, signal.SIGINT):
            signal.signal(each, by_default)
        signal.signal(number, found)
        with pytest.raises(SettingsError, match="SERVING_STATE_DIR"):
            one.run()
        assert signal.getsignal(number) is not by_default
        signal.raise_signal(number)
        assert one.stopping.is_set() is stops
