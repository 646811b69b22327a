"""Batch norm in two processes: what each takes from its share counts, and their mean is scored."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from jobs import config, devices, distributed
from jobs.data.images import Images
from jobs.train import training
from serving.processes import free_ports

DECAYS = (0.0, 0.5)  # without an average of the weights, and with one


class Network(nn.Module):
    """One layer of batch norm, whose input is the same in any number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.dropout, self.fc = nn.Dropout(), nn.Linear(4, 2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        pooled = self.bn(self.conv(x_NCHW)).relu().mean((2, 3))
        logits: Tensor = self.fc(self.dropout(pooled))
        return logits


class Kept:
    """A store that keeps the batch-norm means of all that it is given."""

    def __init__(self) -> None:
        self.means: dict[str, list[Tensor]] = {"network": [], "average": [], "best": []}

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        for name in ("network", "average"):
            if state[name] is not None:
                self.means[name].append(state[name]["bn.running_mean"].clone())

    def save_best(self, state: dict[str, Tensor]) -> None:
        self.means["best"].append(state["bn.running_mean"].clone())

    def append(self, rows: list[dict[str, Any]]) -> None: ...


def train(average_decay: float) -> dict[str, list[Tensor]]:
    """Two epochs of three steps with a checkpoint after each; the weights stand still."""
    optim = config.Optim(
        name="sgd", learning_rate=1e-30, batch_size=4, epochs=2, average_decay=average_decay
    )
    variant = config.Variant(name="scratch", init="random", optim=optim)
    settings = config.Data(input_size=75)
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8, generator=random)
    images = Images(pixels, torch.arange(12), torch.arange(12) % 2, settings)
    torch.manual_seed(0)
    device = devices.Device(torch.device("cpu"), torch.float32)
    trainer = training.Trainer(Network(), variant, len(images), device, seed=0)
    store = Kept()
    evaluation = config.Evaluation(keep="last")
    training.fit(trainer, images, {"validation": images}, evaluation, store, checkpoint_every=1)
    return store.means


def work(rank: int, port: int, folder: Path) -> None:
    group = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    group["MASTER_PORT"] = port
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.update({key: str(value) for key, value in group.items()})
    with distributed.joined() as first:
        for average_decay in DECAYS:
            means = train(average_decay)
            if first:
                torch.save(means, folder / f"{average_decay}.pt")


def test_the_statistics_that_are_scored_and_saved_are_those_of_all_processes(
    tmp_path: Path,
) -> None:
    spawn(work, (free_ports(1)[0], tmp_path), nprocs=2)
    for average_decay in DECAYS:
        pair, alone = torch.load(tmp_path / f"{average_decay}.pt"), train(average_decay)
        assert [len(means) for means in pair.values()] == [len(means) for means in alone.values()]
        for name, means in alone.items():
            for step, mean in enumerate(means):
                torch.testing.assert_close(pair[name][step], mean, msg=f"{name} {step}")
