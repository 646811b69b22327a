"""The learning rate in metrics.jsonl is the one that the epoch's last step was made with."""

from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import nn

from jobs import config, devices
from jobs.data.images import Images
from jobs.train import training
from jobs.train.features import Examples

CPU = devices.Device(torch.device("cpu"), torch.float32)


class Nowhere:
    """A store that keeps the lines of metrics.jsonl alone."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...

    def save_best(self, weights: dict[str, Any], epoch: int, accuracy: float) -> None: ...

    def append(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows


def images() -> Images:
    pixels = torch.zeros(12, 3, 8, 8, dtype=torch.uint8)
    return Images(pixels, torch.arange(12), torch.arange(12) % 2, config.Data(input_size=75))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_it_is_the_rate_of_the_epochs_last_step(schedule: str) -> None:
    optim = {"epochs": 3, "batch_size": 4, "schedule": schedule, "learning_rate": 0.1}
    variant = tiny_config(optim=optim).variants[0]
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    trainer = training.Trainer(network, variant, 12, CPU, seed=0)
    used: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])
    )
    store = Nowhere()
    scored: dict[str, Examples] = {"validation": images()}
    training.fit(trainer, images(), scored, config.Evaluation(keep="last"), store)
    logged = [row["learning_rate"] for row in store.rows if row["split"] == "train"]
    assert logged == used[2::3]
    assert len(used) == 9
