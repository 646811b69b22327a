"""What this machine can do, and whether a configuration can run on it."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from jobs import devices, environment
from jobs.config import Config
from jobs.data import sources
from jobs.errors import JobError, UnavailableError
from jobs.network import reachable
from serving import processes


@dataclass(frozen=True)
class Finding:
    subject: str
    ok: bool
    detail: str


def examine(config: Config) -> None:
    """Prints a table of findings.

    Raises:
        UnavailableError: the configuration could not run here.
    """
    checks = (_versions, _device, _memory, _disk, _data, _weights, _storage)
    findings = [check(config) for check in checks]
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row("ok" if finding.ok else "NO", finding.subject, finding.detail)
    Console(highlight=False).print(table)
    if bad := [finding.subject for finding in findings if not finding.ok]:
        raise UnavailableError(f"this configuration cannot run here yet: {', '.join(bad)}")


def _versions(_: Config) -> Finding:
    names = ("inception-transfer", "torch", "torchvision")
    versions = " · ".join(f"{name} {environment.version_of(name)}" for name in names)
    return Finding("versions", True, f"Python {platform.python_version()} · {versions}")


def _device(config: Config) -> Finding:
    try:
        device = devices.choose(config.runtime)
    except JobError as error:
        return Finding("device", False, str(error))
    seen = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
    return Finding("device", True, f"{device} · {seen} · {torch.get_num_threads()} threads")


def _memory(config: Config) -> Finding:
    detail = f"{processes.memory() / 2**30:.1f} GiB"  # a container's limit may be less than one
    if torch.cuda.is_available() and config.runtime.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        detail += f" · GPU {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    return Finding("memory", True, detail)


def _disk(config: Config) -> Finding:
    cache = Path(config.data.cache).expanduser()
    place = next(p for p in (cache, *cache.parents) if p.exists())
    writable = place.is_dir() and os.access(place, os.W_OK)
    free = shutil.disk_usage(place).free / 2**30
    note = "" if writable else ", and not writable"
    return Finding("cache", writable, f"{cache}: {free:.0f} GiB free{note}")


def _data(config: Config) -> Finding:
    return Finding("data", *sources.find(config.data.source).check(config.data))


def _weights(config: Config) -> Finding:
    source = config.weights.source
    if source in ("stand-in", "random"):
        return Finding("weights", True, f"{source}, needs nothing")
    if source != "imagenet":
        found = Path(source).expanduser().is_file()
        return Finding("weights", found, f"{source} {'is there' if found else 'is missing'}")
    from torchvision.models import Inception_V3_Weights

    url = Inception_V3_Weights.IMAGENET1K_V1.url
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if cached.is_file():
        return Finding("weights", True, f"ImageNet, in {cached.parent}")
    return Finding("weights", *reachable(url))


def _storage(config: Config) -> Finding:
    if config.storage.uri is None:
        return Finding("storage", True, "none configured, runs stay on this machine")
    from jobs.delivery.storage import Storage

    try:
        Storage(config.storage.model_copy(update={"attempts": 1})).check()
    except JobError as error:
        return Finding("storage", False, str(error))
    return Finding("storage", True, f"{config.storage.uri} answers and may be written to")
