"""What promotion has signed is served; what it has not, or somebody else has, is refused."""

import base64
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import job
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from object_store import exported_run
from readme import command_lines
from service import start
from test_promotion import gate

import serving
from jobs import config
from jobs.delivery.promotion import promote
from jobs.errors import ConfigurationError
from jobs.runs import RunFolder
from serving import signing
from serving.archive import ModelError
from serving.fetch import check_signature, fetch

CHANNEL = "models/m/channels/production.json"


def key_pair(folder: Path, name: str, curve: type = SECP256R1) -> tuple[Path, Path]:
    """Files of a private and a public key."""
    key = generate_private_key(curve())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    encoded = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    private.write_bytes(encoded)
    form = PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, form))
    return private, public


@pytest.fixture
def in_environment(settings: config.Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the service looks for the S3 server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", settings.endpoint_url or "")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def test_what_is_promoted_is_signed_once_and_fetched_with_the_key_alone(
    settings: config.Storage, in_environment: None, tmp_path: Path
) -> None:
    private, public = key_pair(tmp_path, "ours")
    run = exported_run(tmp_path / "one", right=150)
    signed = gate(settings, signing_key=str(private))
    promote(run, signed)
    channel, target = f"{settings.uri}/{CHANNEL}", tmp_path / "got.mar"
    fetch(channel, None, target, public)
    assert target.read_bytes() == (run.path / "model" / "m.mar").read_bytes()

    promote(run, signed)  # makes no other signature
    fetch(f"{settings.uri}/models/m/one/", None, target, public)
    target.unlink()
    with pytest.raises(ModelError, match=r"not by the owner of .*others\.pub"):
        fetch(channel, None, target, key_pair(tmp_path, "others")[1])
    assert not target.exists()


def test_without_the_package_that_checks_signatures_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "m.mar"
    archive.write_bytes(b"content")
    monkeypatch.delattr(serving, "signing")
    monkeypatch.delitem(sys.modules, "serving.signing")
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for name in [name for name in sys.modules if name.startswith("cryptography.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModelError, match=r"m\.mar: its signature .*inception-transfer\[signing\]"):
        check_signature(archive, str(archive), tmp_path / "key.pub")


def test_what_is_not_signed_is_fetched_without_a_key_only(
    settings: config.Storage, in_environment: None, tmp_path: Path
) -> None:
    promote(exported_run(tmp_path / "one", right=150), gate(settings))
    fetch(f"{settings.uri}/{CHANNEL}", None, tmp_path / "got.mar")
    private, public = key_pair(tmp_path, "k")
    with pytest.raises(ModelError, match=r"model\.mar\.sig: "):
        fetch(f"{settings.uri}/{CHANNEL}", None, tmp_path / "x.mar", public)
    # What serves already is signed, too, once there is a key.
    promote(RunFolder(tmp_path / "one"), gate(settings, signing_key=str(private)))
    fetch(f"{settings.uri}/{CHANNEL}", None, tmp_path / "x.mar", public)


def test_a_public_key_of_another_curve_is_refused(tmp_path: Path) -> None:
    private, _ = key_pair(tmp_path, "ours")
    _, other = key_pair(tmp_path, "other", SECP384R1)
    (archive := tmp_path / "m.mar").write_bytes(b"an archive")
    with pytest.raises(ModelError, match="a key of the curve P-256 is needed"):
        signing.verify(archive, signing.sign(archive, private), other)


@pytest.mark.parametrize("change", ["archive", "signature", "not base64"])
def test_a_change_of_a_byte_is_found(tmp_path: Path, change: str) -> None:
    private, public = key_pair(tmp_path, "ours")
    archive, signature = tmp_path / "m.mar", tmp_path / "m.mar.sig"
    archive.write_bytes(bytes(range(256)) * 100)
    signature.write_bytes(signing.sign(archive, private) + b"\n")
    check_signature(archive, str(archive), public)
    if change == "archive":
        archive.write_bytes(b"x" + archive.read_bytes()[1:])
    elif change == "signature":
        raw = bytearray(base64.b64decode(signature.read_bytes()))
        raw[-1] ^= 1
        signature.write_bytes(base64.b64encode(raw))
    else:
        signature.write_bytes(b"no base64!")
    with pytest.raises(ModelError, match="not by the owner"):
        check_signature(archive, str(archive), public)


needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed"
)


@needs_openssl
def test_the_documentation_s_commands_make_a_key_pair(tmp_path: Path) -> None:
    for words in sorted(command_lines("openssl"), key=lambda words: "-genkey" not in words):
        subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)
    (archive := tmp_path / "m.mar").write_bytes(b"an archive")
    signature = signing.sign(archive, tmp_path / "promote.pem")
    signing.verify(archive, signature, tmp_path / "promote.pub")
    with pytest.raises(ModelError, match="not by the owner"):
        signing.verify(archive, signature, key_pair(tmp_path, "other")[1])


@needs_openssl
def test_openssl_reads_the_signature(tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "ours")
    archive, raw = tmp_path / "m.mar", tmp_path / "raw"
    archive.write_bytes(b"an archive")
    raw.write_bytes(base64.b64decode(signing.sign(archive, private)))
    command = ["openssl", "dgst", "-sha256", "-verify", str(public), "-signature", str(raw)]
    done = subprocess.run([*command, str(archive)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Verified OK\n")


@pytest.mark.parametrize("kind", ["absent", "text", "another curve", "public"])
def test_a_key_that_cannot_sign_is_a_configuration_error(
    settings: config.Storage, tmp_path: Path, kind: str
) -> None:
    private, public = key_pair(tmp_path, "k", SECP384R1)
    (tmp_path / "text.pem").write_text("no key")
    given = {"absent": tmp_path / "absent", "text": tmp_path / "text.pem"}
    given |= {"another curve": private, "public": public}
    run = exported_run(tmp_path / "one", right=150)
    with pytest.raises(ConfigurationError, match=r"promotion\.signing_key: .*key"):
        promote(run, gate(settings, signing_key=str(given[kind])))


def test_a_service_with_a_key_does_not_start_on_what_is_not_signed(
    archive: Path, tmp_path: Path
) -> None:
    _, public = key_pair(tmp_path, "ours")
    service = start(archive, tmp_path / "state", SERVING_PUBLIC_KEY=str(public))
    assert service.process.wait() == 3
    assert f"{archive}.sig: No such file" in service.log.read_text().replace("[Errno 2] ", "")


@pytest.mark.parametrize("command", ["score", "repository"])
def test_a_command_with_a_key_reads_nothing_that_is_not_signed(
    archive: Path, tmp_path: Path, command: str
) -> None:
    _, public = key_pair(tmp_path, "ours")
    of = [str(tmp_path)] if command == "score" else []
    given = [f"--out={tmp_path / 'out'}", f"--model={archive}", f"--public-key={public}"]
    done = job(command, *of, *given, module="serving")
    assert (done.returncode, done.stdout) == (3, "")
    assert f"{archive}.sig: " in done.stderr and not (tmp_path / "out").exists()
