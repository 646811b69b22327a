"""Request parsing and response formatting, independent of HTTP and of any model.

A request is a raw picture, a multipart upload, or JSON: `{"b64": …}`, KServe's V1
`{"instances": [{"b64": …}]}`, or V2 of the Open Inference Protocol with one input tensor, either
BYTES (base64 of whole pictures) or UINT8 [N, 3, H, W] (pixels).
"""

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.images import MAX_PIXELS

TOP = 5
MAX_PICTURES = 64  # in one request, so that none occupies the service for long
MAX_MARKS = 100_000  # that open something in JSON: when read, each may take 100 bytes
MAX_PARTS = 100  # of an upload


class RequestError(ValueError):
    """A request that cannot be answered; becomes the status 400 for its sender alone."""


class Dialect(Enum):
    """The JSON that a request came in, or none: its answer goes back in the same."""

    ONE = "one"
    V1 = "v1"
    V2 = "v2"


class Explain(Enum):
    """How a class map is sent."""

    MAP = "map"
    """With the prediction, as numbers."""
    PICTURE = "picture"
    """Laid over the picture, as a PNG file alone."""


Picture = bytes | NDArray[np.uint8]
"""A file as it was sent, or its pixels, uint8 [3, H, W]."""


@dataclass(frozen=True)
class Request:
    pictures: Sequence[Picture]
    dialect: Dialect = Dialect.ONE
    top: int = TOP
    abstain: float = 0.0
    """A picture whose familiarity is no larger gets no label."""
    confidence: float | None = None
    """With which probability the set of classes, if one is wanted, holds the right one."""
    explain: Explain | None = None
    """How to say why the answer is the likeliest class, if that is wanted."""
    id: str | None = None
    """Given by V2's clients, and given back to them."""


@dataclass(frozen=True)
class Found:
    """What a model says of N pictures."""

    probabilities: NDArray[np.float32]
    """[N, C]."""
    familiarity: NDArray[np.float64] | None
    """[N]; see serving/trust.py."""
    strangeness: NDArray[np.float32] | None = None
    """[N], what familiarity is computed from."""
    maps: NDArray[np.float32] | None = None
    """[N, h, w], what each place says for the likeliest class; see :class:`runtimes.Outputs`."""

    def part(self, start: int, stop: int) -> "Found":
        given = {name: rows for name, rows in vars(self).items() if rows is not None}
        return replace(self, **{name: rows[start:stop] for name, rows in given.items()})


def parse(
    row: Mapping[str, Any],
    top: str | None = None,
    abstain: str | None = None,
    confidence: str | None = None,
    *,
    explain: Explain | None = None,
) -> Request:
    """Reads one TorchServe row.

    Args:
        row: the bytes of `body`, or of a multipart upload's only part.
        top: how many classes the answer is to name; as the client wrote it, like the others.

    Raises:
        RequestError: it is none of the forms above.
    """
    request = _read(_content(row))
    if explain is Explain.PICTURE and request.dialect is not Dialect.ONE:
        raise RequestError("image/png explains one picture; several are explained in JSON")
    return replace(
        request,
        top=_top(top) if top else TOP,
        abstain=_share(abstain, "abstain") if abstain else 0.0,
        confidence=_share(confidence, "confidence") if confidence else None,
        explain=explain,
    )


def _read(content: bytes | Mapping[str, Any]) -> Request:
    if isinstance(content, bytes):
        return Request([content])
    if "inputs" in content:
        return _parse_v2(content)
    if "instances" in content:
        return Request(_instances(content["instances"]), Dialect.V1)
    if "b64" in content:
        return Request([_decoded(content["b64"])])
    raise RequestError('send a picture, {"b64": …}, {"instances": [{"b64": …}]} or {"inputs": …}')


def unwrapped(row: Mapping[str, Any], multipart: str | None) -> Mapping[str, Any]:
    """The parts by name of a multipart upload (RFC 7578), whose body is a row as it came.

    Args:
        multipart: the upload's content type; None if the row is no upload.

    Raises:
        RequestError: it cannot be parsed.
    """
    if not multipart:
        return row
    boundary = re.search(r'boundary=(?:"([^"]{1,70})"|([^\s;,"]{1,70}))', multipart, re.IGNORECASE)
    if boundary is None:
        raise RequestError("multipart: its boundary is missing")
    delimiter = b"\r\n--" + (boundary[1] or boundary[2]).encode()
    body = b"\r\n" + row["body"]
    if body.count(delimiter) > MAX_PARTS:
        raise RequestError(f"multipart: over {MAX_PARTS} parts")
    pieces = body.split(delimiter)
    if len(pieces) < 3 or not pieces[-1].startswith(b"--"):
        raise RequestError("multipart: it is cut off")
    parts: dict[str, bytes] = {}
    for piece in pieces[1:-1]:
        head, blank_line, content = piece.partition(b"\r\n\r\n")
        found = re.search(rb'[;\s]name=(?:"([^"]*)"|([^\s;"]+))', head)
        if not blank_line or found is None:
            raise RequestError("multipart: a part has no name")
        name = (found[1] or found[2] or b"").decode(errors="replace")
        if name in parts:
            raise RequestError("multipart: one picture is needed; several go into JSON")
        parts[name] = content
    return parts


def _content(row: Mapping[str, Any]) -> bytes | Mapping[str, Any]:
    """A file, or JSON that was read; a TorchServe that is not ours may have read it already."""
    only = next(iter(row.values())) if len(row) == 1 else None
    body = row.get("body", only)
    if isinstance(body, Mapping):
        return body
    if not isinstance(body, bytes | bytearray):
        raise RequestError("one picture is needed; several go into JSON as instances")
    if body.lstrip()[:1] != b"{":  # which no picture starts with
        return bytes(body)
    if sum(body.count(mark) for mark in (b"{", b"[", b'"')) > MAX_MARKS:
        raise RequestError(f"JSON: over {MAX_MARKS:,} brackets, braces and quotes")
    try:
        content: dict[str, Any] = json.loads(body)
        return content
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}") from None


def _top(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 1000:
        raise RequestError(f"top={text[:20]}: a number from 1 to 1000 is needed")
    return int(text[:9])


def _share(text: str, name: str) -> float:
    try:
        if 0 <= (share := float(text)) < 1:
            return share
    except ValueError:
        pass
    raise RequestError(f"{name}={text[:20]}: a number from 0 to below 1 is needed")


def _instances(given: Any) -> list[Picture]:
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_PICTURES:
        raise RequestError(f"instances: a list of 1 to {MAX_PICTURES} is needed")
    if not all(isinstance(instance, dict) and "b64" in instance for instance in given):
        raise RequestError('instances: each is an object {"b64": "…"}')
    return [_decoded(instance["b64"]) for instance in given]


def _decoded(text: Any) -> bytes:
    if not isinstance(text, str):
        raise RequestError("b64: a string is needed")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(f"b64: {error}") from None


def _parse_v2(content: Mapping[str, Any]) -> Request:
    """https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol"""
    inputs = content["inputs"]
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError("inputs: a list of one tensor is needed")
    tensor = inputs[0]
    shape, data = tensor.get("shape"), tensor.get("data")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise RequestError("shape: a list of positive numbers is needed")
    if not shape or shape[0] > MAX_PICTURES:
        raise RequestError(f"shape: 1 to {MAX_PICTURES} pictures are needed")
    if len(shape) > 4 or max(shape) > MAX_PIXELS:  # multiplied, large numbers would take minutes
        raise RequestError(f"shape: at most 4 numbers, none over {MAX_PIXELS:,}")
    if not isinstance(data, list):
        raise RequestError("data: a list is needed")
    readers = {"BYTES": _bytes_tensor, "UINT8": _uint8_tensor}
    reader = readers.get(str(tensor.get("datatype")))
    if reader is None:
        raise RequestError("datatype: BYTES (base64 of a picture) or UINT8 (pixels) is needed")
    identity = content.get("id")
    # JSON may have half a surrogate pair, which no answer can have.
    if identity is not None and identity != str(identity).encode(errors="ignore").decode():
        raise RequestError("id: a string is needed")
    return Request(reader(shape, data), Dialect.V2, id=identity)


def _bytes_tensor(shape: list[int], data: list[Any]) -> list[Picture]:
    if len(data) != math.prod(shape) or len(data) != shape[0]:
        raise RequestError(f"shape: {shape} does not fit the {len(data)} pictures of data")
    return [_decoded(text) for text in data]


def _uint8_tensor(shape: list[int], data: list[Any]) -> list[Picture]:
    if len(shape) != 4 or shape[1] != 3:
        raise RequestError(f"shape: [N, 3, height, width] is needed, not {shape}")
    if shape[2] * shape[3] > MAX_PIXELS:
        raise RequestError(f"shape: over {MAX_PIXELS:,} pixels")
    try:
        for _ in shape[1:]:  # it may be nested as the shape is
            if data and isinstance(data[0], list):
                data = list(chain.from_iterable(map(list.__iter__, data)))  # no text
        if set(map(type, data)) - {int}:  # `bytes` takes true and false for numbers
            raise TypeError
        values = np.frombuffer(bytes(data), np.uint8)
    except (TypeError, ValueError):
        raise RequestError("data: whole numbers from 0 to 255 are needed") from None
    if len(values) != math.prod(shape):
        raise RequestError(f"data: {shape} does not fit it")
    return list(values.reshape(shape))


def answer(
    request: Request,
    found: Found,
    classes: Sequence[str],
    model: Mapping[str, str],
    least: float | None = None,
) -> dict[str, Any]:
    """The answer to a request from what was found of its pictures.

    Args:
        least: the smallest probability of a class in `set`; None for no such field.
    """
    if request.dialect is Dialect.V2:
        identity = {} if request.id is None else {"id": request.id}
        about = {"model_name": model["name"], "model_version": model["version"]}
        return {**about, "outputs": _tensors(request, found, classes, least), **identity}
    answers = [_prediction(request, *one, classes, model, least) for one in _each(found)]
    if request.explain and found.maps is not None:
        for one, places in zip(answers, found.maps, strict=True):  # where no label is given, too
            one["explanation"] = {"label": one["top"][0]["label"], "map": places.tolist()}
    return {"predictions": answers} if request.dialect is Dialect.V1 else answers[0]


def _each(found: Found) -> Iterator[tuple[NDArray[np.float32], float | None]]:
    """Probabilities [C] and familiarity of every picture."""
    for index, row in enumerate(found.probabilities):
        yield row, None if found.familiarity is None else float(found.familiarity[index])


def _prediction(
    request: Request,
    probabilities: NDArray[np.float32],
    familiarity: float | None,
    classes: Sequence[str],
    model: Mapping[str, str],
    least: float | None,
) -> dict[str, Any]:
    order = np.argsort(-probabilities, kind="stable")
    entries = [
        {"label": classes[i], "probability": float(probabilities[i])} for i in order[: request.top]
    ]
    result = {**entries[0], "familiarity": familiarity, "top": entries, "model": dict(model)}
    if _is_strange(request, familiarity):
        result |= {"label": None, "reason": "unfamiliar"}
    if least is not None:
        members = _members(probabilities, least)
        result["set"] = [classes[i] for i in order if members[i]]
    return result


def _is_strange(request: Request, familiarity: float | None) -> bool:
    return familiarity is not None and familiarity <= request.abstain


def _members(probabilities: NDArray[np.float32], least: float) -> NDArray[np.bool_]:
    """Which classes are in the set, bool […, C]: the likeliest one always is."""
    highest: NDArray[np.float32] = probabilities.max(axis=-1, keepdims=True)
    return probabilities >= np.minimum(least, highest)


def _tensors(
    request: Request, found: Found, classes: Sequence[str], least: float | None
) -> list[dict[str, Any]]:
    """V2's outputs. No label is an empty one here, as a tensor of BYTES has no null."""
    labels = [
        "" if _is_strange(request, familiarity) else classes[int(row.argmax())]
        for row, familiarity in _each(found)
    ]
    outputs = [_tensor("label", "BYTES", np.array(labels))]
    outputs.append(_tensor("probabilities", "FP32", found.probabilities))
    if found.familiarity is not None:
        outputs.append(_tensor("familiarity", "FP64", found.familiarity))
    if least is not None:
        outputs.append(_tensor("set", "BOOL", _members(found.probabilities, least)))
    if request.explain and found.maps is not None:
        outputs.append(_tensor("map", "FP32", found.maps))
    return outputs


def _tensor(name: str, datatype: str, values: NDArray[Any]) -> dict[str, Any]:
    shape, data = list(values.shape), values.ravel().tolist()
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def failure(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities [N, C] of logits [N, C]."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = exponents / exponents.sum(axis=1, keepdims=True)
    return shares


def logarithms(probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of probabilities [N, C], which may be 0: what stands for logits where these are not told."""
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))


def probability_errors(
    given: NDArray[np.floating], expected: NDArray[np.floating]
) -> tuple[float, float]:
    """How far probabilities [N, C] are off, by the largest difference of each picture's: their 99th
    percentile and the largest. Of up to 101 pictures, the former is the second largest: rounding
    moves one that is between two classes further than others."""
    off = np.abs(given - expected).max(axis=1)
    return float(np.quantile(off, 0.99, method="lower")), float(off.max())
