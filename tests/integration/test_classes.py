"""Classes of any name and number, from the pictures through training and archive to the answer."""

import csv
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config
from drawings import make_photos, photo

from jobs import config, pipeline
from jobs.data.dataset import load
from jobs.errors import ConfigurationError
from jobs.report import plots
from jobs.runs import RunFolder
from serving import Predictor

ODD = ("Größe & Maß", "a b", "<i>🐱</i>", "🐶", "from $5 to $_{10}", "cat/Siamese", 'the "best"')
KINDS = {"odd names": ODD, "two": ("no", "yes"), "many": [f"{i:04}" for i in range(1001)]}


def listed(root: Path, classes: Sequence[str], each: int) -> Path:
    """A manifest of so many training pictures of each class, and one to test it."""
    rows = []
    for number, label in enumerate(classes):
        for copy in range(each + 1):
            path = f"{number % 7}/Bild ü {number}/{copy} 🐱.png"
            photo(root / path, size=(16, 16), seed=10 * number + copy)
            rows.append([path, label, "train" if copy < each else "test"])
    with (root / "pictures.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    return root / "pictures.csv"


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("kind", KINDS)
def test_classes_go_from_the_pictures_to_the_answer(kind: str, tmp_path: Path) -> None:
    classes = sorted(KINDS[kind])
    manifest = listed(tmp_path / "photos", classes, each=2 if kind == "many" else 12)
    settings = tiny_config(
        data={
            "source": "folder",
            "root": str(manifest),
            "cache": str(tmp_path / "cache"),
            "train_images": None,
            "test_images": None,
            "validation": 0.1,
        },
        optim={"epochs": 1},
        export={"enabled": True},
    )
    settings = settings.model_copy(update={"variants": settings.variants[2:]})
    folder = RunFolder(tmp_path / "run")
    pipeline.run(settings, folder)

    assert list(folder.facts().classes) == classes
    picture = (manifest.parent / "0" / "Bild ü 0" / "0 🐱.png").read_bytes()
    predictor = Predictor.open(folder.path / folder.archive(settings.export.name))
    answer = predictor(picture, top=1000)
    named = {entry["label"] for entry in answer["top"]}  # a thousand of them at most
    assert named <= {*classes} and len(named) == min(1000, len(classes))
    found = predictor.probabilities(predictor.pixels(picture)[None])[0]
    assert answer["label"] == classes[int(found.argmax())]
    with np.load(folder.path / "variants" / "frozen" / "test_predictions.npz") as arrays:
        assert arrays["logits"].shape[1] == len(classes)

    page = (folder.path / "report" / "index.html").read_text()
    for name, drawn in zip(classes, plots.drawable(classes), strict=True):
        assert (f"{drawn}: {html.escape(name)}" in page) == (name != drawn)
        assert name == html.escape(name) or name not in page
    card = (folder.path / "MODEL_CARD.md").read_text()
    assert not re.search(r"(?<!\\)<", card), "no name is markup there"
    sizes = {p.name: p.stat().st_size for p in (folder.path / "model").iterdir()}
    assert sizes[f"{settings.export.name}.json"] < 300_000, sizes
    assert json.loads((folder.path / "comparison.json").read_text())["winner"] == "frozen"


def exclude(root: Path, out: Sequence[str], **changes: object) -> config.Data:
    settings = config.Data(
        source="folder",
        root=str(root / "photos"),
        cache=str(root / "cache"),
        input_size=75,
        exclude=tuple(out),
    )
    return settings.model_copy(update=changes)


def test_a_class_that_nothing_is_left_of_is_named(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", train=4, test=2)
    cats = [f"train/cat/{i}.png" for i in range(4)]
    with pytest.raises(ConfigurationError, match="no picture of cat is left to train on, after"):
        load(exclude(tmp_path, cats))
    assert load(exclude(tmp_path, cats[:2])).classes == ("cat", "dog")
    everything = [*cats, *(f"train/dog/{i}.png" for i in range(4))]
    with pytest.raises(ConfigurationError, match=r"no picture of cat .*, nor of 1 more, after"):
        load(exclude(tmp_path, everything))
    tests = [f"test/{name}/{i}.png" for name in ("cat", "dog") for i in range(2)]
    with pytest.raises(ConfigurationError, match="no picture is left to test with"):
        load(exclude(tmp_path, tests))


def test_nor_is_the_last_one_of_a_class_held_out_in_silence(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", train=3, test=1)
    photo(tmp_path / "photos" / "train" / "eel" / "0.png", seed=9)
    with pytest.raises(ConfigurationError, match="no picture of eel is left to train on"):
        load(exclude(tmp_path, [], validation=0.43))
