"""One training loop for every variant."""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from jobs import config, distributed
from jobs.devices import Device
from jobs.errors import ConfigurationError, Divergence, Interrupted
from jobs.seeds import generator
from jobs.train import whole_batch
from jobs.train.evaluation import loss_and_accuracy, predict
from jobs.train.features import Examples
from jobs.train.models import moving_norms, set_training_mode
from jobs.train.writing import Row, Snapshot, Store, Writer
from serving.processes import COMPILERS, cores
from serving.progress import note, task

SECONDS_BETWEEN_CHECKPOINTS = 20  # at least, at the ends of short epochs
# Of training since the last checkpoint, from which the last epoch is worth one of its own, too: it
# is deleted as soon as the variant is tested.
SECONDS_WORTH_A_LAST_CHECKPOINT = 60
# Images, at most, in a batch that re-estimates batch-norm statistics. More than in a small training
# batch, whose variance leaves out how batches differ from each other; no more than fits into a
# CPU's memory. A constant, because it affects the weights.
NORMALISED_TOGETHER = 50


class Trainer:
    """A variant in training: its network, optimizer, schedule and progress."""

    def __init__(
        self,
        network: nn.Module,
        variant: config.Variant,
        num_images: int,
        device: Device,
        seed: int,
        *,
        compiled: bool = False,
    ) -> None:
        """
        Args:
            network: on the device; what requires a gradient is trained.
            num_images: how many there are to train on.
            compiled: whether its training step is; scoring is too short to win the time back.

        Raises:
            ConfigurationError: they do not fill one batch, or a batch not all processes.
        """
        optim, size = variant.optim, variant.optim.batch_size
        self.num_images = num_images
        self.steps_per_epoch = num_images // size  # a last batch of one has no statistics
        if not self.steps_per_epoch:
            raise ConfigurationError(
                f"optim.batch_size: {size} is more than the {num_images} training images"
            )
        self.network, self.variant, self.device, self.seed = network, variant, device, seed
        self.forward = whole_batch.parallel(network, size)
        self.optimizer = make_optimizer(network, optim)
        self.schedule = make_schedule(self.optimizer, optim, self.steps_per_epoch)
        decay = optim.average_decay
        self.average = ExponentialAverage(network, decay) if decay else None
        self.epoch = self.step = 0  # the next ones
        # Loss, auxiliary loss, right answers, steps before the first loss that is not finite.
        self.totals = torch.zeros(4, device=device.device)
        self.seconds = 0.0  # of training alone, in finished epochs
        self.clock = Stopwatch()  # of this epoch
        self.best_accuracy, self.best_epoch = -1.0, -1
        if compiled:
            compile_step(network)
        torch.manual_seed(seed)  # dropout draws from the global generators

    @property
    def scored_network(self) -> nn.Module:
        """The weights that are judged and kept: the average where there is one."""
        return self.network if self.average is None else self.average.module

    def order(self) -> Tensor:
        """What is left of the epoch: int64 [steps, B], this process's share of every batch."""
        size = self.variant.optim.batch_size
        order = torch.randperm(self.num_images, generator=generator(self.seed, self.epoch, "order"))
        order = order[: self.steps_per_epoch * size].view(-1, size)
        return order[self.step :, distributed.share(size)]

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to resume, as tensors and plain values; the same in any process."""
        cuda = self.device.device.type == "cuda"
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.module.state_dict() if self.average else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device.device) if cuda else None,
            "totals": distributed.total(self.totals),
            "epoch_seconds": self.clock.read(),
            **{name: getattr(self, name) for name in self._plain},
        }

    _plain = ("epoch", "step", "seconds", "best_accuracy", "best_epoch")

    def start_next_epoch(self) -> None:
        self.seconds += self.clock.seconds
        self.epoch, self.step, self.clock = self.epoch + 1, 0, Stopwatch()
        self.totals = torch.zeros_like(self.totals)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device.device)
        if distributed.rank() == 0:  # they are added up over the processes
            self.totals.copy_(state["totals"])
        self.clock.seconds = state["epoch_seconds"]
        for name in self._plain:
            setattr(self, name, state[name])


def compile_step(network: nn.Module) -> None:
    """Compiles what a call of the network runs, when it first does; `network.forward` stays eager.

    Networks that are alike share their code. Those that are not count against a limit, beyond which
    PyTorch goes on eagerly without a word.
    """
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    share = max(1, cores() // distributed.local_size())
    inductor.compile_threads = min(inductor.compile_threads or share, share, COMPILERS)
    dynamo.recompile_limit += 1
    network.compile(dynamic=False)


class ExponentialAverage:
    """An exponential average of a network's weights and batch-norm statistics.

    torch's own AveragedModel copies its counter to the device at every step and waits for it.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module, self.decay = copy.deepcopy(network), decay
        pairs = zip(self.module.state_dict().values(), network.state_dict().values(), strict=True)
        floats = [(mean, value) for mean, value in pairs if mean.is_floating_point()]
        self._means, self._values = [mean for mean, _ in floats], [value for _, value in floats]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after step 0, 1, …; early ones count less, to forget the
        initial weights (the warm-up of TensorFlow's ExponentialMovingAverage)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._means, self._values, 1 - decay)


class Stopwatch:
    """Adds up the seconds spent inside `with` blocks; can be read while one is running."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def read(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self.seconds + running

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds, self._since = self.read(), None


def train_epoch(
    trainer: Trainer,
    examples: Examples,
    checkpoint: Callable[[], None],
    advance: Callable[[int], None],
) -> None:
    """Trains from the trainer's current step to the end of its epoch.

    Nothing in the loop waits for the device: losses add up there and are read by the caller.
    """
    optim = trainer.variant.optim
    order = trainer.order().to(examples.labels.device)
    share = order.shape[1] / optim.batch_size  # of the batch, 1 in a single process
    draws = examples.draws(trainer.seed, trainer.epoch)
    adjustment = None
    if optim.balance == "logits":
        head = trainer.network.fc
        assert isinstance(head, nn.Linear)
        adjustment = log_priors(examples.labels, head.out_features)
    set_training_mode(trainer.network, trainer.variant)
    for inputs, labels in examples.batches(order.unbind(), draws):
        distributed.check()
        with trainer.device.autocast():
            outputs = trainer.forward(inputs)
        loss, aux_loss, right = losses(outputs, labels, optim.label_smoothing, adjustment)
        loss, aux_loss = loss * share, aux_loss * share
        (distributed.size() * (loss + optim.aux_weight * aux_loss)).backward()  # then averaged
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.schedule.step()
        if trainer.average is not None:
            trainer.average.update(trainer.epoch * trainer.steps_per_epoch + trainer.step)
        finite = torch.isfinite(loss + aux_loss) * share
        trainer.totals += torch.stack([loss, aux_loss, right, finite]).detach()
        trainer.step += 1
        advance(optim.batch_size)
        checkpoint()


def log_priors(labels: Tensor, num_classes: int) -> Tensor:
    """float32 [num_classes]: the logarithm of each class's share of the training images, for logit
    adjustment (Menon et al. 2021, arXiv 2007.07314, with τ = 1).

    A network that learns with them added to its logits answers, without them, as if all classes
    were equally frequent.

    Args:
        labels: int64 [N].
    """
    counts = labels.bincount(minlength=num_classes).clamp(min=1)
    return (counts / len(labels)).log()


def losses(
    outputs: Tensor | tuple[Tensor, Tensor],
    labels: Tensor,
    label_smoothing: float,
    adjustment: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Main and auxiliary cross-entropy and the number of right answers, all float32 scalars.

    Args:
        outputs: logits [B, C], or a pair of them where there is an auxiliary head.
        labels: int64 [B].
        adjustment: float32 [C], added to the logits whose cross-entropy is taken.
    """
    logits, aux_logits = outputs if isinstance(outputs, tuple) else (outputs, None)

    def cross_entropy(of: Tensor) -> Tensor:
        adjusted = of.float() if adjustment is None else of.float() + adjustment
        return F.cross_entropy(adjusted, labels, label_smoothing=label_smoothing)

    loss = cross_entropy(logits)
    aux_loss = torch.zeros_like(loss) if aux_logits is None else cross_entropy(aux_logits)
    return loss, aux_loss, (logits.argmax(1) == labels).sum().float()


def fit(
    trainer: Trainer,
    train: Examples,
    scored: dict[str, Examples],
    evaluation: config.Evaluation,
    store: Store,
    checkpoint_every: int = 0,
) -> None:
    """Trains all epochs that remain; after each, scores, keeps the best weights and saves.

    Args:
        scored: splits to score after each epoch, under their names; the last one chooses.
        checkpoint_every: steps between checkpoints within an epoch; 0 for none, and none after
            a short epoch either.

    Raises:
        Divergence: the loss is not finite, or the answers of every epoch are not; the last good
            checkpoint stays.
        Interrupted: asked to stop; the state is saved.
    """
    optim = trainer.variant.optim
    scored_at_once = trainer.device.scored_at_once(evaluation)
    saved = time.monotonic()
    best: Snapshot | None = None  # the best weights, until the next checkpoint

    def save() -> None:
        nonlocal saved, best
        read_totals(trainer)  # raises before a checkpoint is spoilt
        writer.begin(best, trainer.state_dict())
        saved, best = time.monotonic(), None

    def is_due() -> bool:
        passed = time.monotonic() - saved
        if trainer.epoch == optim.epochs:
            return passed >= SECONDS_WORTH_A_LAST_CHECKPOINT
        return bool(checkpoint_every) or passed >= SECONDS_BETWEEN_CHECKPOINTS

    def checkpoint() -> None:
        if checkpoint_every and trainer.step % checkpoint_every == 0:
            save()

    with Writer(store, trainer.device) as writer:
        try:
            while trainer.epoch < optim.epochs:
                label = f"{trainer.variant.name}, epoch {trainer.epoch + 1} of {optim.epochs}"
                images = (trainer.steps_per_epoch - trainer.step) * optim.batch_size
                with trainer.clock, task(label, images) as advance:
                    train_epoch(trainer, train, checkpoint, advance)
                    totals = read_totals(trainer)
                rows = [training_row(trainer, totals)]
                update_batch_norm(trainer, train, evaluation.batch_norm_images)
                rows += [score(trainer, *split, scored_at_once) for split in scored.items()]
                distributed.once(store.append, rows)
                accuracy, finite = rows[-1]["accuracy"], math.isfinite(rows[-1]["loss"])
                note(f"{label}: {accuracy:.1%} of {rows[-1]['split']} right")
                if evaluation.keep == "last" or (finite and accuracy > trainer.best_accuracy):
                    trainer.best_accuracy, trainer.best_epoch = accuracy, trainer.epoch
                    kept = {"epoch": trainer.epoch, "accuracy": accuracy}
                    best = Snapshot({"weights": trainer.scored_network.state_dict(), **kept})
                trainer.start_next_epoch()
                if distributed.once(is_due):
                    save()
            if trainer.best_epoch < 0:
                raise Divergence("no epoch's answers were finite")
            writer.begin(best)
            writer.finish()
        except Interrupted:
            save()
            writer.finish()
            raise


def read_totals(trainer: Trainer) -> dict[str, float | None]:
    """Means over the epoch so far; waits for the device.

    Raises:
        Divergence: they are not finite.
    """
    loss, aux_loss, right, finite = distributed.total(trainer.totals).tolist()
    if not math.isfinite(loss + aux_loss):
        step = int(finite + 0.001) + 1  # shares of processes add up but for rounding
        raise Divergence(
            f"the loss was no longer finite in epoch {trainer.epoch + 1}, step {step} of "
            f"{trainer.steps_per_epoch}"
        )
    steps = max(trainer.step, 1)
    return {
        "loss": loss / steps,
        "aux_loss": aux_loss / steps or None,  # exactly zero without an auxiliary head
        "accuracy": right / (steps * trainer.variant.optim.batch_size),
    }


def training_row(trainer: Trainer, totals: dict[str, float | None]) -> Row:
    """The epoch's line in metrics.jsonl; `seconds` counts training since the variant began."""
    images = trainer.step * trainer.variant.optim.batch_size
    return _row(
        trainer,
        "train",
        **totals,
        images_per_second=images / trainer.clock.seconds,
        learning_rate=_rate_of_last_step(trainer.schedule),
    )


def _rate_of_last_step(schedule: LambdaLR) -> float:
    """Of the first group; the schedule itself stands at the step that comes next."""
    return float(schedule.base_lrs[0] * schedule.lr_lambdas[0](schedule.last_epoch - 1))


def score(trainer: Trainer, split: str, examples: Examples, batch_size: int) -> Row:
    """Scores the weights that are kept, on one split, as a line of metrics.jsonl."""
    start = time.perf_counter()
    with task(f"{trainer.variant.name}, scoring {split}", len(examples)) as advance:
        logits = predict(trainer.scored_network, examples, batch_size, trainer.device, advance)
    rate = len(examples) / (time.perf_counter() - start)
    found = loss_and_accuracy(logits, examples.labels)
    return _row(trainer, split, **found, images_per_second=rate)


def _row(trainer: Trainer, split: str, **values: float | None) -> Row:
    return {
        "variant": trainer.variant.name,
        "seed": trainer.seed,
        "epoch": trainer.epoch,
        "split": split,
        **values,
        "seconds": trainer.seconds + trainer.clock.seconds,
    }


@torch.no_grad()
def update_batch_norm(trainer: Trainer, train: Examples, num_images: int) -> None:
    """Re-estimates the variant's moving batch-norm statistics on `num_images` training images.

    After few steps the running averages still remember their start; a plain mean over some
    hundred images is what they would converge to.
    """
    network = trainer.scored_network
    norms = moving_norms(network, trainer.variant)
    network.eval()  # dropout stays off: it would draw random numbers
    if not num_images or not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    order = torch.randperm(len(train), generator=generator(trainer.seed, "batch norm"))
    order = order[:num_images].to(train.labels.device)
    parts = order.tensor_split(math.ceil(len(order) / NORMALISED_TOGETHER))  # none of one image
    if len(parts[-1]) >= distributed.size():  # as a batch's, an image counts in one process
        parts = tuple(part[distributed.share(len(part))] for part in parts)
    for taken, (inputs, _) in enumerate(train.batches(parts), start=1):
        distributed.check()
        for norm in norms:
            norm.momentum = 1 / taken  # a plain mean; None is one, too, but waits for the device
        with trainer.device.autocast():
            network.forward(inputs)  # not compiled: each momentum would be another graph
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def make_optimizer(network: nn.Module, optim: config.Optim) -> Optimizer:
    """Fused, over what requires a gradient; weight decay on weights of two dimensions and more.

    The heads, which are always newly initialised, take `head_factor` times the learning rate.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith(("fc.", "AuxLogits.")), parameter.ndim > 1].append(parameter)
    settings = [
        {
            "params": parameters,
            "lr": optim.learning_rate * (optim.head_factor if is_head else 1),
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (is_head, decays), parameters in groups.items()
    ]
    if optim.name == "sgd":
        return SGD(settings, momentum=0.9, nesterov=True, fused=True)
    return (AdamW if optim.name == "adamw" else Adam)(settings, fused=True)


def make_schedule(optimizer: Optimizer, optim: config.Optim, steps_per_epoch: int) -> LambdaLR:
    """Constant, or a linear warm-up followed by a cosine decay to zero."""
    steps = optim.epochs * steps_per_epoch
    warmup = max(1, round(optim.warmup * steps))

    def factor(step: int) -> float:
        if optim.schedule == "constant":
            return 1.0
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2

    return LambdaLR(optimizer, factor)
