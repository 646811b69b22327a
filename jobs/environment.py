"""The environment of a run: versions, hardware, commit."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from jobs import distributed
from jobs.devices import Device, name_of

PACKAGES = ("inception-transfer", "torch", "torchvision", "numpy", "pillow")


def describe(device: Device) -> dict[str, Any]:
    """Plain values for environment.json; nothing of them names the host or its user."""
    cuda = torch.version.cuda if device.device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "cuda": cuda,
        "device": name_of(device.device),
        "precision": str(device.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
        "commit": commit(),
        "command": ["python -m jobs", *sys.argv[1:]],
    }


def version_of(name: str) -> str:
    """A checkout that runs in place of an installation has no version of its own."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """The source's commit: from the environment in an image, from git in a checkout."""
    if given := os.environ.get("SOURCE_COMMIT"):
        return given
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None
