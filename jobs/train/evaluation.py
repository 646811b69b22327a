"""Metrics of predictions, with confidence intervals."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from jobs import distributed
from jobs.data.images import Examples
from serving.archive import Scores

CALIBRATION_BINS = 15
RESAMPLES = 10_000


@torch.no_grad()
def predict(
    network: nn.Module,
    examples: Examples,
    batch_size: int,
    autocast: Callable[[], Any],
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Logits float32 [N, C] of all examples in their order, on the CPU; leaves eval mode on."""
    network.eval()
    count, place = len(examples), examples.labels.device
    parts = distributed.batches(count, batch_size, place)
    outputs = []
    for part, (inputs, _) in zip(parts, examples.batches(parts), strict=True):
        distributed.check()
        with autocast():
            outputs.append(network(inputs).float())
        advance(len(part) * distributed.size())
    own = torch.cat(outputs)
    logits = own.new_empty(count, own.shape[1])
    logits[distributed.share(count)] = own
    distributed.complete(logits)
    return logits.cpu()


def quick_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss and accuracy, for the table of epochs."""
    labels = labels.cpu()
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
    }


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """All metrics of one set of predictions.

    Args:
        logits: float32 [N, C] on the CPU.
        labels: int64 [N] on the CPU.
    """
    from scipy.stats import binomtest

    classes = logits.shape[1]
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2)
    confusion = confusion.reshape(classes, classes)
    right, total = int(confusion.trace()), len(labels)
    interval = binomtest(right, total).proportion_ci(0.95, method="wilson")
    per_class = [
        hits / count if count else None
        for hits, count in zip(
            confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True
        )
    ]
    return Scores(
        **quick_scores(logits, labels),
        accuracy_low=float(interval.low),
        accuracy_high=float(interval.high),
        per_class=tuple(per_class),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        calibration_error=calibration_error(logits, labels),
        images=total,
    )


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Mean distance between confidence and accuracy over equal bins of confidence, weighted."""
    confidence, predicted = logits.softmax(1).max(1)
    right = (predicted == labels).float()
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS).index_add(0, bins, confidence - right)
    return float(gap.abs().sum() / len(labels))
