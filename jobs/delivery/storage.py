"""Any S3-compatible storage: a bucket and a prefix, and every operation that is used on it.

Every object carries its SHA-256 as metadata, and the server checks what arrives against a digest.
Credentials come from boto3's default chain and never from a configuration file.
"""

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs import config, interruption
from jobs.errors import ConfigurationError, UnavailableError
from serving import s3
from serving.files import naming
from serving.progress import Advance

PART = 16 * 2**20  # bytes of a file that is sent in parts; S3 takes 10,000 of them
THREADS = 4  # of one client, each with a part or an object


@dataclass(frozen=True)
class Object:
    body: bytes
    etag: str


@dataclass(frozen=True)
class Entry:
    """An object as a listing has it."""

    key: str
    size: int
    modified: datetime


class Storage:
    """A bucket and a prefix in it; keys are relative to the prefix. Progress is in MiB.

    Every method raises :class:`UnavailableError` when storage cannot be reached, or not with
    these credentials; the message says what to do.
    """

    def __init__(self, settings: config.Storage) -> None:
        """
        Raises:
            ConfigurationError: `storage.uri` is not set.
        """
        if settings.uri is None:
            raise ConfigurationError("storage.uri: not set; it is written s3://bucket/prefix")
        self.bucket, self.prefix = s3.place(settings.uri)
        self.uri = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._base = f"{self.prefix}/" if self.prefix else ""  # of every key
        self.settings = settings
        with self._explained():
            try:
                checksums = "when_required" if settings.checksums == "md5" else "when_supported"
                self.client: Any = s3.client(**settings.client, checksums=checksums)
            except ValueError as error:
                raise ConfigurationError(f"storage: {error}") from None

    def check(self) -> None:
        """Asks whether this prefix may be listed and written to, and leaves nothing there."""
        with self._explained():
            self.client.list_objects_v2(Bucket=self.bucket, Prefix=self._base, MaxKeys=1)
            where = self._where("doctor")  # an upload that is started and aborted leaves no object
            begun = self.client.create_multipart_upload(**where, **self._encryption())
            self.client.abort_multipart_upload(**where, UploadId=begun["UploadId"])

    def get(self, key: str) -> Object | None:
        """A small object, None where there is none."""
        with self._explained():
            answer = s3.found(lambda: self.client.get_object(**self._where(key)))
            return Object(answer["Body"].read(), answer["ETag"]) if answer else None

    def head(self, key: str) -> Mapping[str, Any] | None:
        with self._explained():
            return s3.found(lambda: self.client.head_object(**self._where(key)))

    def digest(self, key: str) -> str | None:
        """The SHA-256 that an object was uploaded with; None where there is none."""
        head = self.head(key)
        return head["Metadata"].get("sha256") if head else None

    def put(self, key: str, body: bytes, *, replacing: str | None) -> str:
        """Writes a small object in place of the one with the ETag `replacing`, or where there is
        none.

        Returns:
            Its ETag.

        Raises:
            Conflict: something else is there.
        """
        condition = {"IfMatch": replacing} if replacing else {"IfNoneMatch": "*"}
        with self._explained():
            return self._put(key, body, hashlib.sha256(body).hexdigest(), condition)

    def send(
        self, path: Path, key: str, digest: str, advance: Advance, *, once: bool = False
    ) -> None:
        """Uploads a file, whole or not at all; the server checks what arrives.

        Args:
            digest: the file's SHA-256, which becomes metadata.
            once: only where there is no such object.

        Raises:
            Conflict: there is one.
        """
        condition = {"IfNoneMatch": "*"} if once else {}
        with self._explained():
            if path.stat().st_size <= PART:
                body = path.read_bytes()
                self._put(key, body, digest, condition)
                advance(len(body) / 2**20)
            else:
                self._send_parts(path, key, digest, advance, condition)

    def fetch(self, key: str, path: Path, advance: Advance) -> None:
        """Downloads an object into a file."""

        def count(size: int) -> None:
            interruption.check()
            advance(size / 2**20)

        with self._explained(), naming(path):
            self.client.download_file(self.bucket, self._base + key, str(path), Callback=count)

    def entries(self, prefix: str) -> list[Entry]:
        """All objects whose key starts with `prefix`, sorted by key."""
        with self._explained():
            return [
                Entry(found["Key"].removeprefix(self._base), found["Size"], found["LastModified"])
                for page in self._pages("list_objects_v2", prefix)
                for found in page.get("Contents", [])
            ]

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below a prefix that ends in a slash."""
        with self._explained():
            return [
                found["Prefix"].removeprefix(self._base + prefix).rstrip("/")
                for page in self._pages("list_objects_v2", prefix, Delimiter="/")
                for found in page.get("CommonPrefixes", [])
            ]

    def delete(self, keys: Sequence[str]) -> None:
        with self._explained(), ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda key: self.client.delete_object(**self._where(key)), keys))

    def abort_uploads(self, prefix: str, before: datetime | None = None) -> None:
        """Removes the parts that a killed publisher left behind, or only those begun before."""
        with self._explained():
            left = [
                upload
                for page in self._pages("list_multipart_uploads", prefix)
                for upload in page.get("Uploads", [])
                if before is None or upload["Initiated"] < before
            ]
            for upload in left:
                where = {"Bucket": self.bucket, "Key": upload["Key"]}
                self.client.abort_multipart_upload(**where, UploadId=upload["UploadId"])

    def _put(self, key: str, body: bytes, digest: str, condition: Mapping[str, str]) -> str:
        options = {"Metadata": {"sha256": digest}, **self._encryption(), **condition}
        answer = s3.settled(
            lambda: self.client.put_object(
                **self._where(key), Body=body, **self._checksum(body), **options
            )
        )
        return str(answer["ETag"])

    def _send_parts(
        self, path: Path, key: str, digest: str, advance: Advance, condition: Mapping[str, str]
    ) -> None:
        """Several parts at a time; a failure or an interruption takes them all back."""
        options = {"Metadata": {"sha256": digest}, **self._encryption()}
        if self.settings.checksums == "sha256":
            options["ChecksumAlgorithm"] = "SHA256"
        begun = self.client.create_multipart_upload(**self._where(key), **options)
        where = {**self._where(key), "UploadId": begun["UploadId"]}
        count = -(-path.stat().st_size // PART)

        def send(file: int, number: int) -> dict[str, Any]:
            interruption.check()
            body = os.pread(file, PART, (number - 1) * PART)
            checksum = self._checksum(body)
            answer = self.client.upload_part(**where, PartNumber=number, Body=body, **checksum)
            advance(len(body) / 2**20)
            checksum.pop("ContentMD5", None)
            return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

        threads = ThreadPoolExecutor(THREADS)
        try:
            with path.open("rb") as file:
                try:
                    numbers = range(1, count + 1)
                    parts = list(threads.map(lambda n: send(file.fileno(), n), numbers))
                finally:
                    threads.shutdown(cancel_futures=True)
            s3.settled(
                lambda: self.client.complete_multipart_upload(
                    **where, MultipartUpload={"Parts": parts}, **condition
                )
            )
        except BaseException:
            self._abort(where)
            raise

    def _abort(self, where: Mapping[str, str]) -> None:
        """Takes parts back if storage can be reached; the next publish does it otherwise."""
        from botocore.exceptions import BotoCoreError, ClientError

        with suppress(BotoCoreError, ClientError):
            self.client.abort_multipart_upload(**where)

    def _checksum(self, body: bytes) -> dict[str, str]:
        """What the server compares the body with."""
        if self.settings.checksums == "md5":
            digest = hashlib.md5(body, usedforsecurity=False).digest()
            return {"ContentMD5": base64.b64encode(digest).decode()}
        return {"ChecksumSHA256": base64.b64encode(hashlib.sha256(body).digest()).decode()}

    def _encryption(self) -> dict[str, str]:
        name = {"none": None, "s3": "AES256", "kms": "aws:kms"}[self.settings.encryption]
        options = {"ServerSideEncryption": name, "SSEKMSKeyId": self.settings.kms_key}
        return {option: value for option, value in options.items() if value}

    def _pages(self, operation: str, prefix: str, **options: str) -> Iterator[Any]:
        pages = self.client.get_paginator(operation)
        yield from pages.paginate(Bucket=self.bucket, Prefix=self._base + prefix, **options)

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._base + key}

    def _explained(self) -> AbstractContextManager[None]:
        return s3.explained(self.uri, UnavailableError)
