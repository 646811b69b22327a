"""Runs an archive from nothing but its own files.

    python -m serving.checking FORM|handler DESCRIPTOR

is run in the folder that an archive was unpacked to, in a process of its own. Through a pipe it
gets images, uint8 [N, 3, H, W] in the archive's size, and sends back logits float32 [N, C], then
features float32 [N, F]; class maps stay here. `handler`, which asks TorchServe's entry point with
PNG files, has no features, and for logits the logarithms of the probabilities.
"""

import json
import sys
from base64 import b64encode
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.images import to_png
from serving.messages import logarithms
from serving.predictor import Predictor
from serving.runtimes import Outputs, Predict, outputs


def main(form: Any, descriptor: int) -> None:
    asked, shape = open_form(form)
    pipe: Connection[bytes, bytes] = Connection(descriptor)
    with suppress(EOFError):  # nothing more is asked
        while True:
            images = np.frombuffer(pipe.recv_bytes(), np.uint8).reshape(-1, *shape)
            found = asked(images)
            only_from(Path.cwd())
            for array in (found.logits, found.features):
                pipe.send_bytes(array.astype(np.float32).tobytes())


def only_from(folder: Path) -> None:
    """An editable install finds what an archive lacks, in the checkout.

    Raises:
        ModuleNotFoundError: a module of `serving` comes from elsewhere.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("serving.") and not Path(module.__file__ or "").is_relative_to(folder):
            raise ModuleNotFoundError(f"No module named {name!r}")


def open_form(form: Any) -> tuple[Predict, tuple[int, ...]]:
    """How to ask one form of the archive in this folder, or its handler; the shape of an image."""
    if form != "handler":
        predictor = Predictor.open(Path(), form=form)
        return predictor.network, (3, *predictor.size)
    # The file that TorchServe loads, which lies at the top of the archive.
    from handler import Handler  # type: ignore[import-not-found]

    context = SimpleNamespace(
        system_properties={"model_dir": ".", "gpu_id": None},
        metrics=None,
        get_request_header=lambda *_: None,
        set_response_status=lambda *_: None,
        set_response_header=lambda *_: None,
    )
    handler = Handler()
    handler.initialize(context)
    classes, size = handler.predictor.classes, handler.predictor.size

    def ask(images: NDArray[np.uint8]) -> Outputs:
        answers = handler.handle([{"body": as_v2(to_png(image))} for image in images], context)
        tensors = [{one["name"]: one["data"] for one in a["outputs"]} for a in answers]
        rows = np.array([one["probabilities"] for one in tensors], np.float32)
        if [one["label"] for one in tensors] != [[classes[i]] for i in rows.argmax(1)]:
            raise ValueError("its labels are not those of its probabilities")
        return outputs([logarithms(rows)])

    return ask, (3, *size)


def as_v2(picture: bytes) -> bytes:
    """A request whose answer has the probabilities of all classes."""
    data = [b64encode(picture).decode()]
    tensor = {"name": "pictures", "datatype": "BYTES", "shape": [1], "data": data}
    return json.dumps({"inputs": [tensor]}).encode()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
