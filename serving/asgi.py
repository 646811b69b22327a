"""An engine in one process: Starlette on uvicorn, and threads that share the network.

    python -m serving.asgi ARCHIVE PORT SETTINGS [SHADOW]

listens on loopback. Its threads run the same `Handler` as TorchServe's workers do, but this
package's own and not the archive's: on a CPU, an archive is only data here, and none of its code
is run.
"""

import asyncio
import faulthandler
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving import processes, torchserve
from serving.drift import Drift
from serving.engines import Shadow
from serving.handler import Handler
from serving.messages import Found
from serving.metrics import Meter
from serving.predictor import Predictor
from serving.settings import Settings
from serving.shadow import Mirror, Sent

KEEP_SECONDS = 180
"""How long a connection may be idle: longer than the gateway keeps one, or else it would sometimes
send a request on one that is just being closed, and the client would get 503."""
ANSWERED = ("Requests2XX", "Requests4XX", "Requests5XX")  # TorchServe's names
KINDS = {"histogram": Histogram, "counter": Counter, "gauge": Gauge}
UPDATES = {"histogram": "observe", "counter": "inc", "gauge": "set"}
logger = logging.getLogger(__name__)


@dataclass
class Waiting:
    """A request that has no answer yet."""

    body: bytes
    headers: Mapping[str, str]
    answer: "Future[Response]" = field(default_factory=Future)


class Context:
    """The part of TorchServe's context for a batch that the handler uses."""

    def __init__(self, batch: list[Waiting]) -> None:
        self.batch = batch
        self.statuses = [200] * len(batch)
        self.headers: list[dict[str, str]] = [{} for _ in batch]

    def get_request_header(self, index: int, name: str) -> str | None:
        return self.batch[index].headers.get(name)

    def set_response_status(self, code: int, _: str, index: int) -> None:
        self.statuses[index] = code

    def set_response_header(self, index: int, name: str, value: str) -> None:
        self.headers[index][name] = value


class OwnMeter(Meter):
    """The handler's metrics in a registry of this process, as metrics.yaml declares them."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        super().__init__(None, model)
        declared = yaml.safe_load(torchserve.METRICS.read_text())["model_metrics"]
        self.metrics = {
            one["name"]: KINDS[kind](one["name"], one["unit"], one["dimensions"], registry=registry)
            for kind, group in declared.items()
            for one in group
            if one["name"].startswith("inception_")
        }

    def _update(self, name: str, kind: str, value: float, dimensions: list[str]) -> None:
        metric = self.metrics[f"inception_{name}"].labels(*dimensions)
        getattr(metric, UPDATES[kind])(value)


class SharingHandler(Handler):
    """The handler of one thread, with the network, metrics and drift that all threads share."""

    def __init__(
        self, predictor: Predictor, meter: Meter, drift: Drift | None, lock: threading.Lock
    ) -> None:
        self.predictor, self.own_meter, self.drift, self.lock = predictor, meter, drift, lock

    def _watch(self, found: Found, meter: Meter) -> None:
        with self.lock:
            super()._watch(found, meter)

    def meter(self, context: Any) -> Meter:
        return self.own_meter


class Engine:
    """A queue of requests, and the threads that answer them in batches."""

    def __init__(self, archive: Path, settings: Settings, shadow: Shadow | None = None) -> None:
        self.settings, self.registry = settings, CollectorRegistry()
        self.mirror = Mirror(shadow, settings.shadow_share, self.registry) if shadow else None
        self.queue: queue.Queue[Waiting] = queue.Queue(settings.queue_size)
        self.answered = {name: Gauge(name, name, registry=self.registry) for name in ANSWERED}
        devices: list[int | None] = [*range(processes.gpus())] or [None]
        predictors = [Predictor.open(archive, gpu=gpu) for gpu in devices]
        meter = OwnMeter(self.registry, predictors[0].description.name)
        trust = predictors[0].trust
        drift = None if trust is None else Drift(trust.strangeness)
        shared = (meter, drift, threading.Lock())
        for index in range(settings.workers):
            handler = SharingHandler(predictors[index % len(predictors)], *shared)
            threading.Thread(target=self._work, args=[handler], daemon=True).start()

    async def predict(self, request: Request) -> Response:
        """The handler's answer; 503 where too many requests wait."""
        try:
            waiting = Waiting(await request.body(), request.headers)
            start = time.perf_counter()
            self.queue.put_nowait(waiting)
            response = await answer_to(request, waiting)
        except ClientDisconnect:  # nobody will read this
            return Response(status_code=400)
        except queue.Full:
            response = Response(status_code=503)
        if self.mirror and response.status_code == 200:
            seconds = time.perf_counter() - start
            answer = bytes(response.body)
            self.mirror.offer(Sent(waiting.body, waiting.headers, answer, seconds))
        self.answered[f"Requests{response.status_code // 100}XX"].inc()
        return response

    async def metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4")

    def _work(self, handler: Handler) -> None:
        while True:
            batch = self._batch()
            late = threading.Timer(self.settings.response_seconds, give_up)
            late.daemon = True
            late.start()
            for one, response in zip(batch, respond(handler, batch), strict=True):
                one.answer.set_result(response)
            late.cancel()

    def _batch(self) -> list[Waiting]:
        """Waits for a request, and then a little for others."""
        batch = [self._next()]
        end = time.monotonic() + self.settings.batch_delay_ms / 1000
        while len(batch) < self.settings.batch_size:
            try:
                batch.append(self._next(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                break
        return batch

    def _next(self, timeout: float | None = None) -> Waiting:
        """Passes over those whose clients have left: under overload most work would be for them."""
        while not (one := self.queue.get(timeout=timeout)).answer.set_running_or_notify_cancel():
            pass
        return one


async def answer_to(request: Request, waiting: Waiting) -> Response:
    """What a thread answers to a request that was put into the queue.

    Raises:
        ClientDisconnect: the client left first; if its request still waits, it is passed over.
    """
    answer = asyncio.wrap_future(waiting.answer)
    left = asyncio.ensure_future(disconnected(request))
    either: list[asyncio.Future[Any]] = [answer, left]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    if not answer.done():
        answer.cancel()
        raise ClientDisconnect
    return answer.result()


async def disconnected(request: Request) -> None:
    """Waits until the client of a request that was read has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def respond(handler: Handler, batch: list[Waiting]) -> list[Response]:
    context = Context(batch)
    try:
        answers = handler.handle([{"body": one.body} for one in batch], context)
        whole = zip(answers, context.statuses, context.headers, strict=True)
        return [_response(*parts) for parts in whole]
    except Exception:  # the thread has to live
        logger.exception("a batch has no answers")
        return [Response(status_code=500) for _ in batch]


def _response(answer: Any, status: int, headers: Mapping[str, str]) -> Response:
    kind = Response if isinstance(answer, bytes) else JSONResponse
    try:
        return kind(answer, status, headers)
    except ValueError:  # it is no JSON, such as NaN
        logger.exception("an answer cannot be sent")
        return Response(status_code=500)


def give_up() -> None:
    """Ends the process: a thread that hangs cannot be ended alone."""
    logger.error("a batch takes too long")
    faulthandler.dump_traceback()
    os._exit(1)


def application(engine: Engine) -> Starlette:
    predict = Route("/{path:path}", engine.predict, methods=["POST", "PUT"])
    return Starlette(routes=[Route("/metrics", engine.metrics), predict])


def server(engine: Engine, port: int) -> uvicorn.Server:
    config = uvicorn.Config(
        application(engine), "127.0.0.1", port, log_config=None, timeout_keep_alive=KEEP_SECONDS
    )
    return uvicorn.Server(config)


class JsonFormatter(logging.Formatter):
    """One line of JSON, as the gateway and the supervisor write them."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {"time": record.created, "logger": record.name, "level": record.levelname}
        return json.dumps({**facts, "event": super().format(record)})


def main(archive: str, port: str, settings: str, shadow: str | None = None) -> None:
    log = logging.StreamHandler()
    log.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[log])
    compared = Shadow.model_validate_json(shadow) if shadow else None
    engine = Engine(Path(archive), Settings.model_validate_json(settings), compared)
    server(engine, int(port)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
