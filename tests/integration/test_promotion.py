"""What production serves changes through a gate, one promotion at a time, and goes back."""

import json
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.awsrequest import AWSResponse
from command import called, forked
from conftest import MODEL, tiny_config
from memory_s3 import BUCKET as MEMORY
from memory_s3 import Memory, in_memory
from object_store import BUCKET, Proxy, exported_run, finished_run, keys_of
from service import LONGEST
from typer.testing import CliRunner

from jobs import config
from jobs.cli import app
from jobs.config import Config
from jobs.delivery import deployment, promotion
from jobs.delivery.promotion import promote, rollback
from jobs.delivery.pruning import prune
from jobs.delivery.publishing import run_key
from jobs.delivery.registry import HISTORY, Registry
from jobs.delivery.storage import Storage
from jobs.demo import ObjectStore
from jobs.errors import ConfigurationError, NotPromoted, UnavailableError
from jobs.runs import RunFolder, read_arrays
from serving import s3
from serving.archive import File, Pointer
from serving.files import digest_of, write


def gate(settings: config.Storage, **changes: Any) -> Config:
    return tiny_config(
        storage=settings.model_dump(), export={"name": "m"}, promotion={"tolerance": 2.0, **changes}
    )


@pytest.fixture
def registry(settings: config.Storage) -> Registry:
    return Registry(Storage(settings), "m")


def serving(registry: Registry) -> str | None:
    current = registry.channel("production")
    return current.version if current else None


def test_a_promotion_writes_the_version_and_then_the_channel(
    store: ObjectStore, settings: config.Storage, registry: Registry, tmp_path: Path
) -> None:
    run = exported_run(tmp_path / "one", right=150)
    uri = promote(run, gate(settings))
    assert uri == f"{settings.uri}/models/m/one/"
    assert {key for key in keys_of(store, settings) if key.startswith("models/")} == {
        "models/m/one/model.mar",
        "models/m/one/test_predictions.npz",
        "models/m/one/version.json",
        "models/m/channels/production.json",
    }
    digest = digest_of(run.path / "model" / "m.mar")
    whole = registry.version("one")
    assert whole.description.test is not None and whole.description.test.accuracy == 0.75
    assert whole.description.version == "one"
    assert whole.files["model.mar"] == File(size=5000, sha256=digest)
    current = registry.channel("production")
    assert current is not None
    assert current.pointer == Pointer(
        name="m", version="one", sha256=digest, time=current.pointer.time
    )
    before = current.etag
    assert promote(run, gate(settings)) == uri
    assert registry.channel("production").etag == before  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("right", "digest", "changes", "reason"),
    [
        (140, "d", {"min_accuracy": 80}, r"70.00 % of the test images are right, 80 % are needed"),
        (145, "d", {}, r"2.50 points worse than champion, which serves; 2 are allowed"),
        (199, "other", {}, r"champion, which serves, was tested on other images"),
    ],
)
def test_a_closed_gate_gives_its_reason_and_leaves_everything_published(
    store: ObjectStore,
    settings: config.Storage,
    registry: Registry,
    tmp_path: Path,
    right: int,
    digest: str,
    changes: dict[str, Any],
    reason: str,
) -> None:
    promote(exported_run(tmp_path / "champion", right=150), gate(settings))
    challenger = exported_run(tmp_path / "challenger", right, digest=digest)
    with pytest.raises(NotPromoted, match=reason) as caught:
        promote(challenger, gate(settings, **changes))
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    assert serving(registry) == "champion"
    assert f"{run_key(challenger)}/manifest.json" in keys_of(store, settings)
    assert registry.versions() == ["champion"]


@pytest.mark.parametrize(
    ("right", "first", "complaint"),
    [
        (150, 0, None),  # and wrong on all that are new, which the other was not asked
        (100, 60, None),  # right on 60 to 159
        (140, 0, r"5.00 points worse than champion"),
        (50, 60, r"28.57 points worse than champion"),
        (300, 120, r"tested on other images: 80 of its 200 are here"),
    ],
)
def test_a_test_set_that_grew_is_compared_on_the_pictures_that_both_were_asked(
    settings: config.Storage,
    registry: Registry,
    tmp_path: Path,
    right: int,
    first: int,
    complaint: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The champion is right on pictures 0 to 149 of 200; the challenger is asked 300."""
    promote(exported_run(tmp_path / "champion", right=150), gate(settings))
    challenger = exported_run(tmp_path / "challenger", right, images=300, first=first)
    if complaint is None:
        promote(challenger, gate(settings))
        assert serving(registry) == "challenger"
    else:
        with pytest.raises(NotPromoted, match=complaint):
            promote(challenger, gate(settings))
        assert serving(registry) == "champion"
    said = capsys.readouterr().err
    if first < 120:
        new = 300 - (200 - first)
        assert (
            f"of {new} new test images are right; what follows is about the {200 - first}" in said
        )


def test_a_picture_of_another_class_than_before_is_not_compared(
    settings: config.Storage, registry: Registry, tmp_path: Path
) -> None:
    promote(exported_run(tmp_path / "champion", right=150), gate(settings))
    challenger = exported_run(tmp_path / "challenger", right=10)
    arrays = read_arrays(challenger.path / "model" / "m.npz")
    classes = registry.version("champion").description.data.classes
    ours = promotion._right_by_picture(arrays, classes)
    theirs = promotion._right_by_picture(arrays, classes[1:] + classes[:1])
    assert len(ours) == len(theirs) == len(arrays["labels"]) and not set(ours) & set(theirs)


def test_a_little_worse_is_let_through_and_so_is_a_new_test_set_when_asked(
    settings: config.Storage, registry: Registry, tmp_path: Path
) -> None:
    promote(exported_run(tmp_path / "a", right=150), gate(settings))
    promote(exported_run(tmp_path / "b", right=147), gate(settings))
    assert serving(registry) == "b"
    promote(exported_run(tmp_path / "c", right=20, digest="x"), gate(settings, tolerance=None))
    assert serving(registry) == "c"


def test_an_archive_that_export_has_not_checked_is_stopped(
    settings: config.Storage, registry: Registry, tmp_path: Path
) -> None:
    run = exported_run(tmp_path / "a", right=150)
    write(run.path / "model" / "m.mar", b"something else")
    run.write_manifest()
    with pytest.raises(NotPromoted, match=r"m.mar is not the file that export has checked"):
        promote(run, gate(settings))
    with pytest.raises(
        UnavailableError, match=r"has no m.mar; `export .*bare --set export.name=m` makes it"
    ):
        promote(finished_run(tmp_path / "bare", 10), gate(settings))
    assert serving(registry) is None


def test_a_version_is_written_once(
    settings: config.Storage, registry: Registry, tmp_path: Path
) -> None:
    run = exported_run(tmp_path / "x" / "one", right=150)
    promote(run, gate(settings))
    before = registry.version("one")
    again = exported_run(tmp_path / "y" / "one", right=200)
    environment = run.path / "environment.json"
    write(again.path / "environment.json", environment.read_bytes())
    again.write_manifest()
    with pytest.raises(ConfigurationError, match="another model is there, and versions are writ"):
        promote(again, gate(settings))
    assert registry.version("one") == before


def test_the_real_archive_passes_the_gate_with_its_own_handler(
    settings: config.Storage, exported: RunFolder, tmp_path: Path
) -> None:
    sets = [f"storage.{k}={json.dumps(v)}" for k, v in settings.model_dump().items()]
    arguments = [a for s in sets for a in ("--set", s)]
    slow = called("promote", exported.path, *arguments, "--set", "promotion.max_latency_ms=0.001")
    assert slow.returncode == 4, slow.stderr
    assert "ms for a picture on one core, 0.001 are allowed" in " ".join(slow.stderr.split())
    done = called("promote", exported.path, *arguments, "--set", "promotion.max_latency_ms=60000")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{settings.uri}/models/{MODEL}/exported/"

    listed = called("models", *arguments)
    assert listed.returncode == 0, listed.stderr
    assert "exported" in listed.stdout and "production" in listed.stdout
    fetched = called("fetch", *arguments, "--out", tmp_path / "new" / "folder")
    assert fetched.returncode == 0, fetched.stderr
    file = Path(fetched.stdout.strip())
    assert digest_of(file) == digest_of(exported.path / "model" / f"{MODEL}.mar")
    alone = called("rollback", *arguments)
    assert alone.returncode == 3 and "nothing served before exported" in alone.stderr


# Several at once

RIVALS, ROUNDS = 4, 10


def contend(number: int, rounds: int, settings: config.Storage, barrier: Any, report: Any) -> None:
    """Swaps a channel again and again; all rivals have read it before any of them does."""
    registry = Registry(Storage(settings), "m")
    for turn in range(rounds):
        champion = registry.channel("production")
        barrier.wait()
        try:
            promotion._swap(registry, "production", f"rival{number}", champion)
            report((turn, number, "won"))
        except NotPromoted as error:
            report((turn, number, str(error)))
        barrier.wait()


def check_rounds(outcomes: list[tuple[int, int, str]], rounds: int, registry: Registry) -> None:
    winners = []
    for turn in range(rounds):
        of_turn = {number: outcome for t, number, outcome in outcomes if t == turn}
        assert len(of_turn) == RIVALS
        won = [number for number, outcome in of_turn.items() if outcome == "won"]
        assert len(won) == 1, of_turn
        winners.append(f"rival{won[0]}")
        lost = [outcome for outcome in of_turn.values() if outcome != "won"]
        assert all(f"made production point to {winners[-1]} meanwhile" in text for text in lost)
    current = registry.channel("production")
    assert current is not None and current.version == winners[-1]
    history = [earlier.version for earlier in current.pointer.history]
    assert history == winners[-2::-1][:HISTORY], "an earlier promotion was overwritten"


@pytest.fixture
def rivals(settings: config.Storage, registry: Registry, tmp_path: Path) -> None:
    """Their versions are there; they only have to be promoted."""
    for number in range(RIVALS):
        candidate = promotion.read_candidate(exported_run(tmp_path / f"rival{number}", 150), "m")
        registry.add(candidate.files, candidate.record)


@pytest.mark.slow
@pytest.mark.usefixtures("rivals")
def test_of_promotions_at_once_in_threads_exactly_one_wins(
    settings: config.Storage, registry: Registry
) -> None:
    outcomes: list[tuple[int, int, str]] = []
    barrier = threading.Barrier(RIVALS, timeout=LONGEST)
    with ThreadPoolExecutor(RIVALS) as threads:
        work = (ROUNDS, settings, barrier, outcomes.append)
        tried = [threads.submit(contend, number, *work) for number in range(RIVALS)]
        for one in tried:
            one.result()
    check_rounds(outcomes, ROUNDS, registry)


def contend_in_a_process(number: int, settings: config.Storage, barrier: Any, queue: Any) -> None:
    contend(number, ROUNDS, settings, barrier, queue.put)


@pytest.mark.usefixtures("rivals")
def test_of_promotions_at_once_in_processes_exactly_one_wins(
    settings: config.Storage, registry: Registry
) -> None:
    context = multiprocessing.get_context("forkserver")
    barrier, queue = context.Barrier(RIVALS, timeout=LONGEST), context.Queue()
    processes = [
        forked(contend_in_a_process, number, settings, barrier, queue) for number in range(RIVALS)
    ]
    for process in processes:
        process.start()
    outcomes = [queue.get(timeout=LONGEST) for _ in range(RIVALS * ROUNDS)]
    for process in processes:
        process.join()
    check_rounds(outcomes, ROUNDS, registry)


def on_put(registry: Registry, act: Callable[[int, Any], Any]) -> list[int]:
    """Calls `act` with a count and the request before each write of a channel is sent."""
    calls: list[int] = []

    def before(request: Any, **_: Any) -> Any:
        if "/channels/" not in request.url:
            return None
        calls.append(len(calls))
        return act(calls[-1], request)

    registry.storage.client.meta.events.register("before-send.s3.PutObject", before)
    return calls


def test_a_swap_whose_answer_is_lost_is_recognised_as_our_own(
    settings: config.Storage, proxy: Proxy, tmp_path: Path
) -> None:
    promote(exported_run(tmp_path / "a", right=150), gate(settings))
    promoted = exported_run(tmp_path / "b", right=150)
    candidate = promotion.read_candidate(promoted, "m")
    changes = {"endpoint_url": proxy.address, "read_timeout": 5.0, "attempts": 3}
    registry = Registry(Storage(settings.model_copy(update=changes)), "m")
    registry.add(candidate.files, candidate.record)

    def lose_the_first_answer(count: int, _: Any) -> None:
        proxy.swallow.set() if count == 0 else proxy.swallow.clear()

    calls = on_put(registry, lose_the_first_answer)
    promotion._swap(registry, "production", "b", registry.channel("production"))
    assert len(calls) == 2 and serving(registry) == "b"


def test_a_409_is_tried_again(
    settings: config.Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "CONFLICT_PAUSES", (0.0, 0.0))
    run = exported_run(tmp_path / "a", right=150)
    registry = Registry(Storage(settings), "m")
    candidate = promotion.read_candidate(run, "m")
    registry.add(candidate.files, candidate.record)
    body = b"<Error><Code>ConditionalRequestConflict</Code><Message>again</Message></Error>"

    class Raw:
        def stream(self) -> list[bytes]:
            return [body]

    def conflict_twice(count: int, request: Any) -> AWSResponse | None:
        return AWSResponse(request.url, 409, {}, Raw()) if count < 2 else None

    calls = on_put(registry, conflict_twice)
    registry.point("production", "a", None)
    assert len(calls) == 3 and serving(registry) == "a"


# Back


def test_rollback_goes_back_and_further_back_and_never_to_what_was_left(
    settings: config.Storage, registry: Registry, tmp_path: Path
) -> None:
    resolved = gate(settings)
    for name in "abc":
        promote(exported_run(tmp_path / name, right=150), resolved)
    assert rollback(resolved) == f"{settings.uri}/models/m/b/"
    assert serving(registry) == "b"
    rollback(resolved)
    assert serving(registry) == "a"
    with pytest.raises(UnavailableError, match="nothing served before a; name a version"):
        rollback(resolved)
    promote(exported_run(tmp_path / "d", right=150), resolved)
    rollback(resolved)
    assert serving(registry) == "a"
    rollback(resolved, "c")
    assert serving(registry) == "c"
    with pytest.raises(UnavailableError, match="no such version; `models` lists them"):
        rollback(resolved, "z")
    current = registry.channel("production")
    assert current is not None
    history = [earlier.version for earlier in current.pointer.history]
    assert history == ["a", "d", "a", "b", "c", "b", "a"]


def test_a_channel_that_never_pointed_anywhere_has_nothing_to_go_back_to(
    settings: config.Storage,
) -> None:
    with pytest.raises(UnavailableError, match="production has never pointed to a version"):
        rollback(gate(settings))


def test_a_damaged_archive_is_not_fetched(
    settings: config.Storage, registry: Registry, tmp_path: Path
) -> None:
    promote(exported_run(tmp_path / "a", right=150), gate(settings))
    found = registry.storage.get("models/m/a/model.mar")
    assert found is not None
    body = found.body[:-1] + bytes([found.body[-1] ^ 1])
    registry.storage.put("models/m/a/model.mar", body, replacing=found.etag)
    with pytest.raises(UnavailableError, match=r"model.mar is damaged there"):
        promotion.fetch(gate(settings), None, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# Prune


def later(days: float) -> Callable[[], datetime]:
    return lambda: datetime.now(UTC) + timedelta(days=days)


def test_prune_goes_by_its_rule_and_spares_what_a_channel_names(
    store: ObjectStore, settings: config.Storage, registry: Registry, tmp_path: Path
) -> None:
    resolved, storage = gate(settings), registry.storage
    for name in ("a", "b"):
        promote(exported_run(tmp_path / name, right=150), resolved)
    bad = exported_run(tmp_path / "bad", right=10)
    with pytest.raises(NotPromoted):
        promote(bad, resolved)
    candidate = promotion.read_candidate(bad, "m")
    stray = candidate.description.model_copy(update={"version": "stray"})
    registry.add(candidate.files, candidate.record.model_copy(update={"description": stray}))
    where = {"Bucket": BUCKET, "Key": f"{storage.prefix}/runs/dt=2026-01-31/run_id=x/big"}
    storage.client.create_multipart_upload(**where)
    before = keys_of(store, settings)

    def gone(days: float | None, keep: int, after: float, *, dry_run: bool = False) -> set[str]:
        found = prune(storage, days=days, keep=keep, now=later(after), dry_run=dry_run)
        return {item.prefix for item in found}

    assert not gone(0, 0, 0.5), "what was touched within a day stays"
    assert not gone(30, 0, 29)
    assert not gone(None, 9, 400)
    both = {"runs/dt=2026-01-31/run_id=bad/", "models/m/stray/"}
    assert gone(30, 0, 31, dry_run=True) == both
    assert keys_of(store, settings) == before
    assert gone(30, 0, 31) == both
    assert set(before) - set(keys_of(store, settings)) == {
        key for key in before if any(key.startswith(prefix) for prefix in both)
    }
    listed = storage.client.list_multipart_uploads(Bucket=BUCKET, Prefix=storage.prefix)
    assert not listed.get("Uploads")
    rollback(resolved)
    assert serving(registry) == "a"


def test_prune_deletes_what_is_a_run_a_part_or_a_version_and_no_file_of_somebody_else(
    memory: Memory,
) -> None:
    storage = Storage(in_memory())
    folders = ("runs/dt=2026-01-31/run_id=", "parts/r/", "models/m/")
    for age in ("old", "new"):
        for folder in folders:
            storage.put(f"{folder}{age}/file", b"x", replacing=None)
    foreign = ("runs/queries.sql", "runs/dt=2026-01-31/README.txt", "models/m/NOTES.md")
    for key in (*foreign, "runs/athena/tables/x/part.csv"):
        storage.put(key, b"x", replacing=None)
    for key in ("backups/db", "runs/athena/big", "runs/dt=2026-01-31/run_id=old/big"):
        memory.create_multipart_upload(Bucket=MEMORY, Key=f"some/prefix/{key}")
    before = set(memory.objects)
    gone = prune(storage, days=None, keep=1, now=later(2), dry_run=False)
    left = {upload["Key"] for upload in memory.uploads.values()}
    assert left == {"some/prefix/backups/db", "some/prefix/runs/athena/big"}
    assert [item.prefix for item in gone] == [f"{folder}old/" for folder in folders]
    assert before - set(memory.objects) == {f"some/prefix/{f}old/file" for f in folders}
    prune(storage, days=0, keep=0, now=later(2), dry_run=False)
    assert set(memory.objects) == {
        f"some/prefix/{key}" for key in (*foreign, "runs/athena/tables/x/part.csv")
    }


# In a cluster


class ApiServer(BaseHTTPRequestHandler):
    """Answers one endpoint of the Kubernetes API, and remembers what it was asked."""

    requests: list[tuple[str, str, Any]]

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, self.headers["Content-Type"], body))
        known = (
            self.path.partition("?")[0] == "/apis/apps/v1/namespaces/models/deployments/inception"
        )
        answer = json.dumps({"kind": "Deployment", "metadata": {"name": "inception"}}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_deployment_is_patched_to_the_exact_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ApiServer.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), ApiServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cluster = {"server": f"http://127.0.0.1:{server.server_port}"}
        context = {"cluster": "c", "user": "u", "namespace": "models"}
        kubeconfig = {
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": context}],
            "current-context": "x",
        }
        (tmp_path / "config").write_text(yaml.safe_dump(kubeconfig))
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config")
        )
        uri = "s3://bucket/prefix/models/m/a/"
        deployment.check("inception")
        deployment.patch("inception", uri, "promote")
        for patched in (deployment.check, lambda name: deployment.patch(name, uri, "promote")):
            with pytest.raises(UnavailableError, match="Deployment models/nobody: there is none"):
                patched("nobody")
        server.shutdown()
    (tried, _, nothing), (path, kind, body) = ApiServer.requests[:2]
    assert tried == f"{path}?dryRun=All" and nothing == {}
    assert path.endswith("/namespaces/models/deployments/inception")
    assert kind == "application/strategic-merge-patch+json"
    assert body["spec"]["template"]["spec"] == {
        "initContainers": [{"name": "model", "env": [{"name": "MODEL_URI", "value": uri}]}]
    }
    with pytest.raises(UnavailableError, match="Deployment models/inception: "):
        deployment.patch("inception", uri, "promote")  # nobody listens any more


def test_without_a_cluster_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/nowhere/config"
    )
    with pytest.raises(UnavailableError, match="--deployment: no cluster: "):
        deployment.patch("inception", "s3://b/p/", "promote")


@pytest.mark.parametrize("lost", ["from the start", "after it was asked"])
def test_a_rollback_whose_cluster_is_lost_can_be_repeated_and_goes_back_once(
    settings: config.Storage,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    for name in "abc":
        promote(exported_run(tmp_path / name, right=150), gate(settings))

    def send(name: str, body: Any, **options: str) -> str:
        if lost == "from the start" or not options:
            raise UnavailableError("gone")
        return name

    monkeypatch.setattr(deployment, "_send", send)
    arguments = [f"--set=storage.{k}={json.dumps(v)}" for k, v in settings.model_dump().items()]
    command = ["rollback", "--set=export.name=m", "--deployment=inference", *arguments]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UnavailableError)
    if lost == "from the start":
        assert str(done.exception) == "gone" and serving(registry) == "c"
        return
    assert (
        "the same command with version b goes on" in str(done.exception)
        and serving(registry) == "b"
    )
    CliRunner().invoke(app, ["rollback", "b", *command[1:]])
    assert serving(registry) == "b"


def test_a_rollback_while_a_cluster_is_asked_to_roll_out_is_what_it_serves_at_the_end(
    settings: config.Storage, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(exported_run(tmp_path / "a", right=150), gate(settings))
    run = exported_run(tmp_path / "b", right=150)
    asked: list[str] = []

    def patch(name: str, uri: str, cause: str) -> None:
        asked.append(uri)
        if len(asked) == 1:
            rollback(gate(settings))

    monkeypatch.setattr(deployment, "patch", patch)
    arguments = [f"--set=storage.{k}={json.dumps(v)}" for k, v in settings.model_dump().items()]
    command = ["promote", str(run.path), "--set=export.name=m", "--deployment=inference"]
    done = CliRunner().invoke(app, [*command, *arguments])
    assert done.exit_code == 0, done.output
    assert asked == [f"{settings.uri}/models/m/{version}/" for version in "ba"]
    assert serving(registry) == "a"
