"""The manifests as `kubectl apply -k` sends them."""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from readme import BLOCKS, Block

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sysconfig.get_path("scripts"))
K8S = ROOT / "k8s"
SCHEMAS = ROOT.parent / "shared" / "references" / "crds"
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
        texts[name] = composed(tmp_path_factory.mktemp(name), "gpu", name)
    return texts


def composed(folder: Path, overlay: str | Path, *components: str) -> str:
    """An overlay of one's own, in an empty folder: one of ours, or the folder of another, and
    components in that order."""
    wanted = {
        "resources": [K8S / "overlays" / overlay],
        "components": [K8S / "components" / name for name in components],
    }
    paths = {
        key: [os.path.relpath(part, folder.resolve()) for part in parts]
        for key, parts in wanted.items()
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(paths))
    return kustomize(folder)


def rollback_block() -> Block:
    """What docs/operations.md has typed to roll back in a pod."""
    [block] = [b for b in BLOCKS if b.file == "docs/operations.md" and "| jq " in b.text]
    return block


def rollback_job(job: dict[str, Any]) -> dict[str, Any]:
    """What it makes of a Job of the training's CronJob."""
    if (jq := shutil.which("jq")) is None:
        pytest.skip("jq is not installed")
    [program] = re.findall(r"\| jq '([^']+)'", rollback_block().text)
    text = json.dumps(job)
    done = subprocess.run([jq, program], input=text, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def published(file: str, version: str) -> Draft7Validator:
    """Checks the `spec` of a custom resource against its published definition, whose schema is
    taken as it is: 2 MB take long to check."""
    if not (SCHEMAS / file).is_file():
        pytest.skip(f"the schema is not at {SCHEMAS}")
    definition = yaml.load((SCHEMAS / file).read_text(), yaml.CSafeLoader)["spec"]
    [found] = [v for v in definition["versions"] if version == f"{definition['group']}/{v['name']}"]
    schema = found["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return Draft7Validator(closed(schema))


def closed(schema: Any) -> Any:
    """The same schema, which refuses unknown fields as `kubectl --validate=strict` does, and takes
    a number or a text where Kubernetes does."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and schema.get("type") == "object":
        result["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return result
