"""The Job and the RayJob that score a bucket: schemas, rules, and what the command takes."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from conftest import ROOT
from jsonschema import ValidationError
from manifests import K8S, SCRIPTS, kustomize, published

from serving.cli import EXIT_CODES, app

Object = dict[str, Any]


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    texts = [kustomize(K8S / name) for name in ("score", "score-ray")]
    return [thing for text in texts for thing in yaml.safe_load_all(text)]


@pytest.fixture
def job(objects: list[Object]) -> Object:
    [found] = [thing for thing in objects if thing["kind"] == "Job"]
    return dict(found["spec"])


@pytest.fixture
def rayjob(objects: list[Object]) -> Object:
    [found] = [thing for thing in objects if thing["kind"] == "RayJob"]
    return found


def pods(job: Object, rayjob: Object) -> Iterator[Object]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    for group in (job, cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]


@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_the_schemas_of_three_versions_accept_what_is_kubernetes_own(
    version: str, objects: list[Object], tmp_path: Path
) -> None:
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all([o for o in objects if o["kind"] != "RayJob"]))
    command: list[str | Path] = [SCRIPTS / "kubernetes-validate", "--strict", "-k", version, file]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kuberays_published_schema_accepts_the_rayjob(rayjob: Object) -> None:
    validator = published("kuberay-rayjobs.yaml", rayjob["apiVersion"])
    validator.validate(rayjob["spec"])
    with pytest.raises(ValidationError, match="submission"):
        validator.validate({**rayjob["spec"], "submission": "HTTPMode"})


def test_every_pod_is_restricted_with_a_read_only_root(job: Object, rayjob: Object) -> None:
    for template in pods(job, rayjob):
        pod = template["spec"]
        user = pod["securityContext"]
        assert user["runAsNonRoot"] and user["runAsUser"] == 1000
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        [container] = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]} >= {"tmp"}


def test_the_account_that_writes_is_not_the_services(
    objects: list[Object], job: Object, rayjob: Object
) -> None:
    accounts = {o["metadata"]["name"] for o in objects if o["kind"] == "ServiceAccount"}
    assert {pod["spec"]["serviceAccountName"] for pod in pods(job, rayjob)} == accounts
    served = [thing for thing in yaml.safe_load_all(kustomize(K8S / "base")) if thing]
    [service] = [thing["spec"] for thing in served if thing["kind"] == "Deployment"]
    assert service["template"]["spec"]["serviceAccountName"] not in accounts


def test_pods_reach_s3_and_each_other_and_only_the_operator_reaches_them(
    objects: list[Object], job: Object, rayjob: Object
) -> None:
    policies = [thing["spec"] for thing in objects if thing["kind"] == "NetworkPolicy"]
    selected = [policy["podSelector"]["matchLabels"] for policy in policies]
    for template in pods(job, rayjob):
        assert any(label.items() <= template["metadata"]["labels"].items() for label in selected)
    for policy in policies:
        assert {"ports": [{"protocol": "TCP", "port": 443}]} in policy["egress"]
        for rule in policy.get("ingress", []):
            [source] = rule["from"]
            own = source.get("podSelector") == policy["podSelector"]
            assert own or [port["port"] for port in rule["ports"]] == [8265]


def test_the_command_takes_its_arguments(
    job: Object, rayjob: Object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_URI", "s3://models/name/version/")
    [container] = job["template"]["spec"]["containers"]
    python, m, module, *on_ray = shlex.split(rayjob["spec"]["entrypoint"])
    assert [python, m, module] == ["python", "-m", "serving"]
    given = []
    for name, *arguments in (container["args"], on_ray):
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        given.append(command.make_context(name, arguments).params)
    assert [options["ray"] for options in given] == [None, "auto"]
    assert all(options["out"] == "s3://example-pictures/answers" for options in given)


def test_what_a_retry_cannot_mend_is_not_retried(job: Object) -> None:
    usage, disruption = job["podFailurePolicy"]["rules"]
    assert usage["action"] == "FailJob" and usage["onExitCodes"]["values"] == [2]
    assert re.search(r"\b2 settings or usage", EXIT_CODES)
    assert disruption["action"] == "Ignore" and job["backoffLimit"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_ray_has_an_actor_for_each_core_that_workers_ask_for(rayjob: Object) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in cluster["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        assert group["rayStartParams"]["num-cpus"] == container["resources"]["requests"]["cpu"]
    locked = (ROOT / "requirements" / "score-ray.txt").read_text()
    assert f"\nray=={cluster['rayVersion']} " in locked
