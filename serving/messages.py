"""What clients send and what they get back, apart from HTTP and from any model."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOP = 5


class RequestError(ValueError):
    """A request that cannot be answered; becomes the status 400 for its sender alone."""


@dataclass(frozen=True)
class Request:
    pictures: list[bytes]
    many: bool = False
    """Whether it came as `instances` and is answered with `predictions`, one for each."""


def parse(row: Mapping[str, Any]) -> Request:
    """Reads one TorchServe row.

    Args:
        row: `body` or `data` with raw bytes (a plain upload or a multipart field), or with the
            parsed JSON `{"b64": …}` or `{"instances": [{"b64": …}, …]}` (KServe v1).

    Raises:
        RequestError: none of these.
    """
    body = row.get("body", row.get("data"))
    if isinstance(body, bytes | bytearray):
        return Request([bytes(body)])
    if isinstance(body, Mapping) and "b64" in body:
        return Request([_decoded(body)])
    if isinstance(body, Mapping) and isinstance(body.get("instances"), list):
        if not body["instances"]:
            raise RequestError("instances: at least one is needed")
        return Request([_decoded(instance) for instance in body["instances"]], many=True)
    raise RequestError('send a picture, {"b64": …} or {"instances": [{"b64": …}]}')


def _decoded(instance: Any) -> bytes:
    text = instance.get("b64") if isinstance(instance, Mapping) else None
    if not isinstance(text, str):
        raise RequestError('every instance is an object {"b64": "…"}')
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise RequestError(f"b64: {error}") from None


def answer(
    probabilities: NDArray[np.float32], classes: Sequence[str], model: Mapping[str, str]
) -> dict[str, Any]:
    """The prediction for one picture from its probabilities, float32 [C]."""
    order = np.argsort(-probabilities, kind="stable")[:TOP]
    top = [{"label": classes[i], "probability": float(probabilities[i])} for i in order]
    return {**top[0], "top": top, "model": dict(model)}


def failure(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities [N, C] of logits [N, C]."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = exponents / exponents.sum(axis=1, keepdims=True)
    return shares
