"""The job works where little but torch is installed: without boto3, and without itself."""

import subprocess
import sys

import pytest
from conftest import ROOT, tiny_config

from jobs import devices, doctor, environment

WITHOUT_BOTO3 = """
import sys
sys.modules |= {"boto3": None, "botocore": None}  # an import of either fails
import jobs.cli, jobs.demo, jobs.doctor, jobs.pipeline
from jobs import config, errors
from jobs.delivery.storage import Storage

try:
    Storage(config.Storage(uri="s3://bucket/prefix"))
except errors.UnavailableError as error:
    print(error)
"""


def test_without_boto3_the_job_is_there_and_storage_says_what_is_missing() -> None:
    command = [sys.executable, "-c", WITHOUT_BOTO3]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("s3://bucket/prefix: S3 needs the package boto3")


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "inception-transfer-that-is-not-there"
    assert environment.version_of(missing) == "not installed"
    monkeypatch.setattr(environment, "PACKAGES", (missing, "torch"))
    packages = environment.describe(devices.choose(tiny_config().runtime))["packages"]
    assert packages[missing] == "not installed" and packages["torch"] != "not installed"
    monkeypatch.setattr(environment, "version_of", lambda _: "not installed")
    assert "inception-transfer not installed" in doctor._versions(tiny_config()).detail
