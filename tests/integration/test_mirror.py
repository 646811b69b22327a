"""Pictures in a bucket: fetched once, whole or not at all, and then only what has changed."""

import io
import json
import os
import re
import sqlite3
import tarfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from botocore.exceptions import IncompleteReadError
from botocore.response import StreamingBody
from command import called, forked
from conftest import tiny, tiny_config
from drawings import make_photos
from object_store import BUCKET, READER, Proxy
from PIL import Image
from urllib3 import PoolManager
from urllib3.exceptions import SSLError

from jobs import config, doctor, pipeline
from jobs.data import decoding, index, mirror, origins
from jobs.data.dataset import Dataset, load
from jobs.demo import ObjectStore
from jobs.errors import UnavailableError
from jobs.runs import RunFolder


def png(seed: int, side: int = 16) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


class Pictures:
    """A prefix of a bucket, with what a job needs to read it."""

    def __init__(self, store: ObjectStore, name: str, cache: Path) -> None:
        self.client = store.client()
        self.prefix = name
        s3 = config.S3(endpoint_url=store.address, region="us-east-1", path_style=True, attempts=2)
        root = f"s3://{BUCKET}/{name}"
        self.settings = config.Data(
            source="folder", root=root, s3=s3, cache=str(cache), input_size=75
        )

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"{self.prefix}/{key}", Body=body)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=f"{self.prefix}/{key}")

    def fill(self, count: int = 10) -> None:
        """So many pictures for training of each of two classes, and half as many for the test."""
        for split, number in (("train", count), ("test", count // 2)):
            for i in range(2 * number):
                seed = i + 1000 * (split == "test")
                self.put(f"{split}/{('cat', 'dog')[i % 2]}/{i:03}.png", png(seed))

    def at(self, **changes: Any) -> config.Data:
        """The settings with another root or another way to S3."""
        s3 = self.settings.s3.model_copy(update=changes.pop("s3", {}))
        return self.settings.model_copy(update={"s3": s3, **changes})


@pytest.fixture
def pictures(
    store: ObjectStore, credentials: None, tmp_path: Path, request: pytest.FixtureRequest
) -> Pictures:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return Pictures(store, f"{name}-{time.monotonic_ns()}", tmp_path / "cache")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What has been fetched, and what has been read to be decoded."""
    done: dict[str, list[str]] = {"fetched": [], "read": []}
    fetch, read = origins.Bucket.fetch, decoding._read

    def noted_fetch(self: origins.Bucket, entry: origins.Entry, target: Path) -> bool:
        done["fetched"].append(entry.key.removeprefix(self.prefix))
        return fetch(self, entry, target)

    def noted_read(path: Path, size: tuple[int, int]) -> decoding.Read:
        done["read"].append(path.name)
        return read(path, size)

    monkeypatch.setattr(origins.Bucket, "fetch", noted_fetch)
    monkeypatch.setattr(decoding, "_read", noted_read)
    return done


def forget(work: dict[str, list[str]]) -> None:
    for done in work.values():
        done.clear()


def kept(pictures: Pictures) -> list[Path]:
    """The files of the copy."""
    return [p for p in Path(pictures.settings.cache).glob("mirror-*/objects/*/*") if p.is_file()]


def pixels(dataset: Dataset) -> set[tuple[bytes, int]]:
    splits = (dataset.train, dataset.validation, dataset.test)
    return {
        (images.pixels[row].numpy().tobytes(), int(label))
        for images in splits
        for row, label in zip(images.rows, images.labels, strict=True)
    }


def test_a_bucket_gives_what_the_same_folder_on_the_disk_does(
    pictures: Pictures, tmp_path: Path
) -> None:
    make_photos(tmp_path / "photos", train=6, test=3, size=(32, 32))
    for file in (tmp_path / "photos").rglob("*.png"):
        pictures.put(file.relative_to(tmp_path / "photos").as_posix(), file.read_bytes())
    here = load(pictures.at(root=str(tmp_path / "photos")))
    there = load(pictures.settings)
    assert there.classes == here.classes == ("cat", "dog")
    assert there.description.digest == here.description.digest
    assert there.description.test_digest == here.description.test_digest
    assert torch.equal(there.train.raw(torch.arange(5)), here.train.raw(torch.arange(5)))
    assert pixels(there) == pixels(here) and len(pixels(here)) == 12, "some in both splits"


def test_the_second_night_fetches_and_decodes_what_is_new_and_forgets_what_is_gone(
    pictures: Pictures, work: dict[str, list[str]]
) -> None:
    pictures.fill()
    first = load(pictures.settings)
    assert (len(work["fetched"]), len(work["read"]), len(kept(pictures))) == (30, 30, 30)
    forget(work)

    assert load(pictures.settings).description == first.description
    assert work == {"fetched": [], "read": []}

    pictures.put("train/cat/new.png", png(500))
    pictures.put("train/dog/001.png", png(501))
    pictures.delete("train/cat/000.png")
    second = load(pictures.settings)
    assert sorted(work["fetched"]) == ["train/cat/new.png", "train/dog/001.png"]
    assert len(work["read"]) == 2 and len(kept(pictures)) == 30
    assert second.description.digest != first.description.digest
    assert second.description.test_digest == first.description.test_digest
    changed = pixels(second) ^ pixels(first)
    assert len(changed) == 4, "one new, one gone, one in two versions"


def test_a_picture_that_is_only_renamed_changes_no_digest_and_no_order(
    pictures: Pictures,
) -> None:
    pictures.fill()
    first = load(pictures.settings)
    pictures.delete("train/cat/000.png")
    pictures.put("train/cat/zebra.png", png(0))
    second = load(pictures.settings)
    assert second.description == first.description
    every = torch.arange(len(first.train))
    assert torch.equal(second.train.raw(every), first.train.raw(every))


def test_a_test_set_that_is_set_aside_stays_nearly_the_same_while_the_data_grow(
    pictures: Pictures,
) -> None:
    for i in range(200):
        pictures.put(f"train/{('cat', 'dog')[i % 2]}/{i:03}.png", png(i))
    before = {digest.tobytes() for digest in load(pictures.settings).test.digests()}
    for i in range(200, 250):
        pictures.put(f"train/{('cat', 'dog')[i % 2]}/{i:03}.png", png(i))
    after = {digest.tobytes() for digest in load(pictures.settings).test.digests()}
    assert (len(before), len(after)) == (40, 50)
    assert len(before & after) >= 34, "drawn anew, it would be 8"


def test_a_root_may_have_a_name_that_an_address_of_the_web_could_not(
    store: ObjectStore, credentials: None, tmp_path: Path
) -> None:
    pictures = Pictures(store, f"a#1/b?c-{time.monotonic_ns()}", tmp_path / "cache")
    pictures.fill(2)
    pictures.put("train/dog/one #1?.png", png(7))
    assert len(pixels(load(pictures.settings))) == 7


def test_what_killed_processes_were_fetching_is_removed(pictures: Pictures) -> None:
    pictures.fill(2)
    load(pictures.settings)
    folder = kept(pictures)[0].parent
    for half in (".x.1.part", ".x.1.part.AbCd1234"):
        (folder / half).touch()
    load(pictures.settings)
    assert len(kept(pictures)) == 6


def test_a_run_goes_on_with_what_it_began_with(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures.fill()
    first = load(pictures.settings)
    pictures.delete("train/cat/000.png")
    pictures.put("test/dog/new.png", png(500))
    assert load(pictures.settings).description.digest != first.description.digest

    again = load(pictures.settings, first.description.digest)
    assert again.description == first.description and pixels(again) == pixels(first)
    for changed in (pictures.settings, pictures.at(exclude=("train/cat/000.png",))):
        with pytest.raises(UnavailableError, match="not those that this run began with"):
            load(changed, "0" * 64)


def test_a_run_goes_on_without_what_it_left_out_though_that_is_gone_or_in_another_store(
    pictures: Pictures,
) -> None:
    pictures.fill()
    settings = pictures.at(exclude=("train/cat/000.png",))
    first = load(settings)
    digest = first.description.digest
    pictures.delete("train/cat/000.png")
    load(pictures.settings)
    again = load(settings, digest)
    assert again.description == first.description and pixels(again) == pixels(first)
    assert load(pictures.settings).description.digest != digest

    pictures.put("train/cat/large.png", png(600, side=32))
    load(pictures.settings)  # and all rows are others now
    again = load(settings, digest)
    assert again.description == first.description and pixels(again) == pixels(first)
    assert all(re.fullmatch(r"(train|test)/\d+", path) for path in again.paths), "none is wrong"


def test_a_store_is_begun_anew_once_most_of_it_is_unused_and_not_under_a_reader(
    pictures: Pictures,
) -> None:
    pictures.fill(4)
    first = load(pictures.settings)
    for i in range(8):
        pictures.put(f"train/{('cat', 'dog')[i % 2]}/{i:03}.png", png(100 + i))
    load(pictures.settings)  # 12 rows and 8 more for 12 pictures
    for i in range(8):
        pictures.put(f"train/{('cat', 'dog')[i % 2]}/{i:03}.png", png(200 + i))
    before = pixels(first)
    last = load(pictures.settings)
    files = sorted(p.name for p in decoding.store(pictures.settings).glob("pixels-?"))
    assert files == ["pixels-1", "pixels-2"], "the first is still being read"
    assert pixels(first) == before and len(pixels(last)) == 12
    del first
    load(pictures.settings)
    files = sorted(p.name for p in decoding.store(pictures.settings).glob("pixels-?"))
    assert files == ["pixels-2"]


def mirrored(settings: config.Data, pause: float, done: Path) -> None:
    """Loads slowly, in commits of ten, and writes down what it fetches."""
    index.PAGE = 10
    fetch = origins.Bucket.fetch

    def slow(self: origins.Bucket, entry: origins.Entry, target: Path) -> bool:
        time.sleep(pause)
        with done.open("a") as file:
            file.write(f"{entry.key}\n")
        return fetch(self, entry, target)

    origins.Bucket.fetch = slow  # type: ignore[method-assign]
    load(settings)


def whole(pictures: Pictures) -> int:
    """How many objects the index takes for whole; asserts that they are."""
    [file] = Path(pictures.settings.cache).glob("mirror-*/index.sqlite")
    with sqlite3.connect(file) as db:
        entries = db.execute("SELECT key, size FROM objects WHERE etag IS NOT NULL").fetchall()
    for key, size in entries:
        assert mirror._file(file.parent, key).stat().st_size == size
    return len(entries)


def test_killed_in_the_middle_it_goes_on(
    pictures: Pictures, work: dict[str, list[str]], tmp_path: Path
) -> None:
    pictures.fill(100)
    process = forked(mirrored, pictures.settings, 0.2, tmp_path / "done")
    process.start()
    noted = 0
    while noted < 10:
        assert process.is_alive()
        time.sleep(0.02)
        if list(Path(pictures.settings.cache).glob("mirror-*/objects/*")):
            noted = whole(pictures)
    process.kill()
    process.join()
    noted = whole(pictures)
    assert 10 <= noted < 300

    loaded = load(pictures.settings)
    assert len(work["fetched"]) == 300 - noted and whole(pictures) == 300
    assert len(pixels(loaded)) == 300


def test_two_processes_on_one_cache_fetch_each_picture_once(
    pictures: Pictures, work: dict[str, list[str]], tmp_path: Path
) -> None:
    pictures.fill(20)
    both = [forked(mirrored, pictures.settings, 0.01, tmp_path / "done") for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    fetched = (tmp_path / "done").read_text().splitlines()
    assert len(fetched) == len(set(fetched)) == 60
    assert len(pixels(load(pictures.settings))) == 60 and not work["fetched"]


def test_a_bucket_that_stops_answering_ends_the_job_with_3_and_nothing_half_is_taken(
    pictures: Pictures, proxy: Proxy, work: dict[str, list[str]], tmp_path: Path
) -> None:
    pictures.fill(20)
    proxy.stall_after = 20_000  # some requests' worth
    s3 = {"endpoint_url": proxy.address, "read_timeout": 5.0, "attempts": 1}
    through = pictures.at(s3=s3)
    file = tmp_path / "job.yaml"
    data = {**through.model_dump(mode="json"), "train_images": None, "test_images": None}
    file.write_text(yaml.safe_dump(tiny(data=data)))
    done = called("run", "--config", file, "--out", tmp_path / "runs")
    assert done.returncode == 3, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: s3://{BUCKET}/{pictures.prefix}/") and "Traceback" not in last
    assert proxy.stalled.is_set() and whole(pictures) < 60

    proxy.stall_after = None
    proxy.stalled.clear()
    forget(work)
    noted = whole(pictures)
    patient = pictures.at(s3={"endpoint_url": proxy.address})
    assert len(pixels(load(patient))) == 60
    assert len(work["fetched"]) == 60 - noted


def test_a_bucket_that_is_not_there_or_may_not_be_read_says_so(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match=r"s3://no-such-bucket/.*there is no such bucket"):
        load(pictures.at(root="s3://no-such-bucket/pictures"))
    with pytest.raises(UnavailableError, match="two classes at least are needed"):
        load(pictures.at(root=f"s3://{BUCKET}/nothing-here"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    with pytest.raises(UnavailableError, match="the access key is not known there"):
        load(pictures.settings)


def test_pictures_are_read_with_a_profile_of_their_own(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And so by another identity than the environment's, which writes results."""
    pictures.fill(2)
    lines = ["[pictures]", *(f"{name} = {value}" for name, value in READER.items())]
    (tmp_path / "credentials").write_text("\n".join(lines))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-another-bucket")
    reader = pictures.at(s3={"profile": "pictures"})
    assert len(pixels(load(reader))) == 6
    job_config = config.validate(tiny(data=reader.model_dump(mode="json")))
    assert doctor._data(job_config).ok
    nobody = config.validate(tiny(data=pictures.at().model_dump(mode="json")))
    assert not doctor._data(nobody).ok


NAMES = (
    "plain.png",
    "with space.png",
    "Käse – groß.png",
    "emoji 🐈.png",
    "plus+and%2Fpercent.png",
    "CASE.png",
    "case.png",
    "no suffix",
)


def test_any_key_of_the_server_is_a_picture(pictures: Pictures) -> None:
    for i, name in enumerate(NAMES):
        pictures.put(f"train/süße Katze 🐈/{name}", png(i))
        pictures.put(f"train/dog/{name}", png(100 + i))
    pictures.put("train/.hidden/x.png", png(300))
    pictures.put("train/dog/deep/er.png", png(301))
    pictures.put("notes.txt", b"no picture")
    loaded = load(pictures.settings)
    assert loaded.classes == ("dog", "süße Katze 🐈")
    assert len(pixels(loaded)) == 2 * len(NAMES) and not loaded.description.skipped


def test_no_key_leads_out_of_the_copy(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those among them that the tests' server would not take."""
    hostile = (
        "..",
        "../../x",
        "/etc/passwd",
        "a\0b",
        "C:\\x",
        "x" * 1000,
        "\udcff".encode("utf-8", "replace").decode(),
    )
    keys = [f"train/{label}/{name}" for name in hostile for label in ("cat", "dog")]
    keys += ["train/../x.png", "/train/cat/x.png", "train//x.png"]

    def entries(self: origins.Bucket, *_: object) -> Iterator[origins.Entry]:
        yield from (origins.Entry(self.prefix + key, '"1"', 1) for key in keys)

    def fetch(self: origins.Bucket, entry: origins.Entry, target: Path) -> bool:
        assert target.resolve().is_relative_to(tmp_path / "cache")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(png(keys.index(entry.key.removeprefix(self.prefix))))
        return True

    monkeypatch.setattr(origins.Bucket, "entries", entries)
    monkeypatch.setattr(origins.Bucket, "fetch", fetch)
    before = set(tmp_path.iterdir())
    assert len(pixels(load(pictures.settings))) == 8, "the last four names of each class"
    assert set(tmp_path.iterdir()) - before == {tmp_path / "cache"}


def test_an_object_that_vanishes_while_it_is_listed_is_left_out(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures.fill(2)
    compare = mirror._compare

    def compare_late(db: sqlite3.Connection) -> None:
        compare(db)
        pictures.delete("train/cat/000.png")

    monkeypatch.setattr(mirror, "_compare", compare_late)
    loaded = load(pictures.settings)
    [line] = loaded.description.skipped
    assert line.endswith("train/cat/000.png: is not there") and len(pixels(loaded)) == 5

    def change_and_vanish(db: sqlite3.Connection) -> None:
        compare(db)
        pictures.delete("train/dog/001.png")

    monkeypatch.setattr(mirror, "_compare", change_and_vanish)
    pictures.put("train/dog/001.png", png(7))
    assert len(pixels(load(pictures.settings))) == 4, "and not with what it was before"


def test_shards_that_wait_to_be_unpacked_are_few(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(6):
        pictures.put(f"train/{i}.tar", shard(labelled(4 * i, 4)))
    monkeypatch.setattr(mirror, "WAITING", 1)
    most: list[int] = []
    unpack = mirror._unpack

    def noted(*arguments: Any) -> None:
        time.sleep(0.2)  # for those that fetch
        sizes = [file.stat().st_size for file in kept(pictures)]
        most.append(sum(size >= 10240 for size in sizes))  # which is a tar file's least
        unpack(*arguments)

    monkeypatch.setattr(mirror, "_unpack", noted)
    load(pictures.settings)
    assert len(most) == 6 and max(most) == 2


def test_a_root_without_what_it_names_is_told_before_a_run(pictures: Pictures) -> None:
    root = f"s3://{BUCKET}/{pictures.prefix}"
    assert mirror.check(pictures.settings) == (False, f"{root}/ is not there")
    pictures.fill(2)
    assert mirror.check(pictures.settings) == (True, f"{root}/ is there")
    listed = pictures.at(root=f"{root}/list.csv")
    assert mirror.check(listed) == (False, f"{root}/list.csv is not there")
    pictures.put("list.csv", b"path,label\n")
    assert mirror.check(listed) == (True, f"{root}/list.csv is there")


def test_a_run_does_not_go_on_with_pictures_of_another_size(
    pictures: Pictures, tmp_path: Path
) -> None:
    pictures.fill(10)
    job = tiny_config(data={**pictures.settings.model_dump(mode="json"), "validation": 0.2})
    run = RunFolder(tmp_path / "r")
    with run.open(job):
        assert pipeline.Job(job, run).dataset.description.image_size == (16, 16)
    pictures.put("train/cat/half.png", png(1, side=32)[:200])
    load(pictures.settings)  # by `inspect`, say
    with run.open(job), pytest.raises(UnavailableError, match="stored in another size than when"):
        _ = pipeline.Job(job, run).dataset


def test_damaged_pictures_are_listed_by_their_keys_and_not_read_again(
    pictures: Pictures, work: dict[str, list[str]]
) -> None:
    pictures.fill(2)
    pictures.put("train/cat/broken.png", b"\x89PNG\r\n")
    first = load(pictures.settings)
    [line] = first.description.skipped
    assert line.startswith(f"s3://{BUCKET}/{pictures.prefix}/train/cat/broken.png: ")
    forget(work)
    assert load(pictures.settings).description == first.description
    assert work == {"fetched": [], "read": []}


def manifest(rows: list[dict[str, str]], kind: str) -> bytes:
    if kind == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file.getvalue()
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    return ("\ufeff" + "\r\n".join(lines)).encode()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_names_pictures_in_s3_or_in_a_folder(
    kind: str, pictures: Pictures, work: dict[str, list[str]], tmp_path: Path
) -> None:
    rows = []
    for i in range(12):
        name, label = f"shots/{i} ü.png", ("cat", "dog")[i % 2]
        rows.append({"path": name, "label": label, "split": "test" if i > 7 else ""})
        pictures.put(name, png(i))
        (tmp_path / "shots").mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(i))
    pictures.put("shots/of no interest.png", png(99))
    rows[0] = {**rows[0], "path": f"s3://{BUCKET}/{pictures.prefix}/{rows[0]['path']}"}
    rows[1] = {**rows[1], "path": f"./{rows[1]['path']}"}
    pictures.put(f"list.{kind}", manifest(rows, kind))
    there = load(pictures.at(root=f"{pictures.settings.root}/list.{kind}"))
    assert there.classes == ("cat", "dog") and len(there.test) == 4
    assert len(pixels(there)) == 12 and "shots/of no interest.png" not in work["fetched"]

    rows[0]["path"] = "shots/0 ü.png"
    (tmp_path / f"list.{kind}").write_bytes(manifest(rows, kind))
    here = load(pictures.at(root=str(tmp_path / f"list.{kind}")))
    assert here.description.digest == there.description.digest

    rows.append({"path": "shots/missing.png", "label": "dog", "split": "train"})
    pictures.put(f"list.{kind}", manifest(rows, kind))
    more = load(pictures.at(root=f"{pictures.settings.root}/list.{kind}"))
    [line] = more.description.skipped
    assert line.endswith("shots/missing.png: is not there")
    assert more.description.digest == there.description.digest


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ("path,label\na.png,cat\na.png,dog\n", "a.png is listed twice|a.png: is listed twice"),
        ("path,label\n,cat\n", r"row 1 lacks path \(or url\) or label"),
        ("file,label\na.png,cat\n", r"row 1 lacks path \(or url\) or label"),
        ("path,label,split\na.png,cat,holdout\n", "the split holdout is not train or test"),
        ("path,label\n../secret.png,cat\n", "secret.png is not below|two classes at least"),
        ("url,label\ns3://elsewhere/a.png,cat\n", "not in this bucket|two classes at least"),
        ("", "lists no pictures|two classes at least"),
        ("\udcff", "not a CSV file in UTF-8"),
    ],
)
def test_a_manifest_that_cannot_be_followed_is_refused(
    rows: str, complaint: str, pictures: Pictures, tmp_path: Path
) -> None:
    body = rows.encode("utf-8", "surrogateescape")
    pictures.put("list.csv", body)
    (tmp_path / "list.csv").write_bytes(body)
    for root in (f"{pictures.settings.root}/list.csv", str(tmp_path / "list.csv")):
        with pytest.raises(UnavailableError, match=complaint) as caught:
            load(pictures.at(root=root))
        assert "\n" not in str(caught.value)


def shard(samples: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return file.getvalue()


def labelled(first: int, count: int, prefix: str = "") -> dict[str, bytes]:
    """Samples with labels of both kinds, and what else such shards have."""
    found: dict[str, bytes] = {}
    for i in range(first, first + count):
        found[f"{prefix}{i:04}.png"] = png(i)
        label = ("cat", "dog")[i % 2]
        about = (
            (".cls", label.encode())
            if i % 4 < 2
            else (".json", json.dumps({"label": label}).encode())
        )
        found[f"{prefix}{i:04}{about[0]}"] = about[1]
        found[f"{prefix}{i:04}.txt"] = b"a caption"
        found[f"{prefix}{i:04}.seg.png"] = png(i + 1000)  # a mask
    return found


def test_shards_in_a_bucket_and_on_the_disk_are_the_same_pictures(
    pictures: Pictures, work: dict[str, list[str]], tmp_path: Path
) -> None:
    for name, samples in (
        ("train/0.tar", labelled(0, 8)),
        ("train/1.tar", labelled(8, 8, prefix="../../")),
        ("test/0.tar", labelled(16, 4, prefix="/abs/")),
    ):
        pictures.put(name, shard(samples))
        (tmp_path / "shards" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shards" / name).write_bytes(shard(samples))
    there = load(pictures.settings)
    assert there.classes == ("cat", "dog") and len(there.test) == 4 and len(pixels(there)) == 20
    here = load(pictures.at(root=str(tmp_path / "shards")))
    assert here.description.digest == there.description.digest
    assert not (tmp_path.parent / "0008.png").exists() and len(kept(pictures)) == 40

    forget(work)
    pictures.put("train/1.tar", shard(labelled(8, 6)))
    fewer = load(pictures.settings)
    assert work["fetched"] == ["train/1.tar"] and len(pixels(fewer)) == 18
    assert len(kept(pictures)) == 38

    (tmp_path / "shards" / "test" / "cat").mkdir()
    with pytest.raises(UnavailableError, match=r"test/cat: a root has shards or class folders"):
        load(pictures.at(root=str(tmp_path / "shards")))


LATIN = os.fsdecode(b"caf\xe9")


def test_names_that_are_not_utf_8_are_told_as_they_are(pictures: Pictures, tmp_path: Path) -> None:
    make_photos(root := tmp_path / "photos", size=(32, 32))
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / LATIN)
    assert load(pictures.at(root=str(root))).classes == (r"caf\xe9", "dog")

    samples = labelled(0, 8) | {f"{LATIN}/9.png": png(9), f"{LATIN}/9.cls": b"cat"}
    samples |= {f"{LATIN}.png": b"no picture", f"{LATIN}.cls": b"cat"}
    pictures.put("train/0.tar", shard(samples))
    loaded = load(pictures.settings)
    assert [name for name, _ in loaded.skipped] == [r"train/0.tar: caf\xe9.png"]
    assert r"train/0.tar: caf\xe9/9.png" in loaded.paths and len(pixels(loaded)) == 9

    (shards := tmp_path / "shards" / "train").mkdir(parents=True)
    (shards / f"{LATIN}.tar").write_bytes(shard(labelled(0, 8)))
    with pytest.raises(UnavailableError) as caught:
        load(pictures.at(root=str(tmp_path / "shards")))
    assert str(caught.value) == rf"{shards}/caf\xe9.tar: a shard's name has to be in UTF-8"


def test_what_a_mac_adds_to_shards_is_passed_over(pictures: Pictures, tmp_path: Path) -> None:
    mac = {"._0000.png": b"of a Mac", "deep/._0001.png": b"of a Mac"}
    (train := tmp_path / "shards" / "train").mkdir(parents=True)
    (train / "0.tar").write_bytes(shard(mac | labelled(0, 8)))
    (train / "._0.tar").write_bytes(b"of a Mac")
    loaded = load(pictures.at(root=str(tmp_path / "shards")))
    assert len(pixels(loaded)) == 8 and not loaded.skipped

    make_photos(tmp_path / "photos", train=6, test=3, size=(32, 32))
    (tmp_path / "photos" / "train" / "._0.tar").write_bytes(b"of a Mac")
    loaded = load(pictures.at(root=str(tmp_path / "photos")))
    assert loaded.classes == ("cat", "dog"), "and makes no shards of a folder"


def test_a_damaged_picture_of_a_shard_is_named_as_it_can_be_left_out(pictures: Pictures) -> None:
    pictures.put("train/0.tar", shard({**labelled(0, 12), "0004.png": b"no picture"}))
    [(name, why)] = load(pictures.settings).skipped
    assert name == "train/0.tar: 0004.png" and why.startswith("not a picture")
    assert len(load(pictures.at(exclude=(name,))).train)


def broken(body: bytes) -> Iterator[bytes]:
    """A tar file with a damaged header, one cut within a header, and one cut between two."""
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        offset = tar.getmembers()[6].offset
    yield body[:offset] + b"?" * 100 + body[offset + 100 :]
    yield body[: offset + 100]
    yield body[:offset]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (shard({"1.png": png(1)}), "train/0.tar: 1 has no label, in 1.cls or 1.json"),
        (shard({"1.png": png(1), "1.json": b"[]"}), "1 has no label"),
        (shard({"1.png": png(1), "1.json": b'{"label": ["cat"]}'}), "1 has no label"),
        (b"no tar file", "train/0.tar: not a whole tar file"),
        (shard(labelled(0, 9))[:1000], "train/0.tar: not a whole tar file"),
        *(
            (body, "not a whole tar file: (bad checksum|.* header)")
            for body in broken(shard(labelled(0, 9)))
        ),
    ],
)
def test_a_shard_that_cannot_be_read_is_named(
    body: bytes, complaint: str, pictures: Pictures
) -> None:
    pictures.put("train/0.tar", body)
    with pytest.raises(UnavailableError, match=complaint):
        load(pictures.settings)


def test_a_large_object_goes_straight_to_the_disk(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures.fill(2)
    monkeypatch.setattr(origins, "LARGE", 100)
    monkeypatch.setattr(origins.Bucket, "_read", lambda *_: pytest.fail("into memory"))
    assert len(pixels(load(pictures.settings))) == 6


def test_what_signed_addresses_do_not_give_boto3_fetches_and_again_where_a_body_breaks_off(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures.fill(50)
    asked: list[int] = []
    broken: list[int] = []
    read = StreamingBody.read

    def refuse(*_: object, **__: object) -> None:
        asked.append(1)
        raise SSLError("an unknown authority")

    def break_off(self: StreamingBody, amt: int | None = None) -> bytes:
        if not broken:
            broken.append(1)
            raise IncompleteReadError(actual_bytes=1, expected_bytes=2)
        body: bytes = read(self, amt)
        return body

    monkeypatch.setattr(PoolManager, "request", refuse)
    monkeypatch.setattr(StreamingBody, "read", break_off)
    assert len(pixels(load(pictures.settings))) == 150
    assert broken and 1 <= len(asked) <= origins.THREADS


@pytest.mark.slow
def test_memory_does_not_grow_with_the_listing(
    pictures: Pictures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python's own, 8 MiB for 1,000 entries, too; a list of 100,000 of them would add 30 MiB.
    benchmarks/bucket.py measures a million, and what SQLite takes."""

    def entries(self: origins.Bucket, *_: object) -> Iterator[origins.Entry]:
        tracemalloc.start()  # once boto3 has read its files
        for i in range(100_000):
            key = f"{self.prefix}train/{('cat', 'dog')[i % 2]}/a rather long name {i:09}.jpg"
            yield origins.Entry(key, f'"{i:032x}"', 1000)

    monkeypatch.setattr(origins.Bucket, "entries", entries)
    monkeypatch.setattr(origins.Bucket, "fetch", lambda *_: True)
    with index.opened(tmp_path / "store", decoding.SCHEMA) as db:
        with mirror.refreshed(pictures.settings) as found:
            decoding._note(db, found)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert db.execute("SELECT count(*) FROM pictures").fetchone() == (100_000,)
    assert peak < 24 * 2**20, f"{peak / 2**20:.1f} MiB"
