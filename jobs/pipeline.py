"""The job from configuration to run folder: every variant in turn, then comparison and report."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models import Inception3

from jobs import devices, distributed, environment, errors, table, watching
from jobs.config import Config, Part, Variant
from jobs.data import duplicates, findings
from jobs.data.dataset import Dataset, draw_source_task, load
from jobs.data.images import Draws, Images
from jobs.delivery import export, publishing, tracking
from jobs.delivery.storage import Storage
from jobs.errors import ConfigurationError, JobError, UnavailableError
from jobs.following import following
from jobs.report import comparison, page
from jobs.results import Comparison, Diverged, Done, Trained
from jobs.runs import WEIGHTS, RunFolder, VariantFolder, write_arrays, write_json
from jobs.train import models, plan
from jobs.train.evaluation import class_maps, predict, scores
from jobs.train.features import Examples, Features, extract
from jobs.train.kept import pairs, shrunk, surest
from jobs.train.training import Trainer, fit
from jobs.train.writing import Snapshot, map_tensors
from serving.archive import Scores
from serving.files import digest_of, write
from serving.progress import above, console, log, task

COARSE = 2  # from an input this many times as large as the images on, the log says so
WRONG, RIGHT = 24, 8  # answers whose pictures and class maps are kept for the report
WORST = 12  # … pairs of doubles
STAND_IN_VERSION = 1  # to be raised when its pictures or its training change

Array = NDArray[Any]


def run(config: Config, folder: RunFolder) -> Comparison:
    """Trains, tests, compares and reports; resumes where an earlier call stopped.

    Returns:
        The comparison, as written to comparison.json.

    Raises:
        JobError: no variant has a result.
    """
    with distributed.held_once(folder.open(config)):
        if distributed.once(lambda: folder.finished):
            log(f"{folder.path} is finished; --run-id NAME starts another")
            result = distributed.once(folder.comparison)
        else:
            with distributed.held_once(_followed(config, folder)):
                result = _work(config, folder)
        if result.winner is None:
            raise JobError(f"no variant has a result, see {folder.path}/comparison.json")
        # Still held, so that `deliver` does not begin to do the same.
        distributed.once(_export, config, folder)
        distributed.once(_publish, config, folder)
    return result


@contextmanager
def _followed(config: Config, folder: RunFolder) -> Iterator[None]:
    """Shows the metrics to whoever is to see them while the block works."""
    looks = tracking.looks(folder, config)
    if config.storage.uri is not None:
        looks["S3"] = publishing.Live(folder, config.storage).look
    if console.is_interactive:
        looks["the table"] = lambda: _show_table(config, folder)
    try:
        with tracking.exposed(folder, config.tracking.prometheus), following(looks):
            yield
    finally:
        above.clear()


def _show_table(config: Config, folder: RunFolder) -> None:
    above[:] = [table.progress(watching.progress(config, folder))]


def _work(config: Config, folder: RunFolder) -> Comparison:
    job = Job(config, folder)
    job.find_weights()
    _ = job.dataset  # loaded by all processes, before the first one alone uses it
    distributed.once(job.announce)
    distributed.once(job.find_doubles)
    for part in config.parts:
        job.train(config.variant(part.variant), part.seed)
    return distributed.once(_conclude, config, folder)


def _conclude(config: Config, folder: RunFolder) -> Comparison:
    result = comparison.compare(folder, config)
    page.write_report(folder)
    folder.write_manifest()
    return result


def _export(config: Config, folder: RunFolder) -> None:
    """Exports the winner once; without the packages for that, the log says how to do it later."""
    if not config.export.enabled or folder.packed(config.export.name):
        return
    if missing := export.missing_packages():
        names = ", ".join(missing)
        log(f"not exported: {names} not installed; `export {folder.path}` packs it elsewhere")
        return
    export.export(folder, config.export)


def _publish(config: Config, folder: RunFolder) -> None:
    if config.storage.uri is not None:
        try:
            publishing.publish(Storage(config.storage), folder)
        except UnavailableError as error:
            uri = config.storage.uri  # which a run that ended without storage does not know
            log(f"not published: {error}; `publish {folder.path} --set storage.uri={uri}` does it")


def report_again(folder: RunFolder) -> None:
    """Draws the report of a run whose variants have results, and lists it in the manifest."""
    config = folder.config()
    with folder.open(config):
        comparison.compare(folder, config)
        page.write_report(folder)
        if folder.finished:
            folder.write_manifest()


def train(config: Config, folder: RunFolder, name: str) -> list[Done | Diverged]:
    """Trains one variant of the configuration, with every seed; `run` later does the rest."""
    variant = config.variant(name)
    with distributed.held_once(folder.open(config)):
        seeds = config.runtime.seeds
        there = distributed.once(lambda: [folder.variant(name, seed).result() for seed in seeds])
        results = [result for result in there if result is not None]
        if len(results) == len(seeds):  # and what a manifest lists stays as it is
            return results
        with distributed.held_once(_followed(config, folder)):
            job = Job(config, folder)
            return [job.train(variant, seed) for seed in seeds]


def train_part(config: Config, folder: RunFolder, part: Part, agree: Callable[[str], None]) -> None:
    """Trains one variant with one seed; other processes may train others in the same folder.

    Args:
        agree: is called with the data's digest, and raises an error if it should be another.
    """
    if not folder.variant(*part).finished:
        with ExitStack() as held:
            try:
                held.enter_context(tracking.exposed(folder, config.tracking.prometheus))
            except ConfigurationError as error:  # of one machine's parts, the first has the port
                log(f"warning: {error}")
            job = Job(config, folder)
            agree(job.dataset.description.digest)
            job.train(config.variant(part.variant), part.seed)


class Job:
    """What the variants of one run share; each part is created on first use."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.device = devices.choose(config.runtime)
        self.batch_size = self.device.scored_at_once(config.evaluation)
        devices.keep_compiled(Path(config.data.cache).expanduser() / "compiled")
        distributed.once(folder.add_environment, environment.describe(self.device))

    @cached_property
    def dataset(self) -> Dataset:
        """The configured data on the device; loading it writes data.json and architecture.json.

        Raises:
            UnavailableError: the data cannot be reached or read.
            ConfigurationError: it has too few images for a batch, or the validation split is empty.
        """
        with distributed.held_once(self.folder.alone("the data")):
            known = distributed.once(self._known_digest)  # other machines need not have the folder
            dataset = distributed.in_turns(lambda: self._load(known or self._known_digest()))
        if distributed.once(str, dataset.description.digest) != dataset.description.digest:
            raise UnavailableError("the pictures changed while this job's processes read them")
        splits = " · ".join(f"{n:,} {k}" for k, n in dataset.description.images)
        log(f"data: {dataset.description.source}: {splits}")
        height, width = dataset.description.image_size
        if COARSE * max(height, width) <= self.config.data.input_size:
            log(
                f"data: pictures are stored at {width}×{height}: a service of this model shrinks "
                "larger pictures to that first"
            )
        return dataset.to(self.device.device)

    def _known_digest(self) -> str | None:
        """The digest of the data that the run began with, if it has begun."""
        there = (self.folder.path / "data.json").is_file()
        return self.folder.facts().digest if there else None

    def _load(self, digest: str | None) -> Dataset:
        """Loads and checks the data, which must have this digest if the run has begun; the first
        process writes what they are."""
        dataset = load(self.config.data, digest)
        if not len(dataset.validation) and self.config.evaluation.select_on == "validation":
            raise ConfigurationError(
                f"data.validation: {self.config.data.validation} of {len(dataset.train)} training "
                "images is none, and evaluation.select_on validation chooses by them"
            )
        for variant in self.config.variants:  # before the first of them is trained for hours
            if variant.optim.batch_size > len(dataset.train):
                raise ConfigurationError(
                    f"variants.{variant.name}.optim.batch_size: {variant.optim.batch_size} is more "
                    f"than the {len(dataset.train)} training images"
                )
        if distributed.rank() == 0:
            self._describe(dataset)
        return dataset

    def _describe(self, dataset: Dataset) -> None:
        if self._known_digest() != dataset.description.digest:  # else it may have doubles already
            write(self.folder.path / "data.json", dataset.description.to_json())
        elif self.folder.facts().image_size != dataset.description.image_size:
            raise UnavailableError(
                "the pictures are stored in another size than when this run began: a damaged one "
                "was of another size; --run-id NAME starts another run"
            )
        architecture = models.describe(len(dataset.classes), self.config.data.input_size)
        write_json(self.folder.path / "architecture.json", architecture)

    def find_doubles(self) -> None:
        """Writes findings.csv, the worst few of them as pictures, and what data.json says of it."""
        dataset = self.dataset
        doubles = duplicates.among(dataset, duplicates.thumbnails(dataset), self.device.device)
        found = Counter(finding.kind for finding in doubles.findings)
        update = {"doubles": dict(found), "leaked": doubles.leaked}
        facts = dataset.description.model_copy(update=update)
        write(self.folder.path / "findings.csv", findings.to_csv(doubles.findings))
        if found:
            log("data: " + ", ".join(f"{n:,} {kind}s" for kind, n in found.items()))
            write_arrays(self.folder.path / "doubles.npz", pairs(dataset, doubles.findings[:WORST]))
        write(self.folder.path / "data.json", facts.to_json())  # which the report believes

    def find_weights(self) -> None:
        """Loads pretrained weights from a file or a server now, if a variant starts from them: that
        they are missing has to be known before another one has trained for hours."""
        wanted = any(variant.init == "pretrained" for variant in distributed.once(self._remaining))
        if wanted and self.config.weights.source != "stand-in":
            _ = self.pretrained

    def _remaining(self) -> list[Variant]:
        parts = (part for part in self.config.parts if not self.folder.variant(*part).finished)
        return [self.config.variant(part.variant) for part in parts]

    def announce(self) -> None:
        """Says what is still to be done, and about how long it takes."""
        if remaining := self._remaining():
            stand_in = self._stand_in if self._needs_stand_in(remaining) else None
            with devices.memory_for("a first step"):
                log(plan.outline(self.config, self.dataset, self.device, remaining, stand_in))

    @property
    def _stand_in(self) -> Variant:
        return Variant(name="stand-in", init="random", optim=self.config.weights.stand_in.optim)

    def _needs_stand_in(self, variants: Sequence[Variant]) -> bool:
        wanted = any(variant.init == "pretrained" for variant in variants)
        there = self._kept_stand_in.is_file() or self.folder.stand_in().finished
        return wanted and self.config.weights.source == "stand-in" and not there

    @cached_property
    def pretrained(self) -> models.State:
        """The one set of weights that all pretrained variants start from."""
        with distributed.held_once(self.folder.alone("the pretrained weights")):
            return self._load_pretrained()

    def _load_pretrained(self) -> models.State:
        source = self.config.weights.source
        log(f"weights: {self.config.weights.description}")
        if source != "stand-in":
            weights = distributed.in_turns(lambda: models.load_pretrained(source))
            distributed.once(self._refuse_others, Path(source).expanduser())
            return weights
        folder = self.folder.stand_in()
        if not distributed.once(_take_stand_in, folder, self._kept_stand_in):
            self._train_stand_in(folder)
        return models.check_fit(_best(folder), source)

    def _refuse_others(self, source: Path) -> None:
        """A file may be replaced between two starts: variants would begin with different weights.

        Raises:
            UnavailableError: the run began with others.
        """
        known = self.folder.path / WEIGHTS
        digest = digest_of(source) if source.is_file() else None
        if digest and not known.is_file():
            write(known, digest)
        elif digest and known.read_text() != digest:
            raise UnavailableError(f"weights {source}: not those that this run began with")

    def features(self, images: Images) -> Tensor:
        """What the pretrained trunk makes of images as they are: float32 [N, 2048]."""
        variant = Variant(name="inspection", init="pretrained", trainable="head")
        whole = models.create(variant, len(self.dataset.classes), self.pretrained, seed=0)
        examples = self._examples(variant, whole.to(self.device.device), images)
        assert isinstance(examples, Features)
        return examples.values[0]

    @property
    def _kept_stand_in(self) -> Path:
        """Where the next run finds the weights, named after all that they depend on."""
        data, evaluation, device = self.config.data, self.config.evaluation, self.device
        parts = [
            STAND_IN_VERSION,
            self.config.weights.stand_in.model_dump(),
            [evaluation.keep, evaluation.batch_norm_images],
            [data.input_size, data.normalization, data.flip, data.shift, data.seed],
            [device.device.type, str(device.dtype), distributed.size(), torch.__version__],
        ]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return Path(data.cache).expanduser() / f"stand-in-{digest}.safetensors"

    def _train_stand_in(self, folder: VariantFolder) -> None:
        settings, variant = self.config.weights.stand_in, self._stand_in
        images = draw_source_task(settings, self.config.data).to(self.device.device)
        network = models.create(variant, int(images.labels.max()) + 1, None, seed=0)
        network.to(self.device.device)
        pictures = variant.optim.epochs * len(images)
        compiled = self._compiles(variant, pictures)
        trainer = Trainer(network, variant, len(images), self.device, seed=0, compiled=compiled)
        try:
            self._fit(trainer, images, {}, folder)
        except errors.Divergence as error:  # of no variant
            raise ConfigurationError(f"weights.stand_in.optim: {error}") from None
        outcome = Trained(seconds=trainer.seconds)
        distributed.once(_keep_stand_in, folder, self._kept_stand_in)
        distributed.once(folder.save_result, outcome)

    def train(self, variant: Variant, seed: int) -> Done | Diverged:
        """Trains and tests one variant, or gives the result that the run already has."""
        with distributed.held_once(self.folder.alone(f"{variant.name}, seed {seed}")):
            return self._train_once(variant, seed)

    def _train_once(self, variant: Variant, seed: int) -> Done | Diverged:
        folder = distributed.once(self.folder.variant, variant.name, seed)
        result: Done | Diverged | None = distributed.once(folder.result)
        if result is None:
            distributed.once(folder.tidy)
            if variant.head_of is not None:  # once, whichever part needs it first
                self.train(self.config.variant(variant.head_of), seed)
            try:
                with devices.memory_for(variant.name):
                    result = self._train(variant, seed, folder)
            except errors.Divergence as error:
                log(f"{variant.name}: stopped: {error}; the other variants continue")
                result = Diverged(variant=variant.name, seed=seed, reason=str(error))
            distributed.once(folder.save_result, result)
        return result

    def _train(self, variant: Variant, seed: int, folder: VariantFolder) -> Done:
        dataset, select_on = self.dataset, self.config.evaluation.select_on
        pretrained = self.pretrained if variant.init == "pretrained" else None
        start_with = f"{variant.init} start" + (
            f", head of {variant.head_of}" * bool(variant.head_of)
        )
        log(f"{variant.name}: {start_with}, trains {variant.trainable}, on {self.device}")
        self.device.start_measuring()
        whole = models.create(variant, len(dataset.classes), pretrained, seed)
        if variant.head_of is not None:
            whole.fc.load_state_dict(self._head(variant.head_of, seed))
        whole.to(self.device.device)
        kernels = models.first_kernels(whole, "before")
        trainable = models.count_parameters(whole, trainable=True)

        start = time.perf_counter()
        train = self._examples(variant, whole, dataset.train, seed)
        feature_seconds = time.perf_counter() - start
        scored = {}
        if len(dataset.validation):
            scored["validation"] = self._examples(variant, whole, dataset.validation)
        if select_on == "test":
            scored["test"] = self._examples(variant, whole, dataset.test)

        network = models.head(whole) if variant.cached else whole
        compiled = self._compiles(variant, self.config.epochs_alike(variant) * len(train))
        trainer = Trainer(network, variant, len(train), self.device, seed, compiled=compiled)
        trainer.seconds = feature_seconds
        left_out = Snapshot(whole.state_dict()).on_cpu() if variant.cached else {}
        self._fit(trainer, train, scored, replace(folder, untrained=left_out))

        whole.load_state_dict(_best(folder))  # and so the head, which is a part of it
        if "validation" in scored:
            self._predict(trainer, "validation", scored["validation"], folder)
        test = scored.get("test") or self._examples(variant, whole, dataset.test)
        logits = self._predict(trainer, "test", test, folder)
        kernels |= models.first_kernels(whole, "after")
        distributed.once(write_arrays, folder.path / "kernels.npz", kernels)
        trained = variant.optim.epochs * trainer.steps_per_epoch * variant.optim.batch_size
        return Done(
            variant=variant.name,
            seed=seed,
            parameters=models.count_parameters(whole),
            trainable_parameters=trainable,
            epochs=variant.optim.epochs,
            best_epoch=trainer.best_epoch,
            selected_on=select_on,
            selection_accuracy=trainer.best_accuracy,
            seconds=trainer.seconds,
            images_per_second=trained / trainer.seconds,
            test=distributed.once(self._record, trainer, whole, logits, folder),
            peak_memory_bytes=self.device.peak_memory(),
        )

    def _head(self, name: str, seed: int) -> models.State:
        """The last layer as another variant has trained it.

        Raises:
            Divergence: it was stopped before.
        """
        folder = distributed.once(self.folder.variant, name, seed)
        if isinstance(distributed.once(folder.result), Diverged):
            raise errors.Divergence(f"{name}, whose head it starts with, was stopped")
        return {k.removeprefix("fc."): v for k, v in _best(folder).items() if k.startswith("fc.")}

    def _compiles(self, variant: Variant, num_images: int) -> bool:
        """Whether compiling the training step pays and works here; the log says which."""
        if not self.device.compiles(variant, num_images):
            return False
        if missing := self.device.missing_to_compile():
            log(f"{variant.name}: not compiled, and so slower: {missing}")
            return False
        log(f"{variant.name}: to be compiled, which takes minutes the first time")
        return True

    def _examples(
        self, variant: Variant, whole: Inception3, images: Images, seed: int | None = None
    ) -> Examples:
        """The images themselves, or their features where the trunk is a fixed function: of what
        epochs draw with `seed`, or of the images as they are."""
        if not variant.cached:
            return images
        versions = [Draws.none(len(images))]
        if seed is not None:
            epochs = self.config.data.stored_epochs(variant.optim.epochs)
            versions = [images.draws(seed, epoch) for epoch in range(epochs)]
        with task(f"{variant.name}, features", len(images) * len(versions)) as advance:
            return extract(
                whole, images, self.batch_size, self.device, versions=versions, advance=advance
            )

    def _fit(
        self, trainer: Trainer, train: Examples, scored: dict[str, Examples], folder: VariantFolder
    ) -> None:
        # In the file all tensors share one storage, and each would bring the whole of it: to the
        # other processes, and into the optimizer, which takes a CPU's as they are.
        state = distributed.once(lambda: map_tensors(folder.load_checkpoint(), Tensor.clone))
        if state is not None:
            try:
                trainer.load_state_dict(state)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise UnavailableError(
                    f"{folder.checkpoint}: of another training: {errors.first_line(error)}; "
                    "without that file, the variant is trained from its start"
                ) from None
            if (kept := distributed.once(folder.kept)) is not None:
                trainer.best_epoch, trainer.best_accuracy = kept
            log(f"{trainer.variant.name}: resumes in epoch {trainer.epoch + 1}")
        else:  # what is left of another training is not this one's best
            distributed.once(lambda: folder.best.unlink(missing_ok=True))
        evaluation, every = self.config.evaluation, self.config.runtime.checkpoint_every
        fit(trainer, train, scored, evaluation, folder, every)

    def _predict(
        self, trainer: Trainer, split: str, examples: Examples, folder: VariantFolder
    ) -> Tensor:
        """Logits of a split by the weights that were kept; writes <split>_predictions.npz."""
        with task(f"{trainer.variant.name}, {split}", len(examples)) as advance:
            logits = predict(trainer.network, examples, self.batch_size, self.device, advance)
        if not logits.isfinite().all():  # the last step has spoilt them, and no loss came after it
            raise errors.Divergence(f"answers to the {split} images are not finite")
        arrays = {"logits": logits.numpy(), "labels": examples.labels.cpu().numpy()}
        file = folder.path / f"{split}_predictions.npz"
        distributed.once(write_arrays, file, arrays)
        return logits

    def _record(
        self, trainer: Trainer, whole: Inception3, logits: Tensor, folder: VariantFolder
    ) -> Scores:
        """Scores the test logits of the kept weights; writes examples.npz and a row of metrics."""
        name, labels = trainer.variant.name, self.dataset.test.labels.cpu()
        wrong, right = surest(logits, labels)
        rows = torch.cat([wrong[:WRONG], right[:RIGHT]])
        pixels, maps = shrunk(self.dataset.test.raw(rows)), self._maps(whole, rows, logits)
        kept = {"rows": rows.numpy(), "pixels": pixels, "maps": maps}
        write_arrays(folder.path / "examples.npz", kept)
        result = scores(logits, labels)
        row = {"variant": name, "seed": trainer.seed, "epoch": trainer.best_epoch, "split": "test"}
        row |= {"loss": result.loss, "accuracy": result.accuracy, "seconds": trainer.seconds}
        folder.append([row])
        log(f"{name}: {result.accuracy:.2%} of {len(labels):,} test images")
        return result

    def _maps(self, whole: Inception3, rows: Tensor, logits: Tensor) -> Array:
        """Class maps float32 [n, h, w] of some test images, each for its answer."""
        images = self.dataset.test.take(rows)
        maps = class_maps(whole, images, self.batch_size, self.device)
        return maps[torch.arange(len(rows)), logits[rows].argmax(1)].numpy()


def _keep_stand_in(folder: VariantFolder, kept: Path) -> None:
    """For other runs; a cache that cannot be written to, as on a read-only root, is no error."""
    try:
        write(kept, folder.best.read_bytes())
    except OSError as error:
        log(f"weights: other runs have to train them again: {error}")


def _take_stand_in(folder: VariantFolder, kept: Path) -> bool:
    """Whether the stand-in is in the folder: trained there, or now copied from an earlier run's."""
    if not folder.finished and kept.is_file() and not folder.checkpoint.is_file():
        try:
            models.read(kept)
        except UnavailableError as error:
            log(f"stand-in: trained again: {error}")
            return False
        log(f"stand-in: trained before, from {kept}")
        write(folder.best, kept.read_bytes())
        folder.save_result(Trained(seconds=0.0))
    return folder.finished


def _best(folder: VariantFolder) -> models.State:
    return distributed.once(models.read, folder.best)
