"""What shares a batch: a request costs no other one its answer."""

import json
import threading
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pictures, predictions
from drawings import bomb
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from jobs.runs import RunFolder
from serving import Predictor, asgi
from serving.messages import Picture


@pytest.fixture(scope="module")
def handler(archive: Path) -> asgi.SharingHandler:
    meter = asgi.OwnMeter(CollectorRegistry(), "m")
    return asgi.SharingHandler(Predictor.open(archive, threads=1), meter, None, threading.Lock())


def ask(handler: asgi.SharingHandler, *bodies: bytes | dict[str, Any]) -> list[tuple[int, Any]]:
    """Status and JSON of each answer to a batch."""
    raw = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
    responses = asgi.respond(handler, [asgi.Waiting(body, {}) for body in raw])
    return [(one.status_code, json.loads(bytes(one.body) or b"null")) for one in responses]


def tensor(*files: bytes, **changes: Any) -> dict[str, Any]:
    data = [b64encode(file).decode() for file in files]
    return {"name": "x", "shape": [len(data)], "datatype": "BYTES", "data": data, **changes}


def test_a_request_that_is_none_is_told_so_alone(
    handler: asgi.SharingHandler, exported: RunFolder
) -> None:
    good, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    for bad in (
        {"inputs": [tensor(good, datatype=[])]},
        {"inputs": [tensor(good, datatype={})]},
        {"inputs": [tensor(good)], "id": "\ud800"},
    ):
        refused, answered = ask(handler, bad, good)
        assert refused[0] == 400 and refused[1]["error"]["code"] == "bad_request"
        assert answered[0] == 200 and answered[1]["label"] == label


def test_whatever_fails_while_one_is_read_fails_for_that_one_alone(
    handler: asgi.SharingHandler, exported: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    pixels = handler.predictor.pixels

    def fail(picture: Picture) -> NDArray[np.uint8]:
        if picture == b"other":
            raise MemoryError
        return pixels(picture)

    monkeypatch.setattr(handler.predictor, "pixels", fail)
    failed, answered = ask(handler, b"other", good)
    assert failed == (500, {"error": {"code": "internal", "message": "internal error"}})
    assert answered[0] == 200 and answered[1]["label"] == label


def test_pictures_of_one_request_have_no_more_pixels_than_four_of_the_largest(
    handler: asgi.SharingHandler,
) -> None:
    """Of 25 megapixels here, by their headers; there are no pixels behind these."""
    encoded = {"b64": b64encode(bomb(5_000)).decode()}
    for count, code in ((4, "bad_image"), (5, "bad_request")):
        many = {"inputs": [tensor(*[bomb(5_000)] * count)]}
        for status, answer in ask(handler, {"instances": [encoded] * count}, many):
            assert (status, answer["error"]["code"]) == (400, code)
            too_many = (
                answer["error"]["message"] == "over 100,000,000 pixels in all pictures together"
            )
            assert too_many == (count == 5)
