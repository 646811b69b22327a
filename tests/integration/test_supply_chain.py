"""What the images install is listed, with its licences, and asked for vulnerabilities; no secret is
in the repository."""

import csv
import json
import os
import random
import re
import shlex
import shutil
import string
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from conftest import ROOT
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

LOCKS = ("train", "serve", "serve-gpu", "score-ray")


def pinned(lock: str) -> dict[str, str]:
    text = (ROOT / f"requirements/{lock}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", text, re.MULTILINE))


def make(target: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def secrets(files: list[Path]) -> list[str]:
    """What the hook for commits has to say of these files, as `path:line`."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    [entry] = [hook["entry"] for hook in hooks if hook["id"] == "detect-secrets"]
    program, *options = shlex.split(entry)
    hook = Path(sysconfig.get_path("scripts")) / Path(program).name
    done = subprocess.run([hook, *options, *files], capture_output=True, text=True, check=False)
    found = re.findall(r"^Location: *(\S+)$", done.stdout, re.MULTILINE)
    assert done.returncode == bool(found), done.stdout + done.stderr
    return found


def test_nothing_that_git_knows_has_a_secret() -> None:
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.split("\0")[:-1]]
    assert len(files) > 300
    assert not secrets(files)


def test_planted_secrets_are_found(tmp_path: Path) -> None:
    drawn = random.Random(0)
    key = "AKIA" + "".join(drawn.choices(string.ascii_uppercase, k=16))
    password = "".join(drawn.choices(string.ascii_letters + string.digits, k=20))
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    planted = {
        "job.py": f'client = boto3.client("s3", aws_access_key_id="{key}")\n'.encode(),
        "signing.pem": pem,
        "secret.yaml": f'stringData:\n  password: "{password}"\n'.encode(),
        # What the hook lets through hides nothing else in the same file.
        "result.json": f'{{"commit": "0123456789ab",\n "key": "{key}"}}\n'.encode(),
    }
    for name, content in planted.items():
        (tmp_path / name).write_bytes(content)
    found = secrets([tmp_path / name for name in planted])
    lines = {"job.py": 1, "signing.pem": 1, "secret.yaml": 2, "result.json": 2}
    assert set(found) == {f"{tmp_path / name}:{line}" for name, line in lines.items()}


@pytest.mark.slow
def test_the_bills_of_materials_have_every_package_of_the_locks_with_its_digests() -> None:
    done = make("sbom")
    assert done.returncode == 0, done.stderr
    for lock in LOCKS:
        listed = json.loads((ROOT / f"build/{lock}.cdx.json").read_text())
        assert listed["bomFormat"] == "CycloneDX"
        found = {(c["name"], c["version"]) for c in listed["components"]}
        assert set(pinned(lock).items()) == found and len(found) > 40
        references = [r for c in listed["components"] for r in c["externalReferences"]]
        assert any(reference.get("hashes") for reference in references)


# As packages' metadata name them: licences that ask for no more than notices, and MPL-2.0, which
# asks for the source of its own files alone.
ALLOWED = {
    "0BSD",
    "3-Clause BSD License",
    "Apache 2.0",
    "Apache License Version 2.0",
    "Apache Software License",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "ISC License (ISCL)",
    "MIT",
    "MIT License",
    "MIT-0",
    "MIT-CMU",
    "Mozilla Public License 2.0 (MPL 2.0)",
    "PSF-2.0",
    "Python Software Foundation License",
    "Zlib",
}
# NVIDIA's terms are in its wheels: what they list may be passed on as part of an application.
# cuda-toolkit names no licence: it has no files but its metadata, and requires those.
NVIDIA = {"LicenseRef-NVIDIA-Proprietary", "NVIDIA Proprietary Software"}
WITHOUT_FILES = {"cuda-toolkit": "UNKNOWN"}


def refused(licences: dict[str, str]) -> list[str]:
    """The packages, each with its licence, of which one is not allowed."""
    return [
        f"{name}: {licence}"
        for name, licence in licences.items()
        if not set(re.split(r" AND | OR |; ", licence)) <= ALLOWED
        and not (name.startswith("nvidia-") and licence in NVIDIA)
        and WITHOUT_FILES.get(name) != licence
    ]


def test_a_licence_that_asks_for_more_or_is_not_known_is_refused() -> None:
    licences = {
        "a": "MIT OR Apache-2.0",
        "b": "GNU Affero General Public License v3",
        "c": "BSD-3-Clause AND GPL-3.0-or-later",
        "d": "UNKNOWN",
        "e": "LicenseRef-NVIDIA-Proprietary",
        "nvidia-f": "LicenseRef-NVIDIA-Proprietary",
    }
    assert [line[0] for line in refused(licences)] == ["b", "c", "d", "e"]


@pytest.mark.slow
def test_the_licence_of_every_package_of_the_images_is_listed_and_allowed() -> None:
    done = make("licences")
    assert done.returncode == 0, done.stderr
    for lock in LOCKS:
        with (ROOT / f"build/{lock}.licences.csv").open() as file:
            rows = list(csv.DictReader(file))
        licences = {re.sub("[-_.]+", "-", row["Name"]).lower(): row["License"] for row in rows}
        assert set(licences) == set(pinned(lock))
        assert not refused(licences)


@contextmanager
def advisories(vulnerable: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    """A server that answers as osv.dev does: one package has a vulnerability, in any version; none
    is known where that is None.

    Yields:
        Its address, and the versions that it was asked for.
    """
    asked: dict[str, str] = {}

    class Osv(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            package = query["package"]
            asked[package["name"]] = query["version"]
            found = {"vulns": [{"id": "OSV-0000-1", "affected": [{"package": package}]}]}
            body = json.dumps(found if package["name"] == vulnerable else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Osv) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def audit(address: str) -> subprocess.CompletedProcess[str]:
    return make("audit", PIP_AUDIT_VULNERABILITY_SERVICE="osv", PIP_AUDIT_OSV_URL=address)


@pytest.mark.slow
def test_the_audit_asks_for_every_package_and_fails_where_one_is_vulnerable() -> None:
    with advisories(None) as (address, asked):
        done = audit(address)
    assert done.returncode == 0, done.stderr
    assert set(asked) == {name for lock in LOCKS for name in pinned(lock)}
    assert not [version for version in asked.values() if "+" in version], "no advisory names those"
    with advisories("pillow") as (address, _):
        done = audit(address)
    assert done.returncode != 0 and re.search("^pillow .*OSV-0000-1", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_an_audit_without_an_answer_fails() -> None:
    done = audit("http://127.0.0.1:9")
    assert done.returncode != 0 and "port=9" in done.stderr


@pytest.mark.parametrize(("code", "audited"), [(0, True), (1, False)])
def test_ci_audits_where_advisories_are_reached_and_says_where_they_are_not(
    tmp_path: Path, code: int, audited: bool
) -> None:
    """`.ci/run` with stand-ins for what it starts; python3 ends as its question for them would."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, line in {"make": 'echo "make $*"', "python3": f"exit {code}", "chromium": ""}.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", ".ci/run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    said = [line for line in done.stdout.splitlines() if "make audit" in line]
    assert said == (["make audit"] if audited else [said[0]])
    assert said[0].startswith("make audit" if audited else "Not run here")
    assert {"make check", "make test-all"} <= set(done.stdout.splitlines())
