"""Bulk scoring on a Ray cluster of two nodes: the rows of one machine, whatever dies on the way."""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from command import forked, job
from conftest import free_port, pictures
from object_store import BUCKET

from jobs.config import Storage
from jobs.demo import ObjectStore
from jobs.runs import RunFolder
from serving import Predictor, cluster, scoring
from serving.answers import SCHEMA, Folder
from serving.processes import script

pytest.importorskip("ray", reason="Ray is not installed: pip install 'inception-transfer[ray]'")
pytestmark = pytest.mark.slow

COUNT = 400
LONGEST = 1200  # seconds: without any node a driver waits for ever


@dataclass(frozen=True)
class Nodes:
    """A cluster of one machine: a head that computes nothing, and two nodes of one core."""

    address: str
    processes: list[psutil.Popen]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    port = free_port()
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    quiet |= {"RAY_local_fs_capacity_threshold": "1"}  # by default no disk 95 % of which is used
    # Where nothing answers: storage is the driver's alone.
    environment = {**os.environ, **quiet, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    node = [f"--address=127.0.0.1:{port}", "--num-cpus=1"]
    started = Nodes(f"127.0.0.1:{port}", [])
    # Of a short name, as its sockets' may have 107 characters.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        environment["TMPDIR"] = place
        head.append(f"--temp-dir={place}")
        try:
            for number, options in enumerate((head, node, node)):
                log = tmp_path / f"node-{number}"
                started.processes.append(node_that_runs(options, environment, log))
            yield started
        finally:
            for process in started.processes:
                end(process)


def node_that_runs(options: list[str], environment: dict[str, str], log: Path) -> psutil.Popen:
    """Ray gives a node 30 seconds to start, which is little on a machine with other work."""
    command = [script("ray"), "start", "--block", "--object-store-memory=100000000", *options]
    for _ in range(3):
        with log.open("wb") as file:
            process = psutil.Popen(command, env=environment, stdout=file, stderr=file)
        while process.poll() is None:
            if "will now block forever" in log.read_text():
                return process
            time.sleep(0.1)
        end(process)
    raise AssertionError(log.read_text()[-3000:])


def end(process: psutil.Popen) -> None:
    """Kills a node with all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = [process, *process.children(recursive=True)]
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(tree)


@pytest.fixture(scope="module")
def photos(exported: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    files = pictures(exported, 20)
    for number in range(COUNT - 1):
        (folder / f"{number:03}.png").write_bytes(files[number % len(files)])
    (folder / "damaged.jpg").write_bytes(b"no picture")
    return folder


def by_path(target: Path) -> dict[str, dict[str, Any]]:
    found = pq.read_table(target, schema=SCHEMA).to_pylist()
    assert len(found) == len({row["path"] for row in found}), "each picture is there once"
    return {row["path"]: row for row in found}


def in_small_parts(archive: Path, address: str, source: Path, target: Path) -> None:
    scoring.ROWS = cluster.BLOCK = 2
    cluster.score(archive, address, str(source), target)


def interrupted(run: Any, target: Path, parts: int, kill: Callable[[], None]) -> int:
    """Kills something as soon as there are so many parts; returns how many there were then."""
    run.start()
    while run.is_alive() and len(Folder(target).names()) < parts:
        time.sleep(0.01)
    assert run.is_alive(), "it was done before anything could be killed"
    there = len(Folder(target).names())
    kill()
    run.join(LONGEST)
    if run.is_alive():
        run.kill()
        pytest.fail("it does not end")
    return there


def test_every_picture_is_there_once_when_driver_and_node_were_killed(
    nodes: Nodes, archive: Path, photos: Path, tmp_path: Path
) -> None:
    target, expected = tmp_path / "out", tmp_path / "expected"
    work = (in_small_parts, archive, nodes.address, photos, target)
    driver = forked(*work)
    first = interrupted(driver, target, 2, lambda: os.kill(driver.pid or 0, signal.SIGKILL))
    assert first < COUNT / 2

    again = forked(*work)
    there = interrupted(again, target, first + 3, lambda: end(nodes.processes[2]))
    assert again.exitcode == 0 and there < COUNT / 2, "most was done without that node"

    found = by_path(target)
    scoring.score(Predictor.open(archive, threads=1), str(photos), expected, threads=1)
    assert found.keys() == by_path(expected).keys() and len(found) == COUNT
    for path, row in by_path(expected).items():
        assert found[path].pop("probability") == pytest.approx(row.pop("probability"), abs=1e-5)
        assert {e["label"] for e in found[path].pop("top") or ()} == {
            e["label"] for e in row.pop("top") or ()
        }
        familiarity = found[path].pop("familiarity"), row.pop("familiarity")
        assert familiarity[0] == pytest.approx(familiarity[1], abs=1e-5)
        assert found[path] == row


def test_the_command_says_on_ray_what_it_says_on_one_machine(
    nodes: Nodes, archive: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "list.txt").write_text("001.png\ndamaged.jpg\ngone.png\n")
    command: list[str | Path] = ["score", photos / "list.txt", "--out", tmp_path / "out"]
    command += ["--model", archive, "--ray", nodes.address]
    done = job(*command, module="serving")
    assert done.returncode == 0, done.stderr
    assert "3 scored" in done.stderr and "1 refused: not readable" in done.stderr
    assert by_path(tmp_path / "out")["001.png"]["label"]
    again = job(*command, module="serving")
    assert "0 scored, nothing new; 3 were there already" in again.stderr
    here = job(*command[:-2], module="serving")
    assert "0 scored, nothing new; 3 were there already" in here.stderr, "nor without Ray"


def test_a_cluster_that_is_out_of_reach_is_one_line_and_exit_code_3(
    archive: Path, photos: Path, tmp_path: Path
) -> None:
    command: list[str | Path] = ["score", photos, "--out", tmp_path / "out", "--model", archive]
    wrong = job(*command, "--ray", "127.0.0.1:1", module="serving")
    assert wrong.returncode == 3 and "Traceback" not in wrong.stderr, wrong.stderr
    assert wrong.stderr.splitlines()[-1].startswith("error: no Ray cluster answers at 127.0.0.1:1")


def test_storage_that_nodes_do_not_reach_is_one_line_and_exit_code_3(
    nodes: Nodes, archive: Path, store: ObjectStore, settings: Storage, tmp_path: Path
) -> None:
    store.client().put_object(Bucket=BUCKET, Key="ray/1.png", Body=b"a picture")
    command: list[str | Path] = ["score", f"s3://{BUCKET}/ray/", "--out", tmp_path / "out"]
    command += ["--model", archive]
    here = {"AWS_ENDPOINT_URL": store.address, "AWS_DEFAULT_REGION": "us-east-1"}
    done = job(*command, "--ray", nodes.address, module="serving", **here)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: s3://{BUCKET}/ray/1.png: ")
