"""The InferenceService, against KServe's published schema and the service's own settings."""

from typing import Any

import pytest
import yaml
from conftest import ROOT
from manifests import K8S, kustomize

from serving.settings import from_environment

SCHEMAS = ROOT.parent / "shared" / "references" / "crds"


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    objects = list(yaml.safe_load_all(kustomize(K8S / "kserve")))
    [found] = [one for one in objects if one["kind"] == "InferenceService"]
    return dict(found)


def test_the_published_schema_accepts_it(service: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    file = SCHEMAS / "kserve-inferenceservices.yaml"
    if not file.is_file():
        pytest.skip(f"the schema is not at {SCHEMAS}")
    [version] = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    assert service["apiVersion"].endswith(f"/{version['name']}")
    schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    validator = jsonschema.Draft7Validator(closed(schema))  # as it is: 2 MB take long to check
    validator.validate(service["spec"])
    wrong = {**service["spec"], "predictor": {**service["spec"]["predictor"], "minReplica": 1}}
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        validator.validate(wrong)


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


def test_the_service_accepts_what_it_is_given(service: dict[str, Any]) -> None:
    [container] = service["spec"]["predictor"]["containers"]
    given = {one["name"]: one.get("value", "2") for one in container["env"]}
    assert from_environment(given).workers == 2
    [port] = container["ports"]
    assert port["containerPort"] == from_environment(given).port
    drain = from_environment(given)
    grace = service["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace > drain.endpoint_seconds + drain.drain_seconds
