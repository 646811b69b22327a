"""What the gateway adds: KServe's routes, request ids, keys, and clear answers to everything."""

import contextlib
import http.client
import io
import json
import re
import socket
import subprocess
import sysconfig
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
from conftest import MODEL, classes_of, pictures, predictions
from drawings import bomb
from kinds import scans
from PIL import Image
from service import LONGEST, Service, exchange, get, run_all

from jobs.runs import RunFolder
from serving.archive import open_model

PREDICT = f"/predictions/{MODEL}"


def encoded(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def variants(file: bytes) -> dict[str, bytes]:
    """One picture in every form that must be read; all show the same, without loss."""
    picture = Image.open(io.BytesIO(file)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned by 180°
    frames = {"save_all": True, "append_images": [picture.rotate(90)], "lossless": True}
    return {
        "png": file,
        "webp": encoded(picture, "WEBP", lossless=True),
        "jpeg": encoded(picture, "JPEG", quality=100, subsampling=0),
        "opaque": encoded(picture.convert("RGBA")),
        "rotated": encoded(picture.rotate(180), exif=exif),
        "animated": encoded(picture, "WEBP", **frames),
    }


def others() -> dict[str, bytes]:
    """Forms that must be read, though they show something else."""
    noise = Image.effect_noise((40, 30), 80)
    return {
        "grey": encoded(noise),
        "palette": encoded(noise.convert("RGB").quantize()),
        "cmyk": encoded(noise.convert("CMYK"), "JPEG"),
        "16-bit": encoded(Image.fromarray(np.full((4, 6), 30_000, np.uint16))),
        "clear": encoded(Image.new("RGBA", (5, 5), (1, 2, 3, 0))),
        "one pixel": encoded(Image.new("RGB", (1, 1))),
    }


def refused(file: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"hello",
        "truncated": file[: len(file) // 2],
        "gif": encoded(Image.new("RGB", (4, 4)), "GIF"),
        "bomb": bomb(15_000),  # 225 million pixels
        "scans": scans(5_000),
        "json": b'{"b64": 1}',
    }


def test_every_picture_is_read_or_refused_and_no_neighbour_suffers(
    service: Service, exported: RunFolder
) -> None:
    """All are sent at once, so that TorchServe puts them into the same batches."""
    file, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    bodies = {**variants(file), **others(), **refused(file)}
    bodies |= {f"neighbour {i}": file for i in range(len(bodies))}
    answers: dict[str, tuple[int, dict[str, Any]]] = {}

    def send(name: str, body: bytes) -> None:
        answers[name] = service.predict(body, "application/octet-stream")

    run_all([threading.Thread(target=send, args=item) for item in bodies.items()])
    bad = refused(file)
    assert {n: a for n, a in answers.items() if a[0] != (400 if n in bad else 200)} == {}
    same = [name for name in bodies if name in variants(file) or name.startswith("neighbour")]
    assert {answers[name][1]["label"] for name in same} == {label}
    assert all(answers[name][1]["error"]["message"] for name in bad)


def test_kserves_v1_and_v2_answer_with_the_jobs_predictions(
    service: Service, exported: RunFolder
) -> None:
    files, labels = pictures(exported, 3), predictions(exported, 3)
    texts = [b64encode(file).decode() for file in files]
    json_type = "application/json"

    body = json.dumps({"instances": [{"b64": text} for text in texts]}).encode()
    status, v1 = get(f"{service.address}/v1/models/{MODEL}:predict?top=2", body, json_type)
    assert status == 200 and [p["label"] for p in v1["predictions"]] == labels
    assert len(v1["predictions"][0]["top"]) == 2

    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    tensors = {
        "BYTES": {"shape": [3], "data": texts},
        "UINT8": {"shape": [3, 3, *pixels.shape[1:3]], "data": pixels.transpose(0, 3, 1, 2)},
    }
    tensors["UINT8"]["data"] = tensors["UINT8"]["data"].ravel().tolist()  # type: ignore[attr-defined]
    version = exported.run_id
    for route in (f"/v2/models/{MODEL}/infer", f"/v2/models/{MODEL}/versions/{version}/infer"):
        for datatype, tensor in tensors.items():
            inputs = [{"name": "pictures", "datatype": datatype, **tensor}]
            body = json.dumps({"id": "42", "inputs": inputs}).encode()
            status, v2 = get(service.address + route, body, json_type)
            assert status == 200, v2
            assert (v2["id"], v2["model_name"], v2["model_version"]) == ("42", MODEL, version)
            assert v2["outputs"][0]["data"] == labels
            assert v2["outputs"][1]["shape"] == [3, 10]


def test_kserves_descriptions(service: Service, exported: RunFolder) -> None:
    def answer(path: str) -> dict[str, Any]:
        status, body = get(service.address + path)
        assert status == 200, path
        return body

    assert answer("/v1/models") == {"models": [MODEL]}
    assert answer(f"/v1/models/{MODEL}") == {"name": MODEL, "ready": True}
    assert answer("/v2")["name"] == "inception-transfer"
    assert answer("/v2/health/live") == {"live": True}
    assert answer("/v2/health/ready") == {"ready": True}
    assert answer(f"/v2/models/{MODEL}/ready") == {"name": MODEL, "ready": True}
    described = answer(f"/v2/models/{MODEL}")
    assert described["versions"] == [exported.run_id]
    assert described["inputs"][0]["datatype"] == "BYTES"
    assert described["form"] in described["forms"]
    assert get(f"{service.address}/v2/models/another")[0] == 404


def test_the_card_is_the_archives_description_and_there_are_samples(
    service: Service, exported: RunFolder
) -> None:
    status, card = get(f"{service.address}/v1/models/{MODEL}/card")
    model = open_model(exported.path / "model" / f"{MODEL}.mar")
    assert (status, card) == (200, model.description.model_dump(mode="json"))
    [only] = card["compared"]
    assert only["variant"] == card["variant"] == "frozen" and card["sentences"]
    assert only["accuracy"]["value"] == exported.comparison().done["frozen"].test.accuracy
    assert card["samples"] == 10 < len(model.golden)
    samples = f"{service.address}/v1/models/{MODEL}/samples"
    for number, golden in enumerate(model.golden[: card["samples"]]):
        with urlopen(f"{samples}/{number}") as response:
            assert response.headers["Content-Type"] == "image/png"
            assert response.read() == golden.picture
    for other in ("10", "-1", "0/", "../../card", "%2e%2e/00", ""):
        assert get(f"{samples}/{other}")[0] == 404


def test_a_request_id_comes_back_and_one_is_made_where_none_is_fit(
    service: Service, exported: RunFolder
) -> None:
    file = pictures(exported, 1)[0]
    for path, body in ((PREDICT, file), (PREDICT, b"bad"), ("/nothing", None), ("/readyz", None)):
        kinds = {"Content-Type": "image/png"}
        given = exchange(service.address + path, body, {**kinds, "X-Request-Id": "my-id.1"})[1]
        assert given.get_all("X-Request-Id") == ["my-id.1"], path
        made = exchange(service.address + path, body, {**kinds, "X-Request-Id": "no good"})[1]
        assert len(made["X-Request-Id"]) == 36, path
    lines = service.log.read_text().splitlines()
    logged = [json.loads(line) for line in lines if "http.log.access" in line]
    # A request that ends before it is routed, as other tests send them, has none.
    mine = [line for line in logged if line.get("request_id") == "my-id.1"]
    assert {line["status"] for line in mine} == {200, 400, 404}


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        (PREDICT, {"Content-Type": "text/html"}, 415, "unsupported_media_type"),
        (PREDICT, {"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
        (PREDICT, {"Content-Type": "multipart/form-data; boundary=b"}, 400, "bad_request"),
        (f"{PREDICT}?top=0", {}, 400, "bad_request"),
        (f"{PREDICT}?top=%00", {}, 400, "bad_request"),
        (f"{PREDICT}?top=%0d%0aX:1", {}, 400, "bad_request"),
        (f"{PREDICT}?top=%E0%A4%A", {}, 400, "bad_request"),
        (f"{PREDICT}?x=1&top=1%20", {}, 400, "bad_request"),
        (f"{PREDICT}?%74op=%00", {}, 400, "bad_request"),
        (f"{PREDICT}?%61bstain=%0a", {}, 400, "bad_request"),
        ("/readyz", {}, 405, "method_not_allowed"),
        ("/wfpredict/x", {}, 404, "not_found"),
        ("/predictions", {}, 404, "not_found"),
    ],
)
def test_what_it_refuses_is_clear_json(
    service: Service, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    kinds = {"Content-Type": "application/octet-stream", **headers}
    got, received, answer = exchange(service.address + path, b"x", kinds)
    assert (got, answer["error"]["code"]) == (status, code) and answer["error"]["message"]
    assert received["Content-Type"] == "application/json"
    assert ("Allow" in received) == (status == 405)


def whole_answer(link: socket.socket, *parts: bytes, seconds: float = 30) -> bytes:
    """All that comes back when everything has been sent, until the connection ends."""
    link.settimeout(seconds)
    received = b""
    with contextlib.suppress(ConnectionError):
        for part in parts:
            link.sendall(part)
    with contextlib.suppress(ConnectionError):
        while part := link.recv(1 << 16):
            received += part
    return received


def connect(service: Service) -> socket.socket:
    parts = urlsplit(service.address)
    return socket.create_connection((parts.hostname, parts.port))


@pytest.fixture
def link(service: Service) -> Iterator[socket.socket]:
    with connect(service) as link:
        yield link


@pytest.mark.parametrize("megabytes", [11, 30, 99])
def test_who_sends_too_much_before_listening_is_told_so(service: Service, megabytes: int) -> None:
    parts = urlsplit(service.address)
    with closing(http.client.HTTPConnection(parts.netloc)) as client:
        client.request("POST", PREDICT, bytes(megabytes * 10**6), {"Content-Type": "image/png"})
        response = client.getresponse()
        assert response.status == 413
        assert json.load(response)["error"]["code"] == "too_large"


def test_who_asks_whether_to_send_too_much_is_told_at_once(link: socket.socket) -> None:
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    head += "Content-Length: 50000000\r\nExpect: 100-continue\r\n\r\n"
    answer = whole_answer(link, head.encode())
    assert answer.startswith(b"HTTP/1.1 413 ") and b"too_large" in answer


@pytest.mark.parametrize(
    ("key", "status", "code"), [("third-key", 413, "too_large"), ("no-key", 401, "unauthorized")]
)
def test_who_asks_with_a_key_is_told_at_once_too(
    locked: Service, key: str, status: int, code: str
) -> None:
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    head += f"Authorization: Bearer {key}\r\nContent-Length: 50000000\r\n"
    with connect(locked) as link:
        answer = whole_answer(link, head.encode() + b"Expect: 100-continue\r\n\r\n")
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and code.encode() in answer


@pytest.mark.parametrize("length", ["Content-Length: 200000000", "Transfer-Encoding: chunked"])
def test_what_is_not_read_of_a_body_is_no_request(link: socket.socket, length: str) -> None:
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n{length}\r\n\r\n"
    size = 101_000_000 if "Content" in length else 10_000_001
    chunk = b"" if "Content" in length else b"bebc200\r\n"  # 200 million in hexadecimal digits
    hidden = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = whole_answer(link, head.encode(), chunk, b"\n" * size, hidden * 30_000)
    assert answer.startswith(b"HTTP/1.1 413 ") and answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("length", ["Content-Length: {size}", "Transfer-Encoding: chunked"])
def test_a_body_where_none_is_wanted_is_no_request_of_another_client(
    service: Service, length: str
) -> None:
    """What answers these paths keeps its connections with the gateway, for all clients."""
    hidden = b"GET /nothing HTTP/1.1\r\nX: "
    head = f"GET /livez HTTP/1.1\r\nHost: x\r\n{length.format(size=len(hidden))}\r\n\r\n"
    body = hidden if "{size}" in length else b"%x\r\n%b\r\n0\r\n\r\n" % (len(hidden), hidden)
    for _ in range(20):
        with connect(service) as link:
            link.settimeout(30)
            link.sendall(head.encode() + body)
            assert link.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        status, answer = get(f"{service.address}/readyz")
        assert (status, answer) == (200, {"ready": True})


UPGRADE = "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\nUpgrade: "


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_who_would_rather_speak_another_protocol_gets_an_answer_in_this_one(
    service: Service, exported: RunFolder, protocol: str
) -> None:
    """… and a body behind such a wish is no request of another client."""
    file, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    hidden = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nbad".encode()
    for body, status in ((file, 200), *[(hidden, 400)] * 20):
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        head += f"{UPGRADE}{protocol}\r\nContent-Length: {len(body)}\r\n\r\n"
        with connect(service) as link:
            link.settimeout(LONGEST)
            link.sendall(head.encode() + body)
            assert link.recv(1 << 16).startswith(f"HTTP/1.1 {status} ".encode())
        beside, answer = service.predict(file)
        assert (beside, answer.get("label")) == (200, label)


@pytest.mark.parametrize("service", ["asgi"], indirect=True)  # whose metrics are at the same port
def test_nobody_is_predicted_for_by_way_of_the_metrics(service: Service) -> None:
    """Where no key is asked for."""
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{service.metrics}/metrics", b"x")

    def refused() -> int:
        with urlopen(f"{service.metrics}/metrics") as response:
            return int(re.findall(r"^Requests4XX (\d+)", response.read().decode(), re.M)[0])

    before = refused()
    hidden = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nbad".encode()
    head = f"GET /metrics HTTP/1.1\r\nHost: x\r\n{UPGRADE}h2c\r\n"
    head += f"Content-Length: {len(hidden)}\r\n\r\n"
    for _ in range(20):
        with connect(replace(service, address=service.metrics)) as link:
            link.settimeout(LONGEST)
            link.sendall(head.encode() + hidden)
            assert link.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    assert service.predict(b"bad")[0] == 400
    assert refused() == before + 1


def test_nobody_is_answered_in_http_2(link: socket.socket) -> None:
    """Which would be another way past the limits of the first one."""
    settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    answer = whole_answer(link, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
    assert answer[:5] in (b"", b"HTTP/"), "frames begin with their length"


@pytest.mark.parametrize("method", ["GET", "DELETE", "PATCH"])
def test_another_method_is_told_so_however_large_its_body_is(
    link: socket.socket, method: str
) -> None:
    head = f"{method} {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 11000000\r\n"
    answer = whole_answer(link, head.encode() + b"Connection: close\r\n\r\n", bytes(11_000_000))
    assert answer.startswith(b"HTTP/1.1 405 ") and b"method_not_allowed" in answer


@pytest.mark.parametrize(
    "chunks", [b"zz\r\nabc", b"3\r\nabcXX", b"5\r\nab", b"3;" + b"a" * 5000, b"3\r\rabc"]
)
def test_chunks_that_are_none_are_the_clients_fault(link: socket.socket, chunks: bytes) -> None:
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n"
    link.sendall(head.encode() + chunks + b"\r\n0\r\n\r\n")
    answer = whole_answer(link)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"bad_request" in answer
    assert b"Connection: close" in answer and answer.count(b"HTTP/1.1 ") == 1


def test_a_body_that_ends_too_early_is_not_the_services_fault(link: socket.socket) -> None:
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nab"
    link.sendall(head.encode())
    link.shutdown(socket.SHUT_WR)
    status = whole_answer(link)[:13]
    assert status in (b"HTTP/1.1 400 ", b"HTTP/1.1 499 ")  # Caddy decides by chance, as below


def test_the_time_that_a_client_sends_in_is_no_time_in_the_queue(
    service: Service, exported: RunFolder
) -> None:
    file, pause = pictures(exported, 1)[0], 2.0

    def waited() -> float:
        with urlopen(f"{service.metrics}/metrics") as response:
            found = re.findall(
                r"^inception_queue_seconds_sum\S* (\S+)", response.read().decode(), re.M
            )
        return sum(map(float, found))

    def of_one() -> float:
        before = waited()
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(file)}\r\n"
        with connect(service) as slow:
            slow.sendall(head.encode() + b"Connection: close\r\n\r\n" + file[:9])
            time.sleep(pause)
            assert whole_answer(slow, file[9:]).startswith(b"HTTP/1.1 200 ")
        return waited() - before

    assert any(of_one() < pause for _ in range(5)), "each of five, on a machine that is busy, too"


@pytest.mark.slow
def test_a_body_that_stops_half_way_is_given_up_and_so_is_its_connection(service: Service) -> None:
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n".encode()
    starts = (b"Content-Length: 1000\r\n\r\nab", b"Transfer-Encoding: chunked\r\n\r\n8\r\nab")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connect(service)) for _ in starts]
        for link, start in zip(links, starts, strict=True):
            link.sendall(head + start)
        answers = [whole_answer(link, seconds=600) for link in links]
    assert time.monotonic() - began > 59
    for answer in answers:  # Caddy decides by chance whether it was an error or the client has left
        told = answer.startswith(b"HTTP/1.1 408 ") and b'"timeout"' in answer
        assert told or answer.startswith(b"HTTP/1.1 499 ")


def test_a_head_is_answered_in_json_up_to_a_size_and_in_plain_text_beyond(
    service: Service, exported: RunFolder, link: socket.socket
) -> None:
    for path, body in ((PREDICT, b"x"), ("/livez", None), ("/nothing", None)):
        status, _, answer = exchange(service.address + path, body, {"X-Large": "a" * 30_000})
        assert status and (status == 200 or answer["error"]["code"])
    file = pictures(exported, 1)[0]
    for query, large in (("", {"Cookie": "a" * 20_000}), (f"?junk={'a' * 20_000}&top=2", {})):
        status, _, answer = exchange(f"{service.address}{PREDICT}{query}", file, large)
        assert (status, len(answer["top"])) == (200, 2 if query else 5)
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Large: " + b"a" * 2_000_000 + b"\r\n\r\n"
    assert whole_answer(link, head).startswith(b"HTTP/1.1 431 ")
    assert get(f"{service.address}/livez")[0] == 200


@pytest.mark.slow
def test_the_openapi_document_names_the_model_and_holds_under_fuzzing(
    service: Service, exported: RunFolder, tmp_path: Path
) -> None:
    status, document = get(f"{service.address}/openapi.json")
    assert status == 200 and f"/predictions/{MODEL}" in document["paths"]
    assert document["components"]["schemas"]["Label"]["enum"] == classes_of(exported)
    command: list[str | Path] = [
        Path(sysconfig.get_path("scripts")) / "schemathesis",
        *("run", f"{service.address}/openapi.json", "--max-examples", "20", "--seed", "1"),
        *("--checks", "not_a_server_error,status_code_conformance,response_schema_conformance"),
        *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-color"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def with_key(service: Service, file: bytes, authorization: str | None) -> int:
    headers = {"Content-Type": "image/png"}
    if authorization is not None:
        headers["Authorization"] = authorization
    status, received, answer = exchange(service.address + PREDICT, file, headers)
    if status == 401:
        assert received["WWW-Authenticate"] == "Bearer"
        assert answer["error"]["code"] == "unauthorized"
    return status


def test_predictions_card_and_samples_want_one_of_the_keys_and_nothing_else_does(
    locked: Service, keys: Path, exported: RunFolder
) -> None:
    file = pictures(exported, 1)[0]
    keys.write_text("first-key\nsecond-key\n")
    for key in ("first-key", "second-key", "third-key"):
        assert with_key(locked, file, f"Bearer {key}") == 200
    for wrong in (None, "Bearer", "Bearer ", "Bearer first", "Basic first-key", "Bearer ä"):
        assert with_key(locked, file, wrong) == 401, wrong
    for path in ("/readyz", "/livez", "/v2", "/openapi.json"):
        assert get(locked.address + path)[0] == 200
    for path in (
        f"/v1/models/{MODEL}:predict",
        f"/v2/models/{MODEL}/infer",
        f"/explanations/{MODEL}",
    ):
        assert get(locked.address + path, b"{}", "application/json")[0] == 401
    for path in (f"/v1/models/{MODEL}/card", f"/v1/models/{MODEL}/samples/0"):
        assert get(locked.address + path)[0] == 401
    log = locked.log.read_text()
    assert "first-key" not in log and "Traceback" not in log


def test_a_key_that_asks_too_often_is_told_when_to_come_back(
    locked: Service, exported: RunFolder
) -> None:
    file = pictures(exported, 1)[0]
    headers = {"Content-Type": "image/png", "Authorization": "Bearer often-key"}
    answered, status = -1, 200
    while status == 200:
        status, received, answer = exchange(locked.address + PREDICT, file, headers)
        answered += 1
    assert status == 429 and answered >= 20, "one more is allowed every 3 s"
    assert answer["error"]["code"] == "rate_limited" and 1 <= int(received["Retry-After"]) <= 3
    assert with_key(locked, file, "Bearer third-key") == 200, "the other keys have their own"
    card = f"{locked.address}/v1/models/{MODEL}/card"
    assert [exchange(card, None, headers)[0] for _ in range(25)] == [200] * 25, "none is limited"


def test_keys_change_without_a_restart(locked: Service, keys: Path, exported: RunFolder) -> None:
    file = pictures(exported, 1)[0]
    for key, other in (("old-key", "new-key"), ("new-key", "old-key")):
        time.sleep(0.01)  # a file's time has to differ
        keys.write_text(f"{key}\n")
        assert with_key(locked, file, f"Bearer {key}") == 200
        assert with_key(locked, file, f"Bearer {other}") == 401
