"""Batch norm in two processes is that of one, in every figure, and in one graph."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing.spawn import spawn

from jobs import config, devices, distributed
from jobs.data.images import Images
from jobs.train import training, whole_batch
from serving.processes import free_ports

pytestmark = pytest.mark.slow
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


def statistics(state: dict[str, Tensor]) -> Tensor:
    return torch.stack([state["bn.running_mean"], state["bn.running_var"]]).clone()


class Kept:
    """A store that keeps the batch-norm statistics of all that it is given."""

    def __init__(self) -> None:
        self.means: dict[str, list[Tensor]] = {"network": [], "average": [], "best": []}

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        for name in ("network", "average"):
            if state[name] is not None:
                self.means[name].append(statistics(state[name]))

    def save_best(self, weights: dict[str, Tensor], epoch: int, accuracy: float) -> None:
        self.means["best"].append(statistics(weights))

    def append(self, rows: list[dict[str, Any]]) -> None: ...


def train(average_decay: float, compiled: bool = False) -> dict[str, list[Tensor]]:
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
    trainer = training.Trainer(Network(), variant, 12, device, seed=0, compiled=compiled)
    store = Kept()
    evaluation = config.Evaluation(keep="last")
    training.fit(trainer, images, {"validation": images}, evaluation, store, checkpoint_every=1)
    return store.means


def normalised(share: slice, wrap: Any) -> dict[str, Tensor]:
    """Two steps of a layer, and what they leave behind, this process's share of it."""
    random = torch.Generator().manual_seed(1)
    norm = whole_batch.WholeBatchNorm(3, eps=1e-3) if wrap else nn.BatchNorm2d(3, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    layer = wrap(norm) if wrap else norm
    found: dict[str, Tensor] = {}
    for step in range(2):
        x = 3 + torch.randn(9, 3, 4, 4, generator=random)  # in shares of 4 and 5
        wanted = torch.randn(9, 3, 4, 4, generator=random)[share]
        own = x[share].requires_grad_()
        y = layer(own)
        (y * wanted).square().sum().backward()
        assert own.grad is not None
        found |= {f"output {step}": y.detach(), f"gradient {step}": own.grad}
    for name, parameter in norm.named_parameters():
        assert parameter.grad is not None
        found[name] = distributed.total(parameter.grad)  # as DDP does
    return found | dict(norm.named_buffers())


def one_graph(norm: nn.Module) -> Any:
    return torch.compile(norm, backend="aot_eager", fullgraph=True)


def work(rank: int, port: int, folder: Path) -> None:
    group = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    group["MASTER_PORT"] = port
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.update({key: str(value) for key, value in group.items()})
    with distributed.joined() as first:
        share = distributed.share(9)
        for name, wrap in (("eager", lambda norm: norm), ("compiled", one_graph)):
            torch.save(normalised(share, wrap), folder / f"{name}-{rank}.pt")
        for average_decay in DECAYS:
            means = train(average_decay)
            if first:
                torch.save(means, folder / f"{average_decay}.pt")
        counters.clear()
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        means = train(DECAYS[1], compiled=True)
        breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
        if first:
            torch.save((means, breaks, graphs), folder / "compiled-step.pt")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    spawn(work, (free_ports(1)[0], folder), nprocs=2)
    return folder


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_outputs_gradients_and_statistics_are_those_of_one_process(form: str, pair: Path) -> None:
    alone = normalised(slice(0, 9), None)
    shares = [torch.load(pair / f"{form}-{rank}.pt") for rank in range(2)]
    assert all(share.keys() == alone.keys() for share in shares)
    for name, expected in alone.items():
        own = [share[name] for share in shares]
        together = torch.cat(own) if expected.ndim == 4 else own[0]
        torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-3, msg=name)
        assert expected.ndim == 4 or torch.equal(own[0], own[1])


def test_the_statistics_that_are_scored_and_saved_are_those_of_all_processes(
    pair: Path,
) -> None:
    for average_decay in DECAYS:
        ours, alone = torch.load(pair / f"{average_decay}.pt"), train(average_decay)
        assert [len(means) for means in ours.values()] == [len(means) for means in alone.values()]
        for name, means in alone.items():
            for step, mean in enumerate(means):
                torch.testing.assert_close(ours[name][step], mean, msg=f"{name} {step}")


def test_the_compiled_step_of_several_processes_is_one_graph(pair: Path) -> None:
    """All of it, dropout and what averages the gradients included."""
    means, breaks, graphs = torch.load(pair / "compiled-step.pt")
    assert (breaks, graphs) == (0, 1)
    expected = torch.load(pair / f"{DECAYS[1]}.pt")["best"]
    torch.testing.assert_close(means["best"], expected)
