"""The InferenceService, against KServe's published schema and the service's own settings."""

from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from manifests import K8S, kustomize, published

from serving.settings import from_environment


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(kustomize(K8S / "kserve")))


@pytest.fixture(scope="module")
def service(objects: list[dict[str, Any]]) -> dict[str, Any]:
    [found] = [one for one in objects if one["kind"] == "InferenceService"]
    return dict(found)


def test_the_published_schema_accepts_it(service: dict[str, Any]) -> None:
    validator = published("kserve-inferenceservices.yaml", service["apiVersion"])
    validator.validate(service["spec"])
    wrong = {**service["spec"], "predictor": {**service["spec"]["predictor"], "minReplica": 1}}
    with pytest.raises(ValidationError, match="minReplica"):
        validator.validate(wrong)


def test_the_service_accepts_what_it_is_given(service: dict[str, Any]) -> None:
    [container] = service["spec"]["predictor"]["containers"]
    given = {one["name"]: one.get("value", "2") for one in container["env"]}
    assert from_environment(given).workers == 2
    [port] = container["ports"]
    assert port["containerPort"] == from_environment(given).port
    drain = from_environment(given)
    grace = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace > drain.endpoint_seconds + drain.drain_seconds


def test_it_has_the_account_and_the_ways_that_the_deployment_has(
    objects: list[dict[str, Any]], service: dict[str, Any]
) -> None:
    base = list(yaml.safe_load_all(kustomize(K8S / "base")))
    accounts = [one["metadata"]["name"] for one in base if one["kind"] == "ServiceAccount"]
    assert service["spec"]["predictor"]["serviceAccountName"] in accounts
    [ours] = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy"]
    policies = {o["metadata"]["name"]: o["spec"] for o in base if o["kind"] == "NetworkPolicy"}
    name = service["metadata"]["name"]  # KServe labels its pods with it
    assert ours["podSelector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": name}
    assert {**ours, "podSelector": None} == {**policies["inference"], "podSelector": None}
