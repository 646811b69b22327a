"""A second archive beside the one that serves, on a share of its requests: its shadow.

The engine that serves answers first; then a thread sends the same request to the shadow's engine, a
process of its own, and counts how the two compare. What happens to the shadow costs no client an
answer. `python -m jobs verdict` reads the counts.
"""

import http.client
import json
import logging
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serving.engines import Shadow
from serving.metrics import PROBE

WAITING = 16  # requests; further ones are not compared
SECONDS = 60.0  # for an answer
LOADING = 600.0  # seconds that it may take
PAUSE = 1.0  # between looks at a shadow that has not answered yet
NO_ANSWER = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError)
logger = logging.getLogger(__name__)


class Guess(NamedTuple):
    """What one model takes a picture for."""

    label: str | int
    probability: float


class Sent(NamedTuple):
    """A request that was answered."""

    body: bytes
    headers: Mapping[str, str]
    answer: bytes
    seconds: float


class Mirror:
    """Sends a share of the answered requests to a shadow, and counts."""

    def __init__(self, shadow: Shadow, share: float, registry: CollectorRegistry) -> None:
        self.port, self.share = shadow.port, share
        self.random = random.Random()
        self.queue: queue.Queue[Sent] = queue.Queue(WAITING)
        self.pictures = Counter(
            "inception_shadow_pictures",
            "Pictures of both: agree, or by how much one is surer of another label, of 1 in all",
            ["outcome"],
            registry=registry,
        )
        self.requests = Counter(
            "inception_shadow_requests",
            "answered, failed, or dropped",
            ["outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "inception_shadow_seconds", "Of an answer", ["role"], registry=registry
        )
        self.probability = Histogram(
            "inception_shadow_probability", "Of the likeliest class", ["role"], registry=registry
        )
        info = Gauge("inception_shadow_info", "1", ["live", "shadow"], registry=registry)
        info.labels(**shadow.versions).set(1)
        tested = Gauge(
            "inception_shadow_tested_accuracy",
            "The lower end of its interval on the test set",
            ["role"],
            registry=registry,
        )
        for role, accuracy in shadow.accuracies.items():
            tested.labels(role).set(accuracy)
        threading.Thread(target=self._work, daemon=True).start()

    def offer(self, sent: Sent) -> None:
        """Takes a request for comparison, or not; never waits."""
        headers = sent.headers
        other = headers.get("X-Request-Id") == PROBE or headers.get("Explain") == "True"
        if other or self.random.random() >= self.share:
            return
        try:
            self.queue.put_nowait(sent)
        except queue.Full:
            self.requests.labels("dropped").inc()

    def _work(self) -> None:
        self._wait()
        fails = False
        while True:
            sent = self.queue.get()
            try:
                self._compare(sent)
                self.requests.labels("answered").inc()
                fails = False
            except NO_ANSWER as error:
                self.requests.labels("failed").inc()
                if not fails:  # a line each time that it begins, not one a request
                    logger.warning("the shadow gave no answer: %r", error)
                fails = True

    def _wait(self) -> None:
        """Until the shadow listens for the first time: loading is no failure, unless it never
        ends."""
        end = time.monotonic() + LOADING
        while time.monotonic() < end:
            try:
                self._ask("GET", "/metrics")
                return
            except NO_ANSWER:
                time.sleep(PAUSE)

    def _compare(self, sent: Sent) -> None:
        multipart = sent.headers.get("X-Multipart")
        headers = {"X-Multipart": multipart} if multipart else {}
        start = time.perf_counter()
        answer = self._ask("POST", "/predictions", sent.body, headers)
        seconds = time.perf_counter() - start
        for live, shadow in zip(guesses(sent.answer), guesses(answer), strict=True):
            for outcome, share in outcomes(live, shadow).items():
                self.pictures.labels(outcome).inc(share)
            self.probability.labels("live").observe(live.probability)
            self.probability.labels("shadow").observe(shadow.probability)
        self.seconds.labels("live").observe(sent.seconds)
        self.seconds.labels("shadow").observe(seconds)

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> bytes:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as shadow:
            shadow.request(method, path, body, dict(headers))
            response = shadow.getresponse()
            content = response.read()
        if response.status != 200:
            raise OSError(f"the shadow's answer is {response.status}")
        return content


def outcomes(live: Guess, shadow: Guess) -> dict[str, float]:
    """What a picture counts as, 1 in all. Where they differ, the calibrated probabilities say how
    likely each is to be right: twice the mean share of the shadow, less 1, is what it gains in
    accuracy on such pictures."""
    if live.label == shadow.label:
        return {"agree": 1.0}
    share = (1 + shadow.probability - live.probability) / 2
    return {"shadow_surer": share, "live_surer": 1 - share}


def guesses(answer: bytes) -> Iterator[Guess]:
    """The likeliest class of every picture of an answer, in any of its forms; also where the label
    is withheld."""
    content: dict[str, Any] = json.loads(answer)
    if "outputs" in content:
        tensors = {tensor["name"]: tensor for tensor in content["outputs"]}
        _, classes = tensors["probabilities"]["shape"]
        values = tensors["probabilities"]["data"]
        for start in range(0, len(values), classes):
            row = values[start : start + classes]
            yield Guess(row.index(max(row)), max(row))
    else:
        for prediction in content.get("predictions", [content]):
            best = prediction["top"][0]
            yield Guess(best["label"], best["probability"])
