"""Builds and runs the images without a Docker engine or a registry, by buildah and podman.

The base cannot be pulled here, so Debian's own packages make one like it. This proves the
Dockerfile's logic and everything above the base; not Docker Hub's base, and not a GPU.
"""

import ast
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import ROOT

WORK = Path(os.environ.get("IMAGES_DIR", "/var/tmp/inception-transfer-images"))
PATIENCE = 1800  # seconds; what takes longer, on a machine however busy, waits for ever
BUILDS = 7200  # seconds; likewise, with all images to be built first
BASE = "localhost/debian:12"
# As Docker Hub's slim images have it.
SLIM = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale")]
CONTAINERS = """[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
CONFINED = [
    "--read-only",
    "--user=1000",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp",
]


def call(tool: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs buildah or podman on a storage of its own, under WORK."""
    environment = {
        **os.environ,
        "CONTAINERS_CONF": str(WORK / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(WORK / "storage.conf"),
        "TMPDIR": str(WORK),
    }
    done = subprocess.run(
        [tool, *map(str, arguments)], check=False, capture_output=True, text=True, env=environment
    )
    assert not check or done.returncode == 0, f"{tool} {arguments}\n{done.stdout}\n{done.stderr}"
    return done


def podman(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return call("podman", *arguments, check=check)


def wait(what: str, condition: Callable[[], Any]) -> Any:
    """The condition's value once it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"too late: {what}"
        time.sleep(0.5)
    return value


def prepare() -> None:
    """Makes the storage and the base, once."""
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "containers.conf").write_text(CONTAINERS)
    storage = f'driver = "overlay"\ngraphroot = "{WORK}/storage"\nrunroot = "{WORK}/run"\n'
    (WORK / "storage.conf").write_text(f"[storage]\n{storage}")
    if podman("image", "exists", BASE, check=False).returncode == 0:
        return
    archive = WORK / "base.tar"
    options = ["--mode=root", "--variant=minbase", "--components=main", *SLIM]
    options += ["--include=ca-certificates", '--customize-hook=rm -rf "$1"/usr/share/man']
    call("mmdebstrap", *options, "bookworm", archive)
    path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    podman("import", "--change", path, archive, BASE)
    archive.unlink()


def build(target: str, fresh: bool = False) -> str:
    """Builds one target of the Dockerfile; what has not changed comes from the layers' cache.

    A `fresh` one is built from nothing, has one time for all files, and a name of its own.

    Returns:
        The image's name.
    """
    name = f"localhost/inception-transfer-{target}:{'fresh' if fresh else 'local'}"
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    arguments = {"BASE_IMAGE": BASE, "VERSION": "0.1.0", "COMMIT": commit.stdout.strip()}
    options = [f"--build-arg={key}={value}" for key, value in arguments.items()]
    options += [f"--volume={mount}" for mount in _host_pip()]
    # Health checks are Docker's, not OCI's.
    options += ["--format=docker", "--layers", "--network=host", f"--target={target}"]
    options += ["--no-cache", "--timestamp=0"] if fresh else []
    call("buildah", "bud", *options, "--tag", name, ROOT)
    return name


def _host_pip() -> list[str]:
    """Mounts that give pip in the build what it has here: options, certificates, local folders.

    A folder of wheels takes the place of PyTorch's index, which not every machine reaches.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    )
    pairs = re.findall(r"^(?:global|:env:)\.([a-z-]+)=(.*)$", listed.stdout, re.M)
    options = {key: str(ast.literal_eval(value)) for key, value in pairs}
    folders = {
        Path(found).parent if found.endswith("simple") else Path(found)
        for key in ("index-url", "extra-index-url", "find-links")
        for found in re.findall(r"(?:^|\s|file://)(/\S+)", options.get(key, ""))
    }
    mounts = [f"{folder}:{folder}:ro" for folder in folders]
    if "cert" in options:
        mounts.append(f"{options['cert']}:/run/host-ca.crt:ro")
        options["cert"] = "/run/host-ca.crt"
    lines = [f"{key} = {' '.join(value.split())}" for key, value in options.items()]
    (WORK / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    return [*mounts, f"{WORK / 'pip.conf'}:/etc/pip.conf:ro"]


def files(image: str, *folders: str) -> dict[str, tuple[int, int, int, str]]:
    """Mode, owner, group and content of everything in the folders of an image."""
    root = Path(podman("image", "mount", image).stdout.strip())
    found = {}
    walks = (os.walk(root / folder) for folder in folders)
    for parent, inner, names in itertools.chain.from_iterable(walks):
        for path in (Path(parent, name) for name in inner + names):
            content = ""
            if path.is_symlink():
                content = str(path.readlink())
            elif path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            status = path.lstat()
            about = (status.st_mode, status.st_uid, status.st_gid, content)
            found[str(path.relative_to(root))] = about
    podman("image", "unmount", image)
    return found


def layers(image: str) -> str:
    """The digests of an image's layers."""
    return podman("image", "inspect", "--format={{.RootFS.Layers}}", image).stdout


def size(image: str) -> float:
    """In GB of 10⁹ bytes, not compressed."""
    found = podman("image", "inspect", "--format={{.Size}}", image)
    return int(found.stdout) / 1e9


def available() -> bool:
    return os.geteuid() == 0 and all(map(shutil.which, ("podman", "buildah", "mmdebstrap")))
