"""Your own pictures, in `train/<class>/*` and `test/<class>/*`."""

import os
from pathlib import Path

from jobs import config
from jobs.data.decoding import decoded
from jobs.data.images import stratified
from jobs.data.sources import Source
from jobs.errors import UnavailableError
from serving.progress import log

TEST_SHARE = 0.2  # of a folder that has no test/


def load(settings: config.Data) -> Source:
    """Without `test/`, a fifth of train is set aside, by class.

    Pictures that are all of one size no larger than the network's input keep it; others are
    scaled to the input once. Decoded pixels are kept as memory maps in `data.cache`, under a
    digest of every file's name, size and time. Damaged pictures are skipped, counted and listed.
    """
    root = Path(settings.root or "").expanduser()
    files, classes = _list_images(root / "train")
    train, skipped = decoded(files, classes, settings)
    if (root / "test").is_dir():
        files, test_classes = _list_images(root / "test")
        if strangers := sorted(set(test_classes) - set(classes)):
            raise UnavailableError(f"{root}/test has classes that train has not: {strangers}")
        test, skipped_in_test = decoded(files, classes, settings)
        skipped += skipped_in_test
    else:
        share = round(TEST_SHARE * len(train))
        picked, rest = stratified(train.labels, share, settings.seed)
        test, train = train.take(picked), train.take(rest)
    if skipped:
        log(f"skipped {len(skipped)} damaged pictures, the first: {skipped[0]}")
    return Source(train, test, classes, f"folder {root.name}", skipped)


def _list_images(split: Path) -> tuple[list[tuple[Path, os.stat_result]], tuple[str, ...]]:
    if not split.is_dir():
        raise UnavailableError(f"{split}: no such folder; pictures go to {split}/<class>/")
    classes = tuple(sorted(d.name for d in split.iterdir() if d.is_dir() and d.name[0] != "."))
    files: list[tuple[Path, os.stat_result]] = []
    for name in classes:
        with os.scandir(split / name) as entries:
            found = [(Path(e.path), e.stat()) for e in entries if e.is_file() and e.name[0] != "."]
        if not found:
            raise UnavailableError(f"{split / name}: the class has no pictures")
        files += sorted(found)
    if len(classes) < 2:
        raise UnavailableError(f"{split}: two classes at least are needed, found {list(classes)}")
    return files, classes


def check(settings: config.Data) -> tuple[bool, str]:
    train = Path(settings.root or "").expanduser() / "train"
    return train.is_dir(), f"{train} {'is there' if train.is_dir() else 'is missing'}"
