"""Predictions and class maps of a network, and metrics of predictions with their intervals."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom
from torchvision.models import Inception3

from jobs import distributed
from jobs.config import BLOCKS
from jobs.data.images import Images
from jobs.devices import Device
from jobs.seeds import generator
from jobs.statistics import balanced_accuracy, wilson
from jobs.train import models
from jobs.train.features import Examples
from serving.archive import Interval, Scores

CALIBRATION_BINS = 15
RESAMPLES = 1000
IMBALANCE = 1.5  # of the largest class to the smallest; above it, balanced accuracy is given too


@torch.no_grad()
def predict(
    network: nn.Module,
    examples: Examples,
    batch_size: int,
    device: Device,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Logits float32 [N, C] of all examples in their order, on the CPU; leaves eval mode on.

    Not by compiled code: the last batch is shorter, and so a graph of its own.
    """
    network.eval()
    count, place = len(examples), examples.labels.device
    parts = distributed.batches(count, batch_size, place)
    outputs = []
    for part, (inputs, _) in zip(parts, examples.batches(parts), strict=True):
        distributed.check()
        with device.autocast():
            outputs.append(network.forward(inputs).float())
        advance(len(part) * distributed.size())
    own = torch.cat(outputs)
    logits = own.new_empty(count, own.shape[1])
    logits[distributed.share(count)] = own
    distributed.complete(logits)
    return logits.cpu()


@torch.no_grad()
def class_maps(network: Inception3, images: Images, batch_size: int, device: Device) -> Tensor:
    """Class maps of all images, float32 [N, C, h, w] on the CPU; see :func:`models.class_maps`."""
    parts = torch.arange(len(images), device=images.labels.device).split(batch_size)
    last, kept = network.eval().get_submodule(BLOCKS[-1]), []
    with last.register_forward_hook(lambda _, __, places: kept.append(places.float().cpu())):
        for inputs, _ in images.batches(parts):
            with device.autocast():
                network.forward(inputs)  # not compiled, for the few pictures
    return torch.cat([models.class_maps(places, network.fc.weight.cpu()) for places in kept])


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss and accuracy, for the table of epochs."""
    labels = labels.cpu()
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(1) == labels).double().mean().item(),  # 90 % is not below 0.9
    }


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """All metrics of one set of predictions.

    Args:
        logits: float32 [N, C] on the CPU.
        labels: int64 [N] on the CPU.
    """
    classes = logits.shape[1]
    right = labels[logits.argmax(1) == labels]
    hits, counts = (x.bincount(minlength=classes) for x in (right, labels))
    low, high = wilson(len(right), len(labels))
    return Scores(
        **loss_and_accuracy(logits, labels),
        accuracy_low=low,
        accuracy_high=high,
        balanced=_balanced(hits, counts),
        per_class=tuple(
            hit / count if count else None
            for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)
        ),
        calibration_error=calibration_error(logits, labels),
        images=len(labels),
    )


def _balanced(hits: Tensor, counts: Tensor) -> Interval | None:
    """Balanced accuracy, where plain accuracy is mostly that of the large classes."""
    there = counts > 0
    if counts.max() <= IMBALANCE * counts[there].min():
        return None
    return balanced_accuracy(hits[there].tolist(), counts[there].tolist())


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error: mean distance between confidence and accuracy over bins of
    confidence of equal width, each weighted by its pictures."""
    return _binned(*_by_confidence(logits, labels))


def calibration_interval(logits: Tensor, labels: Tensor) -> Interval:
    """The calibration error with the basic bootstrap's 95 % interval over pictures (Davison and
    Hinkley 1997).

    Few pictures in a bin look like an error even where there is none. Resampling adds about the
    same bias once more, and this interval subtracts it, so it may lie below the value. Near zero,
    resampling adds less than that; there the interval begins at zero unless the value is larger
    than what chance gives to probabilities that are exactly right.
    """
    bins, excess = _by_confidence(logits, labels)
    value, count, source = _binned(bins, excess), len(labels), generator("calibration")
    draws = (torch.randint(count, (count,), generator=source) for _ in range(RESAMPLES))
    drawn = torch.tensor([_binned(bins[draw], excess[draw]) for draw in draws])
    low, high = (2 * value - drawn.quantile(torch.tensor([0.975, 0.025]))).clamp(0, 1).tolist()
    sure = logits.softmax(1).amax(1)
    right = (torch.bernoulli(sure, generator=source) for _ in range(RESAMPLES))
    chance = torch.tensor([_binned(bins, sure - hits) for hits in right])
    return Interval(value=value, low=low if value > chance.quantile(0.975) else 0.0, high=high)


def _by_confidence(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture's bin, int64 [N], and its confidence minus 1 if it is right, float32 [N]."""
    confidence, predicted = logits.softmax(1).max(1)
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    return bins, confidence - (predicted == labels).float()


def _binned(bins: Tensor, excess: Tensor) -> float:
    gap = torch.zeros(CALIBRATION_BINS).index_add(0, bins, excess)
    return float(gap.abs().sum() / len(bins))
