"""The manifests as a cluster gets them: rendered, checked against schemas, and held to rules."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES
from conftest import ROOT
from manifests import (
    COMPONENTS,
    K8S,
    OVERLAYS,
    SCRIPTS,
    composed,
    kustomize,
    published,
    rollback_block,
    rollback_job,
)

from jobs import config
from jobs.cli import app
from jobs.errors import ConfigurationError
from serving.settings import Settings, from_environment

VERSIONS = ("1.29", "1.33", "1.37")
# Prometheus Operator's and the Gateway API's, whose schemas do not come along.
CUSTOM = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "HTTPRoute"}
Object = dict[str, Any]


@pytest.fixture(params=[*OVERLAYS, *COMPONENTS])
def objects(request: pytest.FixtureRequest, rendered: dict[str, str]) -> list[Object]:
    return list(yaml.safe_load_all(rendered[request.param]))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    [found] = [o for o in of_kind(objects, kind) if o["metadata"]["name"] == name]
    return found


def templates(objects: list[Object]) -> Iterator[Object]:
    """The pod template of everything that makes pods."""
    for thing in of_kind(objects, "Deployment", "CronJob"):
        spec = thing["spec"]
        yield spec.get("jobTemplate", {}).get("spec", spec)["template"]


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def environment(container: Object) -> dict[str, str]:
    return {e["name"]: e.get("value", "") for e in container.get("env", [])}


def training(objects: list[Object]) -> Object:
    job: Object = named(objects, "CronJob", "training")["spec"]["jobTemplate"]["spec"]
    return job


def inference(objects: list[Object]) -> Object:
    pod: Object = named(objects, "Deployment", "inference")["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schemas_of_three_versions_accept_everything(
    version: str, rendered: dict[str, str], tmp_path: Path
) -> None:
    files: list[Path] = []
    for name, text in rendered.items():
        known = [o for o in yaml.safe_load_all(text) if o["kind"] not in CUSTOM]
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump_all(known))
    command: list[str | Path] = [SCRIPTS / "kubernetes-validate", "--strict", "-k", version, *files]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()
    bad = [line for line in said if not line.startswith("INFO")]
    assert done.returncode == 0 and not bad, bad


def test_no_service_leads_to_a_management_port(objects: list[Object]) -> None:
    ports = {
        (service["metadata"]["name"], port.get("targetPort", port["port"]))
        for service in of_kind(objects, "Service")
        for port in service["spec"]["ports"]
    }
    allowed = {("inference", "http"), ("inference-metrics", "metrics")}
    allowed |= {("inference-stable", "http"), ("inference-canary", "http")}
    assert ports <= allowed | {("storage", "s3"), ("workers", 29400)}
    [main] = inference(objects)["containers"]
    assert {p["containerPort"] for p in main["ports"]} == {8080, 8082}


def test_every_pod_is_restricted_with_a_read_only_root(objects: list[Object]) -> None:
    namespace = named(objects, "Namespace", "inception-transfer")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for template in templates(objects):
        pod = template["spec"]
        assert (
            pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        )
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not [v for v in pod["volumes"] if "hostPath" in v]
        for container in containers(pod):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]


def test_every_image_is_exact(objects: list[Object]) -> None:
    images = [c["image"] for t in templates(objects) for c in containers(t["spec"])]
    assert images
    for image in images:
        assert "@sha256:" in image or re.search(r":(v?\d+\.\d+|local$)", image), image
        assert not image.startswith("inception-transfer") or image.endswith(":local"), image


def test_services_do_not_leak_into_settings_and_tokens_are_where_they_are_used(
    objects: list[Object],
) -> None:
    pods = {
        t["metadata"]["labels"]["app.kubernetes.io/name"]: t["spec"] for t in templates(objects)
    }
    assert all(pod["enableServiceLinks"] is False for pod in pods.values())
    assert [n for n, pod in pods.items() if pod["automountServiceAccountToken"]] == ["training"]


def test_ready_means_ready_and_the_drain_ends_before_the_grace(objects: list[Object]) -> None:
    pod = inference(objects)
    [main] = pod["containers"]
    assert main["startupProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert main["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert main["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
    variables = environment(main)
    grace = float(variables["SERVING_ENDPOINT_SECONDS"]) + float(variables["SERVING_DRAIN_SECONDS"])
    assert grace + 10 <= pod["terminationGracePeriodSeconds"]


def test_the_service_accepts_its_settings(objects: list[Object]) -> None:
    [main] = inference(objects)["containers"]
    given = {name: value or "2" for name, value in environment(main).items()}
    settings = from_environment(given)
    assert settings.model_uri == "/models/model.mar"
    mounts = {mount["mountPath"] for mount in main["volumeMounts"]}
    assert {"/models", "/tmp"} <= mounts and settings.state_dir == Path("/tmp")


def test_a_promotion_alone_says_which_model_is_served(objects: list[Object]) -> None:
    """Were MODEL_URI in the manifest, applying it would undo the last promotion."""
    first, *others = inference(objects)["initContainers"]
    assert first["name"] == "model" and first["args"] == ["fetch", "/models/model.mar"]
    assert "MODEL_URI" not in environment(first)
    assert [step["name"] for step in others] in ([], ["shadow"])


def test_a_shadow_is_fetched_as_the_model_is_and_compared(rendered: dict[str, str]) -> None:
    pod = inference(list(yaml.safe_load_all(rendered["shadow"])))
    model, shadow = pod["initContainers"]
    assert shadow["args"] == ["fetch", "/models/shadow.mar"]
    assert {**shadow, "name": "model", "args": model["args"]} == model
    [main] = pod["containers"]
    given = {name: value or "2" for name, value in environment(main).items()}
    settings = from_environment(given)
    assert settings.shadow_uri == "/models/shadow.mar" and settings.engine == "asgi"


def test_a_canary_is_the_same_pod_behind_the_same_service(rendered: dict[str, str]) -> None:
    objects = list(yaml.safe_load_all(rendered["canary"]))
    stable, canary = (
        named(objects, "Deployment", name)["spec"] for name in ("inference", "inference-canary")
    )
    assert canary["template"]["spec"] == stable["template"]["spec"]
    assert "replicas" not in canary, "an apply would bring back one that was ended"
    labels = [one["template"]["metadata"]["labels"] for one in (stable, canary)]
    assert [label.pop("track") for label in labels] == ["stable", "canary"]
    assert labels[0] == labels[1]
    selector = named(objects, "Service", "inference")["spec"]["selector"]
    assert selector.items() <= labels[0].items()
    assert canary["selector"]["matchLabels"] == {**selector, "track": "canary"}


@pytest.mark.parametrize("component", ["canary", "canary-weights"])
def test_the_autoscaler_counts_no_canary_and_the_service_reaches_it(
    component: str, rendered: dict[str, str]
) -> None:
    objects = list(yaml.safe_load_all(rendered[component]))
    stable, canary = (
        named(objects, "Deployment", name)["spec"] for name in ("inference", "inference-canary")
    )
    pods = [one["template"]["metadata"]["labels"] for one in (stable, canary)]

    def selected(labels: dict[str, str]) -> list[bool]:
        return [labels.items() <= pod.items() for pod in pods]

    assert selected(stable["selector"]["matchLabels"]) == [True, False]
    assert selected(canary["selector"]["matchLabels"]) == [False, True]
    assert selected(named(objects, "Service", "inference")["spec"]["selector"]) == [True, True]


@pytest.mark.parametrize("other", ["api-keys", "serve-gpu", "shadow"])
def test_a_canary_has_what_other_components_add_in_any_order(other: str, tmp_path: Path) -> None:
    for number, order in enumerate([("canary", other), (other, "canary")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        objects = list(yaml.safe_load_all(composed(folder, "gpu", *order)))
        stable, canary = (
            named(objects, "Deployment", name)["spec"]["template"]["spec"]
            for name in ("inference", "inference-canary")
        )
        assert stable == canary
        assert stable != inference(list(yaml.safe_load_all(kustomize(K8S / "overlays" / "gpu"))))


def test_a_job_looks_for_baked_data_where_the_image_has_them(rendered: dict[str, str]) -> None:
    [plain], [baked] = (
        training(list(yaml.safe_load_all(rendered[name])))["template"]["spec"]["containers"]
        for name in ("gpu", "baked-data")
    )
    assert environment(plain).pop("HOME") == "/runs/cache"
    assert {"HOME": "/runs/cache", **environment(baked)} == environment(plain)
    assert "HOME" not in environment(baked)


@pytest.mark.parametrize("overlay", ["gpu", "own-pictures"])
def test_no_volume_hides_the_baked_data(overlay: str, tmp_path: Path) -> None:
    _, train = (ROOT / "Dockerfile").read_text().split(" AS train\n")
    [home] = re.findall(r"^ENV HOME=(\S+)", train, re.MULTILINE)
    objects = list(yaml.safe_load_all(composed(tmp_path, overlay, "baked-data")))
    [container] = training(objects)["template"]["spec"]["containers"]
    assert home not in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_a_canarys_weight_is_routed_to_services_of_their_own(rendered: dict[str, str]) -> None:
    objects = list(yaml.safe_load_all(rendered["canary-weights"]))
    [route] = of_kind(objects, "HTTPRoute")
    validator = published("gateway-httproutes.yaml", route["apiVersion"])
    assert not list(validator.iter_errors(route["spec"]))
    [rule] = route["spec"]["rules"]
    weights = [ref["weight"] for ref in rule["backendRefs"]]
    assert weights == [100, 0], "a canary without a ready pod would fail its share"
    for ref, track in zip(rule["backendRefs"], ("stable", "canary"), strict=True):
        service = named(objects, "Service", ref["name"])["spec"]
        assert service["selector"]["track"] == track
        assert ref["port"] in [port["port"] for port in service["ports"]]


def test_a_promotion_may_patch_that_deployment_and_nothing_else(objects: list[Object]) -> None:
    [role] = of_kind(objects, "Role")
    [rule] = role["rules"]
    assert rule == {
        "apiGroups": ["apps"],
        "resources": ["deployments"],
        "resourceNames": ["inference"],
        "verbs": ["get", "patch"],
    }
    [binding] = of_kind(objects, "RoleBinding")
    assert [s["name"] for s in binding["subjects"]] == ["training"]
    assert not of_kind(objects, "ClusterRole", "ClusterRoleBinding")


def test_the_cronjob_retries_what_a_retry_can_mend(objects: list[Object]) -> None:
    cron, job = named(objects, "CronJob", "training"), training(objects)
    assert len(cron["metadata"]["name"]) <= 52 and cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron["spec"]["timeZone"] and cron["spec"]["startingDeadlineSeconds"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["activeDeadlineSeconds"] and job["ttlSecondsAfterFinished"]
    rules = job["podFailurePolicy"]["rules"]
    codes = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {2: "FailJob", 4: "FailJob", 75: "Ignore"}
    assert {"type": "DisruptionTarget", "status": "True"} in rules[-1]["onPodConditions"]
    [container] = job["template"]["spec"]["containers"]
    assert rules[0]["onExitCodes"]["containerName"] == container["name"]


def test_jobs_take_the_arguments_that_they_are_given(objects: list[Object]) -> None:
    given: list[str] = []
    for cron in of_kind(objects, "CronJob"):
        [container] = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        command, *options = container["args"]
        known = {
            flag
            for parameter in typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
            for flag in parameter.opts
        }
        assert {option.split("=")[0] for option in options} <= known
        given += options
    assert "--run-id=$(JOB_NAME)" in given, "two firings of one tick are one run"
    name = named(objects, "Deployment", "inference")["metadata"]["name"]
    assert given.count(f"--deployment={name}") == 1


def test_the_rollback_of_the_documentation_runs_once_and_alone(objects: list[Object]) -> None:
    """It waits for nothing that a training holds, and the CronJob does not take it for one."""
    given = training(objects)
    owned = {"name": "rollback-1", "ownerReferences": [{"kind": "CronJob", "controller": True}]}
    rollback = rollback_job({"metadata": owned, "spec": given})
    assert rollback["metadata"] == {"name": "rollback-1"}
    job = rollback["spec"]
    indexed = {"completionMode", "completions", "parallelism", "backoffLimitPerIndex"}
    assert job["backoffLimit"] == 0 and not {"podFailurePolicy", *indexed} & set(job)

    [container], [trains] = (one["template"]["spec"].pop("containers") for one in (job, given))
    volumes, theirs = (one["template"]["spec"].pop("volumes") for one in (job, given))
    assert job["template"] == given["template"], "the same account and labels"
    assert [volume["name"] for volume in volumes] == [volume["name"] for volume in theirs]
    assert "persistentVolumeClaim" not in json.dumps(volumes)
    assert container["args"][:2] == ["rollback", "--config=$(CONFIG)"]
    assert "command" not in container
    maps = [one["configMapRef"]["name"] for one in container["envFrom"] if "configMapRef" in one]
    known = {name for held in maps for name in named(objects, "ConfigMap", held)["data"]}
    assert {"CONFIG", "STORAGE_URI"} <= known
    assert container["resources"]["limits"] == {"memory": "1Gi"}
    assert container["resources"]["requests"] == {"cpu": "100m", "memory": "512Mi"}
    changed = {key for key in trains if container.get(key) != trains[key]}
    assert "args" in changed <= {"args", "command", "resources"}


def test_the_rollback_of_the_documentation_can_be_typed_twice() -> None:
    """A Job stays for a week, and `apply` would take the second for the first."""
    text = rollback_block().text
    assert '"rollback-$(date +%s)"' in text and text.rstrip().endswith("| kubectl create -f -")


def test_what_references_a_name_finds_it(objects: list[Object]) -> None:
    names = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for template in templates(objects):
        pod = template["spec"]
        wanted = (
            {("ServiceAccount", pod["serviceAccountName"])}
            if "serviceAccountName" in pod
            else set()
        )
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                wanted.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            if "configMap" in volume:
                wanted.add(("ConfigMap", volume["configMap"]["name"]))
        for container in containers(pod):
            sources = [
                s["configMapRef"]["name"]
                for s in container.get("envFrom", [])
                if "configMapRef" in s
            ]
            wanted |= {("ConfigMap", name) for name in sources}
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= {volume["name"] for volume in pod["volumes"]}
        assert wanted <= names


def test_nothing_is_reachable_unless_a_policy_says_so(objects: list[Object]) -> None:
    policies = {p["metadata"]["name"]: p["spec"] for p in of_kind(objects, "NetworkPolicy")}
    deny = policies["default-deny"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    [ingress] = policies["inference"]["ingress"]
    assert [port["port"] for port in ingress["ports"]] == [8080]
    open_to_all = [
        n for n, p in policies.items() for rule in p.get("ingress", []) if "from" not in rule
    ]
    assert not open_to_all


def test_a_rollout_and_a_drain_leave_enough_pods(objects: list[Object]) -> None:
    deployment = named(objects, "Deployment", "inference")["spec"]
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert "replicas" not in deployment, "the autoscaler's"
    scaler = named(objects, "HorizontalPodAutoscaler", "inference")["spec"]
    assert scaler["scaleTargetRef"]["name"] == "inference" and scaler["minReplicas"] >= 2
    budget = named(objects, "PodDisruptionBudget", "inference")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    assert budget["selector"]["matchLabels"]["track"] == "stable", "a canary may never get ready"


def test_several_nodes_find_each_other(rendered: dict[str, str]) -> None:
    objects = list(yaml.safe_load_all(rendered["multi-node"]))
    job, workers = training(objects), named(objects, "Service", "workers")
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    assert f"--nnodes={job['parallelism']}" in container["command"]
    assert workers["spec"]["clusterIP"] == "None" and pod["subdomain"] == "workers"
    assert "--rdzv-endpoint=$(JOB_NAME)-0.workers:29400" in container["command"]
    volume = named(objects, "PersistentVolumeClaim", "runs")
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_fan_out_has_a_pod_for_each_part_and_no_volume_in_common(
    rendered: dict[str, str],
) -> None:
    objects = list(yaml.safe_load_all(rendered["fan-out"]))
    job, [settings] = (
        training(objects),
        [thing["data"] for thing in of_kind(objects, "ConfigMap") if "CONFIG" in thing["data"]],
    )
    parts = config.load(settings["CONFIG"]).parts
    assert job["completionMode"] == "Indexed" and job["completions"] == len(parts)
    assert job["backoffLimitPerIndex"] and "backoffLimit" not in job, "which is for all together"
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert container["args"][-2:] == ["--part=$(JOB_COMPLETION_INDEX)", f"--of={len(parts)}"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert not [v for v in pod["volumes"] if "emptyDir" not in v]
    assert not of_kind(objects, "PersistentVolumeClaim")


def test_the_local_overlay_needs_nothing_from_outside(rendered: dict[str, str]) -> None:
    objects = list(yaml.safe_load_all(rendered["local"]))
    settings: dict[str, str] = {}
    for thing in of_kind(objects, "ConfigMap"):
        settings |= thing["data"]
    assert (
        settings["CONFIG"] == "quickstart" and settings["AWS_ENDPOINT_URL"] == "http://storage:8333"
    )
    assert "nvidia.com" not in rendered["local"] and "registry.example.com" not in rendered["local"]
    assert "NOT FOR PRODUCTION" in (K8S / "overlays" / "local" / "kustomization.yaml").read_text()


def test_a_start_on_a_gpu_may_take_as_long_everywhere(rendered: dict[str, str]) -> None:
    objects = list(yaml.safe_load_all(rendered["serve-gpu"]))
    [container] = inference(objects)["containers"]
    probe, allowed = container["startupProbe"], Settings.model_fields["startup_seconds"].default
    assert probe["failureThreshold"] * probe["periodSeconds"] == allowed
    assert f"--start-period={allowed}s" in (ROOT / "Dockerfile").read_text()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert environment(container)["SERVING_COMPILE_CACHE"] == mounts["compiled"]
    assert named(objects, "PersistentVolumeClaim", "compiled")


def test_a_gpu_is_held_for_training_alone(rendered: dict[str, str]) -> None:
    objects = list(yaml.safe_load_all(rendered["delivery"]))
    first, second = (
        named(objects, "CronJob", name)["spec"]["jobTemplate"]["spec"]
        for name in ("training", "training-delivery")
    )
    [trains], [delivers] = (job["template"]["spec"]["containers"] for job in (first, second))
    assert trains["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in delivers["resources"]["limits"]
    assert "tolerations" not in second["template"]["spec"]
    assert trains["args"][0] == "run" and "--set=export.enabled=false" in trains["args"]
    assert "--promote" not in trains["args"] and delivers["args"][0] == "deliver"
    same = ("envFrom", "env", "image", "securityContext", "volumeMounts")
    assert [trains[key] for key in same] == [delivers[key] for key in same]
    assert first["podFailurePolicy"] == second["podFailurePolicy"]
    [claim] = of_kind(objects, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "they may be on different nodes"


def test_copies_have_what_the_overlay_below_has_patched(tmp_path: Path) -> None:
    """As docs/operations.md says to add components: every init step checks signatures."""
    (mine := tmp_path / "mine").mkdir()
    (above := tmp_path / "above").mkdir()
    composed(mine, "gpu")
    key = {"name": "SERVING_PUBLIC_KEY", "value": "/key/promote.pub"}
    place = "/spec/template/spec/initContainers/0/env"
    added = yaml.safe_dump([{"op": "add", "path": place, "value": [key]}])
    patches = [{"target": {"kind": "Deployment", "name": "inference"}, "patch": added}]
    file = mine / "kustomization.yaml"
    file.write_text(file.read_text() + yaml.safe_dump({"patches": patches}))
    objects = list(yaml.safe_load_all(composed(above, mine.resolve(), "canary", "shadow")))
    steps = [
        step
        for name in ("inference", "inference-canary")
        for step in named(objects, "Deployment", name)["spec"]["template"]["spec"]["initContainers"]
    ]
    assert [step["name"] for step in steps] == ["model", "shadow"] * 2
    assert all(environment(step)["SERVING_PUBLIC_KEY"] == key["value"] for step in steps)


def test_boto3_reads_what_is_set_for_it() -> None:
    """AWS_REGION, which other libraries read, would be none of it."""
    known = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    known |= set(re.findall(r"\bAWS_[A-Z_]+", repr(BOTOCORE_DEFAUT_SESSION_VARIABLES)))
    texts = [path.read_text() for path in (*K8S.rglob("*.yaml"), ROOT / "docs" / "serving.md")]
    assert {name for text in texts for name in re.findall(r"\bAWS_[A-Z_]+", text)} <= known


def test_own_pictures_are_read_with_their_own_credentials_into_a_volume_of_theirs(
    rendered: dict[str, str],
) -> None:
    objects = list(yaml.safe_load_all(rendered["own-pictures"]))
    pod = training(objects)["template"]["spec"]
    [container] = pod["containers"]
    variables: dict[str, str] = {}
    for thing in of_kind(objects, "ConfigMap"):
        variables |= thing["data"]
    given = [option[6:] for option in container["args"] if option.startswith("--set=")]
    settings = [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], option) for option in given]
    with pytest.raises(ConfigurationError, match="written s3://bucket/prefix"):
        config.load(variables["CONFIG"], settings)  # nobody has changed it yet
    settings = [setting.replace("CHANGE-ME", "mine") for setting in settings]
    resolved = config.load(variables["CONFIG"], settings)
    assert resolved.data.source == "folder" and resolved.data.root == "s3://mine/pictures"
    assert resolved.export.name == "own_pictures" and resolved.storage.uri != resolved.data.root
    assert resolved.data.s3.profile == "pictures" and resolved.storage.profile is None

    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert resolved.data.cache in mounts and mounts["/etc/pictures"]["readOnly"]
    assert environment(container)["AWS_SHARED_CREDENTIALS_FILE"] == "/etc/pictures/credentials"
    assert "pictures-credentials" not in yaml.safe_dump(inference(objects))


def expressions(rendered: dict[str, str]) -> dict[str, str]:
    """Of alerts, by their names."""
    [rules] = of_kind(list(yaml.safe_load_all(rendered["observability"])), "PrometheusRule")
    return {rule["alert"]: rule["expr"] for g in rules["spec"]["groups"] for rule in g["rules"]}


def test_every_alert_is_explained(rendered: dict[str, str]) -> None:
    objects = list(yaml.safe_load_all(rendered["observability"]))
    [rules] = of_kind(objects, "PrometheusRule")
    alerts = [rule["alert"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert len(alerts) == len(set(alerts)) >= 8
    manual = (ROOT / "docs" / "operations.md").read_text()
    assert not [alert for alert in alerts if f"**{alert}**" not in manual]


def test_a_training_that_is_never_retried_and_one_that_never_succeeds_raise_alerts(
    rendered: dict[str, str],
) -> None:
    """kube-state-metrics gives no reason to a Job that its podFailurePolicy has failed, and no time
    of a last success before the first one."""
    alerts = expressions(rendered)
    assert 'condition="true"' in alerts["TrainingFailed"]
    assert "kube_job_failed{" in alerts["TrainingFailed"]
    assert "reason" not in alerts["TrainingFailed"]
    assert " or kube_cronjob_created{" in " ".join(alerts["TrainingOverdue"].split())
    board = (K8S / "components" / "observability" / "dashboard.json").read_text()
    assert "kube_job_status_failed" not in board and " or kube_cronjob_created{" in board


def test_every_volume_that_trainings_fill_is_watched(rendered: dict[str, str]) -> None:
    alerts = expressions(rendered)
    board = (K8S / "components" / "observability" / "dashboard.json").read_text()
    texts = (alerts["CheckpointVolumeFull"], board.replace('\\"', '"'))
    patterns = [re.findall(r'persistentvolumeclaim=~"([^"]+)"', text) for text in texts]
    assert [len(found) for found in patterns] == [2, 2]
    for overlay in OVERLAYS:
        pod = training(list(yaml.safe_load_all(rendered[overlay])))["template"]["spec"]
        claims = [volume.get("persistentVolumeClaim", {}) for volume in pod["volumes"]]
        for name in (claim["claimName"] for claim in claims if claim):
            assert all(re.fullmatch(pattern, name) for found in patterns for pattern in found)


def test_a_service_that_refuses_all_pictures_raises_the_alert(rendered: dict[str, str]) -> None:
    """It has counted no prediction: golden pictures are not counted, and no sample is no zero."""
    alerts = expressions(rendered)
    board = (K8S / "components" / "observability" / "dashboard.json").read_text()
    zero = re.compile(r"\(sum\(rate\(inception_predictions_total\{\S+\]\)\) or vector\(0\)\)")
    assert zero.search(alerts["RequestsRefused"])
    assert zero.search(board)


def test_alerts_and_dashboard_ask_for_metrics_that_the_handler_declares() -> None:
    folder, metrics = K8S / "components" / "observability", ROOT / "serving" / "metrics.yaml"
    declared = yaml.safe_load(metrics.read_text())["model_metrics"]
    names = {metric["name"] for kind in ("gauge", "counter") for metric in declared[kind]}
    parts = ("bucket", "sum", "count")
    names |= {f"{metric['name']}_{part}" for metric in declared["histogram"] for part in parts}
    for file in ("alerts.yaml", "dashboard.json"):
        asked = set(re.findall(r"\binception_[a-z_]+", (folder / file).read_text()))
        assert asked <= names and "inception_drift_evidence" in asked
