"""What the images install is listed as scanners read it; no secret is in the repository."""

import json
import random
import re
import shlex
import string
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


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
    done = subprocess.run(["make", "sbom"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for lock in ("train", "serve", "serve-gpu"):
        pinned = re.findall(
            r"^([a-z0-9-]+)==([^ ;]+)",
            (ROOT / f"requirements/{lock}.txt").read_text(),
            re.MULTILINE,
        )
        listed = json.loads((ROOT / f"build/{lock}.cdx.json").read_text())
        assert listed["bomFormat"] == "CycloneDX"
        found = {(c["name"], c["version"]) for c in listed["components"]}
        assert set(pinned) == found and len(pinned) > 40
        references = [r for c in listed["components"] for r in c["externalReferences"]]
        assert any(reference.get("hashes") for reference in references)
