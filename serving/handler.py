"""TorchServe's entry point: one batch of requests in, one answer for each out.

Everything it needs lies beside it in the archive, this package's modules included.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving import runtimes
from serving.images import ImageError, decode, to_pixels
from serving.messages import Request, RequestError, answer, failure, parse, softmax


class Handler:
    """Decodes each request by itself and runs the pictures of all of them as one batch, so that
    a bad picture spoils no answer but its own."""

    def initialize(self, context: Any) -> None:
        """Loads the network; `context` is TorchServe's, for this worker."""
        folder = Path(context.system_properties["model_dir"])
        description = json.loads((folder / "model.json").read_text())
        self.classes: list[str] = description["classes"]
        self.size: tuple[int, int] = tuple(description["image_size"])
        self.model = {key: description[key] for key in ("name", "version")}
        self.predict = runtimes.load(folder, context.system_properties.get("gpu_id"))

    def handle(self, rows: list[dict[str, Any]], context: Any) -> list[dict[str, Any]]:
        """An answer for every row; those that cannot be answered get the status 400."""
        requests = [self._read(row) for row in rows]
        arrays = [
            a for request in requests if not isinstance(request, Exception) for a in request[1]
        ]
        results = iter(softmax(self.predict(np.stack(arrays))) if arrays else ())
        answers = []
        for index, request in enumerate(requests):
            if not isinstance(request, Exception):
                answers.append(self._answer(request[0], [next(results) for _ in request[1]]))
            else:
                code = "bad_image" if isinstance(request, ImageError) else "bad_request"
                context.set_response_status(400, "Bad Request", index)
                answers.append(failure(code, str(request)))
        return answers

    def _read(
        self, row: dict[str, Any]
    ) -> tuple[Request, list[NDArray[np.uint8]]] | ImageError | RequestError:
        try:
            request = parse(row)
            return request, [to_pixels(decode(data), self.size) for data in request.pictures]
        except (ImageError, RequestError) as error:
            return error

    def _answer(self, request: Request, probabilities: list[NDArray[np.float32]]) -> dict[str, Any]:
        answers = [answer(row, self.classes, self.model) for row in probabilities]
        return {"predictions": answers} if request.many else answers[0]
