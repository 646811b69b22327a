"""The InferenceService, against KServe's published schema and the service's own settings."""

from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from manifests import K8S, kustomize, published

from serving.settings import from_environment


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    objects = list(yaml.safe_load_all(kustomize(K8S / "kserve")))
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
