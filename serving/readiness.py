"""Readiness: golden pictures are sent through the whole service, as a client would.

They are sent in rotation, so that a constant answer is detected quickly. A missing answer does not
always mean a broken service: if the queue is full or long, the picture waits or is refused like any
other request, and taking such a service out of rotation would overload the rest. A busy engine is
therefore distinguished from a frozen one by the answers that it gives to other clients.
"""

import http.client
import itertools
import json
import time
import urllib.error
import urllib.request
from typing import Any

from serving.archive import TOLERANCES, Golden, Model
from serving.metrics import PROBE

# A frozen engine is found within INTERVAL_SECONDS and twice LOOK_SECONDS: under 10 s.
INTERVAL_SECONDS = 3.0  # between looks at a service that is ready
LOOK_SECONDS = 2.5  # for an answer of one that is ready
START_SECONDS = 10.0  # … and of one that is not: the first picture may take its time
BUSY_SECONDS = 15.0  # an engine that answered any request so recently works
# TorchServe's own Requests2XX counts looks at its metrics, too.
ANSWERED = ("inception_predictions_total", "inception_refusals_total")
NO_ANSWER = (OSError, http.client.HTTPException, ValueError)
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the proxy of http_proxy, which could not reach this machine, and would see the key."""
ROUNDING = 2.0
"""A single picture may exceed the 99th percentile; a wrong network deviates far more."""


class Readiness:
    """Probes one service repeatedly."""

    def __init__(self, model: Model, url: str, metrics: str, key: str | None = None) -> None:
        """
        Args:
            url: of predictions of this model, at the gateway.
            metrics: of the engine's own metrics.
            key: a bearer key, where the gateway wants one.
        """
        self.url, self.metrics, self.key = url, metrics, key
        self.classes, self.golden = model.classes, itertools.cycle(model.golden)
        forms = model.description.forms  # which one it is depends on the device that serves
        self.tolerance = ROUNDING * max(TOLERANCES[form].probability_error for form in forms)
        self.form: str | None = None
        """Which form of the network gave the last golden answer; None before the first."""
        self.answered: float | None = None
        """The engine's count of answers at the last look; None since the last golden answer."""
        self.answered_at = float("-inf")

    def problem(self, ready: bool) -> str | None:
        """What keeps the service from being ready; None if nothing does. Never raises.

        Args:
            ready: whether it was, so far. One that was not gets more time, and has to answer.
        """
        try:
            return self._problem(ready)
        except Exception as error:  # whatever it is, a probe must not end what it probes
            return f"the look at the golden picture failed: {error!r}"

    def _problem(self, ready: bool) -> str | None:
        golden = next(self.golden)
        try:
            answer = self._ask(golden, LOOK_SECONDS if ready else START_SECONDS)
            problem = self._wrong(golden, answer)
        except urllib.error.HTTPError as error:
            with error:
                busy = error.code == 503 and ready and self._answers_others(speaks=True)
                return None if busy else f"the golden picture got {error}"
        except NO_ANSWER as error:
            busy = _is_late(error) and ready and self._answers_others(speaks=False)
            return None if busy else f"the golden picture got no answer: {error}"
        if problem is None:
            self.answered, self.answered_at = None, time.monotonic()
        return problem

    def _ask(self, golden: Golden, seconds: float) -> Any:
        headers = {"Content-Type": "application/octet-stream", "X-Request-Id": PROBE}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, data=golden.picture, headers=headers)
        with DIRECTLY.open(request, timeout=seconds) as response:
            self.form = response.headers["X-Form"]
            return json.load(response)

    def _wrong(self, golden: Golden, answer: Any) -> str | None:
        """What is wrong with the answer to a golden picture; None if nothing is."""
        expected = dict(zip(self.classes, golden.probabilities, strict=True))
        try:
            given = {str(e["label"]): float(e["probability"]) for e in answer["top"]}
            off = [abs(probability - expected[label]) for label, probability in given.items()]
        except (KeyError, TypeError, ValueError):
            return f"the golden picture got {json.dumps(answer)[:200]}"
        if off and all(error <= self.tolerance for error in off):  # not so for NaN
            return None
        said = ", ".join(f"{label} with {p:.3f}" for label, p in list(given.items())[:1])
        return f"the golden picture is {said or 'nothing'}"

    def _answers_others(self, *, speaks: bool) -> bool:
        """Whether the engine has answered any request lately.

        Args:
            speaks: whether it has just said that it is busy. Then its metrics may be late, too; an
                engine that said nothing has to send them.
        """
        now = time.monotonic()
        try:
            total = self._count_answers()
        except NO_ANSWER:
            return speaks and now - self.answered_at < BUSY_SECONDS
        if self.answered is not None and total > self.answered:
            self.answered_at = now
        self.answered = total
        return now - self.answered_at < BUSY_SECONDS

    def _count_answers(self) -> float:
        with DIRECTLY.open(self.metrics, timeout=LOOK_SECONDS) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(ANSWERED))


def _is_late(error: Exception) -> bool:
    """Whether the answer timed out, rather than the connection failed."""
    return isinstance(getattr(error, "reason", error), TimeoutError)
