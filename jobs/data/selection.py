"""Which rows of a store a run's pictures are, so that it can be resumed when its root has others.

`pixels-<n>.<name>.npz`, beside the file that has the rows, is named after the digest of the data
and what is excluded of them.
"""

import hashlib
import json

import numpy as np
import torch

from jobs import config
from jobs.data import decoding, index
from jobs.data.images import Images
from jobs.data.sources import Source
from jobs.errors import UnavailableError
from jobs.runs import read_arrays, write_arrays
from serving.progress import log

KEPT = 20  # in one store


def remember(source: Source, digest: str) -> None:
    """For :func:`recalled`; the oldest selections are removed."""
    assert source.train.file is not None, "its pictures are those of a store"
    path, name = source.train.file.path, _name(digest, source.train.settings)
    about = json.dumps([source.classes, source.name, source.skipped]).encode()
    shape = np.array(source.train.pixels.shape[-2:])
    arrays = {"about": np.frombuffer(about, np.uint8), "shape": shape}
    for split, images in (("train", source.train), ("test", source.test)):
        arrays[f"{split} rows"] = images.rows.numpy()
        arrays[f"{split} labels"] = images.labels.numpy()
        arrays[f"{split} digests"] = images.digests()
    write_arrays(path.with_name(f"{path.name}.{name}.npz"), arrays)
    kept = sorted(path.parent.glob("pixels-*.npz"), key=lambda p: p.stat().st_mtime_ns)
    for old in kept[:-KEPT]:
        old.unlink(missing_ok=True)


def recalled(settings: config.Data, digest: str) -> Source | None:
    """The pictures of that digest as they were remembered; None where they no longer are."""
    for path in decoding.store(settings).glob(f"pixels-*.{_name(digest, settings)}.npz"):
        try:
            file = index.Held(path.with_name(path.name.partition(".")[0]))
            arrays = read_arrays(path)
            height, width = arrays["shape"].tolist()
            rows = 1 + max(arrays[f"{split} rows"].max(initial=-1) for split in ("train", "test"))
            if file.path.stat().st_size < rows * 3 * height * width:
                raise UnavailableError(f"{file.path}: cut short")
        except FileNotFoundError:  # removed meanwhile
            continue
        except UnavailableError as error:
            log(f"data: the pictures are looked up again: {error}")
            continue
        pixels = decoding.memory_mapped(file.path, (height, width))
        train, test = (
            Images(
                pixels,
                torch.from_numpy(arrays[f"{split} rows"]),
                torch.from_numpy(arrays[f"{split} labels"]),
                settings,
                arrays[f"{split} digests"],
                file,
            )
            for split in ("train", "test")
        )
        classes, name, skipped = json.loads(arrays["about"].tobytes())
        return Source(train, test, tuple(classes), name, list(map(tuple, skipped)))
    return None


def _name(digest: str, settings: config.Data) -> str:
    return hashlib.sha256(json.dumps([digest, sorted(settings.exclude)]).encode()).hexdigest()
