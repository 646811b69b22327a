"""Kubernetes: sets the exact version that a Deployment serves.

The version stands in the pod template, so `kubectl rollout undo` restores the previous one; a
restart on a channel that was moved meanwhile would not. The identity needs `patch` on that one
Deployment.
"""

import importlib.util
from pathlib import Path
from typing import Any

from jobs.errors import ConfigurationError, UnavailableError
from serving.progress import log

CONTAINER = "model"  # the init container that fetches MODEL_URI
TIMEOUT = 30  # seconds


def patch(name: str, uri: str, cause: str) -> None:
    """Sets MODEL_URI of the init container `model`, in the pod's or the context's namespace.

    Raises:
        ConfigurationError: the package of the extra `cluster` is missing.
        UnavailableError: there is no cluster, no such Deployment, or no permission.
    """
    container = {"name": CONTAINER, "env": [{"name": "MODEL_URI", "value": uri}]}
    body = {
        "metadata": {"annotations": {"kubernetes.io/change-cause": cause}},
        "spec": {"template": {"spec": {"initContainers": [container]}}},
    }
    log(f"Deployment {_send(name, body)} rolls out {uri}")


def check(name: str) -> None:
    """Has the cluster try a patch, which changes nothing; raises what `patch` would."""
    _send(name, {}, dry_run="All")


def _send(name: str, body: dict[str, Any], **options: str) -> str:
    """Returns the namespace and the name."""
    if importlib.util.find_spec("kubernetes") is None:
        raise ConfigurationError("--deployment: pip install 'inception-transfer[cluster]'")
    from kubernetes import client
    from urllib3.exceptions import HTTPError

    namespace = _configure()
    try:
        api = client.AppsV1Api()
        api.patch_namespaced_deployment(name, namespace, body, _request_timeout=TIMEOUT, **options)
    except client.ApiException as error:
        raise UnavailableError(f"Deployment {namespace}/{name}: {_reason(error)}") from None
    except HTTPError as error:
        raise UnavailableError(f"Deployment {namespace}/{name}: {error}") from None
    return f"{namespace}/{name}"


def _configure() -> str:
    """Points the client at the pod's cluster, else at kubeconfig's; returns the namespace."""
    from kubernetes import config

    try:
        config.load_incluster_config()
    except config.ConfigException:
        try:
            config.load_kube_config()
            _, context = config.list_kube_config_contexts()
        except config.ConfigException as error:
            raise UnavailableError(f"--deployment: no cluster: {error}") from None
        return str(context["context"].get("namespace", "default"))
    return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()


def _reason(error: Any) -> str:
    known = {403: "may not be patched by this identity", 404: "there is none"}
    return known.get(error.status, f"{error.status} {error.reason}")
