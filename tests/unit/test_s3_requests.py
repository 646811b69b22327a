"""What storage asks an S3 server, to the letter, and what it makes of the answers."""

import base64
import errno
import hashlib
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from memory_s3 import BUCKET, Memory, in_memory, refused
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

from jobs import interruption
from jobs.delivery import storage as storages
from jobs.delivery.storage import Entry, Object, Storage
from jobs.errors import ConfigurationError, Interrupted, UnavailableError
from serving import s3
from serving.s3 import Conflict

KEY = "some/prefix/a/key"
WHERE = {"Bucket": BUCKET, "Key": KEY}


@pytest.fixture
def storage(memory: Memory) -> Storage:
    return Storage(in_memory())


def sha256(body: bytes) -> dict[str, str]:
    return {"ChecksumSHA256": base64.b64encode(hashlib.sha256(body).digest()).decode()}


def md5(body: bytes) -> dict[str, str]:
    return {"ContentMD5": base64.b64encode(hashlib.md5(body).digest()).decode()}


def tagged(body: bytes) -> dict[str, dict[str, str]]:
    return {"Metadata": {"sha256": hashlib.sha256(body).hexdigest()}}


def test_a_bucket_and_a_prefix_are_read_from_the_address(memory: Memory) -> None:
    storage = Storage(in_memory(uri=f"s3://{BUCKET}/some/prefix/"))
    assert (storage.bucket, storage.prefix) == (BUCKET, "some/prefix")
    assert storage.uri == f"s3://{BUCKET}/some/prefix"
    bare = Storage(in_memory(uri=f"s3://{BUCKET}"))
    assert (bare.bucket, bare.prefix, bare.uri) == (BUCKET, "", f"s3://{BUCKET}")
    bare.put("a/key", b"body", replacing=None)
    assert list(memory.objects) == ["a/key"]
    assert [entry.key for entry in bare.entries("")] == ["a/key"]
    with pytest.raises(ConfigurationError, match=r"^storage\.uri: not set; it is written s3://"):
        Storage(in_memory(uri=None))


def test_hashes_and_question_marks_in_an_address_are_part_of_the_prefix(memory: Memory) -> None:
    storage = Storage(in_memory(uri=f"s3://{BUCKET}/a#1/b?c#/"))
    storage.put("a/key", b"body", replacing=None)
    assert storage.uri == f"s3://{BUCKET}/a#1/b?c#" and list(memory.objects) == ["a#1/b?c#/a/key"]


def test_a_client_is_made_as_the_settings_say(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = in_memory(attempts=7, path_style=True)
    assert Storage(settings).client is memory
    assert memory.options == {**settings.client, "checksums": "when_supported"}
    Storage(in_memory(checksums="md5"))
    assert memory.options["checksums"] == "when_required"

    def refuse(**_: Any) -> None:
        raise ValueError("Invalid endpoint: x")

    monkeypatch.setattr(s3, "client", refuse)
    with pytest.raises(ConfigurationError, match=r"^storage: Invalid endpoint: x$"):
        Storage(in_memory())


def test_a_check_lists_and_begins_an_upload_that_it_takes_back(memory: Memory) -> None:
    Storage(in_memory(encryption="s3")).check()
    where = {"Bucket": BUCKET, "Key": "some/prefix/doctor"}
    assert memory.asked == [
        ("list_objects_v2", {"Bucket": BUCKET, "Prefix": "some/prefix/", "MaxKeys": 1}),
        ("create_multipart_upload", {**where, "ServerSideEncryption": "AES256"}),
        ("abort_multipart_upload", {**where, "UploadId": "upload 1"}),
    ]


def test_an_object_is_written_where_there_is_none_or_in_place_of_the_known_one(
    memory: Memory, storage: Storage
) -> None:
    etag = storage.put("a/key", b"one", replacing=None)
    assert storage.get("a/key") == Object(b"one", etag)
    second = storage.put("a/key", b"two", replacing=etag)
    assert storage.get("a/key") == Object(b"two", second) and second != etag
    for replacing in (None, etag):
        with pytest.raises(Conflict, match=r"^something else was written there meanwhile$"):
            storage.put("a/key", b"three", replacing=replacing)
    assert storage.digest("a/key") == hashlib.sha256(b"two").hexdigest()
    assert memory.calls("put_object")[:2] == [
        {**WHERE, "Body": b"one", **sha256(b"one"), **tagged(b"one"), "IfNoneMatch": "*"},
        {**WHERE, "Body": b"two", **sha256(b"two"), **tagged(b"two"), "IfMatch": etag},
    ]


def test_amazon_says_of_what_has_gone_that_it_is_not_there(
    memory: Memory, storage: Storage
) -> None:
    etag = storage.put("a/key", b"one", replacing=None)
    memory.errors.append(refused(404, "NoSuchKey"))
    with pytest.raises(Conflict, match=r"^something else was written there meanwhile$"):
        storage.put("a/key", b"two", replacing=etag)


def test_what_is_not_there_is_none_and_another_error_is_told(
    memory: Memory, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storage.get("a/key") is None
    assert storage.head("a/key") is None and storage.digest("a/key") is None

    def refuse(error: ClientError) -> None:
        def answer(**_: Any) -> None:
            raise error

        for operation in ("get_object", "head_object"):
            monkeypatch.setattr(memory, operation, answer)

    refuse(refused(403, "AccessDenied"))
    for ask in (storage.get, storage.head, storage.digest):
        with pytest.raises(UnavailableError, match=f"^{storage.uri}: access denied"):
            ask("a/key")
    refuse(refused(404, "NoSuchBucket"))
    with pytest.raises(UnavailableError, match="there is no such bucket"):
        storage.get("a/key")
    refuse(refused(404, "404"))  # the answer to HEAD has no body that could say more
    assert storage.head("a/key") is None


def test_what_cannot_be_told_from_a_bucket_that_is_not_there_is_said_to_be_either(
    storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(UnavailableError, match=r": it is not there, or there is no such bucket$"):
        storage.fetch("a/key", tmp_path / "got", lambda _: None)


def test_an_endpoint_of_the_environment_that_is_no_address_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(OSError, match=r"^AWS_ENDPOINT_URL: Invalid endpoint: localhost:9000$"):
        s3.default_client()


@pytest.mark.parametrize("error", [RetriesExceededError(None), S3DownloadFailedError("changed")])
def test_a_download_that_breaks_off_is_explained_too(error: Exception) -> None:
    with (
        pytest.raises(UnavailableError, match=f"^s3://bucket/key: {error}$"),
        s3.explained("s3://bucket/key", UnavailableError),
    ):
        raise error


def test_checksums_that_nobody_has_chosen_are_as_the_environment_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for value in ("when_required", "when_supported"):
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", value)
        assert s3.default_client().meta.config.request_checksum_calculation == value


def test_an_object_that_others_have_written_has_no_digest(memory: Memory, storage: Storage) -> None:
    storage.put("a/key", b"one", replacing=None)
    memory.objects[KEY]["Metadata"] = {}
    assert storage.digest("a/key") is None


# Files


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "PART", 10)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("once", [False, True])
def test_a_small_file_goes_in_one_request(
    memory: Memory, storage: Storage, tmp_path: Path, once: bool
) -> None:
    advanced: list[float] = []
    (file := tmp_path / "file").write_bytes(body := b"0123456789")
    digest = hashlib.sha256(body).hexdigest()
    for _ in range(1 if once else 2):
        storage.send(file, "a/key", digest, advanced.append, once=once)
    condition = {"IfNoneMatch": "*"} if once else {}
    [first, *_] = memory.asked
    asked = {**WHERE, "Body": body, **sha256(body), **tagged(body), **condition}
    assert first == ("put_object", asked)
    assert set(advanced) == {10 / 2**20}
    if once:
        with pytest.raises(Conflict):
            storage.send(file, "a/key", digest, advanced.append, once=True)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("checksums", ["sha256", "md5"])
def test_a_large_file_goes_in_parts_and_each_has_its_checksum(
    memory: Memory, tmp_path: Path, checksums: str
) -> None:
    storage = Storage(in_memory(checksums=checksums, encryption="kms", kms_key="k"))
    advanced: list[float] = []
    (file := tmp_path / "file").write_bytes(body := bytes(range(45)))
    digest = hashlib.sha256(body).hexdigest()
    storage.send(file, "a/key", digest, advanced.append, once=True)
    assert memory.objects[KEY]["Body"] == body and not memory.uploads
    assert sorted(advanced) == [5 / 2**20, *[10 / 2**20] * 4]
    upload = {**WHERE, "UploadId": "upload 1"}
    algorithm = {"ChecksumAlgorithm": "SHA256"} if checksums == "sha256" else {}
    kms = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k"}
    assert memory.calls("create_multipart_upload") == [
        {**WHERE, **tagged(body), **kms, **algorithm}
    ]
    pieces = [body[i : i + 10] for i in range(0, 45, 10)]
    parts = sorted(memory.calls("upload_part"), key=lambda given: given["PartNumber"])
    sums = md5 if checksums == "md5" else sha256
    assert parts == [
        {**upload, "PartNumber": n, "Body": piece, **sums(piece)}
        for n, piece in enumerate(pieces, 1)
    ]
    answers = [
        {"PartNumber": n, "ETag": f"part {n}", **(sha256(piece) if checksums == "sha256" else {})}
        for n, piece in enumerate(pieces, 1)
    ]
    assert memory.calls("complete_multipart_upload") == [
        {**upload, "MultipartUpload": {"Parts": answers}, "IfNoneMatch": "*"}
    ]
    with pytest.raises(Conflict):
        storage.send(file, "a/key", digest, advanced.append, once=True)
    assert not memory.uploads
    storage.send(file, "a/key", digest, advanced.append)
    assert "IfNoneMatch" not in memory.calls("complete_multipart_upload")[-1]


@pytest.mark.usefixtures("small_parts")
def test_parts_are_taken_back_when_one_fails_and_the_first_error_is_told(
    memory: Memory, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "file").write_bytes(bytes(1000))
    (answered := threading.Event()).clear()
    sent: list[int] = []

    def fail(**given: Any) -> dict[str, str]:
        sent.append(given["PartNumber"])
        if given["PartNumber"] == 2:
            answered.set()
            raise refused(403, "AccessDenied")
        answered.wait()
        if given["PartNumber"] > 2:
            time.sleep(0.5)  # the sender, which waits for two, has to get a core meanwhile
        return {"ETag": "some"}

    monkeypatch.setattr(memory, "upload_part", fail)
    with pytest.raises(UnavailableError, match="access denied"):
        storage.send(file, "a/key", "digest", lambda _: None)
    assert memory.calls("abort_multipart_upload") == [{**WHERE, "UploadId": "upload 1"}]
    assert not memory.uploads and not memory.objects
    assert len(sent) < 50, "the others were not begun"

    for error in (EndpointConnectionError(endpoint_url="x"), refused(500, "InternalError")):

        def fails(error: Exception = error, **_: Any) -> None:
            raise error

        monkeypatch.setattr(memory, "abort_multipart_upload", fails)
        with pytest.raises(UnavailableError, match="access denied"):
            storage.send(file, "a/key", "digest", lambda _: None)


@pytest.mark.usefixtures("small_parts")
def test_a_signal_ends_transfers_between_two_parts(
    memory: Memory, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "file").write_bytes(bytes(25))
    storage.put("a/key", b"one", replacing=None)
    monkeypatch.setattr(interruption, "_received", ["SIGTERM"])
    with pytest.raises(Interrupted):
        storage.send(file, "another", "digest", lambda _: None)
    assert not memory.uploads and list(memory.objects) == [KEY]
    with pytest.raises(Interrupted):
        storage.fetch("a/key", tmp_path / "got", lambda _: None)


def test_a_file_is_fetched(memory: Memory, storage: Storage, tmp_path: Path) -> None:
    storage.put("a/key", b"x" * 2**19, replacing=None)
    advanced: list[float] = []
    storage.fetch("a/key", tmp_path / "got", advanced.append)
    assert (tmp_path / "got").read_bytes() == b"x" * 2**19 and advanced == [0.5]


def test_a_disk_that_fills_while_a_file_is_fetched_is_told_with_its_name(
    memory: Memory, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(memory, "download_file", fill)
    with pytest.raises(UnavailableError, match=f"No space left on device: '{tmp_path}/got'$"):
        storage.fetch("a/key", tmp_path / "got", lambda _: None)


# Listings


@pytest.fixture
def filled(storage: Storage) -> Storage:
    for key in ("m/b/2", "m/a/1", "m/a/3", "m/c/4", "m/file", "n/X/5"):
        storage.put(key, key.encode() * int(key[-1] == "3") or b"x", replacing=None)
    return storage


def test_objects_are_listed_over_all_pages_by_their_keys(memory: Memory, filled: Storage) -> None:
    found = filled.entries("m/")
    assert [entry.key for entry in found] == ["m/a/1", "m/a/3", "m/b/2", "m/c/4", "m/file"]
    modified = memory.objects["some/prefix/m/a/3"]["LastModified"]
    assert found[1] == Entry("m/a/3", 5, modified)
    asked = {"Bucket": BUCKET, "Prefix": "some/prefix/m/"}
    assert memory.calls("list_objects_v2") == [asked]


def test_folders_are_those_directly_below(memory: Memory, filled: Storage) -> None:
    assert filled.folders("m/") == ["a", "b", "c"]
    asked = {"Bucket": BUCKET, "Prefix": "some/prefix/m/", "Delimiter": "/"}
    assert memory.calls("list_objects_v2") == [asked]
    assert filled.folders("n/") == ["X"]


def test_what_is_deleted_is_gone_and_the_rest_is_not(memory: Memory, filled: Storage) -> None:
    filled.delete([f"m/{key}" for key in ("a/1", "a/3", "b/2", "c/4", "absent")])
    assert sorted(memory.objects) == ["some/prefix/m/file", "some/prefix/n/X/5"]


def test_uploads_that_were_left_are_aborted_if_they_are_old_enough(
    memory: Memory, storage: Storage
) -> None:
    now = datetime.now(UTC)
    for days, name in enumerate(("m/a", "m/b", "m/c", "n/d")):
        memory.create_multipart_upload(Bucket=BUCKET, Key=f"some/prefix/{name}")
        memory.uploads[f"upload {days + 1}"]["Initiated"] = now - timedelta(days=days)
    storage.abort_uploads("m/", before=now - timedelta(days=1))
    assert set(memory.uploads) == {"upload 1", "upload 2", "upload 4"}
    storage.abort_uploads("m/")
    assert set(memory.uploads) == {"upload 4"}


# Two at once


def test_a_write_that_meets_another_is_tried_again_with_growing_pauses(
    memory: Memory, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[float] = []
    monkeypatch.setattr("time.sleep", paused.append)
    memory.errors = [refused(409, "ConditionalRequestConflict")] * 3
    storage.put("a/key", b"one", replacing=None)
    assert paused == [0.1, 0.3, 1.0] and memory.objects[KEY]["Body"] == b"one"
    paused.clear()
    memory.errors = [refused(409, "ConditionalRequestConflict")] * 5
    with pytest.raises(UnavailableError, match="ConditionalRequestConflict"):
        storage.put("another", b"one", replacing=None)
    assert paused == [0.1, 0.3, 1.0, 3.0]
    memory.errors = [refused(403, "AccessDenied")]
    with pytest.raises(UnavailableError, match="access denied"):
        storage.put("another", b"one", replacing=None)
    assert len(paused) == 4 and not memory.errors, "another error is final"
