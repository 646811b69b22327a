"""The manifests as `kubectl apply -k` sends them."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())


def kustomize(folder: Path) -> str:
    kubectl = shutil.which("kubectl", path=f"{SCRIPTS}:{os.environ['PATH']}")
    assert kubectl is not None
    done = subprocess.run(
        [kubectl, "kustomize", folder], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every overlay, and every component on top of `gpu`."""
    texts = {name: kustomize(K8S / "overlays" / name) for name in OVERLAYS}
    for name in COMPONENTS:
        folder = tmp_path_factory.mktemp(name).resolve()
        parts = {"resources": "overlays/gpu", "components": f"components/{name}"}
        paths = {key: [os.path.relpath(K8S / part, folder)] for key, part in parts.items()}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(paths))
        texts[name] = kustomize(folder)
    return texts
