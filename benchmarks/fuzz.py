"""Claim: no request makes the service fail or hang, however broken, huge or slow it is.

    python -m benchmarks.fuzz                          (some 10 minutes; makes an archive first)
    python -m benchmarks.fuzz --archive runs/RUN_ID/model/NAME.mar --engine asgi --n 1000

1. `--n` requests, one after the other: JPEG, PNG, WebP, JSON and multipart bodies with random
   bytes changed, taken out, put in or doubled, or with their end cut off; one in six has its head
   changed instead. Each gets an answer below 500, or the end of the connection, within 10 s.
2. `--idle` connections that say nothing, send half a head, or half a body, at once. A client beside
   them gets its answers, and those without a whole head are ended after 10 s, as is one whose head
   comes a byte at a time; the others after 60 s.
3. What is small as a file, and huge in memory: how long until it is refused, and by how much the
   peak of the memory of the service's processes grew.

The process ends with 1 where an answer was none of these, or a bomb took `--milliseconds`, or 200
MB.
"""

import argparse
import base64
import http.client
import io
import json
import random
import socket
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import psutil
from PIL import Image

from benchmarks import contenders, record
from benchmarks.archive import make_archive
from benchmarks.serving import photographs

MB = 1e6
LONGEST = 10.0  # seconds that an answer may take
HEAD_SECONDS, BODY_SECONDS = 10, 60  # after which the gateway gives up: see the Caddyfile
MULTIPART = "multipart/form-data; boundary=x"
TIMES = 5  # that each bomb is sent
TENSOR = "JSON, 2.4 million numbers"  # as many as a tensor may have: no bomb, but what costs most


@dataclass
class Found:
    """What was answered, and what should not have been."""

    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str, status: int, *, fine: bool, detail: object = "") -> None:
        self.statuses[f"{what}: {status or 'closed'}"] += 1
        self.check(f"{what}: {status}", fine=fine, detail=detail)

    def check(self, what: str, *, fine: bool, detail: object = "") -> None:
        if not fine:
            self.wrong.append(f"{what} {detail}"[:300])


def bodies(files: list[bytes]) -> list[tuple[str, str, bytes]]:
    """Good ones, each with its name and its type."""
    made = [("jpeg", "image/jpeg", file) for file in files[:10]]
    for file in files[:10]:
        picture = Image.open(io.BytesIO(file)).convert("RGB").resize((64, 48))
        for name in ("png", "webp"):
            picture.save(encoded := io.BytesIO(), name)
            made.append((name, f"image/{name}", encoded.getvalue()))
        text = base64.b64encode(encoded.getvalue()).decode()
        v2 = {"name": "x", "datatype": "BYTES", "shape": [1], "data": [text]}
        for value in (
            {"b64": text},
            {"instances": [{"b64": text}], "parameters": {"top": 1}},
            {"id": "1", "inputs": [v2]},
        ):
            made.append(("json", "application/json", json.dumps(value).encode()))
        made.append(("multipart", MULTIPART, form(encoded.getvalue())))
    return made


def form(*parts: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="data"; filename="a.jpg"\r\n\r\n'
    return b"".join(head + part + b"\r\n" for part in parts) + b"--x--\r\n"


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The same with a few bytes changed, put in, taken out, or doubled, or without its end."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        reach = min(len(changed), 400) if rng.random() < 0.5 else len(changed)
        place = rng.randrange(reach + 1)
        new = rng.choice(
            (rng.randbytes(rng.randrange(3)), b"\xff\xff", b"\0\0\0\0", changed[place : place + 20])
        )
        changed[place : place + rng.randrange(4)] = new
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed) + 1) :]
    return bytes(changed)


def paths(server: contenders.Server) -> list[str]:
    name = urlsplit(server.contender.url).path.rpartition("/")[2]
    return [
        f"/predictions/{name}",
        f"/v1/models/{name}:predict",
        f"/v2/models/{name}/infer",
        f"/explanations/{name}",
    ]


def send(url: SplitResult, path: str, kind: str, body: bytes) -> tuple[int, bytes]:
    """Status and answer; status 0 and the reason where there is none in time."""
    with closing(http.client.HTTPConnection(str(url.hostname), url.port)) as link:
        try:
            link.request("POST", path, body, {"Content-Type": kind})
            response = link.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error).encode()


def connect(url: SplitResult) -> socket.socket:
    return socket.create_connection((url.hostname, url.port))


def send_raw(url: SplitResult, content: bytes) -> tuple[int, bytes]:
    """The same for bytes that may be no HTTP, after which nothing more comes; status 0 and nothing
    where the service only ends the connection.

    Raises:
        TimeoutError: it does neither.
    """
    with connect(url) as link:
        answer = b""
        with suppress(ConnectionError):
            link.sendall(content)
        with suppress(OSError):  # it has ended the connection already
            link.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while part := link.recv(65536):
                answer += part
    words = answer.split(b" ", 2)
    return (int(words[1]) if len(words) > 2 else 0), answer


def fuzz(server: contenders.Server, count: int, found: Found) -> None:
    rng, url = random.Random(0), urlsplit(server.contender.url)
    good, routes = bodies(photographs()), paths(server)
    for number in range(count):
        name, kind, body = rng.choice(good)
        path = rng.choice(routes)
        if number % 6:
            status, answer = send(url, path, kind, mutated(body, rng))
            fine = status == 200 or (400 <= status < 500 and b'"message"' in answer)
            found.note(name, status, fine=fine, detail=f"{path} {answer[:200]!r}")
            continue
        lines = [f"POST {path}?top=2 HTTP/1.1", "Host: x", "Transfer-Encoding: identity"]
        lines += [f"Content-Type: {kind}", "X-Request-Id: 1", "Connection: close", "Accept: */*"]
        lines[2] = rng.choice((f"Content-Length: {len(body)}", "Transfer-Encoding: chunked"))
        head = mutated("\r\n".join(lines).encode(), rng) + b"\r\n\r\n"
        try:
            status, answer = send_raw(url, head + body)
        except TimeoutError:
            status, answer = -1, b"neither an answer nor an end"
        # 501 and 505 are Go's, to methods of transfer and versions of HTTP that do not exist.
        fine = status in (0, 501, 505) or 100 <= status < 500
        found.note("head", status, fine=fine, detail=f"{head!r} {answer[:200]!r}")


def seconds_of(server: contenders.Server, picture: bytes, count: int, found: Found) -> list[float]:
    times, url = [], urlsplit(server.contender.url)
    for _ in range(count):
        start = time.monotonic()
        status, answer = send(url, url.path, "image/jpeg", picture)
        times.append(time.monotonic() - start)
        found.note("a client beside", status, fine=status == 200, detail=answer)
    return times


def stay(server: contenders.Server, count: int, found: Found) -> dict[str, float]:
    """Many connections that do not go on, and one client that does."""
    url, picture = urlsplit(server.contender.url), photographs()[0]
    [gateway] = [process for process in server.tree() if process.name() == "caddy"]
    before, used = statistics.median(seconds_of(server, picture, 20, found)), resident(gateway)
    head = f"POST {url.path} HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n".encode()
    starts = (b"", head, head + b"Content-Length: 1000\r\n\r\n" + b"x" * 500)
    with ExitStack() as stack:
        links = [stack.enter_context(connect(url)) for _ in range(count)]
        opened = time.monotonic()
        for number, link in enumerate(links):
            link.sendall(starts[number % 3])
        beside = statistics.median(seconds_of(server, picture, 20, found))
        grown = resident(gateway) - used
        without_head = [link for number, link in enumerate(links) if number % 3 < 2]
        ended = max(seconds_open(link, opened, HEAD_SECONDS) for link in without_head)
        half = max(seconds_open(link, opened, BODY_SECONDS) for link in links)
    slow = trickle(url, head + b"X: " + b"x" * 1000)
    for what, seconds, limit in (
        ("no head", ended, HEAD_SECONDS),
        ("half a body", half, BODY_SECONDS),
        ("slow head", slow, HEAD_SECONDS),
    ):
        found.check(f"{what} is not cut off", fine=seconds < limit + 5, detail=seconds)
    return {
        "connections": count,
        "alone_ms": before * 1000,
        "beside_ms": beside * 1000,
        "gateway_kb_each": grown * 1000 / count,
        "no_head_cut_off_after_s": ended,
        "half_body_cut_off_after_s": half,
        "slow_head_cut_off_after_s": slow,
    }


def resident(process: psutil.Process) -> float:
    return float(process.memory_info().rss / MB)


def seconds_open(link: socket.socket, opened: float, limit: float) -> float:
    """… until the service ends it, or it has had its time."""
    link.settimeout(max(0.1, opened + limit + LONGEST - time.monotonic()))
    with suppress(OSError):
        while link.recv(65536):
            pass
    return time.monotonic() - opened


def is_closed(link: socket.socket) -> bool:
    link.settimeout(0.001)
    try:
        return not link.recv(65536)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def trickle(url: SplitResult, head: bytes) -> float:
    """Seconds until the service ends a connection on which a byte comes every 0.2 s."""
    with connect(url) as link:
        start = time.monotonic()
        for byte in head:
            with suppress(ConnectionError):
                link.sendall(bytes([byte]))
            time.sleep(0.2)
            if is_closed(link):
                break
        return time.monotonic() - start


def chunk(name: bytes, content: bytes) -> bytes:
    checked = name + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def drawn(size: tuple[int, int], kind: str, mode: str = "L") -> bytes:
    Image.new(mode, size).save(encoded := io.BytesIO(), kind)
    return encoded.getvalue()


def scans(size: tuple[int, int], count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    Image.new("L", size).save(encoded := io.BytesIO(), "JPEG", progressive=True)
    file = encoded.getvalue()
    last = file.rindex(b"\xff\xda")
    return file[:last] + count * file[last:-2] + file[-2:]


def bombs() -> dict[str, tuple[str, bytes]]:
    """Each with its type; all of them are to be refused (the service counts before it reads)."""
    zeros = zlib.compress(bytes(200_000_000), 9)
    huge = drawn((16_000, 16_000), "PNG", "1")
    text = b"a\0\0" + zeros  # a name, and how it is compressed
    lines = zlib.compress(bytes(1 + 3 * 100) * 20)
    one = {"b64": base64.b64encode(drawn((5_000, 5_000), "PNG", "1")).decode()}
    tensor = {"name": "x", "shape": [1, 3, 1, 1], "datatype": "UINT8"}
    return {
        "PNG, promises 400 megapixels": ("image/png", png(20_000, 20_000, chunk(b"IDAT", zeros))),
        "PNG, has 256 megapixels": ("image/png", huge),
        "WebP, 64 megapixels": ("image/webp", drawn((8_000, 8_000), "WEBP")),
        "JPEG, 100 megapixels": ("image/jpeg", drawn((10_000, 10_000), "JPEG")),
        "JPEG, 5,000 scans of 25 megapixels": ("image/jpeg", scans((5_000, 5_000), 5_000)),
        "PNG, 200 MB of text": (
            "image/png",
            png(100, 20, chunk(b"zTXt", text), chunk(b"IDAT", lines)),
        ),
        "JSON, nested a million deep": (
            "application/json",
            b'{"instances": ' + b"[" * 1_000_000,
        ),
        "JSON, a number of five million digits": (
            "application/json",
            b'{"instances": ' + b"9" * 5_000_000 + b"}",
        ),
        "JSON, two million empty values": (
            "application/json",
            b'{"instances": [' + b"{}," * 2_000_000 + b"{}]}",
        ),
        "JSON, a million keys": (
            "application/json",
            b"{" + b",".join(b'"%d":0' % i for i in range(900_000)) + b"}",
        ),
        TENSOR: (
            "application/json",
            b'{"instances": [' + b"1e9," * 2_400_000 + b"1]}",
        ),
        "JSON, a picture of 256 megapixels": (
            "application/json",
            json.dumps({"b64": base64.b64encode(huge).decode()}).encode(),
        ),
        "JSON, 64 pictures of 25 megapixels": (
            "application/json",
            json.dumps({"instances": [one] * 64}).encode(),
        ),
        "JSON, a long text among 1,000 numbers": (
            "application/json",
            json.dumps({"inputs": [{**tensor, "data": [0] * 1000 + ["a" * 5_000_000]}]}).encode(),
        ),
        "multipart, 80,000 parts": (MULTIPART, form(*[b"x"] * 80_000)),
    }


def peak(processes: list[psutil.Process], *, reset: bool = False) -> dict[int, float]:
    """The most memory that each has used since the last reset, in MB, by its number."""
    found = {}
    for process in processes:
        with suppress(OSError):
            folder = Path("/proc") / str(process.pid)
            if reset:
                (folder / "clear_refs").write_text("5")
            lines = (folder / "status").read_text().splitlines()
            [line] = [line for line in lines if line.startswith("VmHWM:")]
            found[process.pid] = int(line.split()[1]) * 1024 / MB
    return found


def throw(
    server: contenders.Server, most_ms: float, found: Found
) -> list[tuple[str, int, float, float]]:
    """Name, size in KB, milliseconds (median) and MB of growth of each bomb."""
    url, rows = urlsplit(server.contender.url), []
    for name, (kind, body) in bombs().items():
        times, before = [], peak(server.tree(), reset=True)
        for _ in range(TIMES):
            start = time.monotonic()
            status, answer = send(url, url.path, kind, body)
            times.append((time.monotonic() - start) * 1000)
            fine = 400 <= status < 500
            found.note(name, status, fine=fine, detail=answer[:200])
        after = peak(server.tree())
        grown = sum(max(0.0, after[pid] - used) for pid, used in before.items() if pid in after)
        took = statistics.median(times)
        fine = name == TENSOR or (took < most_ms and grown < 200)
        found.check(f"{name}: too much", fine=fine, detail=(took, grown))
        rows.append((name, len(body) // 1000, took, grown))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--milliseconds", type=float, default=200, help="For each bomb.")
    parser.add_argument("--longest", type=float, default=LONGEST, help="Seconds, for any answer.")
    parser.add_argument("--engine", choices=("torchserve", "asgi"), default="torchserve")
    parser.add_argument("--archive", type=Path)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    socket.setdefaulttimeout(options.longest)
    found = Found()
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        archive = (options.archive or make_archive(Path(work))).resolve()
        make = contenders.asgi if options.engine == "asgi" else contenders.service
        (folder := Path(work) / "state").mkdir()
        server = contenders.Server(make(archive, folder), Path(work) / "log", photographs()[0])
        stack.callback(server.kill)
        before = [process.pid for process in server.tree()]
        thrown = throw(server, options.milliseconds, found)
        fuzz(server, options.n, found)
        idle = stay(server, options.idle, found) if options.idle else {}
        after = [process.pid for process in server.tree()]
        found.check("a process ended", fine=before == after, detail=(before, after))
    record.show(("bomb", "KB", "ms", "MB"), thrown)
    record.show(("answers", "n"), sorted(found.statuses.items()))
    print("\n".join(found.wrong[:50]) or "nothing was wrong")
    figures = {
        "engine": options.engine,
        "answers": dict(sorted(found.statuses.items())),
        "wrong": found.wrong,
        "idle": idle,
        "bombs": {name: {"kb": kb, "ms": ms, "mb": mb} for name, kb, ms, mb in thrown},
    }
    record.save(f"fuzz-{options.engine}", options.out, options.n, figures)
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()
