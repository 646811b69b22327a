"""S3: a finished run reaches it whole, and only then is seen as there.

    PREFIX/runs/dt=YYYY-MM-DD/run_id=…/…    the manifest last; a run without one is not there yet

Credentials come from boto3's default chain and never from a configuration file.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.client import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from jobs import config, interruption
from jobs.errors import ConfigurationError, UnavailableError
from jobs.progress import log
from jobs.runs import MANIFEST, RunFolder, sha256

ADVICE = {
    "403": "access denied; check the credentials and what they may do in this bucket",
    "AccessDenied": "access denied; check the credentials and what they may do in this bucket",
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key is not the access key's",
    "ExpiredToken": "the credentials have expired; renew them",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "404": "there is no such bucket",
    "NoSuchBucket": "there is no such bucket",
}


class Storage:
    """A bucket and a prefix in it."""

    def __init__(self, settings: config.Storage) -> None:
        """
        Raises:
            ConfigurationError: `storage.uri` is not set.
        """
        if settings.uri is None:
            raise ConfigurationError("storage.uri: not set; it is written s3://bucket/prefix")
        parts = urlsplit(settings.uri)
        self.uri, self.bucket, self.prefix = settings.uri, parts.netloc, parts.path.strip("/")
        self.client: Any = boto3.Session().client(
            "s3",
            endpoint_url=settings.endpoint_url,
            region_name=settings.region,
            config=ClientConfig(
                connect_timeout=15,
                read_timeout=30,
                retries={"mode": "standard", "max_attempts": settings.attempts},
                s3={"addressing_style": "path" if settings.path_style else "auto"},
            ),
        )

    def check(self) -> None:
        """Asks for the bucket.

        Raises:
            UnavailableError: it cannot be reached with these credentials; says what to do.
        """
        with self._explained():
            self.client.head_bucket(Bucket=self.bucket)

    def publish(self, folder: RunFolder) -> int:
        """Sends what is missing of a finished run, the manifest last.

        Returns:
            How many files were sent; 0 when all of them were there already.

        Raises:
            UnavailableError: the run is unfinished, or storage failed; call again to go on.
            ConfigurationError: another run has this id there.
        """
        manifest = folder.manifest()
        root = "/".join(part for part in (self.prefix, _run_key(folder)) if part)
        with self._explained():
            ours = sha256(folder.path / MANIFEST)
            if self._digest_of(f"{root}/{MANIFEST}") == ours:
                return 0
            self._refuse_another_run(f"{root}/{MANIFEST}", manifest)
            sent = 0
            for name, entry in manifest["files"].items():
                interruption.check()
                sent += self._send(folder.path / name, f"{root}/{name}", entry["sha256"])
            sent += self._send(folder.path / MANIFEST, f"{root}/{MANIFEST}", ours)
        log(f"published {sent} files to s3://{self.bucket}/{root}")
        return sent

    def _refuse_another_run(self, key: str, manifest: dict[str, Any]) -> None:
        """A run may be published again after an export; one that only shares its id may not."""
        if self._digest_of(key) is None:
            return
        published = json.load(self.client.get_object(Bucket=self.bucket, Key=key)["Body"])
        if published["started"] != manifest["started"]:
            raise ConfigurationError(f"{self.uri}: another run is there as {manifest['run_id']}")

    def _send(self, path: Path, key: str, digest: str) -> bool:
        """Uploads a file unless it is there; the server checks every part's SHA-256."""
        if self._digest_of(key) == digest:
            return False
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": digest}}
        self.client.upload_file(str(path), self.bucket, key, ExtraArgs=extra)
        return True

    def _digest_of(self, key: str) -> str | None:
        """The whole object's SHA-256 as it was noted on upload; None where there is none."""
        try:
            head = self.client.head_object(Bucket=self.bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                return None
            raise
        digest: str | None = head["Metadata"].get("sha256")
        return digest

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns boto3's errors into one line that says what to do."""
        try:
            yield
        except NoCredentialsError:
            advice = "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
            raise UnavailableError(f"{self.uri}: {advice}") from None
        except ClientError as error:
            code = error.response["Error"]["Code"]
            raise UnavailableError(f"{self.uri}: {ADVICE.get(code, error)}") from None
        except (BotoCoreError, boto3.exceptions.Boto3Error, OSError) as error:
            raise UnavailableError(f"{self.uri}: {error}") from None


def _run_key(folder: RunFolder) -> str:
    """The layout that DuckDB and Athena read in place; the day is that of the run's start."""
    return f"runs/dt={folder.started[:10]}/run_id={folder.run_id}"
