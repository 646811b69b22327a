"""Copies the archive of MODEL_URI to this machine and verifies its digest.

    a path                               used where it lies
    s3://…/models/NAME/VERSION/          that version; the digest is in its version.json
    s3://…/models/NAME/channels/X.json   the version that the channel points to; digest likewise
    http(s)://… or s3://….mar            needs the digest from elsewhere: SERVING_MODEL_SHA256

S3's endpoint, region and credentials come from boto3's own chain (AWS_ENDPOINT_URL and so on).
"""

import ipaddress
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

import urllib3

from serving import archive, s3
from serving.archive import ModelError, Pointer, Record, Version, check_digest
from serving.files import replacing

CHUNK = 1 << 20
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 15, 30, 3
Found = TypeVar("Found", bound=Record)


def is_local(uri: str) -> bool:
    return "://" not in uri


def fetch(uri: str, sha256: str | None, target: Path) -> Path:
    """Copies the archive to `target`, which appears only once its digest is right.

    Raises:
        ModelError: the download failed, or the digest differs.
    """
    try:
        with replacing(target) as part:
            with part.open("wb") as file:
                digest = _download(uri, sha256, file)
            if digest is None and not is_local(uri):
                raise ModelError(f"{uri}: its digest is needed, as SERVING_MODEL_SHA256")
            if sha256 is not None and digest != sha256:
                raise ModelError(
                    f"{uri}: its SHA-256 should be {digest} by its version.json, not {sha256}"
                )
            check_digest(part, digest)
    except OSError as error:
        raise ModelError(f"{target}: {error}") from None
    return target


def _download(uri: str, sha256: str | None, file: IO[bytes]) -> str | None:
    """Returns the digest that the archive should have."""
    scheme = urlsplit(uri).scheme
    if is_local(uri):
        return _copy(uri, sha256, file)
    if scheme in ("http", "https"):
        return _download_http(uri, sha256, file)
    if scheme == "s3":
        with _explained(uri):
            return _download_s3(uri, sha256, file)
    raise ModelError(f"{uri}: a path, http(s)://… or s3://… is needed")


def _copy(path: str, sha256: str | None, file: IO[bytes]) -> str | None:
    with Path(path).open("rb") as source:
        shutil.copyfileobj(source, file, CHUNK)
    return sha256


def _download_http(uri: str, sha256: str | None, file: IO[bytes]) -> str | None:
    if sha256 is None:
        return None
    _refuse_link_local(uri)
    timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
    retries = urllib3.Retry(ATTEMPTS, backoff_factor=1, status_forcelist=[502, 503, 504])
    try:
        with urllib3.PoolManager(timeout=timeout, retries=retries) as pool:
            # A redirect could lead anywhere; the address of a file that does not move is known.
            response = pool.request("GET", uri, preload_content=False, redirect=False)
            if response.status != 200:
                raise ModelError(f"{uri}: the server answers {response.status}")
            shutil.copyfileobj(response, file, CHUNK)
    except urllib3.exceptions.HTTPError as error:
        raise ModelError(f"{uri}: {error}") from None
    return sha256


def _refuse_link_local(uri: str) -> None:
    """Where clouds give the machine's own credentials to whoever asks from inside."""
    parts = urlsplit(uri)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ModelError(f"{uri}: {error}") from None
    for *_, address in found:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if (getattr(ip, "ipv4_mapped", None) or ip).is_link_local:
            raise ModelError(f"{uri}: {address[0]} is a link-local address")


def _download_s3(uri: str, sha256: str | None, file: IO[bytes]) -> str | None:
    parts = urlsplit(uri)
    bucket, key, client = parts.netloc, parts.path.strip("/"), s3.default_client()
    if key.endswith(".mar"):
        digest = sha256
    elif archive.is_channel(key):
        pointer = _read(client, bucket, key, Pointer)
        digest = pointer.sha256
        key = f"{archive.beside_channel(key, pointer.version)}/{archive.ARCHIVE}"
    else:
        version = _read(client, bucket, f"{key}/{archive.VERSION}", Version)
        digest = version.files[archive.ARCHIVE].sha256
        key = f"{key}/{archive.ARCHIVE}"
    if digest is not None:
        client.download_fileobj(bucket, key, file)
    return digest


def _read(client: Any, bucket: str, key: str, kind: type[Found]) -> Found:
    return kind.model_validate_json(client.get_object(Bucket=bucket, Key=key)["Body"].read())


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        with s3.explained(uri, ModelError):
            yield
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{uri}: no version or channel as promotion writes them: {archive.in_one_line(error)}"
        ) from None
