"""Parity check: an archive's predictions against those of the job's own network.

The archive runs in separate processes that see only its unpacked files: whatever is missing there
would be missing in the service too.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from jobs import interruption
from jobs.data.images import Images
from jobs.delivery.children import child
from jobs.errors import JobError
from serving.archive import Check, Form
from serving.messages import probability_errors, softmax
from serving.progress import task
from serving.runtimes import Outputs, Predict, joined, outputs

BATCH = 8  # images at a time

Logits = NDArray[np.float32]


class ExportError(JobError):
    """The archive does not reproduce the job's predictions."""


@contextmanager
def asked(folder: Path, form: str) -> Iterator[Predict]:
    """One form of an unpacked archive, or its `handler`, in a process of its own; it sends no class
    maps.

    Raises:
        ExportError: on a call, if it does not run; the message has its last line of output.
    """
    with child(folder, "serving.checking", form) as process:
        pipe = process.pipe

        def ask(images: NDArray[np.uint8]) -> Outputs:
            try:
                pipe.send_bytes(images.tobytes())
                received = [np.frombuffer(pipe.recv_bytes(), np.float32) for _ in range(2)]
                return outputs([array.reshape(len(images), -1) for array in received])
            except (EOFError, OSError):
                interruption.check()  # the signal was for all processes of the group
                words = process.last_words()
                raise ExportError(f"{form} of the archive does not run: {words}") from None

        yield ask


@contextmanager
def asked_all(folder: Path, forms: Iterable[Form]) -> Iterator[dict[Form, Predict]]:
    """Several forms, whose processes start side by side: most of that time is imports."""
    with ExitStack() as stack:
        yield {form: stack.enter_context(asked(folder, form)) for form in forms}


def predict(label: str, network: Predict, images: Images) -> Outputs:
    """Those of all images, in batches."""
    found = []
    with task(f"export, {label}", len(images)) as advance:
        for batch in torch.arange(len(images)).split(BATCH):
            interruption.check()
            found.append(network(images.raw(batch).cpu().numpy()))
            advance(len(batch))
    return joined(found)


def compare(logits: Logits, reference: Logits, labels: NDArray[np.int64]) -> Check:
    """How far some logits float32 [N, C] are from the reference's; labels int64 [N]."""
    typical, largest = probability_errors(softmax(logits), softmax(reference))
    # A constant added to all logits of an image changes no answer.
    given, expected = (x - x.mean(axis=1, keepdims=True) for x in (logits, reference))
    # Pictures that all have the same logits, or a single one, differ by nothing but their classes.
    spread = _rms(expected - expected.mean(axis=0)) or _rms(expected)
    error = _rms(given - expected)
    return Check(
        images=len(labels),
        accuracy=float((logits.argmax(1) == labels).mean()),
        agreement=float((logits.argmax(1) == reference.argmax(1)).mean()),
        logit_error=error / spread if spread else math.inf if error else 0.0,
        probability_error=typical,
        largest_probability_error=largest,
    )


def _rms(values: Logits) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
