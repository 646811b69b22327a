"""Every kind of picture is the same pixels, or refused for the same reason, wherever it is read:
in training, by the predictor that every service has, and in bulk scoring."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from drawings import make_photos
from kinds import Kind, Pixels, kinds

from jobs import config
from jobs.data.dataset import load
from serving import Predictor
from serving.answers import SCHEMA
from serving.images import ImageError, decode, in_srgb
from serving.scoring import score

KINDS = kinds()


class Read(NamedTuple):
    """What training and scoring made of all kinds."""

    pixels: dict[bytes, Pixels]
    """By digest of the file, uint8 [3, 75, 75]."""
    skipped: dict[str, str]
    rows: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def predictor(archive: Path) -> Predictor:
    return Predictor.open(archive, threads=2)


@pytest.fixture(scope="module")
def read(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Read:
    root = tmp_path_factory.mktemp("kinds")
    make_photos(root / "photos", train=2, test=1)
    for name, kind in KINDS.items():
        (root / "photos" / "train" / "cat" / f"{name}.jpg").write_bytes(kind.file)
    settings = config.Data(
        source="folder",
        root=str(root / "photos"),
        cache=str(root / "cache"),
        input_size=75,
        validation=0.2,
    )
    dataset = load(settings)
    pixels = {
        digest.tobytes(): images.pixels[row].numpy()
        for images in dataset.splits.values()
        for row, digest in zip(images.rows, images.digests(), strict=True)
    }
    skipped = dict(line.split(": ", 1) for line in dataset.description.skipped)
    score(predictor, str(root / "photos" / "train" / "cat"), root / "out", threads=1)
    rows = pq.read_table(root / "out", schema=SCHEMA).to_pylist()
    return Read(
        pixels,
        {Path(path).stem: reason for path, reason in skipped.items()},
        {Path(row["path"]).stem: row for row in rows},
    )


@pytest.mark.parametrize("name", [name for name in KINDS if not isinstance(KINDS[name][1], str)])
def test_a_kind_is_what_a_viewer_shows_and_the_same_everywhere(
    name: str, read: Read, predictor: Predictor
) -> None:
    kind: Kind = KINDS[name]
    picture = decode(kind.file)
    shown = np.asarray(in_srgb(picture)).astype(int)
    assert shown.shape == np.shape(kind.shows)
    assert np.abs(shown - kind.shows).max() <= kind.within
    trained = read.pixels[sha256(kind.file).digest()]
    assert np.array_equal(trained, predictor.pixels(kind.file))
    row, answer = read.rows[name], predictor(kind.file)
    assert (row["error"], row["width"], row["height"]) == (None, *picture.size)
    assert row["label"] == answer["label"]
    assert row["probability"] == pytest.approx(answer["probability"], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in KINDS if isinstance(KINDS[name][1], str)])
def test_what_is_refused_is_refused_everywhere_for_the_same_reason(
    name: str, read: Read, predictor: Predictor
) -> None:
    file, reason, _ = KINDS[name]
    with pytest.raises(ImageError) as refused:
        predictor(file)
    assert re.search(str(reason), str(refused.value))
    assert read.skipped[name] == read.rows[name]["error"] == str(refused.value)


def test_two_primary_colours_show_that_a_wide_gamut_is_more_than_its_numbers() -> None:
    """… so that the table above would not agree with colours that are left as they are."""
    plain, wide = KINDS["PNG"], KINDS["wide gamut"]
    assert not isinstance(plain.shows, str) and not isinstance(wide.shows, str)
    assert np.abs(plain.shows.astype(int) - wide.shows).max() > 10
