"""TorchServe's entry point: one batch of requests in, one answer for each out.

Everything it needs is beside it in the archive, this package's modules included.
"""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving import messages
from serving.drift import Drift
from serving.images import MAX_PIXELS, ImageError, pixels_of
from serving.messages import Explain, Found, Picture, Request, RequestError
from serving.metrics import PROBE, Meter, seconds_since
from serving.predictor import Predictor

PNG = "image/png"
MAX_PIXELS_IN_ALL = 4 * MAX_PIXELS  # of one request
FORM_HEADER = "X-Form"  # of an answer: which form of the network gave it
logger = logging.getLogger(__name__)


class Handler:
    """Decodes each request by itself and runs the pictures of all of them as one batch, so that
    a bad picture affects no answer but its own."""

    def initialize(self, context: Any) -> None:
        """Loads the network; `context` is TorchServe's, for this worker, of which there is one for
        each core."""
        properties = context.system_properties
        folder, gpu = Path(properties["model_dir"]), properties.get("gpu_id")
        self.predictor = Predictor.open(folder, gpu=gpu, threads=1)
        trust = self.predictor.trust
        self.drift = None if trust is None else Drift(trust.strangeness)

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[Any]:
        """An answer for every row, JSON or a PNG file; a refusal has its status, 400 or 500, set in
        the context."""
        meter = self.meter(context)
        try:
            return self._handle(rows, context, meter)
        except Exception as error:
            logger.exception("a batch failed")  # TorchServe would call it 503, as if it were busy
            return [_refusal(error, index, context, meter) for index in range(len(rows))]

    def meter(self, context: Any) -> Meter:
        return Meter(context.metrics, self.predictor.description.name)

    def _handle(self, rows: list[dict[str, Any]], context: Any, meter: Meter) -> list[Any]:
        read = []
        for index, row in enumerate(rows):
            waited = seconds_since(context.get_request_header(index, "X-Request-Start"))
            if waited is not None:
                meter.observe("queue_seconds", waited)
            header = partial(context.get_request_header, index)
            read.append(self._read(row, header, meter))
        arrays = [array for item in read if not isinstance(item, Exception) for array in item[1]]
        found = self._infer(arrays, meter)
        answers: list[Any] = []
        done = 0
        for index, item in enumerate(read):
            if isinstance(item, Exception):
                answers.append(_refusal(item, index, context, meter))
            else:
                request, pixels = item
                its_own = found.part(done, done + len(pixels))
                done += len(pixels)
                if request.explain is Explain.PICTURE:
                    answers.append(self.predictor.explanation(request, its_own))
                    context.set_response_header(index, "content-type", PNG)
                else:
                    answers.append(self.predictor.answer(request, its_own))
                if context.get_request_header(index, "X-Request-Id") != PROBE:
                    self._watch(its_own, meter)
                context.set_response_header(index, FORM_HEADER, self.predictor.form)
        if self.drift is not None:
            version = self.predictor.model["version"]
            meter.show("drift_evidence", self.drift.evidence, version)
        return answers

    def _watch(self, found: Found, meter: Meter) -> None:
        """What alerts ask about clients' pictures."""
        for row in found.probabilities:
            meter.observe("confidence", float(row.max()))
            meter.count("predictions_total", self.predictor.classes[int(row.argmax())])
        for familiarity in () if found.familiarity is None else found.familiarity:
            meter.observe("familiarity", float(familiarity))
        if self.drift is not None and found.strangeness is not None:
            for strangeness in found.strangeness.tolist():
                self.drift.add(strangeness)

    def _read(
        self, row: dict[str, Any], header: Callable[[str], str | None], meter: Meter
    ) -> tuple[Request, list[NDArray[np.uint8]]] | Exception:
        start = time.perf_counter()
        try:
            asked = (header(f"X-{name}") for name in ("Top", "Abstain", "Confidence"))
            content = messages.unwrapped(row, header("X-Multipart"))
            request = messages.parse(content, *asked, explain=_explain(header))
            self.predictor.require(request)
            _bound(request.pictures)
            return request, [self.predictor.pixels(picture) for picture in request.pictures]
        except Exception as error:
            if not isinstance(error, ImageError | RequestError):
                logger.exception("a request failed")
            return error.with_traceback(None)  # a traceback would keep all that was read
        finally:
            meter.observe("decode_seconds", time.perf_counter() - start)

    def _infer(self, arrays: list[NDArray[np.uint8]], meter: Meter) -> Found:
        """What is found of pictures uint8 [3, H, W]."""
        if not arrays:
            return Found(np.zeros((0, len(self.predictor.classes)), np.float32), None)
        start = time.perf_counter()
        found = self.predictor.find(np.stack(arrays))
        meter.observe("inference_seconds", time.perf_counter() - start)
        meter.observe("batch_size", len(arrays))
        return found


def _bound(pictures: Sequence[Picture]) -> None:
    """Raises:
    RequestError: they have so many pixels that decoding them would hold up a worker for long.
    """
    files = [picture for picture in pictures if isinstance(picture, bytes) and picture]
    if len(files) > 1 and sum(map(pixels_of, files)) > MAX_PIXELS_IN_ALL:
        raise RequestError(f"over {MAX_PIXELS_IN_ALL:,} pixels in all pictures together")


def _explain(header: Callable[[str], str | None]) -> Explain | None:
    """A header says which requests came to /explanations: the gateway's, or TorchServe's own."""
    if "True" not in (header("Explain"), header("explain")):
        return None
    return Explain.PICTURE if PNG in (header("Accept") or "") else Explain.MAP


def _refusal(error: Exception, index: int, context: Any, meter: Meter) -> dict[str, Any]:
    if isinstance(error, ImageError | RequestError):
        code = "bad_image" if isinstance(error, ImageError) else "bad_request"
        status, message = 400, str(error)
    else:
        code, status, message = "internal", 500, "internal error"
    context.set_response_status(status, code, index)
    context.set_response_header(index, "X-Refusal", code)  # by which the gateway knows it for ours
    meter.count("refusals_total", code)
    return messages.failure(code, message)
