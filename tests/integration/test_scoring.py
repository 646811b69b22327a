"""Many pictures, answered into Parquet files: each once, whatever happens on the way."""

import errno
import io
import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError, IncompleteReadError
from botocore.response import StreamingBody
from command import forked
from conftest import MODEL, pictures
from memory_s3 import refused
from object_store import BUCKET
from service import Service
from test_examples import run_example
from typer.testing import CliRunner, Result

from jobs.config import Storage
from jobs.demo import ObjectStore
from jobs.runs import RunFolder
from serving import Predictor, cluster, s3, scoring
from serving.answers import (
    ABOUT,
    SCHEMA,
    Answers,
    Folder,
    ScoringError,
    SourceError,
    at,
    opened,
)
from serving.archive import Description
from serving.cli import app
from serving.processes import java_home
from serving.scoring import score


@pytest.fixture(scope="module")
def predictor(archive: Path) -> Predictor:
    return Predictor.open(archive, threads=2, callers=2)


@pytest.fixture
def photos(exported: RunFolder, tmp_path: Path) -> Path:
    """Nine files that can be read, one below the folder, one damaged, one that is no picture."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index, content in enumerate(pictures(exported, 9)):
        (folder / ("more" if index > 6 else ".") / f"{index}.png").write_bytes(content)
    (folder / "damaged.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture
def put(
    store: ObjectStore, settings: Storage, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, bytes], str]:
    """Puts an object where the scoring looks for it, and gives its address."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def put(name: str, body: bytes) -> str:
        uri = f"{settings.uri}/{name}"
        store.client().put_object(Bucket=BUCKET, Key=uri.removeprefix(f"s3://{BUCKET}/"), Body=body)
        return uri

    return put


def packed(photos: Path, file: Path) -> Path:
    with tarfile.open(file, "w") as tar:
        tar.add(photos, arcname=".")
    return file


def rows(target: Path | str) -> list[dict[str, Any]]:
    place = at(target)
    parts = [pa.BufferReader(place.read(name)) for name in place.names()]
    return [row for part in parts for row in pq.read_table(part, schema=SCHEMA).to_pylist()]


def test_a_folder_is_answered_once_and_then_only_what_is_new(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    first = score(predictor, str(photos), target, threads=2)
    by_path = {row["path"]: row for row in rows(target)}
    assert first.done == len(by_path) == 10 and first.skipped == 0
    refused = by_path.pop("damaged.jpg")
    assert refused["label"] is None and refused["bytes"] == 10 and refused["error"]
    assert list(first.errors) == [refused["error"]]
    for path, row in by_path.items():
        answer = predictor(photos / path)
        assert (row["label"], row["error"]) == (answer["label"], None)
        assert row["probability"] == pytest.approx(answer["probability"], abs=1e-5)
        assert [e["label"] for e in row["top"]] == [e["label"] for e in answer["top"]]
        assert (row["width"], row["height"], row["model"]) == (75, 75, MODEL)

    (photos / "new.png").write_bytes((photos / "1.png").read_bytes())
    again = score(predictor, str(photos), target, threads=2)
    assert (again.done, again.skipped) == (1, 10)
    assert sorted(row["path"] for row in rows(target)) == sorted(
        [*by_path, "damaged.jpg", "new.png"]
    )


def test_a_list_a_tar_file_and_s3_are_answered_as_a_folder_is(
    predictor: Predictor,
    photos: Path,
    tmp_path: Path,
    store: ObjectStore,
    settings: Storage,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.png"))
    (photos / "list.txt").write_text("\n".join([*names, "gone.png", ""]))
    packed(photos, tmp_path / "photos.tar")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    prefix = f"pictures-{time.monotonic_ns()}"
    for name in names:
        key = f"{prefix}/{name}"
        store.client().put_object(Bucket=BUCKET, Key=key, Body=(photos / name).read_bytes())

    def labels(source: str, name: str) -> dict[str, str]:
        score(predictor, source, tmp_path / name, threads=2)
        found = rows(tmp_path / name)
        return {Path(row["path"]).name: row["label"] for row in found if row["error"] is None}

    expected = labels(str(photos), "folder")
    assert len(expected) == 9
    assert labels(str(photos / "list.txt"), "list") == expected
    assert [r["error"] for r in rows(tmp_path / "list") if r["path"] == "gone.png"] == [
        "not readable: No such file or directory"
    ]
    assert labels(str(tmp_path / "photos.tar"), "tar") == expected
    assert labels(f"s3://{BUCKET}/{prefix}/", "s3") == expected
    gone = scoring.Item("gone.png", f"s3://{BUCKET}/{prefix}/gone.png")
    [row] = scoring.answers(predictor, [gone])
    assert row["error"] == "not readable: vanished"
    with pytest.raises(SourceError, match="there is no such bucket"):
        score(predictor, "s3://no-such-bucket/x", tmp_path / "none", threads=2)


def test_no_row_is_lost_where_a_part_was_removed(predictor: Predictor, tmp_path: Path) -> None:
    for name in "abc":
        kept = Answers(Folder(tmp_path))
        kept.add(scoring.answers(predictor, [scoring.Item(name, "/gone")]))
    (tmp_path / kept.parts[1]).unlink()
    again = Answers(Folder(tmp_path))
    again.add(scoring.answers(predictor, [scoring.Item("d", "/gone")]))
    again.add(scoring.answers(predictor, [scoring.Item("e", "/gone")]))
    assert sorted(row["path"] for row in rows(tmp_path)) == ["a", "c", "d", "e"]


@pytest.mark.parametrize("compression", ["", "gz", "bz2", "xz"])
@pytest.mark.parametrize("size", [0, 60, 400])
def test_a_tar_file_that_is_cut_short_at_its_beginning_is_damaged(
    photos: Path, tmp_path: Path, compression: str, size: int
) -> None:
    with tarfile.open(tmp_path / "whole", f"w:{compression}") as tar:  # type: ignore[call-overload]
        tar.add(photos, "photos")
    cut = tmp_path / f"cut.tar.{compression}".removesuffix(".")
    cut.write_bytes((tmp_path / "whole").read_bytes()[:size])
    with pytest.raises(ScoringError, match=rf"^{cut}: damaged: "):
        list(scoring.pictures(str(cut)))


def test_what_was_answered_before_its_source_failed_is_kept(
    predictor: Predictor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "BATCH", 1)
    monkeypatch.setattr(scoring, "AHEAD", 0)
    file = packed(photos, tmp_path / "photos.tar")
    with tarfile.open(file) as tar:
        offset = tar.getmembers()[6].offset
    whole = file.read_bytes()
    file.write_bytes(whole[:offset])  # between two: Python takes it for the end
    with pytest.raises(ScoringError, match=r"photos.tar: damaged: "):
        score(predictor, str(file), tmp_path / "out", threads=1)
    there = len(rows(tmp_path / "out"))
    assert 0 < there < 10
    file.write_bytes(whole)
    assert score(predictor, str(file), tmp_path / "out", threads=1).skipped == there


def failing(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Lets the system refuse to read files of that name."""
    read = Path.read_bytes

    def read_bytes(self: Path) -> bytes:
        if self.name == name:
            raise OSError(number, os.strerror(number), str(self))
        return read(self)

    patch.setattr(Path, "read_bytes", read_bytes)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_disk_that_fails_is_in_no_row_and_the_next_call_answers_everything(
    number: int,
    predictor: Predictor,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "5.png", number)
        with pytest.raises(SourceError, match=f"^{photos}/5.png: {os.strerror(number)}$"):
            score(predictor, str(photos), tmp_path / "out", threads=1)
    there = len(rows(tmp_path / "out"))
    again = score(predictor, str(photos), tmp_path / "out", threads=1)
    assert (again.done, again.skipped) == (10 - there, there) and there <= 5
    found = rows(tmp_path / "out")
    assert len({row["path"] for row in found}) == len(found) == 10
    assert [row["path"] for row in found if row["error"]] == ["damaged.jpg"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT])
def test_a_file_that_cannot_be_read_is_a_row(
    number: int,
    predictor: Predictor,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing(monkeypatch, "5.png", number)
    assert score(predictor, str(photos), tmp_path / "out", threads=1).done == 10
    errors = {row["path"]: row["error"] for row in rows(tmp_path / "out") if row["error"]}
    assert errors.pop("5.png") == f"not readable: {os.strerror(number)}"
    assert list(errors) == ["damaged.jpg"]


def test_a_folder_that_cannot_be_read_is_not_passed_over_and_links_to_folders_are(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "round").symlink_to(photos)
    assert len(list(scoring.pictures(str(photos)))) == 10
    assert f"{photos}: passed over 1 links to folders\n" in capsys.readouterr().err
    scandir = os.scandir

    def refused(path: str) -> Any:
        if Path(path).name == "more":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(SourceError, match=f"^{photos}/more: Permission denied$"):
        list(scoring.pictures(str(photos)))


def test_progress_is_of_what_is_missing(
    predictor: Predictor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, float, float]] = []

    @contextmanager
    def task(label: str, total: float) -> Iterator[Callable[[float], None]]:
        done: list[float] = []
        yield done.append
        shown.append((label, total, sum(done)))

    monkeypatch.setattr(scoring, "task", task)
    for _ in range(2):
        score(predictor, str(photos), tmp_path / "out", threads=1)
        (photos / "new.png").write_bytes((photos / "1.png").read_bytes())
    assert shown == [("score", 10, 10), ("score", 1, 1)]


def test_a_list_has_addresses_in_s3_too_and_may_begin_with_a_mark_of_its_encoding(
    predictor: Predictor, photos: Path, tmp_path: Path, put: Callable[[str, bytes], str]
) -> None:
    address = put("far.png", (photos / "1.png").read_bytes())
    (photos / "list.txt").write_text(f"0.png\n{address}\n", encoding="utf-8-sig")
    score(predictor, str(photos / "list.txt"), tmp_path / "out", threads=1)
    found = {row["path"]: row["label"] for row in rows(tmp_path / "out")}
    assert found == {
        "0.png": predictor(photos / "0.png")["label"],
        address: predictor(photos / "1.png")["label"],
    }


def test_a_body_that_breaks_off_is_fetched_again_and_not_for_ever(
    put: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    item, read = scoring.Item("1.png", put("1.png", b"a picture")), StreamingBody.read
    left = 1

    def break_off(self: StreamingBody, amt: int | None = None) -> bytes:
        nonlocal left
        if left:
            left -= 1
            raise IncompleteReadError(actual_bytes=1, expected_bytes=2)
        body: bytes = read(self, amt)
        return body

    monkeypatch.setattr(StreamingBody, "read", break_off)
    assert item.read() == b"a picture" and left == 0
    left = 100
    with pytest.raises(SourceError, match=f"^{item.place}: "):
        item.read()
    assert left == 100 - s3.ATTEMPTS


def test_names_in_no_encoding_are_answered_and_links_in_a_tar_file_are_passed_over(
    predictor: Predictor, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (photos / "1.png").rename(photos / name)
    (photos / "list.txt").write_bytes(b"caf\xe9.png\n")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, arcname=".")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "2.png"
        tar.addfile(link)
    for number, source in enumerate((photos, photos / "list.txt", tmp_path / "photos.tar")):
        out = tmp_path / str(number)
        score(predictor, str(source), out, threads=1)
        [row] = [row for row in rows(out) if "caf" in row["path"]]
        assert row["path"].removeprefix("./") == r"caf\xe9.png" and row["label"]
        assert score(predictor, str(source), out, threads=1).done == 0, "and it is known again"
    assert "passed over 1 links" in capsys.readouterr().err
    items = [item for item in scoring.pictures(str(photos)) if item.path.startswith("caf")]
    assert cluster.answered(predictor, cluster.table(items))["label"].to_pylist() == [row["label"]]


def test_one_picture_is_a_source_and_another_file_is_none(
    predictor: Predictor, photos: Path, archive: Path, tmp_path: Path
) -> None:
    assert score(predictor, str(photos / "1.png"), tmp_path / "out", threads=1).done == 1
    with pytest.raises(ScoringError, match="neither a picture, a tar file nor a list of files"):
        score(predictor, str(archive), tmp_path / "other", threads=1)


@pytest.mark.usefixtures("settings")
def test_a_prefix_may_have_any_character(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.address)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    prefix = f"shoot-{time.monotonic_ns()}"
    for name in (f"{prefix}/other.png", f"{prefix}#3?/mine.png"):
        store.client().put_object(Bucket=BUCKET, Key=name, Body=b"")
    found = [item.path for item in scoring.pictures(f"s3://{BUCKET}/{prefix}#3?/")]
    assert found == [f"s3://{BUCKET}/{prefix}#3?/mine.png"]


def test_frames_of_pictures_become_frames_of_the_same_rows(
    predictor: Predictor, archive: Path, photos: Path, tmp_path: Path
) -> None:
    """As Spark's `mapInPandas` hands them over, after its reader of binary files."""
    pandas = pytest.importorskip("pandas", reason="`pip install 'inception-transfer[ray]'` has it")
    files = [path for path in sorted(photos.rglob("*")) if path.suffix in (".jpg", ".png")]
    read = {"path": map(str, files), "length": 1, "content": [file.read_bytes() for file in files]}
    frame = pandas.DataFrame(read)
    given = list(cluster.frames(iter([frame[:4], frame[4:]]), str(archive)))
    assert [len(part) for part in given] == [4, len(files) - 4]
    table = pa.Table.from_pandas(pandas.concat(given), SCHEMA, preserve_index=False)

    score(predictor, str(photos), tmp_path / "out", threads=1)
    expected = {row["path"]: row for row in rows(tmp_path / "out")}
    for row in table.to_pylist():
        other = expected[str(Path(row["path"]).relative_to(photos))]
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-5)
        exact = ("label", "error", "width", "height", "bytes", "sha256", "model", "version")
        assert [row[key] for key in exact] == [other[key] for key in exact]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Spark's own
def test_spark_runs_it(archive: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed")
    monkeypatch.setenv("JAVA_HOME", str(java_home()))
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    spark = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    with spark.getOrCreate() as session:
        read = session.read.format("binaryFile").option("recursiveFileLookup", "true")
        frame = read.option("pathGlobFilter", "*.{png,jpg}").load(str(photos))
        work = partial(cluster.frames, archive=str(archive))
        found = frame.mapInPandas(work, schema=cluster.SPARK_SCHEMA).collect()
    assert len(found) == 10 and sum(row["error"] is not None for row in found) == 1
    assert all(len(row["top"]) == 5 for row in found if row["error"] is None)


def test_sparks_schema_is_that_of_the_files() -> None:
    spark = {"string": "string", "float": "float", "int32": "int", "int64": "bigint"}
    columns = [f"{f.name} {spark.get(str(f.type))}" for f in SCHEMA if f.name != "top"]
    before, top, after = cluster.SPARK_SCHEMA.partition(
        "top array<struct<label: string, probability: float>>, "
    )
    assert top and (before + after).split(", ") == columns


def slowly(archive: Path, source: Path, target: Path | str) -> None:
    """Scores with a part for every batch."""
    scoring.ROWS = scoring.BATCH = 1
    score(Predictor.open(archive, threads=1), str(source), target, threads=1)


@pytest.mark.slow
@pytest.mark.usefixtures("put")
@pytest.mark.parametrize("place", ["a folder", "S3"])
def test_killed_in_the_middle_it_goes_on_and_every_picture_is_there_once(
    place: str,
    predictor: Predictor,
    archive: Path,
    photos: Path,
    tmp_path: Path,
    settings: Storage,
) -> None:
    target = tmp_path / "out" if place == "a folder" else f"{settings.uri}/killed"
    kills = 0
    for wanted in (2, 5):
        process = forked(slowly, archive, photos, target)
        process.start()
        while process.is_alive() and len(at(target).names()) < wanted:
            time.sleep(0.01)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills, "it was done before it could be killed"
    score(predictor, str(photos), target, threads=1)
    paths = [row["path"] for row in rows(target)]
    assert len(paths) == len(set(paths)) == 10
    assert not list(tmp_path.glob("out/.*.part"))


def test_answers_are_of_the_same_archive_when_descriptions_have_more_fields(
    predictor: Predictor,
) -> None:
    class Later(Description):
        more: int = 0

    said = predictor.description.model_dump_json(exclude_unset=True)  # as in the archive
    now, later = (kind.model_validate_json(said) for kind in (Description, Later))
    assert scoring.about(later, "/photos") == scoring.about(now, "/photos")


def test_an_output_is_of_one_process_one_archive_and_one_source(
    predictor: Predictor, photos: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    monday, tuesday = (packed(photos, tmp_path / f"{day}.tar") for day in ("monday", "tuesday"))
    with (
        opened(target, scoring.about(predictor.description, str(monday))),
        pytest.raises(ScoringError, match="another process writes there"),
    ):
        score(predictor, str(monday), target, threads=1)
    assert score(predictor, str(monday), target, threads=1).done == 10
    with pytest.raises(ScoringError) as caught:
        score(predictor, str(tuesday), target, threads=1)
    held = f"{target}: holds other answers"
    assert str(caught.value) == f"{held} (pictures {monday}); take another folder"
    again = predictor.description.model_copy(update={"seed": 7})  # under the same version
    with pytest.raises(ScoringError, match=rf"^{held} \(model \w{{64}}\); take another folder$"):
        scoring.collect(again, str(monday), target, lambda items: pytest.fail("it answers"))
    assert len(rows(target)) == 10
    (target / ABOUT).write_text(json.dumps(predictor.model))  # as it was once
    assert score(predictor, str(monday), target, threads=1).skipped == 10
    with pytest.raises(ScoringError, match=rf"^{held} \(pictures {monday}\)"):
        score(predictor, str(tuesday), target, threads=1)


def test_what_names_its_pictures_alike_shares_an_output(
    predictor: Predictor, photos: Path, tmp_path: Path, put: Callable[[str, bytes], str]
) -> None:
    """A folder, the lists and the pictures in it; and prefixes of S3."""

    def scored(source: str | Path, name: str) -> tuple[int, int]:
        summary = score(predictor, str(source), tmp_path / name, threads=1)
        return summary.done, summary.skipped

    (photos / "list.txt").write_text("1.png\nmore/7.png\n")
    assert scored(photos / "list.txt", "out") == (2, 0)
    assert scored(photos / "2.png", "out") == (1, 0)
    assert scored(photos, "out") == (7, 3)
    for name in ("monday/1.png", "tuesday/1.png"):
        prefix, _, _ = put(name, (photos / "1.png").read_bytes()).rpartition("/")
        assert scored(prefix, "s3") == (1, 0)


def test_answers_in_s3_are_those_of_a_folder(
    predictor: Predictor,
    archive: Path,
    photos: Path,
    tmp_path: Path,
    settings: Storage,
    put: Callable[[str, bytes], str],
) -> None:
    target = f"{settings.uri}/scores #1/"
    put("scores #1/part-of-others/part-00007.parquet", b"not of these")

    def scored(source: Path) -> Result:
        command = ["score", str(source), "--out", target, "--model", str(archive)]
        return CliRunner().invoke(app, command)

    first = scored(photos)
    assert first.exit_code == 0 and "10 scored" in first.stderr, first.stderr
    score(predictor, str(photos), tmp_path / "out", threads=1)
    expected = {row["path"]: row for row in rows(tmp_path / "out")}
    for row in rows(target):
        here = expected.pop(row["path"])
        exact = ("label", "error", "sha256", "version")
        assert [row[key] for key in exact] == [here[key] for key in exact]
    assert not expected
    (photos / "new.png").write_bytes((photos / "1.png").read_bytes())
    (photos / "round").symlink_to(photos)
    again = scored(photos).stderr
    assert "1 scored" in again and len(rows(target)) == 11
    assert again.count("passed over 1 links to folders") == 1
    assert "0 scored, nothing new; 11 were there" in scored(photos).stderr
    packed(photos, tmp_path / "photos.tar")
    other = scored(tmp_path / "photos.tar")
    assert other.exit_code == 2 and "holds other answers (pictures " in other.stderr
    assert at(target).names() == ["part-00000.parquet", "part-00001.parquet"]


def test_of_two_that_write_to_s3_one_is_refused_and_no_picture_has_two_rows(
    predictor: Predictor, settings: Storage, put: Callable[[str, bytes], str]
) -> None:
    target, of = f"{settings.uri}/scores", {"model": "a"}
    answers = {
        name: scoring.answers(predictor, [scoring.Item(name, "/gone")]) for name in ("a", "b")
    }
    with opened(target, of) as one, opened(target, of) as other:
        one.add(answers["a"])
        for _ in range(2):  # as the work does, which writes what it still has when it fails
            with pytest.raises(SourceError, match=f"^{target}: another process writes there$"):
                other.add([*answers["a"], *answers["b"]])
        one.add(answers["b"])
    assert [row["path"] for row in rows(target)] == ["a", "b"]
    content = at(target).read("part-00001.parquet")
    assert content is not None
    at(target).write("part-00001.parquet", content)  # sent again, as the first answer was lost
    with pytest.raises(ScoringError, match=r"holds other answers \(model a\)"):
        opened(target, {"model": "b"}).__enter__()


class Refusing:
    """A client of S3 that answers some calls with errors first."""

    def __init__(self, client: Any, **errors: list[ClientError]) -> None:
        self.client, self.errors = client, errors

    def __getattr__(self, name: str) -> Any:
        def call(**given: Any) -> Any:
            if self.errors.get(name):
                raise self.errors[name].pop()
            return getattr(self.client, name)(**given)

        return call if name in self.errors else getattr(self.client, name)


def test_a_part_that_meets_another_request_is_sent_again_and_an_archived_picture_is_a_row(
    predictor: Predictor,
    settings: Storage,
    put: Callable[[str, bytes], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    item = scoring.Item("1.png", put("1.png", b"a picture"))
    refusing = Refusing(
        s3.shared_client(),
        put_object=[refused(409, "ConditionalRequestConflict")],
        get_object=[refused(403, "InvalidObjectState")],
    )
    monkeypatch.setattr(s3, "shared_client", lambda: refusing)
    [row] = scoring.answers(predictor, [item])
    assert row["error"] == "not readable: archived in S3; restore it"
    Answers(at(f"{settings.uri}/scores")).add([row])
    assert [row["path"] for row in rows(f"{settings.uri}/scores")] == ["1.png"]
    assert refusing.errors == {"put_object": [], "get_object": []}
    refusing.errors["get_object"].append(refused(403, "InvalidObjectState"))
    with pytest.raises(SourceError, match=r"/scores/part-00000.parquet: archived in S3; restore"):
        Answers(at(f"{settings.uri}/scores")).done()
    [row] = scoring.answers(predictor, [scoring.Item("list", f"s3://{BUCKET}/")])
    assert row["error"] == "not readable: vanished"


def test_a_damaged_part_is_named(predictor: Predictor, tmp_path: Path) -> None:
    kept = Answers(Folder(tmp_path))
    kept.add(scoring.answers(predictor, [scoring.Item("a-picture.png", "/gone")]))
    part = tmp_path / "part-00000.parquet"
    whole, other = part.read_bytes(), io.BytesIO()
    pq.write_table(pa.table({"other": [1]}), other)
    for content in (b"", whole[: len(whole) // 2], whole[:-100] + bytes(100), other.getvalue()):
        part.write_bytes(content)
        with pytest.raises(ScoringError, match=rf"^{part}: damaged: .+$"):
            kept.done()
    place = whole.index(b"a-picture.png") + 1
    part.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    with pytest.raises(ScoringError, match=rf"^{part}: damaged: .+$"):  # else it is another path
        kept.done()
    about = {"model": "a"}
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / ABOUT).write_bytes(content)
        with pytest.raises(ScoringError, match=rf"^{tmp_path / ABOUT}: damaged$"):
            opened(tmp_path, about).__enter__()


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), OSError(errno.EIO, "no")])
def test_an_output_that_cannot_be_listed_is_not_an_empty_one(
    error: OSError,
    predictor: Predictor,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "out"
    score(predictor, str(photos), target, threads=1)
    before = (target / "part-00000.parquet").read_bytes()
    (photos / "damaged.jpg").unlink()
    with monkeypatch.context() as patch:
        for name in ("listdir", "scandir"):
            listed = getattr(os, name)

            def refused(path: Any = ".", listed: Callable[..., Any] = listed) -> Any:
                if Path(path) == target:
                    raise error
                return listed(path)

            patch.setattr(os, name, refused)
        with pytest.raises((SourceError, OSError), match=r"no$"):
            score(predictor, str(photos), target, threads=1)
    assert (target / "part-00000.parquet").read_bytes() == before


def test_a_source_without_pictures_and_an_output_in_no_bucket_are_wrong_use(
    archive: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (empty := tmp_path / "empty").mkdir()
    for source, target, complaint in (
        (empty, "out", f"{empty}: no pictures there"),
        (photos, "s3:/bucket/answers", "s3:/bucket/answers: an output in S3 is written s3://"),
        (photos, "gs://bucket/answers", "gs://bucket/answers: an output in S3 is written s3://"),
    ):
        command = ["score", str(source), "--out", target, "--model", str(archive)]
        done = CliRunner().invoke(app, command)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
        assert complaint in done.stderr and not Path(target).exists()
    with pytest.raises(ScoringError, match=r"^s3://: an output in S3 is written "):
        at("s3://")
    paths: dict[str, str | Path] = {"photos": empty, archive.name: archive}
    said = run_example("score_folder.py", tmp_path, paths)
    assert said.startswith("0 scored") and said.endswith("least sure:\nleast familiar:\n")


def test_a_disk_that_is_full_is_no_wrong_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").touch()
    with (
        pytest.raises(ScoringError, match=r"file: File exists"),
        opened(tmp_path / "file", {}),
    ):
        pass
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"), opened(tmp_path / "out", {}):
        pass


def test_what_is_read_ahead_does_not_grow_with_the_number_of_pictures(
    predictor: Predictor, exported: RunFolder
) -> None:
    [content] = pictures(exported, 1)
    listed = 0

    def endless() -> Iterator[scoring.Item]:
        nonlocal listed
        while True:
            listed += 1
            yield scoring.Item(str(listed), content=content)

    batches = scoring.in_order(endless(), predictor, threads=2)
    for done in range(1, 4):
        assert len(next(batches)) == scoring.BATCH
        assert listed <= scoring.BATCH * (done + scoring.AHEAD * 2 + 1)
    batches.close()  # type: ignore[attr-defined]


def test_the_command_gives_the_services_answers(
    service: Service, archive: Path, photos: Path, tmp_path: Path
) -> None:
    command = ["score", str(photos), "--out", str(tmp_path / "out"), "--model", str(archive)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert "10 scored" in done.stderr and "1 refused" in done.stderr
    for row in rows(tmp_path / "out"):
        if row["error"] is None:
            status, answer = service.predict((photos / row["path"]).read_bytes())
            assert status == 200 and answer["label"] == row["label"]
            assert answer["probability"] == pytest.approx(row["probability"], abs=1e-5)
    for place, wrong in ((1, tmp_path / "nowhere"), (3, archive / "out")):
        refused = [*command[:place], str(wrong), *command[place + 1 :]]
        failed = CliRunner().invoke(app, refused)
        assert (failed.exit_code, failed.stderr.count("\n")) == (2, 1), failed.stderr
    other = CliRunner().invoke(app, [*command, "--sha256", "0" * 64])
    assert other.exit_code == 3 and f"not {'0' * 64}" in other.stderr, "a digest holds here, too"
