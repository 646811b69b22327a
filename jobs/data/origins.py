"""Where pictures come from: a prefix of a bucket, or a folder of tar shards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from urllib3 import PoolManager, Timeout
from urllib3.exceptions import HTTPError

from jobs import config
from jobs.data import listing, shards
from jobs.errors import ConfigurationError, UnavailableError
from serving import s3
from serving.files import replacing, text, write

THREADS = s3.CONNECTIONS  # that may fetch at once
LARGE = 8 * 2**20  # bytes of an object that is fetched in parts, straight to the disk


class Entry(NamedTuple):
    """An object as a listing has it."""

    key: str
    etag: str
    size: int


class Bucket:
    """A prefix of a bucket, or a manifest in one. Methods raise :class:`UnavailableError` when S3
    does not answer, or not with these credentials, after boto3's own retries."""

    def __init__(self, settings: config.Data) -> None:
        """
        Raises:
            ConfigurationError: `data.s3.endpoint_url` is no address.
        """
        self.bucket, self.root = s3.place(str(settings.root))
        # The root, if it is the key of one.
        self.manifest = self.root if self.root.endswith(listing.MANIFESTS) else None
        # What keys are relative to: the root, or the folder of a manifest.
        folder = self.root.rpartition("/")[0] if self.manifest else self.root
        self.prefix = f"{folder}/" if folder else ""
        self.attempts = settings.s3.attempts
        limits = Timeout(connect=settings.s3.connect_timeout, read=settings.s3.read_timeout)
        self.http = PoolManager(maxsize=THREADS, timeout=limits, retries=False)
        self.direct = True
        try:
            with s3.explained(self.name(self.root), UnavailableError):
                self.client: Any = s3.client(**settings.s3.client)
        except ValueError as error:
            raise ConfigurationError(f"data.s3: {error}") from None

    def name(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def key(self, path: str) -> str:
        """Of a path or a URL in a manifest."""
        if "://" not in path:
            return self.prefix + path.removeprefix("./")  # as `find` writes it
        if not path.startswith(self.name("")):
            raise UnavailableError(f"{self.name(self.root)}: {path} is not in this bucket")
        return path.removeprefix(self.name(""))

    def entries(self, prefix: str | None = None, limit: int | None = None) -> Iterator[Entry]:
        """All objects whose keys begin with the prefix, or the first ones, sorted by key."""
        prefix = self.prefix if prefix is None else prefix
        with s3.explained(self.name(prefix), UnavailableError):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix, PaginationConfig={"MaxItems": limit}
            )
            for page in pages:
                for found in page.get("Contents", []):
                    yield Entry(found["Key"], found["ETag"], found["Size"])

    def fetch(self, entry: Entry, target: Path) -> bool:
        """Writes an object to a file, whole or not at all; False if it has vanished."""
        with s3.explained(self.name(entry.key), UnavailableError):
            return s3.found(lambda: self._write(entry, target)) is not None

    def _write(self, entry: Entry, target: Path) -> Path:
        if entry.size <= LARGE:
            write(target, self._read(entry.key))
        else:
            with replacing(target) as part:
                self.client.download_file(self.bucket, entry.key, str(part))
        return target

    def _read(self, key: str) -> bytes:
        """By a signed address, which takes half the time of boto3's own way. That is taken once the
        first has failed: only boto3 may know the proxy, the certificate authority or the region."""
        where = {"Bucket": self.bucket, "Key": key}
        if self.direct:
            url = self.client.generate_presigned_url("get_object", Params=where)
            try:
                answer = self.http.request("GET", url, decode_content=False)
                if answer.status == 200:
                    return answer.data
                self.direct = answer.status == 404
            except HTTPError:
                self.direct = False
        return s3.read(self.client, self.attempts, **where)


class Folder:
    """Tar shards in `train/` and `test/`, and no class folder beside them."""

    manifest = None

    def __init__(self, settings: config.Data) -> None:
        self.path = Path(str(settings.root)).expanduser().absolute()
        self.prefix = f"{self.path}/"

    def name(self, key: str) -> str:
        return key

    def entries(self) -> Iterator[Entry]:
        """
        Raises:
            UnavailableError: there is a class folder, too.
        """
        for split in listing.SPLITS:
            for path in (self.path / split).glob("[!.]*"):
                if path.is_dir():
                    raise UnavailableError(
                        f"{path}: a root has shards or class folders, and this one has both"
                    )
            for path in sorted((self.path / split).glob(f"[!.]*{shards.SUFFIX}")):
                if text(str(path)) != str(path):
                    raise UnavailableError(f"{text(str(path))}: a shard's name has to be in UTF-8")
                stat = path.stat()
                yield Entry(str(path), listing.version(stat), stat.st_size)

    def fetch(self, entry: Entry, target: Path) -> bool:
        target.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(entry.key)
        return True
