"""Bulk scoring on a Ray cluster of two nodes: the rows of one machine, whatever dies on the way."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from command import forked, job
from conftest import pictures
from object_store import BUCKET

from jobs.demo import ObjectStore
from jobs.runs import RunFolder
from serving import Predictor, cluster, scoring

pytest.importorskip("ray", reason="Ray is not installed: pip install 'inception-transfer[ray]'")
pytestmark = pytest.mark.slow

COUNT = 400


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of one machine: a head that computes nothing, and two nodes of one core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # where nothing answers
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": 100_000_000}
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        for _ in range(2):
            started.add_node(num_cpus=1, **small)
        try:
            yield started
        finally:
            started.shutdown()


@pytest.fixture(scope="module")
def photos(exported: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    files = pictures(exported, 20)
    for number in range(COUNT - 1):
        (folder / f"{number:03}.png").write_bytes(files[number % len(files)])
    (folder / "damaged.jpg").write_bytes(b"no picture")
    return folder


def by_path(target: Path) -> dict[str, dict[str, Any]]:
    found = pq.read_table(target, schema=scoring.SCHEMA).to_pylist()
    assert len(found) == len({row["path"] for row in found}), "each picture is there once"
    return {row["path"]: row for row in found}


def in_small_parts(archive: Path, address: str, source: Path, target: Path) -> None:
    scoring.ROWS = cluster.BLOCK = 2
    cluster.score(archive, address, str(source), target)


def interrupted(run: Any, target: Path, parts: int, kill: Callable[[], None]) -> int:
    """Kills something as soon as there are so many parts; returns how many there were then."""
    run.start()
    while run.is_alive() and len(scoring.parts(target)) < parts:
        time.sleep(0.01)
    assert run.is_alive(), "it was done before anything could be killed"
    there = len(scoring.parts(target))
    kill()
    run.join()
    return there


def test_every_picture_is_there_once_when_driver_and_node_were_killed(
    nodes: Any, archive: Path, photos: Path, tmp_path: Path
) -> None:
    target, expected = tmp_path / "out", tmp_path / "expected"
    work = (in_small_parts, archive, nodes.address, photos, target)
    driver = forked(*work)
    first = interrupted(driver, target, 2, lambda: os.kill(driver.pid or 0, signal.SIGKILL))
    assert first < COUNT / 2

    again, lost = forked(*work), nodes.worker_nodes.copy().pop()
    there = interrupted(again, target, first + 3, lambda: nodes.remove_node(lost, False))
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
    nodes: Any, archive: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "list.txt").write_text("001.png\ndamaged.jpg\ngone.png\n")
    options = ["--model", archive, "--ray", nodes.address]
    command = ["score", photos / "list.txt", "--out", tmp_path / "out", *options]
    done = job(*command, module="serving")
    assert done.returncode == 0, done.stderr
    assert "3 scored" in done.stderr and "1 refused: not readable" in done.stderr
    assert by_path(tmp_path / "out")["001.png"]["label"]
    again = job(*command, module="serving")
    assert "0 scored, nothing new; 3 were there already" in again.stderr


def test_a_cluster_that_is_out_of_reach_is_one_line_and_exit_code_3(
    archive: Path, photos: Path, tmp_path: Path
) -> None:
    command = ["score", photos, "--out", tmp_path / "out", "--model", archive]
    wrong = job(*command, "--ray", "127.0.0.1:1", module="serving")
    assert wrong.returncode == 3 and wrong.stderr.count("\n") == 1, wrong.stderr
    assert "error: no Ray cluster answers at 127.0.0.1:1" in wrong.stderr


def test_storage_that_nodes_do_not_reach_is_one_line_and_exit_code_3(
    nodes: Any, archive: Path, store: ObjectStore, photos: Path, tmp_path: Path
) -> None:
    store.client().put_object(Bucket=BUCKET, Key="ray/1.png", Body=b"a picture")
    command = ["score", f"s3://{BUCKET}/ray/", "--out", tmp_path / "out", "--model", archive]
    here = {"AWS_ENDPOINT_URL": store.address, "AWS_REGION": "us-east-1"}
    done = job(*command, "--ray", nodes.address, module="serving", **here)
    assert done.returncode == 3 and done.stderr.count("\n") == 1, done.stderr
    assert f"error: s3://{BUCKET}/ray/1.png: " in done.stderr
