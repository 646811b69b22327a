"""Metrics of the handler, which TorchServe exports to Prometheus.

`metrics.yaml`, beside this file, declares them to TorchServe. Its histograms have Prometheus's
default buckets, 0.005 to 10, hence seconds and shares.
"""

import os
import re
import time
from typing import Any

NOT_A_LABEL = re.compile(r"[^\w .-]")  # TorchServe reads these from a line of text
PROBE = "golden"  # X-Request-Id of readiness's own requests, which tell nothing of the clients'


class Meter:
    """Hands observations to TorchServe's registry, which writes them to its log pipe."""

    def __init__(self, registry: Any, model: str) -> None:
        """`registry` is TorchServe's `context.metrics`, or None outside of it."""
        self.registry, self.model = registry, model

    def observe(self, name: str, value: float) -> None:
        self._update(name, "histogram", value, [self.model])

    def count(self, name: str, label: str) -> None:
        self._update(name, "counter", 1, [self.model, NOT_A_LABEL.sub("_", label)])

    def show(self, name: str, value: float, version: str) -> None:
        """A state of this worker's, while it serves a version."""
        dimensions = [self.model, NOT_A_LABEL.sub("_", version), str(os.getpid())]
        self._update(name, "gauge", value, dimensions)

    def _update(self, name: str, kind: str, value: float, dimensions: list[str]) -> None:
        if self.registry is None:
            return
        from ts.metrics.metric_type_enum import MetricTypes

        metric = self.registry.get_metric(f"inception_{name}", MetricTypes(kind))
        metric.add_or_update(round(value, 6), dimensions)


def seconds_since(header: str | None) -> float | None:
    """How long ago the gateway took a request, by its header with milliseconds since 1970."""
    if header is None or not header.isdecimal():
        return None
    return max(0.0, time.time() - int(header) / 1000)
