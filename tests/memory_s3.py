"""An S3 client that keeps its objects in memory, and what it was asked: for tests in a second."""

import base64
import hashlib
import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from jobs import config
from serving import s3

BUCKET = "some-bucket"
PAGE = 2  # entries of a listing


def refused(status: int, code: str) -> ClientError:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "some operation")


class Memory:
    """The operations that :class:`jobs.delivery.storage.Storage` uses, of one bucket."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.options: dict[str, Any] = {}
        """With which the client was made."""
        self.errors: list[ClientError] = []
        """With which the next writes are answered."""
        self.written = 0

    def client(self, **options: Any) -> "Memory":
        self.options = options
        return self

    def calls(self, operation: str) -> list[dict[str, Any]]:
        return [given for name, given in self.asked if name == operation]

    def put_object(self, **given: Any) -> dict[str, str]:
        self._note("put_object", given)
        check(given["Body"], given)
        return self._write(given["Body"], given)

    def get_object(self, **given: Any) -> dict[str, Any]:
        self._note("get_object", given)
        found = self._found(given, "NoSuchKey")
        return {"Body": io.BytesIO(found["Body"]), "ETag": found["ETag"]}

    def head_object(self, **given: Any) -> dict[str, Any]:
        self._note("head_object", given)
        return self._found(given, "404")

    def delete_object(self, **given: Any) -> None:
        self._note("delete_object", given)
        self.objects.pop(given["Key"], None)

    def download_file(
        self, bucket: str, key: str, path: str, Callback: Callable[[int], None]
    ) -> None:
        self._note("download_file", {"Bucket": bucket, "Key": key})
        body = self._found({"Key": key}, "404")["Body"]
        Path(path).write_bytes(body)
        Callback(len(body))

    def list_objects_v2(self, **given: Any) -> None:
        self._note("list_objects_v2", given)

    def get_paginator(self, operation: str) -> Any:
        return Pages(self, operation)

    def create_multipart_upload(self, **given: Any) -> dict[str, str]:
        self._note("create_multipart_upload", given)
        name = f"upload {len(self.calls('create_multipart_upload'))}"
        self.uploads[name] = {**given, "parts": {}, "Initiated": datetime.now(UTC)}
        return {"UploadId": name}

    def upload_part(self, **given: Any) -> dict[str, str]:
        self._note("upload_part", given)
        check(given["Body"], given)
        self.uploads[given["UploadId"]]["parts"][given["PartNumber"]] = given["Body"]
        return {"ETag": f"part {given['PartNumber']}"}

    def complete_multipart_upload(self, **given: Any) -> None:
        self._note("complete_multipart_upload", given)
        upload = self.uploads[given["UploadId"]]
        numbers = [part["PartNumber"] for part in given["MultipartUpload"]["Parts"]]
        assert numbers == list(range(1, len(upload["parts"]) + 1)) and given["Key"] == upload["Key"]
        self._write(b"".join(upload["parts"][n] for n in numbers), {**upload, **given})
        del self.uploads[given["UploadId"]]

    def abort_multipart_upload(self, **given: Any) -> None:
        self._note("abort_multipart_upload", given)
        assert self.uploads.pop(given["UploadId"])["Key"] == given["Key"]

    def _note(self, operation: str, given: dict[str, Any]) -> None:
        assert given["Bucket"] == BUCKET
        self.asked.append((operation, given))

    def _found(self, given: dict[str, Any], code: str) -> dict[str, Any]:
        if given["Key"] not in self.objects:
            raise refused(404, code)
        return self.objects[given["Key"]]

    def _write(self, body: bytes, given: dict[str, Any]) -> dict[str, str]:
        if self.errors:
            raise self.errors.pop(0)
        there = self.objects.get(given["Key"])
        if (given.get("IfNoneMatch") == "*" and there) or (
            "IfMatch" in given and (there is None or there["ETag"] != given["IfMatch"])
        ):
            raise refused(412, "PreconditionFailed")
        self.written += 1
        self.objects[given["Key"]] = {
            "Body": body,
            "ETag": f"version {self.written}",
            "Metadata": given["Metadata"],
            "LastModified": datetime.now(UTC),
        }
        return {"ETag": f"version {self.written}"}


class Pages:
    """A listing, a few entries at a time."""

    def __init__(self, memory: Memory, operation: str) -> None:
        self.memory, self.operation = memory, operation

    def paginate(self, **given: Any) -> Iterator[dict[str, Any]]:
        self.memory._note(self.operation, given)
        prefix, limit = given["Prefix"], given.get("Delimiter")
        yield {}
        if self.operation == "list_multipart_uploads":
            found = [
                {"Key": upload["Key"], "UploadId": name, "Initiated": upload["Initiated"]}
                for name, upload in self.memory.uploads.items()
                if upload["Key"].startswith(prefix)
            ]
            yield from pages("Uploads", found)
            return
        keys = sorted(key for key in self.memory.objects if key.startswith(prefix))
        if limit:
            below = {key.removeprefix(prefix).partition(limit) for key in keys}
            folders = sorted(f"{prefix}{name}{limit}" for name, slash, _ in below if slash)
            yield from pages("CommonPrefixes", [{"Prefix": f} for f in dict.fromkeys(folders)])
            return
        entries = [
            {
                "Key": key,
                "Size": len(self.memory.objects[key]["Body"]),
                "LastModified": self.memory.objects[key]["LastModified"],
            }
            for key in keys
        ]
        yield from pages("Contents", entries)


def pages(name: str, entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(entries), PAGE):
        yield {name: entries[start : start + PAGE]}


def check(body: bytes, given: dict[str, Any]) -> None:
    """As a server does: what arrives is what was sent."""
    md5, sha256 = given.get("ContentMD5"), given.get("ChecksumSHA256")
    digest = hashlib.md5(body) if md5 else hashlib.sha256(body)
    if (md5 or sha256) != base64.b64encode(digest.digest()).decode():
        raise refused(400, "BadDigest")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """What every S3 client of the test is."""
    memory = Memory()
    monkeypatch.setattr(s3, "client", memory.client)
    return memory


def in_memory(**changes: Any) -> config.Storage:
    return config.Storage(**{"uri": f"s3://{BUCKET}/some/prefix", **changes})
