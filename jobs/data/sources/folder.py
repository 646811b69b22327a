"""Your own pictures, on this machine or in S3, in class folders, a manifest or tar shards."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from jobs import config
from jobs.data import listing, mirror
from jobs.data.decoding import decoded
from jobs.data.images import Images, stratified
from jobs.data.selection import recalled, remember
from jobs.data.sources import Source
from serving.progress import log

__all__ = ["check", "load", "recalled", "remember"]

TEST_SHARE = 0.2  # of pictures of which none is said to be for testing


def load(settings: config.Data) -> Source:
    """Without test pictures, a fifth of those for training is set aside, by class.

    Pictures that are all of one size no larger than the network's input keep it; others are
    scaled to the input once. What `data.cache` has already is neither fetched nor decoded again.
    Damaged pictures are skipped, counted and listed.
    """
    root = str(settings.root).rstrip("/") or "/"
    if root.startswith("s3://") or mirror.has_shards(Path(root).expanduser()):
        with mirror.refreshed(settings) as pictures:
            found = decoded(pictures, settings)
    elif root.endswith(listing.MANIFESTS):
        found = decoded(listing.in_manifest(Path(root).expanduser()), settings)
    else:
        found = decoded(listing.in_folders(Path(root).expanduser().absolute()), settings)
    if found.skipped:
        first = ": ".join(found.skipped[0])
        log(f"skipped {len(found.skipped)} damaged pictures, the first: {first}")
    train, test = found.splits["train"], found.splits["test"]
    if not len(test):
        test, train = set_aside(train, settings.seed)
    name = root if "://" in root else Path(root).name
    return Source(train, test, found.classes, f"folder {name}", found.skipped)


def set_aside(images: Images, seed: int) -> tuple[Images, Images]:
    """A fifth of each class, drawn by the pictures' digests: when the data grows, most pictures
    stay on their side, so that a test set can be compared with the one before."""
    draw = [hashlib.sha256(b"%d" % seed + digest.tobytes()).digest() for digest in images.digests()]
    order = torch.from_numpy(np.argsort(np.array(draw, "S32"), kind="stable"))
    picked, rest = stratified(images.labels, round(TEST_SHARE * len(images)), seed, order)
    return images.take(picked), images.take(rest)


def check(settings: config.Data) -> tuple[bool, str]:
    root = str(settings.root)
    if root.startswith("s3://"):
        return mirror.check(settings)
    place = Path(root).expanduser()
    if not root.endswith(listing.MANIFESTS):
        place /= "train"
    return place.exists(), f"{place} {'is there' if place.exists() else 'is missing'}"
