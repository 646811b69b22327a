"""S3 access: one function creates the client, one explains its errors.

Credentials come from boto3's default chain, and so do endpoint and region that are not given.
boto3 is imported on first use, as that takes half a second.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

Answer = TypeVar("Answer")
SCHEME = "s3://"
ATTEMPTS = 3  # to get an object
CONFLICT_PAUSES = (0.1, 0.3, 1.0, 3.0)  # seconds
CONNECTIONS = 32  # of one client that are kept; more threads would open others again and again
DENIED = "access denied; check the credentials and what they may do in this bucket"
REGION = "the bucket is in another region; set its `region`, or AWS_DEFAULT_REGION"
EXPIRED = "the credentials have expired; renew them"
ADVICE = {
    "400": "refused without a reason; credentials that have expired, or a wrong `region`",
    "403": DENIED,
    "AccessDenied": DENIED,
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key is not the access key's",
    "ExpiredToken": EXPIRED,
    "ExpiredTokenException": EXPIRED,
    "InvalidToken": "the session token is not valid; renew the credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "404": "it is not there, or there is no such bucket",
    "NoSuchBucket": "there is no such bucket",
    "301": REGION,
    "PermanentRedirect": REGION,
    "AuthorizationHeaderMalformed": REGION,
    "BadDigest": "a file arrived damaged and was refused; try again",
    "NotImplemented": "this server lacks something; storage.checksums=md5 may help, or for "
    "`score` the variable AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
}


class Conflict(Exception):  # noqa: N818 - an outcome that every caller has an answer to
    """A conditional write found something else than it expected; nothing was written."""


def client(
    *,
    style: str = "auto",
    checksums: str | None = None,
    connect_timeout: float = 15,
    read_timeout: float = 30,
    attempts: int = 3,
    profile: str | None = None,
    endpoint_url: str | None = None,
    region: str | None = None,
    **credentials: str,
) -> Any:
    """A boto3 client; timeouts in seconds.

    Args:
        style: where the bucket's name goes: `path`, `virtual` (the host) or `auto`.
        checksums: `when_supported` or `when_required`; by default as the environment has it.
        profile: of `~/.aws`, before the environment's credentials.

    Raises:
        ValueError: the endpoint is no address.
    """
    import boto3
    from botocore.client import Config

    return boto3.Session(profile_name=profile).client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=region,
        config=Config(
            signature_version="s3v4",  # of signed addresses, too
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            max_pool_connections=CONNECTIONS,
            retries={"mode": "standard", "total_max_attempts": attempts},
            s3={"addressing_style": style},
            request_checksum_calculation=checksums,
            response_checksum_validation=checksums,
        ),
        **credentials,
    )


def place(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`; in a key, `#` and `?` are characters like others."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key.strip("/")


def default_client() -> Any:
    """A client that takes everything from boto3's chain. Amazon's own addresses carry the bucket in
    the host's name; other servers want it in the path.

    Raises:
        OSError: AWS_ENDPOINT_URL is no address.
    """
    try:
        amazons = client()
    except ValueError as error:
        raise OSError(f"AWS_ENDPOINT_URL: {error}") from None
    host = urlsplit(amazons.meta.endpoint_url).hostname or ""
    return amazons if ".amazonaws.com" in host else client(style="path")


@cache
def shared_client() -> Any:
    """:func:`default_client`, one for all threads of a process."""
    return default_client()


@contextmanager
def explained(uri: str, kind: type[Exception]) -> Iterator[None]:
    """Turns boto3's errors, and its absence, into one of `kind`, with one line that says what to
    do."""
    try:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError
    except ModuleNotFoundError as error:
        raise kind(f"{uri}: S3 needs the package boto3 ({error})") from None
    broken_off = (RetriesExceededError, S3DownloadFailedError)

    try:
        yield
    except NoCredentialsError:
        advice = "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role"
        raise kind(f"{uri}: {advice}") from None
    except ClientError as error:
        raise kind(f"{uri}: {ADVICE.get(code(error), str(error))}") from None
    except (BotoCoreError, Boto3Error, OSError, *broken_off) as error:
        raise kind(f"{uri}: {' '.join(str(error).split())}") from None


def found(ask: Callable[[], Answer]) -> Answer | None:
    """What a client answers when it is asked for an object; None where there is none."""
    from botocore.exceptions import ClientError

    try:
        return ask()
    except ClientError as error:
        if status(error) == 404 and code(error) != "NoSuchBucket":
            return None
        raise


def keys(uri: str, kind: type[Exception]) -> Iterator[str]:
    """Keys of all objects whose URI starts with `uri`, in order; errors as :func:`explained`."""
    bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
    with explained(uri, kind):
        pages = shared_client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            yield from (entry["Key"] for entry in page.get("Contents", []))


def get(uri: str, kind: type[Exception]) -> bytes | None:
    """An object; None where there is none. Errors as :func:`explained`, and one more.

    Raises:
        PermissionError: it is archived.
    """
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not key:
        return None
    with explained(uri, kind):
        from botocore.exceptions import ClientError

        try:
            return found(lambda: read(shared_client(), ATTEMPTS, Bucket=bucket, Key=key))
        except ClientError as error:
            if code(error) != "InvalidObjectState":
                raise
    raise PermissionError("archived in S3; restore it")


def settled(write: Callable[[], Answer]) -> Answer:
    """What a conditional write answers; tries again where two wrote at the same moment (409).

    Raises:
        Conflict: the condition is not met (412, or 404 where Amazon has nothing to replace).
    """
    from botocore.exceptions import ClientError

    for pause in (*CONFLICT_PAUSES, None):
        try:
            return write()
        except ClientError as error:
            if status(error) == 412 or code(error) == "NoSuchKey":
                raise Conflict("something else was written there meanwhile") from None
            if status(error) != 409 or pause is None:
                raise
            time.sleep(pause)
    raise AssertionError("the last pause is None")


def read(client: Any, attempts: int, **where: str) -> bytes:
    """An object. Tries again, as boto3 does with requests but not with a body that breaks off."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    for left in reversed(range(attempts)):
        body = client.get_object(**where)["Body"]
        try:
            content: bytes = body.read()
            return content
        except (HTTPClientError, IncompleteReadError):
            if not left:
                raise
    raise AssertionError("the last attempt returns or raises")


def code(error: Any) -> str:
    """Of a botocore ClientError, such as `NoSuchBucket`."""
    return str(error.response["Error"]["Code"])


def status(error: Any) -> int:
    """The HTTP status of a botocore ClientError."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
