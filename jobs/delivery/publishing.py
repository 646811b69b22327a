"""Publishes a run to S3: metrics during training, all files at the end, the manifest last.

runs/dt=YYYY-MM-DD/run_id=…/…    a run without a manifest is not there yet
"""

from jobs import config, interruption, results
from jobs.delivery.storage import Object, Storage
from jobs.errors import ConfigurationError, UnavailableError
from jobs.results import Manifest
from jobs.runs import ENVIRONMENT, MANIFEST, RunFolder
from serving.files import digest_of, replacing, write
from serving.progress import log, task
from serving.s3 import Conflict

LIVE = ("config.yaml", ENVIRONMENT, "metrics.jsonl")  # sent while a run trains


def run_key(folder: RunFolder) -> str:
    """The layout that DuckDB and Athena read in place; the day is that of the run's start."""
    return f"runs/dt={folder.started[:10]}/run_id={folder.run_id}"


def publish(storage: Storage, folder: RunFolder) -> int:
    """Sends what is missing of a finished run, the manifest last.

    Returns:
        How many files were sent; 0 when all of them were there already.

    Raises:
        UnavailableError: the run is unfinished, a file is not what the manifest says, or storage
            failed; call again to resume.
        ConfigurationError: another run has this id there.
    """
    manifest = folder.manifest()
    with folder.open(folder.config()):
        root = run_key(folder)
        published = storage.get(f"{root}/{MANIFEST}")
        ours = (folder.path / MANIFEST).read_bytes()
        if published and published.body == ours:
            return 0
        before = _manifest(storage, root, published)
        _refuse_another_run(before, manifest, storage)
        etag = published.etag if published else None
        if before and _contradicts(manifest, before):
            storage.delete([f"{root}/{MANIFEST}"])  # it is about to be outdated
            etag = None
        storage.abort_uploads(f"{root}/")
        sent = _send_files(storage, folder, manifest)
        try:
            storage.put(f"{root}/{MANIFEST}", ours, replacing=etag)
        except Conflict:
            there = storage.get(f"{root}/{MANIFEST}")
            _refuse_another_run(_manifest(storage, root, there), manifest, storage)
            if there is None or there.body != ours:  # over whose files ours may have been written
                raise UnavailableError(
                    f"{storage.uri}/{root}: another process has published it meanwhile; call again"
                ) from None
    log(f"published {sent + 1} files to {storage.uri}/{root}")
    return sent + 1


def fetch_published(storage: Storage, folder: RunFolder) -> None:
    """Fetches the files of a run if it is published already: its process was lost after that, and
    what another made again would have other bytes.

    Raises:
        UnavailableError: a file is not what the manifest there says.
        ConfigurationError: another run has this id there.
    """
    root = run_key(folder)
    published = storage.get(f"{root}/{MANIFEST}")
    manifest = _manifest(storage, root, published)
    if published is None or manifest is None:
        return
    _refuse_another_run(manifest, folder, storage)
    size = sum(entry.size for entry in manifest.files.values()) / 2**20
    with task(f"fetch {folder.run_id}", size, "MiB") as advance:
        for name, entry in manifest.files.items():
            with replacing(folder.path / name) as part:
                storage.fetch(f"{root}/{name}", part, advance)
                if digest_of(part) != entry.sha256:
                    raise UnavailableError(f"{storage.uri}/{root}/{name}: damaged")
    write(folder.path / MANIFEST, published.body)


def _manifest(storage: Storage, root: str, there: Object | None) -> Manifest | None:
    where = f"{storage.uri}/{root}/{MANIFEST}"
    return results.parse(where, there.body, results.MANIFEST) if there else None


def _refuse_another_run(
    published: Manifest | None, ours: Manifest | RunFolder, storage: Storage
) -> None:
    """A run may be published again after an export; one that only shares its id may not."""
    if published and published.started != ours.started:
        raise ConfigurationError(f"{storage.uri}: another run is there as {ours.run_id}")


def _contradicts(manifest: Manifest, published: Manifest) -> bool:
    files = manifest.files
    return any(files.get(name, entry) != entry for name, entry in published.files.items())


def _send_files(storage: Storage, folder: RunFolder, manifest: Manifest) -> int:
    root = run_key(folder)
    missing = {
        name: entry
        for name, entry in manifest.files.items()
        if storage.digest(f"{root}/{name}") != entry.sha256
    }
    size = sum(entry.size for entry in missing.values()) / 2**20
    with task(f"publish {folder.run_id}", size, "MiB") as advance:
        for name, entry in missing.items():
            interruption.check()
            if digest_of(folder.path / name) != entry.sha256:
                raise UnavailableError(
                    f"{folder.path / name}: changed since the manifest was written; "
                    f"`report {folder.path}` rewrites it"
                )
            storage.send(folder.path / name, f"{root}/{name}", entry.sha256, advance)
    return len(missing)


class Live:
    """Sends epoch metrics while the run trains, each object only in place of the one it knows: a
    delayed request can therefore never overwrite what `publish` sends later."""

    def __init__(self, folder: RunFolder, settings: config.Storage) -> None:
        self.folder = folder
        self.settings = settings.model_copy(update={"attempts": 1})
        self.storage: Storage | None = None
        self.sent: dict[str, tuple[bytes, str]] = {}  # content and ETag by name

    def look(self) -> None:
        """Sends what is new.

        Raises:
            ConfigurationError: a finished run is there under the same id.
        """
        if not (self.folder.path / ENVIRONMENT).is_file():
            return
        self.storage = self.storage or Storage(self.settings)
        for name in LIVE:
            self._send(self.storage, name)

    def _send(self, storage: Storage, name: str) -> None:
        path, key = self.folder.path / name, f"{run_key(self.folder)}/{name}"
        if not path.is_file():
            return
        known, etag = self.sent.get(name, (b"", None))
        # Before the file is read: what is replaced must not be newer than what replaces it.
        if etag is None:
            head = storage.head(key)
            etag = head["ETag"] if head else None
            if storage.head(f"{run_key(self.folder)}/{MANIFEST}"):
                raise ConfigurationError(f"a finished run is there as {self.folder.run_id}")
        content = path.read_bytes()
        content = content[: content.rfind(b"\n") + 1]  # a line may be half written
        if content == known:
            return
        self.sent.pop(name, None)  # unknown, should the next line fail
        self.sent[name] = content, storage.put(key, content, replacing=etag)
