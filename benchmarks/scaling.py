"""Claim: training takes time in proportion to the images, whatever their number.

    python -m benchmarks.scaling                   (some 2 minutes on 2 cores)

Images per second of the training step (`scratch`, all weights) against the number of images, the
batch and the number of processes. R² tells how straight the line of seconds against images is. On
a machine with GPUs, every process has one of its own; on a CPU they share the cores, and what is
lost by that is what several processes cost.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import correlation
from typing import Any

import torch

from benchmarks import record
from jobs import config, devices, distributed
from jobs.data.images import Images
from jobs.data.sources import generated
from jobs.train import models
from jobs.train.training import Trainer, train_epoch
from serving.processes import free_ports


def train(images: int, batch: int, size: int) -> float:
    """Seconds of an epoch; one batch goes before it uncounted."""
    device = devices.choose(config.Runtime())
    place = device.device
    aux = 0.3 if size >= config.AUX_MIN_SIZE else 0.0
    optim = config.Optim(batch_size=batch, aux_weight=aux)
    variant = config.Variant(name="scratch", init="random", optim=optim)
    pixels, labels = generated.TARGET.draw(images, 32, seed=0)
    rows = torch.arange(images)
    examples = Images(pixels, rows, labels, config.Data(input_size=size)).to(place)
    network = models.create(variant, 10, None, seed=0).to(place)
    for count in (batch, images):
        trainer = Trainer(network, variant, count, device, seed=0)
        start = time.perf_counter()
        train_epoch(trainer, examples, lambda: None, lambda _: None)
        trainer.totals.tolist()  # waits for a GPU
    return time.perf_counter() - start


def in_processes(count: int, images: int, batch: int, size: int) -> float:
    """The same in several processes on this machine, by the first one's clock."""
    [port] = free_ports(1)
    group: dict[str, object] = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "benchmarks.scaling", "--worker", str(images), str(batch)]
    command += ["--size", str(size)]
    workers = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **{k: str(v) for k, v in group.items()}, "RANK": n, "LOCAL_RANK": n},
        )
        for n in map(str, range(count))
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    return float(record.last_line(outputs[0])["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=299)
    parser.add_argument("--worker", type=int, nargs=2, metavar=("IMAGES", "BATCH"))
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    if options.worker:
        with distributed.joined():
            images, batch = options.worker
            print(json.dumps({"seconds": train(images, batch, options.size)}))
        return
    usual, middle = options.batches[1], options.images[-2]
    seconds = [train(images, usual, options.size) for images in options.images]
    by_batch = [train(middle, batch, options.size) for batch in options.batches]
    by_processes = [in_processes(n, middle, usual, options.size) for n in options.processes]
    straightness = correlation(options.images, seconds) ** 2 if len(seconds) > 1 else None
    figures: dict[str, Any] = {
        "size": options.size,
        "batch": usual,
        "seconds_by_images": dict(zip(options.images, seconds, strict=True)),
        "straightness": straightness,
        "images_per_second_by_batch": _rates(options.batches, by_batch, middle),
        "images_per_second_by_processes": _rates(options.processes, by_processes, middle),
    }
    rows = [(f"{n} images", n / s) for n, s in zip(options.images, seconds, strict=True)]
    for what in ("batch", "processes"):
        rows += [(f"{what} {k}", v) for k, v in figures[f"images_per_second_by_{what}"].items()]
    record.show(("", "images per second"), rows)
    print(f"seconds against images: R² = {straightness}")
    record.save("scaling", options.out, 1, figures)


def _rates(keys: list[int], seconds: list[float], images: int) -> dict[int, float]:
    return {key: images / taken for key, taken in zip(keys, seconds, strict=True)}


if __name__ == "__main__":
    main()
