"""Copies the archive of MODEL_URI to this machine and verifies its digest.

    a path                               used where it lies, if no digest and no key is given
    s3://…/models/NAME/VERSION/          that version; the digest is in its version.json
    s3://…/models/NAME/channels/X.json   the version that the channel points to; digest likewise
    http(s)://… or s3://….mar            needs the digest from elsewhere: SERVING_MODEL_SHA256

S3's endpoint, region and credentials come from boto3's own chain (AWS_ENDPOINT_URL and so on).
"""

import io
import ipaddress
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import urllib3

from serving import archive, s3
from serving.archive import Model, ModelError, Pointer, Version, check_digest, open_model
from serving.files import replacing

CHUNK = 1 << 20
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 15, 30, 3
# AWS's, Google's, Azure's and Alibaba's that are not link-local.
METADATA = ("fd00:ec2::254", "fd20:ce::254", "168.63.129.16", "100.100.100.200")

Verify = Callable[[Path], object]


def is_local(uri: str) -> bool:
    return "://" not in uri


def fetch(
    uri: str, sha256: str | None, target: Path, key: Path | None = None, check: Verify = Path.exists
) -> Path:
    """Copies the archive to `target`, which appears only once its digest is right, and its
    signature where there is a key.

    Args:
        key: the public one of whoever signs; None to load unsigned archives, too.
        check: is called with the copy before it appears, and raises a `ModelError` if the copy is
            not to; by default nothing more is asked of it.

    Raises:
        ModelError: the download failed, or digest or signature are wrong.
    """
    where, digest = _resolved(uri, sha256)
    if digest is None and not is_local(uri):
        raise ModelError(f"{uri}: its digest is needed, as SERVING_MODEL_SHA256")
    if sha256 is not None and digest != sha256:
        raise ModelError(f"{uri}: its SHA-256 should be {digest} by its version.json, not {sha256}")
    try:
        with replacing(target) as part:
            with part.open("wb") as file:
                _download(where, file)
            check_digest(part, digest)
            if key is not None:
                check_signature(part, where, key)
            check(part)
    except ModelError as error:  # of a file that is not there any more
        raise ModelError(str(error).replace(str(part), where)) from None
    except OSError as error:
        raise ModelError(f"{target}: {error}") from None
    return target


def located(uri: str, sha256: str | None, target: Path, public_key: Path | None) -> Model:
    """Opens an archive and checks it: where it lies, if that is this machine and neither digest nor
    key is given; else as a copy at `target`, because another may take its place where it lies.

    Raises:
        ModelError: there is none, or it is not the one that was meant.
    """
    if is_local(uri) and sha256 is None and public_key is None:
        return open_model(Path(uri))
    if is_local(uri) and not Path(uri).exists():
        raise ModelError(f"{uri}: no such file")
    return open_model(fetch(uri, sha256, target, public_key))


def check_signature(path: Path, where: str, public_key: Path) -> None:
    """Checks an archive against the signature that lies beside where it came from.

    Raises:
        ModelError: it has none, or one that is not by the owner of the key.
    """
    try:
        from serving import signing
    except ModuleNotFoundError as error:
        hint = "pip install 'inception-transfer[signing]'"
        raise ModelError(f"{where}: its signature cannot be checked: {error}; {hint}") from None
    signature = io.BytesIO()
    try:
        _download(where + archive.SIGNATURE, signature)
    except OSError as error:
        raise ModelError(f"{where}{archive.SIGNATURE}: {error}") from None
    signing.verify(path, signature.getvalue().strip(), public_key)


def _resolved(uri: str, sha256: str | None) -> tuple[str, str | None]:
    """The archive's own address, and the digest that it should have."""
    if not is_local(uri) and _scheme(uri) not in ("s3", "http", "https"):
        raise ModelError(f"{uri}: a path, http(s)://… or s3://… is needed")
    bucket, key = s3.place(uri)
    if _scheme(uri) != "s3" or key.endswith(".mar"):
        return uri, sha256
    with _explained(uri):
        client = s3.default_client()
        if archive.is_channel(key):
            pointer = Pointer.model_validate_json(s3.read(client, 1, Bucket=bucket, Key=key))
            digest, key = pointer.sha256, archive.beside_channel(key, pointer.version)
        else:
            file = f"{key}/{archive.VERSION}"
            version = Version.model_validate_json(s3.read(client, 1, Bucket=bucket, Key=file))
            digest = version.files[archive.ARCHIVE].sha256
    return f"s3://{bucket}/{key}/{archive.ARCHIVE}", digest


def _scheme(uri: str) -> str:
    return uri.partition("://")[0].lower()


def _download(where: str, file: IO[bytes]) -> None:
    if is_local(where):
        with Path(where).open("rb") as source:
            shutil.copyfileobj(source, file, CHUNK)
    elif _scheme(where) == "s3":
        with _explained(where):
            s3.default_client().download_fileobj(*s3.place(where), file)
    else:
        _download_http(where, file)


def _download_http(uri: str, file: IO[bytes]) -> None:
    _refuse_metadata(uri)
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


def _refuse_metadata(uri: str) -> None:
    """Refuses addresses at which clouds give their machines credentials."""
    try:
        parts = urlsplit(uri)
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ModelError(f"{uri}: {error}") from None
    for *_, address in found:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if ip.is_link_local or str(ip) in METADATA:
            raise ModelError(f"{uri}: {address[0]} may be where clouds keep credentials")


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        with s3.explained(uri, ModelError):
            yield
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{uri}: no version or channel as promotion writes them: {archive.in_one_line(error)}"
        ) from None
