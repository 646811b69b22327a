"""Claim: a job that is killed at any moment, or whose disk is full at any moment, ends by the same
command as if nothing had happened.

    python -m benchmarks.chaos --kills 50        (half an hour to an hour on 2 cores; `make chaos`)

A small job (a folder of photographs, two variants at 75 px, archive, S3, promotion) runs once in
peace. Then it is started, killed with SIGKILL at a random moment of its first phase, started again
and killed in the next one, until it has been killed in all of them and may end; and another one
begins. After every kill each file that has its final name is read. At every end the weights, the
predictions, the metrics and the archive's answers are compared with the first run's, bit by bit,
and S3 with the run folder; what killed processes left is gone, in /tmp too. With `--disks`, and as
root, the same job runs on file systems that have no more room from some moment of each phase on,
and then grow. The process ends with 1 if anything was lost.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks import record
from jobs.config import Storage
from jobs.delivery import promotion, publishing
from jobs.delivery.storage import Storage as Remote
from jobs.demo import ObjectStore
from jobs.runs import RunFolder
from serving.files import MARK

CONFIG: dict[str, Any] = {
    "data": {"source": "folder", "validation": 0.25, "input_size": 75},
    "weights": {"source": "random"},
    "optim": {"epochs": 2, "batch_size": 10, "aux_weight": 0.0, "average_decay": 0.5},
    "variants": [
        {"name": "scratch", "init": "random"},
        {"name": "frozen", "init": "pretrained", "trainable": "head"},
    ],
    "runtime": {"device": "cpu", "precision": "fp32", "checkpoint_every": 2},
    "evaluation": {"batch_size": 40, "batch_norm_images": 60},
    "export": {"calibration_images": 20, "max_accuracy_drop": 100},
}
KEYS = {"aws_access_key_id": "chaos", "aws_secret_access_key": "only-for-this-benchmark"}
PICTURES = {"train": 40, "test": 20}  # of each class, and large: to decode them takes a while
SIZE = (1500, 1000)
LONGEST = 600.0  # seconds that a job may take
STARTING = "start"  # of which there is nothing to lose
Times = dict[str, tuple[float, float]]
"""From when to when each phase of the job in peace was, in seconds from its start."""
MIB = 2**20
ROOM = 4096  # MiB of a disk that is large enough


@dataclass
class Trial:
    """One job, in a folder and a prefix of S3 of its own."""

    folder: Path
    store: ObjectStore
    pictures: Path
    lost: list[str] = field(default_factory=list)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "r")

    @property
    def storage(self) -> Storage:
        uri = f"s3://{self.store.bucket}/{self.folder.name}"
        return Storage(
            uri=uri, endpoint_url=self.store.address, region="us-east-1", path_style=True
        )

    @property
    def temporary(self) -> Path:
        """What its processes take for /tmp."""
        return self.folder.parent / "tmp"

    @property
    def said(self) -> str:
        return (self.folder.parent / "said").read_text()

    def start(self) -> subprocess.Popen[bytes]:
        """Its processes are a group, which can be killed as a whole, like a container."""
        for place in (self.folder, self.temporary):
            place.mkdir(parents=True, exist_ok=True)
        storage = self.storage.model_dump(mode="json", exclude_unset=True)
        places = {"root": str(self.pictures), "cache": str(self.folder / "cache")}
        data = {**CONFIG["data"], **places}
        config = self.folder / "chaos.yaml"
        config.write_text(yaml.safe_dump({**CONFIG, "data": data, "storage": storage}))
        arguments = ("--config", str(config), "--out", str(self.folder), "--run-id", "r")
        with (self.folder.parent / "said").open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "jobs", "run", "--promote", *arguments],
                env={**os.environ, "TMPDIR": str(self.temporary)},
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )

    def reach(self, phase: str, times: Times, rng: random.Random) -> subprocess.Popen[bytes]:
        """Started, and at a random moment of this phase; or it has ended."""
        order = list(times)
        later = order[order.index(phase) :]
        starts = times[order[0]][0] if self.phase() in later else 0.0  # it goes on, once it works
        process, works = self.start(), time.monotonic() + starts
        while process.poll() is None and (time.monotonic() < works or self.phase() not in later):
            time.sleep(0.02)
        begin, end = times[phase]
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, end - begin))
        return process

    def phase(self) -> str:
        """What it was about, by the files that are there."""
        if list((self.run.path / "model").glob("*.mar")):
            return "publish, promote"
        if self.run.finished:
            return "export"
        results = len(list(self.run.path.glob("variants/*/result.json")))
        if results == len(CONFIG["variants"]):
            return "compare, report"
        if (self.run.path / "data.json").exists():
            return f"train, test {results + 1}"
        return "load, cache" if (self.folder / "cache").exists() else STARTING

    def look(self) -> int:
        """Reads every file that has its final name, notes what cannot be read; how many."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        whole = [path for path in files if not path.name.endswith(".part")]
        for path in whole:
            try:
                opened(path)
            except Exception as error:
                self.lost.append(f"{path.relative_to(self.folder)}: {error!r}")
        return len(whole)


def opened(path: Path) -> None:
    import torch
    from safetensors import safe_open

    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            dict(arrays)
    elif path.suffix == ".npy":
        np.load(path, mmap_mode="r", allow_pickle=False)
    elif path.suffix == ".safetensors":
        with safe_open(path, "np") as tensors:
            tensors.get_tensor(next(iter(tensors.keys())))
    elif path.suffix == ".ckpt":
        torch.load(path, map_location="cpu", weights_only=True)
    elif path.suffix == ".mar":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


def outcome(run: RunFolder) -> dict[str, Any]:
    """What has to be the same, bit by bit, however often the job was killed."""
    kept = [path for path in sorted(run.path.rglob("*")) if path.suffix in (".safetensors", ".npz")]
    rows = [[row[c] for c in ("variant", "epoch", "split", "loss")] for row in run.metrics()]
    digests = {str(path.relative_to(run.path)): digest_of_content(path) for path in kept}
    return {"digests": digests, "metrics": rows, "winner": run.comparison().winner}


def digest_of_content(path: Path) -> str:
    """Of an .npz its arrays: the zip file around them has the time in it."""
    content = hashlib.sha256()
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            for name in sorted(arrays):
                content.update(name.encode() + arrays[name].tobytes())
    else:
        content.update(path.read_bytes())
    return content.hexdigest()


def compare(trial: Trial, expected: dict[str, Any]) -> None:
    """Notes what differs from the run in peace, and what S3 does not have."""
    found = outcome(trial.run)
    trial.lost += [f"{key} differs" for key in expected if found[key] != expected[key]]
    trial.lost += [f"{path.name} is left" for path in trial.run.path.rglob("*.part")]
    trial.lost += [f"{path.name} is left" for path in trial.run.path.rglob("last.ckpt")]
    trial.lost += [f"{mark.parent} is left" for mark in trial.temporary.glob(f"*/{MARK}")]
    if sent := publishing.publish(Remote(trial.storage), trial.run):
        trial.lost.append(f"S3 lacked {sent} files")
    promotion.fetch(trial.run.config(), None, trial.folder)  # its digest is checked


def draw(folder: Path) -> None:
    """Two classes that differ in their colour; the same pictures each time."""
    rng = np.random.default_rng(0)
    for split, count in PICTURES.items():
        for name, colour in (("amber", (200, 150, 40)), ("teal", (30, 140, 140))):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                grey = rng.normal(128, 40, SIZE[::-1]).clip(0, 255).astype(np.uint8)
                noise = Image.fromarray(grey).convert("RGB")
                noise.paste(colour, (0, 0, SIZE[0] // 2, SIZE[1] - 7 * number))
                noise.save(folder / split / name / f"{number}.jpg")


def keep(trial: Trial, figures: dict[str, Any], out: Path) -> None:
    """Adds what the trial lost, and writes it all: hours of them must not hang on the last one."""
    print("\n".join(trial.lost) or "nothing was lost", file=sys.stderr)
    figures["lost"] += trial.lost
    record.save("chaos", out, sum(figures["kills"].values()), figures)


@contextmanager
def trial_in(folder: Path, pictures: Path) -> Iterator[Trial]:
    """A job and an S3 server of its own; what both stored is gone afterwards."""
    store = ObjectStore(folder / "s3", KEYS, "chaos")
    store.start()
    try:
        yield Trial(folder / "job", store, pictures)
    finally:
        store.kill()
        shutil.rmtree(folder)


def run_in_peace(trial: Trial) -> Times:
    times: Times = {}
    start = time.monotonic()
    process = trial.start()
    while process.poll() is None:
        now, phase = time.monotonic() - start, trial.phase()
        times[phase] = (times.get(phase, (now, now))[0], now)
        time.sleep(0.02)
    if process.returncode != 0:
        sys.exit(f"the job in peace ended with {process.returncode}: {trial.said[-2000:]}")
    trial.look()
    del times[STARTING]
    return times


def kill_in_each_phase(trial: Trial, times: Times, rng: random.Random, kills: Counter[str]) -> None:
    for phase in times:
        process = trial.reach(phase, times, rng)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills[met := trial.phase()] += 1
            files = trial.look()
            print(f"kill {sum(kills.values())}: in {met}; {files} files read", file=sys.stderr)
    if (code := trial.start().wait(LONGEST)) != 0:
        trial.lost.append(f"ended with {code}: {trial.said[-500:]}")


@contextmanager
def own_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, mib: int) -> bool:
    """False where more than that is used."""
    command = ["mount", "-o", f"remount,size={mib}m", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def fill_the_disk(
    trial: Trial, phase: str, times: Times, rng: random.Random, full: Counter[str]
) -> None:
    """Runs the job on a disk that has no more room from a moment of this phase on, and then again
    where there is."""
    process = trial.reach(phase, times, rng)
    while not resize(trial.folder, shutil.disk_usage(trial.folder).used // MIB + 1):
        pass
    code, said = process.wait(LONGEST), trial.said.strip()
    last = said.splitlines()[-1] if said else ""
    print(f"full in {phase}: {trial.phase()}, exit code {code}: {last}", file=sys.stderr)
    full[trial.phase() if code else "nothing more was written"] += 1
    if code not in (0, 3) or (code == 3 and "No space left on device" not in last):
        trial.lost.append(f"full in {phase}: exit code {code}: {said[-800:]}")
    trial.look()
    assert resize(trial.folder, ROOM)
    if (code := trial.start().wait(LONGEST)) != 0:
        trial.lost.append(f"with room again: {code}: {trial.said[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--disks", type=int, default=0, help="How many full ones; needs root.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    os.environ |= {name.upper(): value for name, value in KEYS.items()}
    rng = random.Random(options.seed)
    kills: Counter[str] = Counter()
    full: Counter[str] = Counter()
    lost: list[str] = []
    figures: dict[str, Any] = {"kills": kills, "jobs": 0, "full disks": full, "lost": lost}
    with tempfile.TemporaryDirectory() as work:
        draw(pictures := Path(work) / "pictures")
        with trial_in(Path(work) / "peace", pictures) as trial:
            times = figures["phases"] = run_in_peace(trial)
            expected = outcome(trial.run)
            print(f"in peace: {times}", file=sys.stderr)
            keep(trial, figures, options.out)
        while sum(kills.values()) < options.kills:
            with trial_in(Path(work) / f"killed-{figures['jobs']}", pictures) as trial:
                kill_in_each_phase(trial, times, rng, kills)
                compare(trial, expected)
            figures["jobs"] += 1
            keep(trial, figures, options.out)
        for number, phase in zip(range(options.disks), cycle(times), strict=False):
            with (
                trial_in(Path(work) / f"full-{number}", pictures) as trial,
                own_disk(trial.folder),
            ):
                fill_the_disk(trial, phase, times, rng, full)
                compare(trial, expected)
            keep(trial, figures, options.out)
    record.show(("killed in", "times"), list(kills.items()))
    record.show(("disk full in", "times"), list(full.items()))
    print(f"{sum(kills.values())} kills of {figures['jobs']} jobs, {sum(full.values())} full disks")
    print("\n".join(lost) or "nothing was lost")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
