"""One part of what benchmarks.gpu measures, in a process of its own; JSON in the last line.

python -m benchmarks.gpu_parts {ceilings,steps,scoring,checkpoint,decoding} …
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs import config, devices
from jobs.data.dataset import load
from jobs.data.images import Images
from jobs.runs import RunFolder, VariantFolder
from jobs.train import models
from jobs.train.evaluation import predict
from jobs.train.training import Trainer, train_epoch
from jobs.train.writing import Writer

REPEATS = 20
SIDE = 32  # of the pictures, as CIFAR-10's


def seconds(work: Callable[[], Tensor], repeats: int = REPEATS) -> float:
    """Of one call, among several that are waited for together."""
    work().flatten()[0].item()
    start = time.perf_counter()
    for _ in range(repeats):
        result = work()
    result.flatten()[0].item()
    return (time.perf_counter() - start) / repeats


def ceilings(options: argparse.Namespace, device: devices.Device) -> dict[str, Any]:
    """Bytes a second of a copy, read and written; operations a second of a matrix product."""
    side = options.side
    a = torch.randn(side, side, device=device.device, dtype=device.dtype)
    large = torch.empty(8 * side * side, device=device.device)
    return {
        "copy_bytes_per_second": 2 * large.nbytes / seconds(large.clone),
        "product_operations_per_second": 2 * side**3 / seconds(lambda: a @ a),
        "product_side": side,
    }


def steps(options: argparse.Namespace, device: devices.Device) -> dict[str, Any]:
    """The first step, which compiles, and the rate of those that nothing waits within."""
    trainer = _trainer(options, device)
    images = _images(options, options.batch * options.steps).to(device.device)
    ends: list[float] = []

    def wait(_: int) -> None:
        trainer.totals.tolist()
        ends.append(time.perf_counter())

    start = time.perf_counter()
    train_epoch(trainer, images, lambda: None, wait)
    trainer.start_next_epoch()
    device.start_measuring()  # without what compiling, and cuDNN's trials, took
    again = time.perf_counter()
    train_epoch(trainer, images, lambda: None, lambda _: None)
    trainer.totals.tolist()
    each = (time.perf_counter() - again) / options.steps
    return {
        "first_step_seconds": ends[0] - start,
        "seconds_a_step": each,
        "images_per_second": options.batch / each,
        "peak_memory_bytes": device.peak_memory(),
    }


def scoring(options: argparse.Namespace, device: devices.Device) -> dict[str, Any]:
    network = _network(options, device)
    images = _images(options, options.pictures).to(device.device)
    batch = device.scored_at_once(config.load(options.config, options.set).evaluation)
    first = torch.arange(batch, device=device.device) % len(images)
    predict(network, images.take(first), batch, device)  # warms up
    start = time.perf_counter()
    predict(network, images, batch, device)
    return {"images_per_second": len(images) / (time.perf_counter() - start), "batch": batch}


def checkpoint(options: argparse.Namespace, device: devices.Device) -> dict[str, Any]:
    """What training waits for a checkpoint, and when it is on the disk."""
    trainer = _trainer(options, device)
    images = _images(options, options.batch * options.steps).to(device.device)
    train_epoch(trainer, images, lambda: None, lambda _: None)
    trainer.totals.tolist()
    with tempfile.TemporaryDirectory() as folder:
        store = VariantFolder(Path(folder), RunFolder(Path(folder)))
        with Writer(store, device) as writer:
            start = time.perf_counter()
            writer.begin(None, trainer.state_dict())
            begun = time.perf_counter()
            writer.finish()
        written = time.perf_counter()
        size = store.checkpoint.stat().st_size
    return {"waited_seconds": begun - start, "written_seconds": written - start, "bytes": size}


def decoding(options: argparse.Namespace, _: devices.Device) -> dict[str, Any]:
    start = time.perf_counter()
    dataset = load(config.load(options.config, options.set).data)
    return {"seconds": time.perf_counter() - start, "images": dict(dataset.description.images)}


def _variant(options: argparse.Namespace) -> config.Variant:
    aux = 0.3 if options.size >= config.AUX_MIN_SIZE else 0.0
    optim = config.Optim(batch_size=options.batch, aux_weight=aux)
    return config.Variant(name="scratch", init="random", optim=optim)


def _network(options: argparse.Namespace, device: devices.Device) -> torch.nn.Module:
    network: torch.nn.Module = models.create(_variant(options), 10, None, seed=0)
    return network.to(device.device)


def _trainer(options: argparse.Namespace, device: devices.Device) -> Trainer:
    count = options.batch * options.steps
    network = _network(options, device)
    return Trainer(network, _variant(options), count, device, seed=0, compiled=options.compiled)


def _images(options: argparse.Namespace, count: int) -> Images:
    pixels = torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8)
    return Images.all(pixels, torch.arange(count) % 10, config.Data(input_size=options.size))


def choose_kernels(trials: int | None) -> None:
    """How many of cuDNN's kernels are tried before one is taken: 0 for its heuristics alone."""
    if trials is not None:
        torch.backends.cudnn.benchmark = trials > 0
        torch.backends.cudnn.benchmark_limit = trials


PARTS = {part.__name__: part for part in (ceilings, steps, scoring, checkpoint, decoding)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--trials", type=int, help="of cuDNN's kernels; as the job's when absent")
    parser.add_argument("--steps", type=int, default=REPEATS)
    parser.add_argument("--size", type=int, default=299)
    parser.add_argument("--side", type=int, default=8192, help="of the matrix product")
    parser.add_argument("--pictures", type=int, default=50_000)
    parser.add_argument("--config", default="h200")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    device = devices.choose(config.Runtime())
    choose_kernels(options.trials)  # after the job's own choice
    found = PARTS[options.part](options, device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
