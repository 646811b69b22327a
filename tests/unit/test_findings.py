"""What findings.csv holds, which pictures it excludes, and when a label is suspected."""

from pathlib import Path

import numpy as np
import pytest

from jobs import config
from jobs.data import findings, label_errors
from jobs.data.findings import Finding
from jobs.errors import ConfigurationError
from jobs.statistics import balanced_accuracy, wilson

FOUND = [
    Finding("duplicate", "train/cat/b.jpg", "train/cat/a.jpg", 0.98),
    Finding("small class", "", "dog, old", 7),
    Finding("label", 'train/cat/"c", d.jpg', "dog", 0.4),
    Finding("label", "train/cat/e.jpg", "dog", 0.9),
    Finding("leak", "train/cat/e.jpg", "test/cat/f.jpg", 0.95),
]


def test_the_worst_comes_first() -> None:
    kinds = [finding.kind for finding in findings.worst_first(FOUND)]
    assert kinds == ["leak", "label", "label", "duplicate", "small class"]
    labels = [f.score for f in findings.worst_first(FOUND) if f.kind == "label"]
    assert labels == [0.9, 0.4]
    small = [Finding("small class", "", name, count) for name, count in (("a", 19), ("b", 2))]
    assert [finding.other for finding in findings.worst_first(small)] == ["b", "a"]


def test_findings_are_a_list_of_pictures_to_leave_out(tmp_path: Path) -> None:
    file = tmp_path / "findings.csv"
    file.write_text(findings.to_csv(FOUND))
    assert file.read_text().splitlines()[:2] == [
        "kind,path,other,score",
        "duplicate,train/cat/b.jpg,train/cat/a.jpg,0.98",
    ]
    pictures = ("train/cat/b.jpg", 'train/cat/"c", d.jpg', "train/cat/e.jpg")
    assert findings.paths_in(file) == pictures


def test_a_plain_list_is_one_too(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes("\ufefftrain/cat/a b.jpg\r\n\r\n  train/1\ntrain/1\n".encode())
    assert findings.paths_in(file) == ("train/cat/a b.jpg", "train/1")


def test_a_name_is_read_as_it_was_written(tmp_path: Path) -> None:
    names = "a\nb.png", "a\u2028b.png", "a.png ", ' "a", b.png', "Icon\r", "a\r\nb.png"
    file = tmp_path / "findings.csv"
    file.write_bytes(findings.to_csv(Finding("label", n, "dog\n", 0.5) for n in names).encode())
    assert findings.paths_in(file) == names


@pytest.mark.parametrize(
    ("content", "paths"),
    [
        ("\ufeffwhy,path\r\nx,train/1\r\n\r\ny,train/2\r\n", ("train/1", "train/2")),
        ('"a".png\ntrain/a\u2028b.png\n', ('"a".png', "train/a\u2028b.png")),
        ('"a.png\n' + "train/1\n" * 20_000, ('"a.png', "train/1")),
    ],
)
def test_a_table_or_list_of_another_program_is_read(
    content: str, paths: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "list"
    file.write_bytes(content.encode())
    assert findings.paths_in(file) == paths


def test_a_list_may_be_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.csv").write_text("path\ntrain/1\n")
    assert config.load("quickstart", ["data.exclude=~/x.csv"]).data.exclude == ("train/1",)


def test_what_is_excluded_and_not_the_file_is_part_of_the_run(tmp_path: Path) -> None:
    one, other, shorter = (tmp_path / name for name in ("one", "other", "shorter"))
    one.write_text("train/1\ntrain/2\n")
    other.write_text("path,why\ntrain/2,x\ntrain/1,y\n")
    shorter.write_text("train/1\n")
    resolved = [config.load("quickstart", [f"data.exclude={f}"]) for f in (one, other, shorter)]
    assert resolved[0].data.exclude == ("train/1", "train/2")
    assert resolved[0].digest == resolved[1].digest != resolved[2].digest
    assert resolved[2].digest != config.load("quickstart").digest
    one.unlink()
    again = tmp_path / "config.yaml"
    again.write_text(resolved[0].to_yaml())
    assert config.load(str(again)) == resolved[0]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b'path\n"' + b"x" * 200_000])
def test_a_list_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "list"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"^data\.exclude: .*list: ") as raised:
        config.load("quickstart", [f"data.exclude={file}"])
    assert "\n" not in str(raised.value)


def test_confident_learning_suspects_what_is_off_the_diagonal_of_the_confident_joint() -> None:
    probabilities = np.array(
        [[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.45, 0.55], [0.1, 0.9], [0.4, 0.6], [0.95, 0.05]],
        dtype=np.float32,
    )
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    # Thresholds by hand: (0.9 + 0.7 + 0.2 + 0.45) / 4 and (0.9 + 0.6 + 0.05) / 3.
    limits = label_errors.thresholds(probabilities, labels)
    assert limits == pytest.approx([0.5625, 0.5167], abs=1e-4)
    positions, classes, margins = label_errors.suspects(probabilities, labels)
    assert positions.tolist() == [6, 2, 3] and classes.tolist() == [0, 1, 1]
    assert margins == pytest.approx([0.9, 0.6, 0.1])


def test_a_class_that_is_confused_anyway_needs_more_to_be_suspected() -> None:
    """Thresholds are each class's own: 0.55 of class 1 is nothing where its pictures have 0.8."""
    probabilities = np.array([[0.8, 0.2], [0.45, 0.55], [0.2, 0.8], [0.2, 0.8]], dtype=np.float32)
    positions, _, _ = label_errors.suspects(probabilities, np.array([0, 0, 1, 1]))
    assert positions.tolist() == []


def test_a_class_without_pictures_is_suspected_of_none() -> None:
    probabilities = np.array([[0.3, 0.7], [0.9, 0.1]], dtype=np.float32)
    assert label_errors.suspects(probabilities, np.array([0, 0]))[0].tolist() == []


def test_turned_labels_of_classes_that_are_apart_are_found() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    features = (np.eye(4)[labels] * 6 + rng.normal(size=(200, 4))).astype(np.float32)
    features = np.concatenate([features, rng.normal(size=(200, 60)).astype(np.float32)], 1)
    turned = rng.choice(200, 8, replace=False)
    wrong = labels.copy()
    wrong[turned] = (wrong[turned] + 1) % 4
    positions, classes, _ = label_errors.suspects(
        label_errors.cross_validated(features, wrong, 4), wrong
    )
    found = dict(zip(positions.tolist(), classes.tolist(), strict=True))
    assert set(turned.tolist()) <= found.keys() and len(found) <= 10
    assert all(found[i] == labels[i] for i in turned.tolist())


def test_a_class_of_one_picture_does_not_stop_the_search() -> None:
    features = np.random.default_rng(0).normal(size=(41, 8)).astype(np.float32)
    labels = np.array([0, 1] * 20 + [2])
    probabilities = label_errors.cross_validated(features, labels, 4)
    assert probabilities.shape == (41, 4) and probabilities[40, 2] == 0
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-4)
    lone = label_errors.cross_validated(features, np.array([0] * 40 + [1]), 2)
    assert len(label_errors.suspects(lone, np.array([0] * 40 + [1]))[0]) == 0


def test_with_fewer_pictures_than_folds_nothing_is_suspected() -> None:
    features, labels = np.eye(4, 8, dtype=np.float32), np.array([0, 0, 1, 1])
    probabilities = label_errors.cross_validated(features, labels, 2)
    assert probabilities.shape == (4, 2)
    assert len(label_errors.suspects(probabilities, labels)[0]) == 0


def test_a_class_that_no_classifier_was_shown_is_not_called_wrong() -> None:
    labels = np.repeat([0, 1, 2, 3], [60, 60, 2, 1])
    noise = np.random.default_rng(0).normal(size=(len(labels), 8), scale=0.1)
    features = (noise + 5 * np.eye(8)[labels]).astype(np.float32)
    probabilities = label_errors.cross_validated(features, labels, 4)
    assert len(label_errors.suspects(probabilities, labels)[0]) == 0


def test_balanced_accuracy_is_the_mean_of_the_classes() -> None:
    balanced = balanced_accuracy([90, 1], [100, 10])
    assert balanced.value == pytest.approx(0.5)
    assert balanced.low < 0.5 < balanced.high < 0.7
    low, high = wilson(91, 110)
    assert balanced.high - balanced.low > high - low  # ten pictures decide half of it
