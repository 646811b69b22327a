"""The plan of a run and its estimated duration on this machine, logged before it begins."""

import time

import torch

from jobs import distributed
from jobs.config import Config, Variant
from jobs.data.dataset import Dataset
from jobs.devices import Device
from jobs.train import models
from jobs.train.training import losses, make_optimizer
from serving.progress import duration

# A forward pass takes so much of a training step's time for the same pictures; measured on a CPU:
# 0.19 at 75 pixels and 0.28 at 299.
FORWARD_SHARE = 0.22
PASSED = 16  # pictures of the forward pass that is measured, on a CPU
REPORT_SECONDS, EXPORT_SECONDS = 8, 45  # on 2 cores


def outline(
    config: Config,
    dataset: Dataset,
    device: Device,
    remaining: list[Variant],
    stand_in: Variant | None,
) -> str:
    """One line: the steps in their order, and minutes estimated from a training step made here.

    Args:
        remaining: what is still to be trained, once for each seed.
        stand_in: what trains the pretrained weights on the spot, if that is still to be done.
    """
    pictures = sum(_pictures(config, dataset, variant) for variant in remaining)
    trained = [variant for variant in remaining if not variant.cached]
    if stand_in is not None:
        pictures += config.weights.stand_in.images * stand_in.optim.epochs
        trained.append(stand_in)
    if trained:
        largest = max(trained, key=lambda variant: variant.optim.batch_size)
        seconds_per_picture = _training_seconds(config, largest, len(dataset.classes), device)
    else:
        seconds_per_picture = _forward_seconds(config, device) / FORWARD_SHARE
    seconds = pictures * seconds_per_picture / distributed.size() + REPORT_SECONDS
    names = list(dict.fromkeys(variant.name for variant in remaining))
    if stand_in is not None:
        first = next(variant.name for variant in remaining if variant.init == "pretrained")
        names.insert(names.index(first), "the stand-in for ImageNet")
    steps = [*names, "report"]
    if config.export.enabled:
        steps.append("archive")
        seconds += EXPORT_SECONDS
    return f"to do: {', '.join(steps)}; about {duration(seconds)} on this machine"


def _pictures(config: Config, dataset: Dataset, variant: Variant) -> float:
    """What a variant costs, in pictures trained on."""
    train, validation = len(dataset.train), len(dataset.validation)
    scored = float(len(dataset.test))
    epochs, size = variant.optim.epochs, variant.optim.batch_size
    if variant.cached:
        versions = config.data.stored_epochs(epochs)
        return (scored + train * versions + validation) * FORWARD_SHARE
    scored += epochs * (validation + config.evaluation.batch_norm_images)
    return epochs * (train // size * size) + scored * FORWARD_SHARE


def _training_seconds(config: Config, variant: Variant, num_classes: int, device: Device) -> float:
    """Seconds of training per picture, measured on a step whose result is discarded."""
    optim = variant.optim
    network = models.build(num_classes, aux=variant.has_aux).to(device.device).train()
    optimizer = make_optimizer(network, optim)
    own = distributed.share(optim.batch_size)  # more need not fit into the memory
    inputs = _inputs(config, device, max(2, own.stop - own.start))  # one has no statistics
    labels = torch.zeros(len(inputs), dtype=torch.int64, device=device.device)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        with device.autocast():
            outputs = network(inputs)
        loss, aux_loss, _ = losses(outputs, labels, optim.label_smoothing)
        (loss + aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
    return (time.perf_counter() - start) / len(inputs)


@torch.inference_mode()
def _forward_seconds(config: Config, device: Device) -> float:
    """Seconds of a forward pass per picture."""
    network = models.build(2, aux=False).to(device.device).eval()
    on_gpu = device.device.type == "cuda"  # which takes as long for a few pictures as for many
    inputs = _inputs(config, device, device.scored_at_once(config.evaluation) if on_gpu else PASSED)
    for _ in range(2):
        start = time.perf_counter()
        with device.autocast():
            network(inputs).sum().item()  # waits for the device
    return (time.perf_counter() - start) / len(inputs)


def _inputs(config: Config, device: Device, count: int) -> torch.Tensor:
    side = config.data.input_size
    inputs = torch.zeros(count, 3, side, side, device=device.device)
    return inputs.contiguous(memory_format=torch.channels_last)
