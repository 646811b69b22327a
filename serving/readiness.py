"""Whether the service can be sent requests: the golden picture, asked for as a client would.

Not every failure to answer it is one of the service. Where the queue is full, or long, the picture
waits or is refused like anybody's; taking such a service out would bury the others. So what tells
a busy engine from a frozen one are the answers that it gives to others.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from serving.archive import Model

# A frozen engine is found within INTERVAL_SECONDS and twice LOOK_SECONDS: under 10 s.
INTERVAL_SECONDS = 3.0  # between looks at a service that is ready
LOOK_SECONDS = 2.5  # for an answer of one that is ready
START_SECONDS = 10.0  # … and of one that is not: the first picture may take its time
BUSY_SECONDS = 15.0  # an engine that gave anybody an answer so recently is at work
ANSWERED = "Requests2XX"
NO_ANSWER = (OSError, http.client.HTTPException, ValueError)


class Readiness:
    """Looks at one service, again and again."""

    def __init__(self, model: Model, url: str, metrics: str, key: str | None = None) -> None:
        """
        Args:
            url: of predictions, at the gateway.
            metrics: of TorchServe's own metrics.
            key: a bearer key, where the gateway wants one.
        """
        self.model, self.url, self.metrics, self.key = model, url, metrics, key
        self.answered: float | None = None
        """TorchServe's count of answers; None when it was not read since the last golden one."""
        self.answered_at = float("-inf")

    def problem(self, ready: bool) -> str | None:
        """What keeps the service from being ready; None if nothing does. Never raises.

        Args:
            ready: whether it was, so far. One that was not gets more time, and has to answer.
        """
        try:
            return self._problem(ready)
        except Exception as error:  # whatever it is, a look must not end what it looks at
            return f"the look at the golden picture failed: {error!r}"

    def _problem(self, ready: bool) -> str | None:
        try:
            problem = self._wrong(self._ask(LOOK_SECONDS if ready else START_SECONDS))
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

    def _ask(self, seconds: float) -> Any:
        headers = {"Content-Type": "application/octet-stream", "X-Request-Id": "golden"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, data=self.model.golden, headers=headers)
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return json.load(response)

    def _wrong(self, answer: Any) -> str | None:
        """What is wrong with an answer to the golden picture; None if nothing is."""
        expected = self.model.expected
        try:
            label, probability = str(answer["label"]), float(answer["probability"])
        except (KeyError, TypeError, ValueError):
            return f"the golden picture got {json.dumps(answer)[:200]}"
        off = abs(probability - expected["probability"])
        if label == expected["label"] and off <= expected["tolerance"]:  # not so for NaN
            return None
        return f"the golden picture is {label} with {probability:.3f}"

    def _answers_others(self, *, speaks: bool) -> bool:
        """Whether TorchServe has answered anybody lately.

        Args:
            speaks: whether it has just said that it is busy. Its metrics may then be late, too;
                from one that says nothing at all they have to come.
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
        with urllib.request.urlopen(self.metrics, timeout=LOOK_SECONDS) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(ANSWERED))


def _is_late(error: Exception) -> bool:
    """Whether there was no answer in time, rather than nobody to give one."""
    return isinstance(getattr(error, "reason", error), TimeoutError)
