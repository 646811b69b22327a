"""A configured source with its subsets and splits.

Every source ends as `uint8 [N, 3, H, W]` pixels, `int64 [N]` labels and class names.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from jobs import config
from jobs.data import decoding, sources
from jobs.data.images import Images, fit_on, stratified
from jobs.data.sources import Source
from jobs.errors import ConfigurationError, UnavailableError
from jobs.results import Facts
from serving.archive import Counts


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, and their description."""

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    description: Facts
    skipped: tuple[tuple[str, str], ...] = ()
    """Files that are not pictures, as paths below the data's root, and why."""
    stored: "Dataset | None" = None
    """This data set before it was moved to a device, with the rows that its pictures have in the
    store."""

    @property
    def splits(self) -> dict[str, Images]:
        """All images, the test images first."""
        return {"test": self.test, "train": self.train, "validation": self.validation}

    @cached_property
    def paths(self) -> list[str]:
        """Of all images, in the order of `splits`, as they were called when they were first asked
        for: another process may find them under other names."""
        return [
            path
            for split, images in (self.stored or self).splits.items()
            for path in decoding.paths(images, "test" if split == "test" else "train")
        ]

    @property
    def labels(self) -> Tensor:
        """int64 [N] of all images, in the order of `splits`, on the CPU."""
        return torch.cat([images.labels.cpu() for images in self.splits.values()])

    def raw(self, position: int) -> Tensor:
        """uint8 [3, H, W] of the image at a position in the order of `splits`."""
        for images in self.splits.values():
            if position < len(images):
                at = torch.tensor([position], device=images.labels.device)
                return images.raw(at)[0].cpu()
            position -= len(images)
        raise IndexError(position)

    def to(self, device: torch.device) -> "Dataset":
        splits = (self.train, self.validation, self.test)
        resident = fit_on(device, splits)
        train, validation, test = (images.to(device, resident=resident) for images in splits)
        stored = self.stored or self
        return replace(self, train=train, validation=validation, test=test, stored=stored)


def load(settings: config.Data, digest: str | None = None) -> Dataset:
    """Loads the configured source, draws its subsets and takes validation out of training.

    Args:
        digest: of the data that a run began with, and is to have again.

    Raises:
        UnavailableError: the data cannot be reached or read, or has become other data.
        ConfigurationError: it has fewer images than requested, lacks an excluded one, or a class
            has none left to train on; or none is left to test with.
    """
    source, digest = _found(settings, digest)
    train = _subset(source.train, settings.train_images, "train_images")
    test = _subset(source.test, settings.test_images, "test_images")
    share = round(settings.validation * len(train))
    held_out, kept = stratified(train.labels, share, settings.seed)
    validation, train = train.take(held_out), train.take(kept)
    _require_pictures(source.classes, train, test)
    height, width = train.pixels.shape[-2:]
    tested = test.labels.numpy().tobytes() + test.digests().tobytes()
    description = Facts(
        source=source.name,
        classes=tuple(source.classes),
        images=Counts(train=len(train), validation=len(validation), test=len(test)),
        image_size=(height, width),
        test_digest=hashlib.sha256(tested).hexdigest(),
        digest=digest,
        skipped=tuple(": ".join(of) for of in source.skipped),
    )
    skipped = tuple((decoding.below_root(name, settings), why) for name, why in source.skipped)
    return Dataset(train, validation, test, source.classes, description, skipped)


def _found(settings: config.Data, wanted: str | None) -> tuple[Source, str]:
    """The source without the excluded pictures, and the digest of all its pictures. If a digest is
    wanted: the source that was remembered under it, else the present one, which must have it."""
    module = sources.find(settings.source)
    if wanted is not None and (recalled := getattr(module, "recalled", None)):
        remembered: Source | None = recalled(settings, wanted)
        if remembered is not None:
            return remembered, wanted
    source = module.load(settings)
    digest = _digest_of(source)
    if wanted not in (None, digest):
        raise UnavailableError(
            f"{source.name}: the pictures are not those that this run began with, and those are no "
            "longer in data.cache; start another run"
        )
    source = _without_excluded(source, settings)  # now: by the next run, their names may be gone
    if remember := getattr(module, "remember", None):
        remember(source, digest)
    return source, digest


def draw_source_task(stand_in: config.StandIn, settings: config.Data) -> Images:
    """The images that stand-in weights are trained on."""
    from jobs.data.sources import digits, generated

    if stand_in.task == "characters":
        drawn = digits.printed(stand_in.images, seed=settings.seed)
    else:
        drawn = generated.SOURCE.draw(stand_in.images, settings.input_size, seed=settings.seed)
    return Images.all(*drawn, settings)


def _without_excluded(source: Source, settings: config.Data) -> Source:
    if not settings.exclude:
        return source
    out = set(settings.exclude)
    train, test = decoding.paths(source.train, "train"), decoding.paths(source.test, "test")
    damaged = [decoding.below_root(name, settings) for name, _ in source.skipped]
    if strangers := [path for path in settings.exclude if path not in {*train, *test, *damaged}]:
        more = f", and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise ConfigurationError(f"data.exclude: the data has no {strangers[0]}{more}")
    return replace(
        source, train=_without(source.train, train, out), test=_without(source.test, test, out)
    )


def _without(images: Images, paths: Sequence[str], out: Collection[str]) -> Images:
    kept = [at for at, path in enumerate(paths) if path not in out]
    return images.take(torch.tensor(kept, dtype=torch.int64))


def _subset(images: Images, count: int | None, key: str) -> Images:
    if count is None:
        return images
    if count > len(images):
        raise ConfigurationError(f"data.{key}: {count} asked for, the data has {len(images)}")
    return images.take(stratified(images.labels, count, images.settings.seed)[0])


def _require_pictures(classes: Sequence[str], train: Images, test: Images) -> None:
    """Of each class to train on, and some to test with."""
    if not len(test):
        raise ConfigurationError("data: no picture is left to test with, after data.exclude")
    counts = train.labels.bincount(minlength=len(classes)).tolist()
    if missing := [name for name, count in zip(classes, counts, strict=True) if not count]:
        more = f", nor of {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigurationError(
            f"data: no picture of {missing[0]} is left to train on{more}, after data.exclude, "
            "data.train_images and what is held out for test and validation"
        )


def _digest_of(source: Source) -> str:
    """SHA-256 over the pictures of each class and split, whatever their names and order."""
    digest = hashlib.sha256()
    for images in (source.train, source.test):
        digests, labels = np.ascontiguousarray(images.digests()), images.labels.numpy()
        for label, name in enumerate(source.classes):
            of_class = np.sort(digests[labels == label].view("S32").ravel())
            digest.update(f"{name}\0{len(of_class)}\0".encode())
            digest.update(of_class.tobytes())
    return digest.hexdigest()
