"""One loop trains every variant, repeats itself exactly, and survives being stopped anywhere."""

import functools
import math
import os
import resource
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_config
from thin import thin_network
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torchvision.models import inception_v3

from jobs import config, devices, interruption, pipeline
from jobs.data.dataset import Dataset, load
from jobs.data.images import Draws, Images, augment
from jobs.errors import ConfigurationError, Divergence, Interrupted
from jobs.runs import RunFolder, VariantFolder
from jobs.seeds import generator
from jobs.train import models, training
from jobs.train.features import Examples, Features, extract

pytestmark = pytest.mark.usefixtures("thin")
CPU = devices.Device(torch.device("cpu"), torch.float32)


@dataclass
class Memory:
    """A store that keeps everything in memory."""

    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    kept: tuple[int, float] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        self.checkpoints.append(_clone(state))

    def save_best(self, weights: dict[str, Tensor], epoch: int, accuracy: float) -> None:
        self.best, self.kept = _clone(weights), (epoch, accuracy)

    def append(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows


def _clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clone(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load(tiny_config().data)


@pytest.fixture(scope="module")
def pretrained() -> models.State:
    with thin_network():
        return models.load_pretrained("random")


def variant(wanted: str, **optim: Any) -> config.Variant:
    return next(v for v in tiny_config(optim=optim).variants if v.name == wanted)


def trainer_of(
    chosen: config.Variant, dataset: Dataset, pretrained: models.State, seed: int = 0
) -> training.Trainer:
    network = models.create(chosen, len(dataset.classes), pretrained, seed)
    return training.Trainer(network, chosen, len(dataset.train), CPU, seed)


def fit(trainer: training.Trainer, dataset: Dataset, store: Memory, every: int = 0) -> None:
    evaluation = config.Evaluation(batch_size=40, batch_norm_images=20, keep="last")
    scored: dict[str, Examples] = {"validation": dataset.validation}
    training.fit(trainer, dataset.train, scored, evaluation, store, every)


def test_training_twice_gives_the_same_losses_and_weights(
    dataset: Dataset, pretrained: models.State
) -> None:
    stores = [Memory(), Memory()]
    for store in stores:
        fit(trainer_of(variant("scratch"), dataset, pretrained), dataset, store)
    losses = [[row["loss"] for row in store.rows] for store in stores]
    assert losses[0] == losses[1]
    assert [row["split"] for row in stores[0].rows] == ["train", "validation"] * 2
    _assert_equal(stores[0].best, stores[1].best)


def test_the_loop_is_the_textbooks_bit_for_bit(dataset: Dataset, pretrained: models.State) -> None:
    """Whatever is done for speed, the losses and the weights stay those of the plain loop."""
    chosen = variant("scratch", average_decay=0.0, epochs=2)
    plain = models.create(chosen, len(dataset.classes), pretrained, seed=0)
    optimizer = training.make_optimizer(plain, chosen.optim)
    schedule = training.make_schedule(optimizer, chosen.optim, steps_per_epoch=6)
    torch.manual_seed(0)
    means = []
    for epoch in range(2):
        order = torch.randperm(60, generator=generator(0, epoch, "order"))
        draws = dataset.train.draws(0, epoch)
        total = 0.0
        plain.train()
        for batch in order.split(10):
            pictures = dataset.train.pixels[dataset.train.rows[batch]]
            pictures = augment(pictures, draws.flip[batch], draws.shift[batch])
            inputs = (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            logits = plain(inputs)
            loss = nn.functional.cross_entropy(
                logits, dataset.train.labels[batch], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        means.append(total / 6)
    store = Memory()
    ours = trainer_of(chosen, dataset, pretrained)  # seeds dropout, as above
    evaluation = config.Evaluation(keep="last")
    training.fit(ours, dataset.train, {"validation": dataset.validation}, evaluation, store)
    losses = [row["loss"] for row in store.rows if row["split"] == "train"]
    assert losses == pytest.approx(means, rel=1e-6), "sums of six, in 32 and in 64 bits"
    _assert_equal(ours.network.state_dict(), plain.state_dict())


def test_compiling_is_for_much_work_on_a_gpu_or_on_demand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = devices.Device(torch.device("cuda", 0), torch.bfloat16)
    scratch, frozen = variant("scratch", epochs=5), variant("frozen", epochs=5)
    much = devices.COMPILING_PAYS
    assert gpu.compiles(scratch, much) and not gpu.compiles(scratch, much - 1)
    assert not gpu.compiles(frozen, much), "its trunk is not trained"
    assert not CPU.compiles(scratch, much)
    demanded = devices.Device(torch.device("cpu"), torch.float32, compile=True)
    assert demanded.compiles(scratch, 1) and not demanded.compiles(frozen, 1)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: "/nowhere")
    assert gpu.missing_to_compile() == "no /nowhere/Python.h"
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert gpu.missing_to_compile() == "no gcc or clang"
    assert CPU.missing_to_compile() == "no g++ or clang++"


def test_variants_and_seeds_that_share_a_graph_pay_for_it_together() -> None:
    settings = tiny_config(runtime={"seeds": [0, 1, 2]}, optim={"epochs": 5})
    scratch, finetune, frozen = settings.variants
    assert settings.epochs_alike(scratch) == settings.epochs_alike(finetune) == 2 * 3 * 5
    assert settings.epochs_alike(frozen) == 3 * 5


@pytest.mark.parametrize("lacking", ["a compiler", "a header", "a folder", "a right to run"])
def test_without_what_compiling_takes_the_job_says_so_and_goes_on(
    lacking: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, said = tmp_path / "compiled", "no g++"
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("sysconfig.get_config_var", lambda _: str(tmp_path))
    (tmp_path / "Python.h").touch()
    if lacking == "a compiler":
        monkeypatch.setattr("shutil.which", lambda _: None)
    elif lacking == "a header":
        (tmp_path / "Python.h").unlink()
        said = "no /"
    elif lacking == "a folder":
        folder.touch()
        said = f"{folder}: File exists"
    else:
        flags = SimpleNamespace(f_flag=os.ST_NOEXEC)
        monkeypatch.setattr("os.statvfs", lambda _: flags)
        said = f"{folder} is mounted noexec"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    job = pipeline.Job(tiny_config(runtime={"compile": True}), RunFolder(tmp_path))
    assert not job._compiles(variant("scratch"), 1)
    assert not job._compiles(variant("frozen"), 1)
    errors = capsys.readouterr().err
    assert errors.count("not compiled") == 1
    line = f"scratch: not compiled, and so slower: {said}"
    assert "".join(line.split()) in "".join(errors.split()), "however the console wraps it"


def test_ten_kinds_of_networks_are_ten_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own limit is eight, beyond which a network runs eagerly and nobody is told."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    with dynamo.patch(recompile_limit=8):
        for kind in range(10):
            layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
            layers[kind].requires_grad_(False)
            training.compile_step(layers)
            layers(torch.zeros(1, 2))
    assert counters["stats"]["unique_graphs"] == 10


@pytest.mark.slow
def test_a_compiled_network_trains_and_is_saved_as_the_same(
    dataset: Dataset, pretrained: models.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a back end that generates no code, which takes minutes; all else is as with one.

    The step is one graph for all steps and both variants, and scoring is none: what breaks or
    repeats would be compiled anew, at half a minute each.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    chosen = variant("scratch", epochs=2, average_decay=0.9)
    another = variant("finetune", epochs=1, average_decay=0.0)
    stores = [Memory(), Memory(), Memory()]
    runs = ((chosen, False), (chosen, True), (another, True))
    for store, (wanted, compiled) in zip(stores, runs, strict=True):
        network = models.create(wanted, len(dataset.classes), pretrained, seed=0)
        count = len(dataset.train)
        trainer = training.Trainer(network, wanted, count, CPU, seed=0, compiled=compiled)
        fit(trainer, dataset, store)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    assert [r["loss"] for r in stores[0].rows] == [r["loss"] for r in stores[1].rows]
    _assert_equal(stores[0].best, stores[1].best)


class Meta(devices.Device):
    """A device without values: it refuses tensors of other devices, and to be waited for."""

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()


def not_fused(network: nn.Module, _: config.Optim) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters())


def test_a_step_neither_waits_for_the_device_nor_leaves_it(
    dataset: Dataset, pretrained: models.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = Meta(torch.device("meta"), torch.float32)
    monkeypatch.setattr(training, "make_optimizer", not_fused)
    train = replace(
        dataset.train,
        pixels=dataset.train.pixels.to("meta"),
        rows=dataset.train.rows.to("meta"),
        labels=dataset.train.labels.to("meta"),
    )
    scratch, frozen = variant("scratch", average_decay=0.9), variant("frozen")
    whole = models.create(frozen, len(dataset.classes), pretrained, seed=0).to("meta")
    drawn = [train.draws(0, 0)]
    features = extract(whole, train, 40, meta, versions=drawn, advance=lambda _: None)
    network = models.create(scratch, len(dataset.classes), pretrained, seed=0).to("meta")
    steps: list[int] = []
    for chosen, trained, examples in (
        (scratch, network, train),
        (frozen, models.head(whole), features),
    ):
        trainer = training.Trainer(trained, chosen, len(train), meta, seed=0)
        training.train_epoch(trainer, examples, lambda: None, steps.append)
        training.update_batch_norm(trainer, examples, 60)
        assert trainer.totals.is_meta
        with pytest.raises(RuntimeError, match="meta"):
            training.read_totals(trainer)  # this is where it waits
    assert sum(steps) == 2 * trainer.steps_per_epoch * scratch.optim.batch_size


def _assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


def test_going_on_from_any_checkpoint_ends_bit_for_bit_the_same(
    dataset: Dataset, pretrained: models.State
) -> None:
    whole = Memory()
    fit(trainer_of(variant("finetune"), dataset, pretrained), dataset, whole, every=2)
    places = [(c["epoch"], c["step"]) for c in whole.checkpoints]
    assert places == [(0, 2), (0, 4), (0, 6), (1, 0), (1, 2), (1, 4), (1, 6)]
    for start in (1, 2, 4):  # within the first epoch, at its very end, within the second
        rest = Memory()
        trainer = trainer_of(variant("finetune"), dataset, pretrained)
        torch.manual_seed(12345)  # nothing may hang on what the process drew before
        trainer.load_state_dict(_clone(whole.checkpoints[start]))
        fit(trainer, dataset, rest, every=2)
        _assert_equal(rest.checkpoints[-1]["network"], whole.checkpoints[-1]["network"])
        _assert_equal(rest.best, whole.best)
        ours = [(r["epoch"], r["split"], r["loss"]) for r in rest.rows]
        assert ours == [(r["epoch"], r["split"], r["loss"]) for r in whole.rows][-len(ours) :]


class Slow(Memory):
    """Writes a checkpoint only once training has come to the end of an epoch meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch_ended = threading.Event()

    def append(self, rows: list[dict[str, Any]]) -> None:
        super().append(rows)
        self.epoch_ended.set()

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        if not self.epoch_ended.wait(600):
            raise OSError("training has waited for the disk")
        super().save_checkpoint(state)


def test_training_goes_on_while_a_checkpoint_is_written_as_it_was(
    dataset: Dataset, pretrained: models.State
) -> None:
    stores = Memory(), Slow()
    for store in stores:
        fit(trainer_of(variant("scratch"), dataset, pretrained), dataset, store, every=6)
    first, slow = (store.checkpoints for store in stores)
    assert [(c["epoch"], c["step"]) for c in slow] == [(0, 6), (1, 0), (1, 6)]
    for ours, theirs in zip(slow, first, strict=True):
        _assert_equal(ours["network"], theirs["network"])
        _assert_equal(ours["average"], theirs["average"])


class Full(Memory):
    def save_checkpoint(self, state: dict[str, Any]) -> None:
        raise OSError("no space left")


@pytest.mark.parametrize("every", [2, 12])
def test_a_checkpoint_that_cannot_be_written_ends_training(
    every: int, dataset: Dataset, pretrained: models.State
) -> None:
    """At the next one, or at the end, where only the first epoch's end has one."""
    with pytest.raises(OSError, match="no space left"):
        fit(trainer_of(variant("scratch"), dataset, pretrained), dataset, Full(), every)


def test_a_full_disk_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.runs.replacing", lambda _: nullcontext(Path("/dev/full")))
    with pytest.raises(OSError, match="No space left on device"):
        VariantFolder(tmp_path, RunFolder(tmp_path)).save_checkpoint({"a": torch.zeros(10**6)})


def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint_is_said_to_be_full(
    tmp_path: Path,
) -> None:
    """A limit on a file's size is met as the end of a disk is: a part of the file is there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            VariantFolder(tmp_path, RunFolder(tmp_path)).save_checkpoint({"a": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["a step", "scoring"])
def test_a_request_to_stop_saves_and_going_on_changes_nothing(
    moment: str, dataset: Dataset, pretrained: models.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = Memory(), Memory()
    fit(trainer_of(variant("scratch"), dataset, pretrained), dataset, whole)

    calls, check = 0, interruption.check
    steps_and_scorings = 3 if moment == "a step" else 8

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == steps_and_scorings:
            raise Interrupted("SIGTERM")

    monkeypatch.setattr(interruption, "check", stop)
    with pytest.raises(Interrupted):
        fit(trainer_of(variant("scratch"), dataset, pretrained), dataset, cut)
    monkeypatch.setattr(interruption, "check", check)

    state = cut.checkpoints[-1]
    assert (state["epoch"], state["step"]) == ((0, 2) if moment == "a step" else (0, 6))
    trainer = trainer_of(variant("scratch"), dataset, pretrained)
    trainer.load_state_dict(state)
    fit(trainer, dataset, cut)
    _assert_equal(cut.best, whole.best)
    assert [r["loss"] for r in cut.rows] == [r["loss"] for r in whole.rows]


@pytest.mark.parametrize(
    ("flip", "shift", "versions"), [(False, 0.0, 1), (True, 0.0, 2), (True, 0.125, 3)]
)
def test_training_on_cached_features_equals_training_through_the_trunk(
    flip: bool, shift: float, versions: int, pretrained: models.State
) -> None:
    """Shifts are new in every epoch, of which there are no more here than are stored."""
    # Adam would magnify the order of additions, which hangs on the batch, where a gradient is ~0.
    chosen = variant("frozen", epochs=3, name="sgd", learning_rate=0.1)
    dataset = load(tiny_config(data={"shift": shift, "flip": flip}).data)
    through = trainer_of(chosen, dataset, pretrained)
    store = Memory()
    fit(through, dataset, store)

    network = models.create(chosen, len(dataset.classes), pretrained, seed=0)

    def features(images: Images, *versions: Draws) -> Features:
        return extract(network, images, 40, CPU, versions=versions, advance=lambda _: None)

    assert dataset.train.settings.stored_epochs(3) == versions
    train = features(dataset.train, *(dataset.train.draws(0, epoch) for epoch in range(versions)))
    validation = features(dataset.validation, Draws.none(len(dataset.validation)))
    assert train.values.shape == (versions, 60, network.fc.in_features)
    cached = training.Trainer(models.head(network), chosen, len(train), CPU, seed=0)
    cached_store = Memory()
    evaluation = config.Evaluation(batch_size=40, keep="last")
    training.fit(cached, train, {"validation": validation}, evaluation, cached_store)

    assert set(cached_store.best) == {"fc.weight", "fc.bias"}
    for name, tensor in cached_store.best.items():
        torch.testing.assert_close(tensor, store.best[name], rtol=1e-4, atol=1e-6)
    for row, expected in zip(cached_store.rows, store.rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["accuracy"] == expected["accuracy"]


def test_later_epochs_take_the_stored_versions_in_turn(dataset: Dataset) -> None:
    stored = dataset.train.settings.stored_epochs(7)
    values = torch.arange(stored * 60 * 2.0).view(stored, 60, 2)
    features = Features(values, dataset.train)
    batch = torch.tensor([3, 1])
    for epoch in range(7):
        [(inputs, labels)] = features.batches([batch], features.draws(0, epoch))
        assert torch.equal(inputs, values[epoch % 4, batch])
        assert torch.equal(labels, dataset.train.labels[batch])


@pytest.mark.parametrize(
    ("flip", "shift", "epochs", "expected"),
    [(True, 0.125, 9, 4), (False, 0.125, 2, 2), (True, 0.0, 9, 2), (True, 0.0, 1, 1)],
)
def test_as_many_epochs_are_stored_as_differ_but_four(
    flip: bool, shift: float, epochs: int, expected: int
) -> None:
    assert config.Data(flip=flip, shift=shift).stored_epochs(epochs) == expected


def test_the_frozen_trunk_does_not_move(dataset: Dataset, pretrained: models.State) -> None:
    trainer = trainer_of(variant("frozen"), dataset, pretrained)
    before = _clone(trainer.network.state_dict())
    fit(trainer, dataset, Memory())
    after = trainer.network.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == ["fc.weight", "fc.bias"]


def test_a_loss_that_is_not_finite_ends_the_variant_and_spoils_no_checkpoint(
    dataset: Dataset, pretrained: models.State
) -> None:
    store = Memory()
    trainer = trainer_of(variant("scratch", name="sgd", learning_rate=1e30), dataset, pretrained)
    with pytest.raises(Divergence, match="no longer finite in epoch 1, step 2 of 6"):
        fit(trainer, dataset, store, every=1)
    assert all(torch.isfinite(c["totals"]).all() for c in store.checkpoints)


@pytest.mark.parametrize("lost", [[0], [0, 1]])
def test_an_epoch_whose_answers_are_not_finite_is_not_kept(
    dataset: Dataset,
    pretrained: models.State,
    monkeypatch: pytest.MonkeyPatch,
    lost: list[int],
) -> None:
    score, store = training.score, Memory()

    def spoilt(trainer: training.Trainer, *of: Any) -> dict[str, Any]:
        row = score(trainer, *of)
        return row | ({"loss": math.nan, "accuracy": 1.0} if trainer.epoch in lost else {})

    monkeypatch.setattr(training, "score", spoilt)
    trainer = trainer_of(variant("frozen", epochs=2), dataset, pretrained)
    scored: dict[str, Examples] = {"validation": dataset.validation}
    none = pytest.raises(Divergence, match="no epoch's answers were finite")
    with none if lost == [0, 1] else nullcontext():
        training.fit(trainer, dataset.train, scored, config.Evaluation(batch_size=40), store)
    assert store.kept == ((1, store.rows[-1]["accuracy"]) if lost == [0] else None)


def test_less_than_one_batch_is_a_configuration_error(
    dataset: Dataset, pretrained: models.State
) -> None:
    with pytest.raises(ConfigurationError, match="batch_size: 61 is more than the 60"):
        trainer_of(variant("scratch", batch_size=61), dataset, pretrained)


def test_the_loss_knows_both_heads() -> None:
    labels = torch.tensor([0, 1])
    main = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    aux = torch.zeros(2, 2)
    loss, aux_loss, right = training.losses((main, aux), labels, 0.0)
    expected = -torch.log_softmax(main, 1)[[0, 1], labels].mean()
    assert loss.item() == pytest.approx(expected.item())
    assert aux_loss.item() == pytest.approx(math.log(2))
    assert right.item() == 1
    alone, nothing, _ = training.losses(main, labels, 0.0)
    assert alone == loss and nothing == 0


def test_the_adjusted_loss_is_that_of_logits_with_the_shares_of_the_classes_on_top() -> None:
    adjustment = training.log_priors(torch.tensor([0, 0, 0, 1]), num_classes=3)
    assert adjustment.exp().tolist() == pytest.approx([0.75, 0.25, 0.25])  # of 2 there is none
    labels = torch.tensor([0, 1])
    main, aux = torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]]), torch.zeros(2, 3)
    loss, aux_loss, right = training.losses((main, aux), labels, 0.0, adjustment)
    for found, logits in ((loss, main), (aux_loss, aux)):
        expected = -torch.log_softmax(logits + adjustment, 1)[[0, 1], labels].mean()
        assert found.item() == pytest.approx(expected.item())
    assert right.item() == 1  # of the logits as they are


def test_a_balanced_head_knows_a_rare_class_better(pretrained: models.State) -> None:
    """Nine pictures of ten are of one class, and the two overlap: only a balanced head gives the
    rare one its due."""
    labels = torch.cat([torch.zeros(180), torch.ones(20)]).long()
    width = models.build(2, aux=False).fc.in_features
    values = torch.randn(200, width, generator=torch.Generator().manual_seed(0))
    values[:, 0] += 2.0 * labels
    values[:, 1:] = 0  # nothing to learn the rare ones by heart with
    recalls = {}
    for balance in ("none", "logits"):
        chosen = variant("frozen", epochs=30, batch_size=20, learning_rate=0.05, balance=balance)
        network = models.head(models.create(chosen, 2, pretrained, seed=0))
        pixels = torch.zeros(200, 3, 1, 1, dtype=torch.uint8)
        features = Features(values[None], Images.all(pixels, labels, tiny_config().data))
        trainer = training.Trainer(network, chosen, 200, CPU, seed=0)
        for _ in range(chosen.optim.epochs):
            training.train_epoch(trainer, features, lambda: None, lambda _: None)
            trainer.start_next_epoch()
        network.eval()
        with torch.no_grad():
            recalls[balance] = (network(values)[180:].argmax(1) == 1).float().mean().item()
    assert recalls["logits"] > recalls["none"] + 0.2


def test_the_auxiliary_head_trains_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the real network at 299 px in the precision of this machine: both losses are
    there."""
    monkeypatch.setattr(models, "inception_v3", inception_v3)
    settings = tiny_config(
        data={"input_size": 299, "train_images": 20, "validation": 0.5},
        optim={"aux_weight": 0.3, "batch_size": 4},
    )
    device = devices.choose(config.Runtime(device="cpu"))
    small = load(settings.data)
    chosen = settings.variants[0]
    network = models.create(chosen, 10, None, seed=0)
    trainer = training.Trainer(network, chosen, 4, device, seed=0)
    training.train_epoch(trainer, small.train, lambda: None, lambda _: None)
    totals = training.read_totals(trainer)
    assert (totals["loss"] or 0) > 0 and (totals["aux_loss"] or 0) > 0 and trainer.step == 1


def test_weight_decay_spares_biases_and_batch_norm_and_heads_have_their_own_rate() -> None:
    network = models.build(10, aux=True)
    optim = config.Optim(learning_rate=0.1, weight_decay=0.5, head_factor=10)
    groups = training.make_optimizer(network, optim).param_groups
    found = {
        name: group
        for group in groups
        for name, parameter in network.named_parameters()
        if any(parameter is p for p in group["params"])
    }
    assert len(found) == len(list(network.parameters()))
    for name, group in found.items():
        is_weight = name.endswith(("conv.weight", "fc.weight"))
        is_head = name.startswith(("fc.", "AuxLogits."))
        assert group["weight_decay"] == (0.5 if is_weight else 0.0)
        assert group["lr"] == pytest.approx(1.0 if is_head else 0.1)


def test_the_schedule_climbs_and_falls_to_zero() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optim = config.Optim(epochs=2, warmup=0.25, learning_rate=1.0)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = training.make_schedule(optimizer, optim, steps_per_epoch=10)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert schedule.get_last_lr()[0] == pytest.approx(0)


def test_the_average_follows_the_weights_and_their_statistics() -> None:
    network = nn.BatchNorm1d(2)
    average = training.ExponentialAverage(network, decay=0.75)
    with torch.no_grad():
        network.weight.fill_(3.0)
        network.state_dict()["running_mean"].fill_(5.0)
    average.update(step=0)
    means = average.module.state_dict()
    assert means["weight"].tolist() == pytest.approx([2.8, 2.8]), "a tenth of the start"
    assert means["running_mean"].tolist() == pytest.approx([4.5, 4.5])
    average.update(step=1000)
    assert means["weight"].tolist() == pytest.approx([2.85, 2.85])


def test_recalibration_takes_the_mean_over_training_images(
    dataset: Dataset, pretrained: models.State
) -> None:
    trainer = trainer_of(variant("scratch", average_decay=0.0), dataset, pretrained)
    first = trainer.network.get_submodule("Conv2d_1a_3x3")
    norm = first.get_submodule("bn")
    training.update_batch_norm(trainer, dataset.train, 60)
    with torch.no_grad():
        everything, _ = next(dataset.train.batches([torch.arange(60)]))
        expected = first.get_submodule("conv")(everything).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-3, atol=1e-4)
    assert norm.momentum == 0.1 and not norm.training


def test_no_image_is_normalised_alone(
    dataset: Dataset, pretrained: models.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "NORMALISED_TOGETHER", 4)
    trainer = trainer_of(variant("scratch", average_decay=0.0), dataset, pretrained)
    sizes: list[int] = []

    def seen(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        sizes.append(len(inputs[0]))

    trainer.scored_network.get_submodule("Conv2d_1a_3x3").register_forward_pre_hook(seen)
    training.update_batch_norm(trainer, dataset.train, 17)
    assert sorted(sizes) == [3, 3, 3, 4, 4]


def test_how_many_are_scored_at_once_decides_no_weight(
    dataset: Dataset, pretrained: models.State
) -> None:
    stores = [Memory(), Memory()]
    for store, batch_size in zip(stores, (20, 7), strict=True):
        evaluation = config.Evaluation(batch_size=batch_size, batch_norm_images=60, keep="last")
        trainer = trainer_of(variant("scratch", epochs=1), dataset, pretrained)
        training.fit(trainer, dataset.train, {"validation": dataset.validation}, evaluation, store)
    _assert_equal(stores[0].best, stores[1].best)
