"""HTTP client of the service: `Client(url).predict(picture)`.

Needs no torch and no model, so it starts at once and runs anywhere.
"""

import json
import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlencode, urlsplit

from urllib3 import BaseHTTPResponse, PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError, MaxRetryError, ReadTimeoutError

from serving.ahead import mapped

URL = "http://localhost:8080"
CONNECT_SECONDS = 5.0
LATER = frozenset({429, 502, 503})
"""Statuses of a service that is overloaded, starting or shutting down: the request is retried."""


@dataclass(frozen=True)
class Score:
    label: str
    probability: float


@dataclass(frozen=True)
class Model:
    name: str
    version: str


@dataclass(frozen=True)
class Prediction:
    """The prediction for one picture; `top` has the most probable classes, best first."""

    label: str | None
    """None where the service abstains."""
    probability: float
    top: tuple[Score, ...]
    model: Model
    familiarity: float | None = None
    """A p-value; see docs/trust.md. None where the model has none."""
    set: tuple[str, ...] | None = None
    """Classes of which one is right with the `confidence` that the client was given."""


class ClientError(Exception):
    """A picture without an answer; the message says why.

    `status` is the answer's, or None where there was none; `code` is the service's own
    ("bad_image", "http_413", …), or "unreachable", "unreadable" (the file) or "bad_answer".
    """

    def __init__(self, message: str, code: str, status: int | None = None) -> None:
        super().__init__(message)
        self.code, self.status = code, status

    @property
    def unavailable(self) -> bool:
        """Whether the service failed, rather than the picture or the request."""
        at_fault = self.status is not None and (self.status >= 500 or self.status in LATER)
        return at_fault or self.code in ("unreachable", "bad_answer")


class Client:
    """Connections to one service, to be shared by threads and closed at the end (`with`).

    Requests to a full or absent service (429, 502, 503, no or a cut connection) are retried, up to
    `retries` times, after a growing time that is at least what it asks for in Retry-After, with
    jitter. Repeating a prediction changes nothing. Other refusals are final, and so is a
    timeout: the service has done the work by then, and would do it again.
    """

    def __init__(
        self,
        url: str = URL,
        *,
        model: str | None = None,
        key: str | None = None,
        abstain: float | None = None,
        confidence: float | None = None,
        timeout: float = 30.0,
        retries: int = 5,
        concurrency: int = 8,
    ) -> None:
        """
        Args:
            url: where the service is.
            model: its name there; requested from the service when absent.
            key: sent as bearer token.
            abstain: a picture whose familiarity is no larger gets no label; by default as the
                service is set.
            confidence: asks for a set of classes that holds the right one so often.
            timeout: seconds that an answer may take, for each attempt.
            concurrency: requests that :meth:`predict_many` keeps in flight.

        Raises:
            ValueError: not an http address, or a key that no header can carry.
        """
        self.url, self.concurrency = _checked(url).rstrip("/"), concurrency
        given = {"abstain": abstain, "confidence": confidence}
        query = urlencode({name: value for name, value in given.items() if value is not None})
        self._query = f"?{query}" if query else ""
        if model is not None:
            self.model = model
        self._pool = PoolManager(
            maxsize=concurrency,
            headers={"Content-Type": "application/octet-stream", **_authorization(key)},
            timeout=Timeout(connect=min(CONNECT_SECONDS, timeout), read=timeout),
            retries=_Patience(
                retries,
                allowed_methods=None,
                status_forcelist=LATER,
                raise_on_status=False,
                backoff_factor=0.25,
                backoff_jitter=0.5,
                retry_after_max=60,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.clear()

    @cached_property
    def model(self) -> str:
        """The name of the service's model.

        Raises:
            ClientError: there is no answer, or more than one model to choose from.
        """
        names = self._ask("GET", "/v1/models").get("models")
        if not isinstance(names, list) or len(names) != 1:
            raise ClientError(f"{self.url}: which model? It has {names}", "bad_answer")
        return str(names[0])

    def predict(self, image: bytes | Path) -> Prediction:
        """Classifies one picture (JPEG, PNG or WebP).

        Raises:
            ClientError: there is no answer to this picture.
        """
        path = f"/predictions/{quote(self.model, safe='')}"
        answer = self._ask("POST", path + self._query, _bytes(image))
        try:
            return Prediction(
                label=answer["label"],
                probability=float(answer["probability"]),
                top=tuple(Score(**score) for score in answer["top"]),
                model=Model(**answer["model"]),
                familiarity=answer.get("familiarity"),
                set=tuple(answer["set"]) if "set" in answer else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ClientError(f"{self.url}: not a prediction: {error}", "bad_answer") from None

    def predict_many(self, images: Iterable[bytes | Path]) -> Iterator[Prediction | ClientError]:
        """Yields a prediction for every picture, in order, as they complete; an error in place of
        each that failed.

        Each picture is a request of its own, `concurrency` of them at a time: the service batches
        them as it sees fit, over all its workers, and a bad picture or a lost connection costs one
        answer. One request with many `instances` would keep one worker busy, be refused as a
        whole, and grow by a third in base64.

        Raises:
            ClientError: the model's name is not given and the request for it failed.
        """
        self.model  # noqa: B018 - once, before many threads ask for it
        with ThreadPoolExecutor(self.concurrency) as threads:
            yield from mapped(threads, self._predict, images, 2 * self.concurrency)

    def _predict(self, image: bytes | Path) -> Prediction | ClientError:
        try:
            return self.predict(image)
        except ClientError as error:
            return error

    def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        try:
            response = self._pool.request(method, self.url + path, body=body)
        except HTTPError as error:
            raise ClientError(f"{self.url}: {_reason(error)}", "unreachable") from error
        answer = _mapping(response.data)
        if response.status != 200:
            failure = answer.get("error")
            failure = failure if isinstance(failure, dict) else {}
            code = failure.get("code", f"http_{response.status}")
            message = failure.get("message", response.reason or "no reason given")
            raise ClientError(str(message), str(code), response.status)
        return answer


class _Patience(Retry):
    """urllib3's, but it repeats no timeout and no 413, and Retry-After is only the shortest wait.

    Each wait has jitter, or clients that were refused together would return together; and each is
    longer, or all tries would be over before a service of which a part has died is back."""

    RETRY_AFTER_STATUS_CODES = LATER

    def increment(self, *args: Any, **kwargs: Any) -> Self:
        if isinstance(error := kwargs.get("error"), ReadTimeoutError):
            raise error
        return super().increment(*args, **kwargs)

    def sleep_for_retry(self, response: BaseHTTPResponse) -> bool:
        seconds = self.get_retry_after(response)
        if seconds is None:
            return False
        jitter = random.uniform(0, self.backoff_jitter)
        time.sleep(max(seconds, self.get_backoff_time()) + jitter)
        return True


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{url}: not an address like {URL}")
    return url


def _authorization(key: str | None) -> dict[str, str]:
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the key has characters that no header can carry, a line's end maybe")
    return {"Authorization": f"Bearer {key}"}


def _bytes(image: bytes | Path) -> bytes:
    try:
        return image.read_bytes() if isinstance(image, Path) else image
    except OSError as error:
        raise ClientError(error.strerror or str(error), "unreadable") from None


def _mapping(data: bytes) -> dict[str, Any]:
    """The JSON object that `data` is, or an empty one."""
    try:
        answer = json.loads(data)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _reason(error: HTTPError) -> str:
    if isinstance(error, MaxRetryError) and error.reason is not None:
        return str(error.reason.__cause__ or error.reason)
    return str(error)
