"""A look at the data before anything is trained on it: `python -m jobs inspect`."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs.config import Config
from jobs.data import decoding, duplicates, findings, label_errors
from jobs.data.dataset import Dataset
from jobs.data.findings import Finding
from jobs.data.listing import MANIFESTS
from jobs.pipeline import Job
from jobs.report import inspection as page
from jobs.runs import RunFolder
from serving.files import replacing, temporary, write
from serving.progress import log

FEW = 20  # training pictures: a class with less is called small
SHARE = 0.1  # … as is one with less than this share of the largest


def inspect(config: Config, out: Path) -> Counter[str]:
    """Writes index.html and findings.csv to `out`.

    Returns:
        How many findings there are of each kind.

    Raises:
        UnavailableError: data or weights cannot be reached or read.
    """
    with temporary() as work:
        folder = RunFolder(work / "inspection")
        with folder.open(config):  # nothing is trained, whatever the variants ask for
            return _inspect(Job(config.model_copy(update={"variants": ()}), folder), out)


def _inspect(job: Job, out: Path) -> Counter[str]:
    data, root = job.dataset, job.config.data.root
    files = _files(root, data.paths)
    small = duplicates.thumbnails(data)
    found = duplicates.among(data, small, job.device.device).findings
    log(f"duplicates: {len(found)}")
    suspects, agreement = _label_errors(job)
    found += suspects
    found += [Finding("damaged", path, why, 1.0) for path, why in data.skipped]
    found += _small_classes(data)
    found = findings.worst_first(found)
    write(out / "findings.csv", findings.to_csv(found))
    write(out / "index.html", page.render(data, small, found, files, agreement))
    return Counter(finding.kind for finding in found)


def _label_errors(job: Job) -> tuple[list[Finding], float]:
    """And with what share of the labels the classifier agrees that looks for them."""
    data = job.dataset
    labels = data.labels.numpy()
    probabilities = label_errors.cross_validated(_features(job), labels, len(data.classes))
    suspected = zip(*label_errors.suspects(probabilities, labels), strict=True)
    paths = data.paths
    found = [Finding("label", paths[i], data.classes[c], float(by)) for i, c, by in suspected]
    agreement = float((probabilities.argmax(1) == labels).mean())
    log(f"probable label errors: {len(found)}, by a classifier that agrees with {agreement:.1%}")
    return found, agreement


def _features(job: Job) -> NDArray[np.float32]:
    """[N, 2048] of all images, kept for the next time in the cache."""
    data, settings = job.dataset, job.config.data
    made_of = hashlib.sha256()
    for tensor in job.pretrained.values():
        made_of.update(tensor.cpu().contiguous().numpy().tobytes())
    for images in data.splits.values():
        made_of.update(images.digests().tobytes())
    parts = [decoding.CACHE_VERSION, settings.input_size, settings.normalization]
    made_of.update(repr([*parts, str(job.device), torch.__version__]).encode())
    file = Path(settings.cache).expanduser() / f"features-{made_of.hexdigest()[:16]}.npy"
    if file.is_file():
        try:
            kept: NDArray[np.float32] = np.load(file)
            return kept
        except (ValueError, EOFError) as error:
            log(f"{file}: damaged, and so made again: {error}")
    values = torch.cat([job.features(images).cpu() for images in data.splits.values()]).numpy()
    with replacing(file) as part, part.open("wb") as opened:
        np.save(opened, values)
    return values


def _small_classes(data: Dataset) -> list[Finding]:
    """Classes of which there is little to learn from, validation included."""
    labels = torch.cat([data.train.labels, data.validation.labels])
    counts = labels.bincount(minlength=len(data.classes)).tolist()
    limit = max(FEW, SHARE * max(counts))
    named = zip(data.classes, counts, strict=True)
    return [Finding("small class", "", name, count) for name, count in named if count < limit]


def _files(root: str | None, paths: Sequence[str]) -> dict[str, Counter[str]]:
    """How many files have each size, mode and format, by what their headers say; nothing of a
    source without files."""
    if root is None:
        return {}
    place = Path(root).expanduser()
    if root.endswith(MANIFESTS):
        place = place.parent
    files = [file for path in paths if (file := place / path).is_file()]
    if not files:
        return {}
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(_header, files))
    kinds = ("size", "mode", "format")
    return {kind: Counter(header[i] for header in headers) for i, kind in enumerate(kinds)}


def _header(file: Path) -> tuple[str, str, str]:
    with Image.open(file) as picture:
        return f"{picture.width}×{picture.height}", picture.mode, picture.format or ""
