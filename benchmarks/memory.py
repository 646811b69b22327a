"""Claim: 60,000 images cost less than 2 GB of memory on a CPU beyond what the model itself takes.

    python -m benchmarks.memory --data FOLDER      (some 3 minutes on 2 cores)

FOLDER has train/<class>/ and test/<class>/, such as CIFAR-10 as JPEG files. Two processes: one
trains a single batch; the other does so too, after all that the job does with its data: decoding,
splits, inputs at full size for every stored version of each picture, and the frozen variant's
features of them. The trunk is replaced there by an average over each picture, which takes no time;
the features are as many as the trunk's. Inputs come in batches as a CPU scores them. The claim is
on the difference of the two peaks.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from jobs import config, devices
from jobs.data.dataset import load
from jobs.data.images import Draws, Images
from jobs.data.sources import generated
from jobs.train import models
from jobs.train.features import Features, extract
from jobs.train.training import Trainer, train_epoch

LIMIT = 2e9  # bytes
FEATURES = 2048


class Cheap(nn.Module):
    """As many features as Inception-v3 has, from a picture's average colour."""

    def __init__(self) -> None:
        super().__init__()
        self.fc: nn.Module = nn.Linear(FEATURES, 10)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        features: Tensor = self.fc(x_NCHW.mean((1, 2, 3))[:, None].expand(-1, FEATURES))
        return features


def train_one_batch(size: int) -> None:
    optim = config.Optim(batch_size=8, aux_weight=0.3 if size >= config.AUX_MIN_SIZE else 0.0)
    variant = config.Variant(name="scratch", init="random", optim=optim)
    pixels, labels = generated.TARGET.draw(8, 32, seed=0)
    images = Images(pixels, torch.arange(8), labels, config.Data(input_size=size))
    network = models.create(variant, 10, None, seed=0)
    trainer = Trainer(network, variant, 8, devices.choose(config.Runtime(device="cpu")), seed=0)
    train_epoch(trainer, images, lambda: None, lambda _: None)


def all_data(folder: str, size: int) -> tuple[int, list[Features]]:
    """Holds what the job holds; gives the number of images."""
    with tempfile.TemporaryDirectory() as cache:
        settings = config.Data(source="folder", root=folder, cache=cache, input_size=size)
        dataset = load(settings)
    device = devices.choose(config.Runtime(device="cpu"))
    batch_size = device.scored_at_once(config.Evaluation())
    train, stored = dataset.train, settings.stored_epochs(config.Optim().epochs)
    splits = [(train, [train.draws(0, epoch) for epoch in range(stored)])]
    splits += [(s, [Draws.none(len(s))]) for s in (dataset.validation, dataset.test) if len(s)]
    features = [
        extract(Cheap(), images, batch_size, device, versions=versions, advance=lambda _: None)
        for images, versions in splits
    ]
    return sum(map(len, features)), features


def measure(folder: str | None, size: int) -> dict[str, int]:
    images, held = all_data(folder, size) if folder else (0, [])
    train_one_batch(size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"images": images, "peak_memory_bytes": peak, "features": len(held)}


def measured_apart(size: int, *data_option: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--worker", "--size", str(size)]
    done = subprocess.run([*command, *data_option], stdout=subprocess.PIPE, text=True, check=True)
    return record.last_line(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data")
    parser.add_argument("--size", type=int, default=299)
    parser.add_argument("--worker", action="store_true", help="measure in this process")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.data, options.size)))
        return
    model = measured_apart(options.size)["peak_memory_bytes"]
    whole = measured_apart(options.size, "--data", options.data)
    beyond = whole["peak_memory_bytes"] - model
    record.show(
        ("", "peak GB"),
        [
            ("one batch", model / 1e9),
            (f"with {whole['images']:,} images", whole["peak_memory_bytes"] / 1e9),
            ("beyond the model's own", beyond / 1e9),
        ],
    )
    print("the claim holds" if beyond < LIMIT else "the claim does not hold")
    figures = {"images": whole["images"], "model_bytes": model, "beyond_bytes": beyond}
    record.save("memory", options.out, 1, figures)


if __name__ == "__main__":
    main()
