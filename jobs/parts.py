"""A run in parts: each variant with each seed by itself, in any order and on any machine.

Processes that share the run folder meet there. Others meet in S3, where a part is one object,
written once, and so there as a whole or not at all:

    parts/<run_id>/<digest>/<variant>.<seed>.tar    its files, and the run's own that belong to it
                            data                    the digest of their pictures
                            last                    the part whose process does the last step
"""

import tarfile
from contextlib import suppress
from pathlib import Path

from jobs import interruption, pipeline
from jobs.config import Config, Part
from jobs.delivery import publishing
from jobs.delivery.storage import Storage
from jobs.errors import UnavailableError
from jobs.runs import WEIGHTS, RunFolder
from serving.files import digest_of, temporary, write
from serving.progress import log, task
from serving.s3 import Conflict
from serving.tar import opened

OF_THE_RUN = ("data.json", "environment.json", "metrics.jsonl", WEIGHTS)  # in each part's object


def run(config: Config, folder: RunFolder, part: Part) -> bool:
    """Trains one part; the process that then finds all of them does what is left of the run.

    A part that is there is not trained again, so that the same call mends whatever was lost.

    Returns:
        Whether this process did the last step.
    """
    there = _begin(config, folder)
    if there is None or not there.has(part):
        pipeline.train_part(config, folder, part, there.agree if there else lambda digest: None)
        if there:
            there.upload(part)
    with folder.alone("the last step"):
        if left := _missing(config, folder, there):
            log(f"{part} is done; still missing: {', '.join(left)}")
            return False
        if there and (last := there.last(part)) != str(part):
            log(f"{part} is done; the process of {last} does the rest")
            return False
        gather(config, folder)
        pipeline.run(config, folder)
        return True


def gather(config: Config, folder: RunFolder) -> None:
    """Brings all parts into the run folder; if the run is published already, all its files.

    Raises:
        UnavailableError: some are missing, which `run` can train, or were trained on other data.
    """
    there = _begin(config, folder)
    if there and not folder.finished:
        for part in config.parts:
            interruption.check()
            if not folder.variant(*part).finished and there.has(part):
                there.download(part)
    if left := _missing(config, folder, there):
        raise UnavailableError(f"{folder.path}: missing: {', '.join(left)}")
    if there and not folder.finished:
        publishing.fetch_published(there.storage, folder)


def _begin(config: Config, folder: RunFolder) -> "Rendezvous | None":
    with folder.alone("the configuration"):
        folder.begin(config)
    return Rendezvous(config, folder) if config.storage.uri is not None else None


def _missing(config: Config, folder: RunFolder, there: "Rendezvous | None") -> list[str]:
    """The parts that are nowhere, and the option that trains each."""
    return [
        f"{part} (--part {index})"
        for index, part in enumerate(config.parts)
        if not folder.variant(*part).finished and not (there and there.has(part))
    ]


class Rendezvous:
    """The place in S3 where the processes of one run exchange its parts."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.storage, self.folder = Storage(config.storage), folder
        self.root = f"parts/{folder.run_id}/{config.digest}"
        self.storage.get(f"{self.root}/last")  # raises now, not after hours, if it cannot be read

    def has(self, part: Part) -> bool:
        return self.storage.head(self._key(part)) is not None

    def agree(self, digest: str) -> None:
        """Compares the data with those of the part that began first, before hours of training.

        Raises:
            UnavailableError: they are others.
        """
        if self._settle("data", digest) != digest:
            raise UnavailableError(
                "the pictures are not those that the other parts began with; a manifest keeps them "
                "the same, --run-id NAME starts another run"
            )

    def last(self, part: Part) -> str:
        """The part whose process does the last step: this one, unless another was quicker."""
        return self._settle("last", str(part))

    def _settle(self, name: str, value: str) -> str:
        """What is in S3 under this name: this value, unless another process was quicker."""
        key = f"{self.root}/{name}"
        with suppress(Conflict):
            self.storage.put(key, value.encode(), replacing=None)
        found = self.storage.get(key)
        return found.body.decode() if found else value

    def upload(self, part: Part) -> None:
        """Puts a part into S3, unless another process of the same part was quicker."""
        own = self.folder.variant(*part).path
        files = [*own.iterdir(), *(self.folder.path / name for name in OF_THE_RUN)]
        with temporary() as place:
            packed = place / "part.tar"
            with tarfile.open(packed, "w") as tar:
                for file in filter(Path.is_file, files):  # one that diverged at once has no metrics
                    tar.add(file, file.relative_to(self.folder.path))
            size, digest = packed.stat().st_size / 2**20, digest_of(packed)
            with suppress(Conflict), task(f"send {part}", size, "MiB") as advance:
                self.storage.send(packed, self._key(part), digest, advance, once=True)

    def download(self, part: Part) -> None:
        """Copies a part from S3 into the run folder.

        Raises:
            UnavailableError: it was trained on other data than the run.
        """
        with temporary() as place:
            packed, theirs = place / "part.tar", RunFolder(place / "run")
            log(f"{part}: from {self.storage.uri}/{self._key(part)}")
            self.storage.fetch(self._key(part), packed, lambda _: None)
            _unpack(packed, theirs.path)
            self._add(part, theirs)

    def _add(self, part: Part, theirs: RunFolder) -> None:
        for name in ("data.json", WEIGHTS):
            ours, given = self.folder.path / name, theirs.path / name
            if given.is_file() and not ours.is_file():
                write(ours, given.read_bytes())
            elif name == WEIGHTS and given.is_file() and ours.read_bytes() != given.read_bytes():
                raise UnavailableError(f"{part} began with other weights than the other parts")
        if theirs.facts().digest != self.folder.facts().digest:
            raise UnavailableError(f"{part} was trained on other pictures than the other parts")
        known = self.folder.environments()
        self.folder.add_environments([e for e in theirs.environments() if e not in known])
        rows = [row for row in theirs.metrics() if (row["variant"], row["seed"]) == part]
        self.folder.append_metrics(rows)
        own = self.folder.variant(*part).path
        files = [*(theirs.path / own.relative_to(self.folder.path)).iterdir()]
        for file in sorted(files, key=lambda file: file.name == "result.json"):  # which ends it
            write(own / file.name, file.read_bytes())

    def _key(self, part: Part) -> str:
        return f"{self.root}/{part.variant}.{part.seed}.tar"


def _unpack(packed: Path, folder: Path) -> None:
    """`extractall` takes no filter before Python 3.11.4, and Debian 12 has 3.11.2.

    Raises:
        UnavailableError: it is damaged, or would write elsewhere than into the folder.
    """
    try:
        with opened(packed) as tar:
            for member in tar:
                target = folder / member.name
                inside = target.resolve().is_relative_to(folder.resolve())
                content = tar.extractfile(member) if member.isfile() and inside else None
                if content is None:
                    raise UnavailableError(f"{packed.name}: {member.name} is no file of a part")
                write(target, content.read())
    except tarfile.TarError as error:
        raise UnavailableError(f"{packed.name}: damaged: {error}") from None
