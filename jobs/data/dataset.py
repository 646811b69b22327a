"""A configured source with its subsets and splits.

Every source ends as `uint8 [N, 3, H, W]` pixels, `int64 [N]` labels and class names.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from jobs import config
from jobs.data import sources
from jobs.data.images import Images, stratified
from jobs.errors import ConfigurationError
from jobs.results import Facts
from serving import files
from serving.archive import Counts


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, and their description."""

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    description: Facts

    @property
    def splits(self) -> dict[str, Images]:
        """All images, the test images first."""
        return {"test": self.test, "train": self.train, "validation": self.validation}

    @property
    def paths(self) -> list[str]:
        """Of all images, in the order of `splits`."""
        return [path for images in self.splits.values() for path in images.paths]

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
        train, test = self.train.to(device), self.test.to(device)
        labels = self.validation.labels.to(device)
        validation = replace(self.validation, pixels=train.pixels, labels=labels)
        validation = replace(validation, rows=validation.rows.to(train.rows.device))
        return replace(self, train=train, validation=validation, test=test)


def load(settings: config.Data) -> Dataset:
    """Loads the configured source, draws its subsets and takes validation out of training.

    Raises:
        UnavailableError: the data cannot be reached or read.
        ConfigurationError: it has fewer images than requested, or lacks an excluded one.
    """
    source = sources.find(settings.source).load(settings)
    source = replace(source, train=source.train.named("train"), test=source.test.named("test"))
    source = _without_excluded(source, settings.exclude)
    train = _subset(source.train, settings.train_images, "train_images")
    test = _subset(source.test, settings.test_images, "test_images")
    share = round(settings.validation * len(train))
    held_out, kept = stratified(train.labels, share, settings.seed)
    validation, train = train.take(held_out), train.take(kept)
    height, width = train.pixels.shape[-2:]
    description = Facts(
        source=source.name,
        classes=tuple(source.classes),
        images=Counts(train=len(train), validation=len(validation), test=len(test)),
        image_size=(height, width),
        test_digest=digest(test),
        skipped=tuple(source.skipped),
    )
    return Dataset(train, validation, test, source.classes, description)


def draw_source_task(stand_in: config.StandIn, settings: config.Data) -> Images:
    """The images that stand-in weights are trained on."""
    from jobs.data.sources import digits, generated

    if stand_in.task == "characters":
        drawn = digits.printed(stand_in.images, seed=settings.seed)
    else:
        drawn = generated.SOURCE.draw(stand_in.images, settings.input_size, seed=settings.seed)
    return Images.all(*drawn, settings)


def _without_excluded(source: sources.Source, excluded: Sequence[str]) -> sources.Source:
    if not excluded:
        return source
    out = set(excluded)
    train, test = source.train.paths, source.test.paths
    damaged = [Path(line.partition(": ")[0]) for line in source.skipped]
    known = {*train, *test, *("/".join(path.parts[-3:]) for path in damaged)}
    strangers = [path for path in excluded if path not in known]
    if strangers:
        more = f", and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise ConfigurationError(f"data.exclude: the data has no {strangers[0]}{more}")
    return replace(
        source,
        train=source.train.take(torch.tensor([path not in out for path in train])),
        test=source.test.take(torch.tensor([path not in out for path in test])),
    )


def _subset(images: Images, count: int | None, key: str) -> Images:
    if count is None:
        return images
    if count > len(images):
        raise ConfigurationError(f"data.{key}: {count} asked for, the data has {len(images)}")
    return images.take(stratified(images.labels, count, images.settings.seed)[0])


def digest(images: Images) -> str:
    """SHA-256 of labels and pixels, kept beside pixels that are kept, which may be many."""
    if images.file is None:
        return _computed_digest(images)
    chosen = hashlib.sha256(images.rows.numpy().tobytes() + images.labels.numpy().tobytes())
    note = images.file.with_suffix(f".{chosen.hexdigest()[:16]}.sha256")
    if not note.is_file():
        files.write(note, _computed_digest(images))
    return note.read_text()


def _computed_digest(images: Images) -> str:
    digest = hashlib.sha256(images.labels.numpy().tobytes())
    for rows in images.rows.split(1000):
        digest.update(images.pixels[rows].numpy().tobytes())
    return digest.hexdigest()
