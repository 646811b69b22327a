"""Claim: on a 2-core CPU with bf16 instructions this job does the lecture's five epochs of three
networks about three times as fast as the lecture's own loop. (The aim is 3.5 times.)

    python -m benchmarks.training                  (some 5 minutes on 2 cores)
    python -m benchmarks.training --techniques     what each is worth alone (some 7 minutes)

The lecture's loop is written from its description: three networks in lockstep, batches of 8, 32-bit
floats, pictures scaled by PIL in a DataLoader, back-propagation through the frozen trunk, the test
set scored after every epoch. The job trains the same three variants on the same pictures in
batches of 8 for as many epochs, scores the same test pictures as often, and does more: mirrored and
shifted pictures, an average of the weights. Both sides run in processes of their own, in turns,
after a warm-up that is not counted; building the networks is not counted either.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks import record
from jobs import config, devices
from jobs.data.images import Draws, Images
from jobs.data.sources import generated
from jobs.train import models
from jobs.train.evaluation import loss_and_accuracy, predict
from jobs.train.features import extract
from jobs.train.training import Trainer, train_epoch

BATCH = 8
PICTURE = 32  # pixels, as CIFAR-10 has them
TECHNIQUES = (
    "bf16",
    "channels last",
    "trunk once",
    "freed memory kept",
    "pictures on the device",
    "fused optimizer",
)
KEEPING = "jobs.devices.keep_freed_memory"


@dataclass(frozen=True)
class Work:
    """How much of it: the lecture has five training images for every test image."""

    train: int = 16
    test: int = 3
    epochs: int = 5
    size: int = 299  # pixels; below that neither side has an auxiliary head

    def images(self) -> tuple[Images, Images]:
        settings = config.Data(input_size=self.size)
        pixels, labels = generated.TARGET.draw(self.train + self.test, PICTURE, seed=0)
        everything = Images(pixels, torch.arange(len(labels)), labels, settings)
        order = torch.arange(len(labels))
        return everything.take(order[: self.train]), everything.take(order[self.train :])


# The lecture's side


class Pictures(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Images, size: int) -> None:
        self.images = images
        self.transform = transforms.Compose(
            [transforms.Resize((size, size)), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        picture = self.images.pixels[self.images.rows[i]].permute(1, 2, 0).numpy()
        return self.transform(Image.fromarray(picture)), int(self.images.labels[i])


def lecture(work: Work) -> Callable[[], None]:
    aux = work.size >= config.AUX_MIN_SIZE
    networks = [models.build(10, aux=aux) for _ in range(3)]
    for network in networks:
        models.initialise(network, seed=0)
        network.to(memory_format=torch.contiguous_format)
    trained = [networks[0], networks[1], networks[2].fc]  # the third goes back all the way anyhow
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in trained]
    train, test = (
        DataLoader(Pictures(images, work.size), BATCH, shuffle=True) for images in work.images()
    )

    def epochs() -> None:
        for _ in range(work.epochs):
            for inputs, labels in train:
                for network, optimizer in zip(networks, optimizers, strict=True):
                    network.train()
                    optimizer.zero_grad()
                    outputs = network(inputs)
                    heads = outputs if isinstance(outputs, tuple) else (outputs,)
                    losses = [F.nll_loss(F.log_softmax(h, 1), labels) for h in heads]
                    torch.stack(losses).sum().backward()
                    optimizer.step()
            with torch.no_grad():
                for inputs, labels in test:
                    for network in networks:
                        (network.eval()(inputs).argmax(1) == labels).sum().item()

    return epochs


# The job's side, with techniques that can be switched off


class Contiguous(Images):
    """Inputs in the order of their dimensions."""

    def prepare(self, x_NCHW: Tensor, batch: Tensor, draws: Draws | None = None) -> Tensor:
        return super().prepare(x_NCHW, batch, draws).contiguous()


class ByPil(Images):
    """Inputs scaled one by one by PIL, then augmented."""

    def raw(self, batch: Tensor) -> Tensor:
        side = (self.settings.input_size,) * 2
        pictures = super().raw(batch).permute(0, 2, 3, 1).numpy()
        scaled = [np.asarray(Image.fromarray(p).resize(side)) for p in pictures]
        return torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2)


def job(work: Work, without: str = "") -> Callable[[], None]:
    with patch(KEEPING) if without == "freed memory kept" else nullcontext():
        device = devices.choose(config.Runtime(device="cpu", compile=False))
    if without == "bf16":
        device = replace(device, dtype=torch.float32)
    kinds: dict[str, type[Images]] = {
        "channels last": Contiguous,
        "pictures on the device": ByPil,
    }
    kind = kinds.get(without, Images)
    train, test = (kind(**vars(images)) for images in work.images())
    optim = config.Optim(batch_size=BATCH, epochs=work.epochs)
    if work.size < config.AUX_MIN_SIZE:
        optim = optim.model_copy(update={"aux_weight": 0.0})
    parts = [_variant(*parts, optim, device, train, test, without) for parts in VARIANTS]

    def epochs() -> None:
        for part in parts:
            part()

    return epochs


VARIANTS = (("scratch", "all"), ("finetune", "all"), ("frozen", "head"))


def _variant(
    name: str,
    trainable: str,
    optim: config.Optim,
    device: devices.Device,
    train: Images,
    test: Images,
    without: str,
) -> Callable[[], None]:
    variant = config.Variant(name=name, init="random", trainable=trainable, optim=optim)
    whole = models.create(variant, 10, None, seed=0)
    if without == "channels last":
        whole.to(memory_format=torch.contiguous_format)
    cached = variant.cached and without != "trunk once"
    network: nn.Module = models.head(whole) if cached else whole
    trainer = Trainer(network, variant, len(train), device, seed=0)
    if without == "fused optimizer":
        for group in trainer.optimizer.param_groups:
            group["fused"] = group["foreach"] = False

    def epochs() -> None:
        learnt, scored = train, test
        if cached:
            stored = train.settings.stored_epochs(optim.epochs)
            drawn = [train.draws(0, epoch) for epoch in range(stored)]
            learnt, scored = (  # type: ignore[assignment]
                extract(whole, images, 50, device, versions=versions, advance=lambda _: None)
                for images, versions in ((train, drawn), (test, [Draws.none(len(test))]))
            )
        for _ in range(optim.epochs):
            train_epoch(trainer, learnt, lambda: None, lambda _: None)
            logits = predict(trainer.scored_network, scored, 50, device)
            loss_and_accuracy(logits, scored.labels)
            trainer.start_next_epoch()

    return epochs


# Both


def measure(side: str, work: Work) -> dict[str, float]:
    """Seconds and peak memory of one side, in this process."""
    devices.set_threads()
    make = lecture if side == "lecture" else lambda w: job(w, side.removeprefix("without "))
    make(replace(work, epochs=1))()  # warm-up: the first batch of a shape prepares its kernels
    epochs = make(work)
    start = time.perf_counter()
    epochs()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_memory_bytes": peak}


def measured_apart(side: str, work: Work) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training", "--side", side]
    for key, value in vars(work).items():
        command += [f"--{key}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return record.last_line(done.stdout)


def compare(work: Work, rounds: int) -> dict[str, Any]:
    """The lecture's loop and the job in turns."""
    sides: dict[str, list[dict[str, Any]]] = {"lecture": [], "job": []}
    for _ in range(rounds):
        for side, found in sides.items():
            found.append(measured_apart(side, work))
    images = work.train * work.epochs
    figures: dict[str, Any] = {
        side: {
            "seconds_per_image": [f["seconds"] / images for f in found],
            "peak_memory_bytes": max(f["peak_memory_bytes"] for f in found),
        }
        for side, found in sides.items()
    }
    pairs = zip(*(figures[side]["seconds_per_image"] for side in sides), strict=True)
    figures["ratios"] = [ours_first / ours for ours_first, ours in pairs]
    figures["ratio"] = median(figures["ratios"])
    record.show(
        ("three networks", "s per image", "peak GiB"),
        [
            (
                side,
                median(figures[side]["seconds_per_image"]),
                figures[side]["peak_memory_bytes"] / 2**30,
            )
            for side in sides
        ],
    )
    print(f"the job is {figures['ratio']:.2f} times as fast: {figures['ratios']}")
    return figures


def switch_off(techniques: Sequence[str], work: Work, rounds: int) -> dict[str, list[float]]:
    """How many times longer the job takes without each technique than with all, every round."""
    slower: dict[str, list[float]] = {technique: [] for technique in techniques}
    for _ in range(rounds):
        whole = measured_apart("job", work)["seconds"]
        for technique, found in slower.items():
            found.append(measured_apart(f"without {technique}", work)["seconds"] / whole)
    rows = [(name, median(found), min(found), max(found)) for name, found in slower.items()]
    record.show(("without", "times as long", "least", "most"), rows)
    return slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for key, value in vars(Work()).items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=2, help="of all sides, in turns")
    help_ = "switch each of these off, alone (of all)"
    parser.add_argument("--techniques", nargs="*", choices=TECHNIQUES, help=help_)
    parser.add_argument("--side", help="measure one side in this process")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    work = Work(options.train, options.test, options.epochs, options.size)
    if options.side:
        print(json.dumps(measure(options.side, work)))
        return
    figures: dict[str, Any] = {"work": vars(work)}
    if options.techniques is not None:
        few = replace(work, train=min(work.train, BATCH), test=1)
        found = switch_off(options.techniques or TECHNIQUES, few, options.rounds)
        figures = {"work": vars(few), "times_as_long_without": found}
        record.save("techniques", options.out, options.rounds, figures)
    else:
        figures |= compare(work, options.rounds)
        record.save("training", options.out, options.rounds, figures)


if __name__ == "__main__":
    main()
