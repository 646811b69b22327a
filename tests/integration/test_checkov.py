"""The manifests and the Dockerfile, as a scanner of settings sees them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from manifests import K8S, kustomize


@pytest.mark.slow
def test_checkov_finds_nothing_that_is_not_justified(
    rendered: dict[str, str], tmp_path: Path
) -> None:
    checkov = Path(sys.prefix) / "checkov" / "bin" / "checkov"
    if not checkov.is_file():
        pytest.skip(
            "checkov is not installed; `make test` does it, apart from its rivals' versions"
        )
    for name, text in {**rendered, "score": kustomize(K8S / "score")}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    command: list[str | Path] = [
        checkov,
        "--directory",
        tmp_path,
        "--config-file",
        K8S / "checkov.yaml",
    ]
    frameworks = ["--framework", "kubernetes", "dockerfile"]
    done = subprocess.run([*command, *frameworks], check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
