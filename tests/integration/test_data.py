"""Every source ends as the same arrays; splits share nothing; damaged pictures end no job."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_config
from drawings import make_photos, photo
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs import config, pipeline
from jobs.data import decoding, listing
from jobs.data.dataset import draw_source_task, load
from jobs.data.images import RESIDENT_SHARE, augment, fit_on, prefetched, stratified
from jobs.data.sources import cifar10, generated
from jobs.errors import ConfigurationError, UnavailableError
from jobs.runs import RunFolder
from jobs.seeds import generator
from serving.archive import Counts


def settings(**changes: object) -> config.Data:
    return tiny_config(data=changes).data


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten training and four test pictures, 32×32."""
    make_photos(tmp_path / "photos", train=10, test=4, size=(32, 32))
    return tmp_path / "photos"


def folder(root: Path, **changes: object) -> config.Data:
    return settings(
        source="folder",
        root=str(root),
        cache=str(root.parent / "cache"),
        train_images=None,
        test_images=None,
        **changes,
    )


def test_generated_pictures_depend_on_the_seed_alone() -> None:
    first, again = load(settings()), load(settings())
    other = load(settings(seed=1))
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert not torch.equal(first.train.pixels, other.train.pixels)
    assert first.description.test_digest == again.description.test_digest
    assert first.description.test_digest != other.description.test_digest


def test_the_source_task_and_the_target_task_share_no_picture_and_no_hue() -> None:
    textures = config.StandIn(task="textures", images=20)
    source = draw_source_task(textures, settings())
    assert source.pixels.shape == (20, 3, 75, 75) and source.pixels.dtype == torch.uint8
    target = load(settings(train_images=20)).train
    assert not any(torch.equal(a, b) for a in source.pixels for b in target.pixels)
    assert generated.SOURCE.hue_offset != generated.TARGET.hue_offset


def test_splits_are_disjoint_and_even_by_class() -> None:
    dataset = load(settings())
    train, validation = set(dataset.train.rows.tolist()), set(dataset.validation.rows.tolist())
    assert (len(train), len(validation), len(dataset.test)) == (60, 20, 40)
    assert not train & validation
    assert dataset.train.labels.bincount().tolist() == [6] * 10
    assert dataset.validation.labels.bincount().tolist() == [2] * 10


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_stratified_draw_takes_each_class_by_its_share(
    counts: list[int], share: float, seed: int
) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    wanted = round(share * len(labels))
    drawn, rest = stratified(labels, wanted, seed)
    assert len(drawn) == wanted
    assert sorted(drawn.tolist() + rest.tolist()) == list(range(len(labels)))
    taken = labels[drawn].bincount(minlength=len(counts))
    for count, number in zip(counts, taken.tolist(), strict=True):
        assert abs(number - count * wanted / len(labels)) <= 1
    order = torch.randperm(len(labels), generator=generator(seed, wanted))
    first = [order[labels[order] == label][:number] for label, number in enumerate(taken)]
    assert drawn.tolist() == sorted(torch.cat(first).tolist()), "as they are drawn"


def test_more_images_than_there_are_is_a_configuration_error(photos: Path) -> None:
    asked = folder(photos).model_copy(update={"train_images": 21})
    with pytest.raises(ConfigurationError, match="train_images: 21 asked for, the data has 20"):
        load(asked)


def test_a_folder_keeps_small_pictures_small_and_reads_exact_pixels(photos: Path) -> None:
    dataset = load(folder(photos))
    assert dataset.classes == ("cat", "dog")
    assert dataset.train.pixels.shape == (28, 3, 32, 32), "of both splits"
    with Image.open(photos / "train" / "dog" / "3.png") as picture:
        expected = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    digest = sha256((photos / "train" / "dog" / "3.png").read_bytes()).digest()
    [position] = [i for i, d in enumerate(dataset.train.digests()) if d.tobytes() == digest]
    assert torch.equal(dataset.train.raw(torch.tensor([position]))[0], expected)
    assert dataset.train.labels[position] == 1


def test_a_folder_of_mixed_sizes_is_scaled_to_the_input(photos: Path) -> None:
    photo(photos / "train" / "cat" / "wide.png", size=(200, 100))
    assert load(folder(photos)).train.pixels.shape[1:] == (3, 75, 75)


@pytest.mark.parametrize(("side", "remarked"), [(37, True), (38, False)])
def test_pictures_much_smaller_than_the_input_are_remarked_upon(
    side: int, remarked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Because a service shrinks what it is sent to that size. The input has 75 pixels here."""
    make_photos(tmp_path / "photos", size=(side, 20))
    stored = tiny_config().model_copy(update={"data": folder(tmp_path / "photos")})
    assert pipeline.Job(stored, RunFolder(tmp_path / "r")).dataset
    said = [line for line in capsys.readouterr().err.splitlines() if "stored at" in line]
    expected = (
        f"data: pictures are stored at {side}×20: a service of this model shrinks "
        "larger pictures to that first"
    )
    assert said == [expected] * remarked


def test_the_second_time_nothing_is_decoded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder(photos))
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded again"))
    again = load(folder(photos))
    assert torch.equal(first.train.pixels, again.train.pixels)
    photo(photos / "train" / "cat" / "0.png", seed=77)
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        load(folder(photos))


def test_grey_and_transparent_pictures_are_read_and_damaged_ones_listed(photos: Path) -> None:
    photo(photos / "train" / "cat" / "grey.png", mode="L")
    photo(photos / "train" / "cat" / "clear.png", mode="RGBA")
    (photos / "train" / "dog" / "notes.txt").write_text("no picture")
    (photos / "test" / "dog" / "3.png").write_bytes(b"\x89PNG\r\n")
    dataset = load(folder(photos))
    assert dataset.description.images == Counts(train=16, validation=6, test=7)
    assert len(dataset.train) + len(dataset.validation) == 22
    names = [Path(line.split(": ")[0]).name for line in dataset.description.skipped]
    assert names == ["notes.txt", "3.png"]


def test_without_a_test_folder_a_fifth_of_training_is_the_test_set(photos: Path) -> None:
    for path in sorted((photos / "test").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (photos / "test").rmdir()
    dataset = load(folder(photos))
    assert dataset.test.labels.bincount().tolist() == [2, 2]
    seen = {*dataset.train.rows.tolist(), *dataset.validation.rows.tolist()}
    assert not seen & set(dataset.test.rows.tolist())


def test_pictures_that_swap_their_names_are_seen_though_size_and_time_stay(photos: Path) -> None:
    cat, dog = (photos / "train" / label / "0.png" for label in ("cat", "dog"))
    for file in (cat, dog):
        os.utime(file, ns=(0, 0))
    assert cat.stat().st_size == dog.stat().st_size
    before = load(folder(photos)).description.digest
    cat.rename(photos / "spare")
    dog.rename(cat)
    (photos / "spare").rename(dog)
    after = load(folder(photos)).description.digest
    fresh = folder(photos).model_copy(update={"cache": str(photos.parent / "fresh")})
    assert before != after == load(fresh).description.digest


def test_what_does_not_fit_the_layout_is_told_but_not_what_is_hidden(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> list[str]:
        assert len(load(folder(photos)).paths) == 28
        said = capsys.readouterr().err.splitlines()
        return [line for line in said if line.startswith("passed over")]

    for hidden in ("train/.x.png", "train/cat/.x.png", "train/.eel/x.png", ".val/cat/x.png"):
        photo(photos / hidden)
    assert told() == []
    for stray in ("train/x.png", "train/cat/2024/x.png", "val/cat/x.png"):
        photo(photos / stray)
    (photos / "test" / "cat" / "link.png").symlink_to("link.png")  # in a circle
    layout = (
        "passed over 4 that are not train/<class>/<picture> or test/<class>/<picture>, the first: "
    )
    assert told() == [f"{layout}{photos}/train/x.png"]


def test_a_picture_that_vanishes_while_its_folder_is_read_is_left_out(photos: Path) -> None:
    found = listing.in_folders(photos)
    first = Path(os.fsdecode(next(found).file))
    gone = next(file for file in first.parent.iterdir() if file != first)
    gone.unlink()
    rest = [os.fsdecode(picture.file) for picture in found]
    assert len(rest) == 26 and str(gone) not in rest


@pytest.mark.parametrize("root", ["photos", "photos/list.csv"])
def test_a_root_is_the_same_however_it_is_written(
    root: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(place: str, **changes: object) -> config.Data:
        return folder(photos).model_copy(update={"root": place, **changes})

    listed(photos)
    monkeypatch.chdir(photos.parent)
    first = load(at(f"{photos.parent}/{root}")).paths
    assert "train/cat/0.png" in first
    assert load(at(f"photos/../{root}")).paths == first
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded again"))
    assert load(at(f"./{root}")).paths == first
    without = load(at(root, exclude=("train/cat/0.png",))).paths
    assert {*first} - {*without} == {"train/cat/0.png"}


def listed(root: Path, *more: str, below: str = "") -> Path:
    """A manifest of a folder's pictures, and of what else is said."""
    files = sorted(file.relative_to(root) for file in root.rglob("*.png"))
    rows = [f"{below}{file},{file.parts[1]},{file.parts[0]}" for file in files]
    (root / "list.csv").write_text("\n".join(["path,label,split", *rows, *more]))
    return root / "list.csv"


def test_a_manifest_s_rows_that_are_no_files_are_skipped(photos: Path) -> None:
    rows = ("train/cat,cat,train", "train/cat/0.png/x.png,cat,train")
    assert load(folder(listed(photos, *rows))).skipped == (
        ("train/cat", "is not there"),
        ("train/cat/0.png/x.png", "is not there"),
    )
    with pytest.raises(UnavailableError, match=r"list.csv: x{300}: File name too long$"):
        load(folder(listed(photos, f"{'x' * 300},cat,train")))


def test_a_manifest_in_this_folder_does_not_lead_out_of_it(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(photos.parent / "outside.png")
    monkeypatch.chdir(photos)
    listed(photos, below=f"{photos}/")
    assert "train/cat/0.png" in load(folder(Path("list.csv"))).paths
    for outside in ("../outside.png", "train/../../outside.png", f"{photos.parent}/outside.png"):
        listed(photos, f"{outside},cat,train")
        with pytest.raises(UnavailableError, match=f"{outside} is not below {photos}$"):
            load(folder(Path("list.csv")))


def test_a_parquet_manifest_that_is_damaged_is_named(tmp_path: Path) -> None:
    file = tmp_path / "list.parquet"
    rows = [{"path": f"{i}.png", "label": "cät"} for i in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), file, compression="none")
    whole, said = file.read_bytes(), []
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            list(listing.rows(file))  # where a letter has changed, it is another letter
        except UnavailableError as error:
            said.append(str(error))
    assert said and all(one.startswith(f"{file}: ") and "\n" not in one for one in said)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"path": "a.png", "label": ["cat"]}, ": a path and one word or number is needed"),
        ({"path": "a.png", "label": b"cat"}, ": a path and one word or number is needed"),
        ({"path": "a\0.png", "label": "cat"}, ": a path and one word or number is needed"),
        ({"path": "a.png", "label": math.nan}, " lacks path (or url) or label"),
    ],
)
def test_a_manifest_s_row_has_one_path_and_one_word(
    row: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "list.parquet")
    with pytest.raises(UnavailableError) as caught:
        load(folder(tmp_path / "list.parquet"))
    assert str(caught.value) == f"{tmp_path}/list.parquet: row 1{complaint}"


def damage(root: Path, how: str) -> None:
    if how == "no training folder":
        (root / "train").rename(root / "training")
    elif how == "an empty class":
        (root / "train" / "eel").mkdir()
    elif how == "a class that only test has":
        photo(root / "test" / "eel" / "0.png")
    elif how == "a class without a readable picture":
        photo(root / "train" / "eel" / "0.png")
        (root / "train" / "eel" / "0.png").write_bytes(b"gone")
    elif how == "one class":
        for path in (root / "train" / "dog").iterdir():
            path.unlink()
        (root / "train" / "dog").rmdir()


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("no training folder", "no such folder; pictures go to"),
        ("an empty class", "eel: the class has no pictures"),
        ("a class that only test has", "test has classes that train has not: ['eel']"),
        ("a class without a readable picture", "eel: not one readable picture"),
        ("one class", "two classes at least"),
    ],
)
def test_a_folder_that_cannot_be_learnt_from_is_refused_before_any_work(
    photos: Path, how: str, complaint: str
) -> None:
    damage(photos, how)
    with pytest.raises(UnavailableError) as caught:
        load(folder(photos))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_cifar10_out_of_reach_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    asked = settings(source="cifar10", cache=str(tmp_path), train_images=None, test_images=None)
    with pytest.raises(UnavailableError, match=r"no route to host.*cifar-10-python.tar.gz"):
        load(asked)


def test_cifar10_is_downloaded_by_one_of_two_that_start_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: list[bool] = []

    class Slow:
        data, targets = np.zeros((20, 32, 32, 3), np.uint8), [*range(10)] * 2
        classes = tuple("abcdefghij")

        def __init__(self, root: Path, *, train: bool, download: bool) -> None:
            whole = root / f"{train}"
            if whole.is_file() and whole.read_text() == "whole":
                return
            if not download:
                raise RuntimeError("Dataset not found or corrupted.")
            downloads.append(train)
            for content in ("half", "whole"):
                whole.write_text(content)
                time.sleep(0.1)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Slow)
    asked = settings(source="cifar10", cache=str(tmp_path), train_images=None, test_images=None)
    with ThreadPoolExecutor(2) as pool:
        sizes = [len(source.train) for source in pool.map(cifar10.load, [asked] * 2)]
    assert sizes == [20, 20] and downloads == [True, False]


def test_augmentation_mirrors_and_shifts_whole_pixels() -> None:
    picture = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    still = torch.zeros(2, 2, dtype=torch.int64)
    no, yes = torch.tensor([False, False]), torch.tensor([False, True])
    assert torch.equal(augment(picture, no, still), picture)
    mirrored = augment(picture, yes, still)
    assert torch.equal(mirrored[0], picture[0]) and torch.equal(mirrored[1], picture[1].flip(-1))
    moved = augment(picture, no, torch.tensor([[1, 0], [0, -1]]))
    assert torch.equal(moved[0, :, 1:], picture[0, :, :-1])
    assert torch.equal(moved[0, :, 0], picture[0, :, 0]), "the edge is repeated"
    assert torch.equal(moved[1, :, :, :-1], picture[1, :, :, 1:])


def test_any_two_epochs_in_a_row_show_an_image_both_ways() -> None:
    train = load(settings()).train
    first, second, third = (train.draws(0, epoch) for epoch in range(3))
    assert torch.equal(first.flip, ~second.flip) and torch.equal(first.flip, third.flip)
    assert 10 < first.flip.sum() < 50
    assert not torch.equal(first.shift, second.shift)
    assert first.shift.abs().max() <= round(0.125 * 75)
    assert not load(settings(flip=False, shift=0.0)).train.draws(0, 1).flip.any()


def test_pictures_that_are_not_square_shift_by_the_same_share_of_either_side() -> None:
    train = load(settings()).train
    wide = replace(train, pixels=train.pixels[:, :, :24])
    shift = wide.draws(0, 0).shift.abs()
    assert shift.amax(0).tolist() == [round(0.125 * 24), round(0.125 * 75)]


def test_pixels_stay_on_a_gpu_only_if_those_of_all_splits_leave_room_to_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = list(load(settings()).splits.values())
    needed = sum(images.pixels[images.rows].nbytes for images in splits)
    free = [needed / RESIDENT_SHARE, needed / RESIDENT_SHARE - 1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free.pop(0), 0))
    assert fit_on(torch.device("cuda"), splits) and not fit_on(torch.device("cuda"), splits)


def test_inputs_are_channels_last_floats_and_repeatable() -> None:
    train = load(settings()).train
    batch = torch.tensor([3, 1])
    draws = train.draws(0, 0)
    (inputs, labels), (alone, _) = train.batches([batch, torch.tensor([3])], draws)
    assert torch.equal(labels, train.labels[batch])
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert inputs.dtype == torch.float32 and inputs.abs().max() <= 1
    assert torch.equal(inputs[0], alone[0])


def test_pixels_that_stay_behind_arrive_as_the_same_batches() -> None:
    """What a GPU too small for the pictures does, without the GPU."""
    train = load(settings()).train
    batches = train.rows.split(7)
    expected = [train.pixels[rows] for rows in batches]
    arrived = list(prefetched(train.pixels, batches, torch.device("cpu")))
    assert all(torch.equal(a, b) for a, b in zip(arrived, expected, strict=True))
    assert not list(prefetched(train.pixels, [], torch.device("cpu")))
    one = next(prefetched(train.pixels, batches, torch.device("cpu")))
    assert torch.equal(one, expected[0]), "and may be left half-way"


@pytest.mark.slow
def test_cifar10_of_sixty_thousand_jpegs_is_decoded_once(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(
        source="folder",
        root=str(real_data / "cifar10"),
        cache=str(tmp_path),
        train_images=None,
        test_images=None,
        validation=0.1,
    )
    dataset = load(asked)
    assert dataset.description.images == Counts(train=45_000, validation=5_000, test=10_000)
    assert dataset.train.pixels.shape == (60_000, 3, 32, 32)
    assert dataset.validation.labels.bincount().tolist() == [500] * 10
    assert dataset.description.skipped == ()
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded again"))
    assert load(asked).description == dataset.description
