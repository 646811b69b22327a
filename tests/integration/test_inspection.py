"""Planted faults are found, said in a table and on a page, and left out when that is wanted."""

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command import called
from conftest import tiny_config
from drawings import make_photos
from PIL import Image, ImageEnhance

from jobs import inspection, pipeline
from jobs.config import Config
from jobs.data import duplicates
from jobs.data.dataset import load
from jobs.data.sources import digits
from jobs.errors import ConfigurationError
from jobs.runs import RunFolder

pytestmark = pytest.mark.usefixtures("thin")
SIDE = 40


def scene(seed: int) -> Image.Image:
    """Blobs of colour: smooth as photos are, and unlike each other."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def recompressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    return Image.open(file)


def shifted(picture: Image.Image) -> Image.Image:
    pixels = np.pad(np.asarray(picture), ((3, 0), (0, 4), (0, 0)), mode="edge")
    return Image.fromarray(pixels[:SIDE, -SIDE:])


def brighter(picture: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(1.2)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "copied": lambda picture: picture,
    "recompressed": recompressed,
    "shifted": shifted,
    "brighter": brighter,
}


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Three classes of twelve training and four test pictures, and four planted faults."""
    root = tmp_path / "photos"
    for label, name in enumerate(("cat", "dog", "elk")):
        for split, count in (("train", 12), ("test", 4)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                scene(100 * label + i + 50 * (split == "test")).save(
                    root / split / name / f"{i:02}.png"
                )
    brighter(scene(150)).save(root / "train/dog/leak.png")  # test/dog/00.png
    recompressed(scene(3)).save(root / "train/cat/twice.png")  # train/cat/03.png
    shifted(scene(205)).save(root / "train/dog/elk.png")  # train/elk/05.png
    (root / "train/elk/broken.jpg").write_bytes(b"\xff\xd8 nothing")
    return root


def of(root: Path, **data: object) -> Config:
    folder = {"source": "folder", "root": str(root), "cache": str(root.parent / "cache")}
    every = {"train_images": None, "test_images": None}
    return tiny_config(data={**folder, **every, **data}, optim={"epochs": 1})


def rows(file: Path) -> dict[tuple[str, str], str]:
    with file.open(newline="") as lines:
        return {(row["kind"], row["path"]): row["other"] for row in csv.DictReader(lines)}


# Of a leak, the training picture comes first; of the others either may.
PLANTED = {
    "leak": {"train/dog/leak.png", "test/dog/00.png"},
    "duplicate": {"train/cat/twice.png", "train/cat/03.png"},
    "conflict": {"train/elk/05.png", "train/dog/elk.png"},
}


def doubles_in(file: Path) -> dict[str, set[str]]:
    """The pairs of each kind, of which there is one."""
    found = {key: other for key, other in rows(file).items() if key[0] in PLANTED}
    assert len(found) == 3 and ("leak", "train/dog/leak.png") in found
    return {kind: {path, other} for (kind, path), other in found.items()}


@pytest.mark.parametrize("change", CHANGES)
def test_a_double_is_found_whatever_was_done_to_it(change: str) -> None:
    pictures = [scene(seed) for seed in range(20)]
    pictures.append(CHANGES[change](pictures[7]))
    small = torch.stack([torch.tensor(np.asarray(p.resize((32, 32)))) for p in pictures])
    pairs = duplicates.find(small.permute(0, 3, 1, 2).contiguous(), torch.device("cpu"))
    assert [(pair.first, pair.second) for pair in pairs] == [(7, 20)]
    assert pairs[0].similarity == 1 if change == "copied" else 0.93 <= pairs[0].similarity <= 1


def test_copies_are_found_where_every_picture_has_several() -> None:
    """Whose nearest neighbours are copies themselves, and do not say what is usual."""
    pictures = [
        recompressed(ImageEnhance.Brightness(scene(seed)).enhance(0.8 + copy / 20))
        for copy in range(7)
        for seed in range(20)
    ]
    small = torch.stack([torch.tensor(np.asarray(p.resize((32, 32)))) for p in pictures])
    pairs = duplicates.find(small.permute(0, 3, 1, 2).contiguous(), torch.device("cpu"))
    assert all(pair.first % 20 == pair.second % 20 for pair in pairs)
    assert len({pair.second for pair in pairs}) >= 0.95 * 6 * 20


def test_pictures_that_all_look_alike_are_not_doubles() -> None:
    dataset = load(tiny_config(data={"source": "digits", "train_images": 300}).data)
    pairs = duplicates.find(duplicates.thumbnails(dataset), torch.device("cpu"))
    assert len(digits.handwritten()[1]) == 1797 and len(pairs) < 5


def test_of_many_copies_all_but_one_are_named() -> None:
    blank = torch.full((4, 3, 32, 32), 255, dtype=torch.uint8)
    pairs = duplicates.find(blank, torch.device("cpu"))
    assert {pair.second for pair in pairs} == {1, 2, 3}
    assert duplicates.leaked(pairs, 4, tests=2) == [0, 1]
    assert duplicates.leaked(pairs, 4, tests=4) == []


def test_the_verb_finds_what_was_planted(faulty: Path, tmp_path: Path) -> None:
    counts = inspection.inspect(of(faulty), tmp_path / "out")
    assert doubles_in(tmp_path / "out" / "findings.csv") == PLANTED
    found = rows(tmp_path / "out" / "findings.csv")
    assert "not a picture" in found["damaged", "train/elk/broken.jpg"]
    assert counts["small class"] == 3 and counts["leak"] == 1
    page = (tmp_path / "out" / "index.html").read_text()
    for text in ("test/dog/00.png", "broken.jpg", f"{SIDE}×{SIDE}: ", "In training and in test: 1"):
        assert text in page
    assert page.count("data:image/png;base64,") >= 3 * 2 + 3  # pairs, and a mean of each class
    assert "http" not in page


def test_features_are_computed_once(
    faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = inspection.inspect(of(faulty), tmp_path / "out")
    cached = list((tmp_path / "cache").glob("features-*.npy"))
    assert len(cached) == 1 and len(np.load(cached[0])) == 3 * 16 + 3
    monkeypatch.delattr(pipeline.Job, "features")
    assert inspection.inspect(of(faulty), tmp_path / "out") == first


def test_a_marked_picture_is_left_out(faulty: Path, tmp_path: Path) -> None:
    inspection.inspect(of(faulty), tmp_path / "out")
    marked = tmp_path / "exclude.csv"
    lines = (tmp_path / "out" / "findings.csv").read_text().splitlines()
    marked.write_text("\n".join(line for line in lines if not line.startswith("label,")))
    named = {path for kind, path in rows(tmp_path / "out" / "findings.csv") if kind in PLANTED}
    before, after = load(of(faulty).data), load(of(faulty, exclude=str(marked)).data)
    gone = set(before.paths) - set(after.paths)
    assert gone == named  # the damaged one and the classes do no harm
    pairs = duplicates.among(after, duplicates.thumbnails(after), torch.device("cpu"))
    assert pairs.findings == [] and pairs.leaked == ()


def test_a_picture_that_is_not_there_cannot_be_left_out(faulty: Path) -> None:
    wrong = faulty.parent / "exclude.csv"
    wrong.write_text("train/cat/00.png\ntrain/cow/00.png\ntrain/cat/99.png\n")
    with pytest.raises(ConfigurationError, match=r"has no train/cat/99.png, and 1 more$"):
        load(of(faulty, exclude=str(wrong)).data)


def test_pictures_without_files_are_left_out_by_their_numbers(tmp_path: Path) -> None:
    every = {"source": "digits", "train_images": None, "test_images": None}
    before = load(tiny_config(data=every).data)
    chosen = {before.paths[0], before.paths[-1]}
    assert {path.split("/")[0] for path in chosen} == {"test", "train"}
    marked = tmp_path / "exclude.txt"
    marked.write_text("\n".join(chosen))
    after = load(tiny_config(data={**every, "exclude": str(marked)}).data)
    assert {*before.paths} - {*after.paths} == chosen


def test_few_pictures_can_be_looked_at_and_one_s_name_need_not_be_utf_8(tmp_path: Path) -> None:
    make_photos(root := tmp_path / "photos", train=3, test=2, size=(SIDE, SIDE))  # batches have 10
    (root / "train/cat/0.png").rename(root / "train/cat" / os.fsdecode(b"caf\xe9.png"))
    inspection.inspect(of(root), tmp_path / "out")
    assert f"{SIDE}×{SIDE}: 9<" in (tmp_path / "out" / "index.html").read_text()
    name = r"train/cat/caf\xe9.png"
    assert rows(tmp_path / "out" / "findings.csv")["leak", name] == "test/cat/0.png"
    assert {*load(of(root).data).paths} - {*load(of(root, exclude=(name,)).data).paths} == {name}


def test_names_stay_though_another_process_finds_the_pictures_renamed(tmp_path: Path) -> None:
    make_photos(root := tmp_path / "photos", train=3, test=2, size=(SIDE, SIDE))
    dataset = load(of(root).data)
    before = list(dataset.paths)
    (root / "train/cat/0.png").rename(root / "train/cat/renamed.png")
    assert "train/cat/renamed.png" in load(of(root).data).paths
    assert dataset.paths == before and "train/cat/0.png" in before


def test_a_manifest_s_pictures_are_named_below_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photos(root := tmp_path / "photos", train=3, test=2, size=(SIDE, SIDE))
    files = [file.relative_to(root) for file in root.rglob("*.png")]
    lines = [f"{file},{file.parts[1]},{file.parts[0]}" for file in files]
    (root / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    monkeypatch.chdir(tmp_path)
    inspection.inspect(of(Path("photos/list.csv")), tmp_path / "out")
    assert f"{SIDE}×{SIDE}: 10<" in (tmp_path / "out" / "index.html").read_text()
    found = rows(tmp_path / "out" / "findings.csv")
    assert found["leak", "train/dog/1.png"] == "test/dog/1.png"


def test_a_run_says_what_leaked_and_what_it_scores_without(faulty: Path, tmp_path: Path) -> None:
    wanted = of(faulty)
    wanted = wanted.model_copy(update={"variants": wanted.variants[2:]})
    folder = RunFolder(tmp_path / "run")
    result = pipeline.run(wanted, folder)
    [leaked] = result.data.leaked
    assert load(wanted.data).paths[leaked] == "test/dog/00.png"
    assert result.data.doubles == {"leak": 1, "conflict": 1, "duplicate": 1}
    assert doubles_in(folder.path / "findings.csv") == PLANTED
    with np.load(folder.variant("frozen", 0).path / "test_predictions.npz") as arrays:
        right = arrays["logits"].argmax(1) == arrays["labels"]
    without = np.delete(right, leaked).mean()
    assert result.sentences[-1].startswith(f"frozen: {without:.2%} (")
    assert "without the 1 test images that are also in training" in result.sentences[-1]
    page = (folder.path / "report" / "index.html").read_text()
    assert "1 test pictures are also trained on" in page
    assert (folder.path / "report" / "doubles.png").is_file()
    assert "findings.csv" in folder.manifest().files


def test_the_command_line(faulty: Path, tmp_path: Path) -> None:
    settings = [f"data.root={faulty}", f"data.cache={tmp_path / 'cache'}", "data.source=folder"]
    settings += ["data.train_images=null", "data.test_images=null", "weights.source=random"]
    options = [part for setting in settings for part in ("--set", setting)]
    done = called("inspect", "--config", "quickstart", *options, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("1 leak · 1 conflict · ")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "index.html")
    missing = called("inspect", "--set", "data.exclude=nowhere.csv")
    assert missing.returncode == 2 and "nowhere.csv" in missing.stderr.splitlines()[-1]


def test_the_benchmark_counts_what_it_planted(tmp_path: Path) -> None:
    from benchmarks import inspection as benchmark

    for split, count in (("train", 20), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "all" / split / name).mkdir(parents=True)
            for i in range(count):
                scene(i).save(tmp_path / "all" / split / name / f"{i:02}.png")
    pictures = benchmark.chosen(tmp_path / "all", {"train": 40, "test": 8})
    faults = benchmark.plant(pictures, tmp_path / "data", doubles=4)
    assert {kind: len(paths) for kind, paths in faults.items()} == {
        **{"labels": 1, "doubles": 4, "leaks": 4, "moved": 1}
    }
    there = {p.relative_to(tmp_path / "data").as_posix() for p in tmp_path.glob("data/*/*/*.png")}
    assert len(there) == 48 + 8 and set().union(*faults.values()) <= there
    lines = [f"label,{path},dog,1" for path in (*faults["labels"], *faults["moved"], "train/x")]
    lines += [f"duplicate,train/other,{path},1" for path in faults["doubles"]]
    lines += [f"leak,{path},test/x,1" for path in sorted(faults["leaks"])[:3]]
    (tmp_path / "findings.csv").write_text("\n".join(["kind,path,other,score", *lines]))
    found = benchmark.judged(tmp_path / "findings.csv", faults)
    assert found["wrong labels"]["recall"] == 1
    assert found["wrong labels"]["precision"] == pytest.approx(2 / 3)
    assert found["doubles"]["recall"] == found["doubles"]["precision"] == 1
    assert found["leaks"]["recall"] == 0.75 and found["leaks"]["precision"] == 1
