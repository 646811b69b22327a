"""The small real pictures of the quickstart, and the printed ones its weights come from."""

import torch

from jobs import config
from jobs.data.dataset import load
from jobs.data.sources import digits


def test_the_handwritten_digits_are_those_of_scikit_learn_dark_on_light() -> None:
    pictures, labels = digits.handwritten()
    assert pictures.shape == (1797, 3, 8, 8) and pictures.dtype == torch.uint8
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert pictures[:, :, 0, 0].float().mean() > 250, "the corners are paper"
    assert torch.equal(pictures[:, 0], pictures[:, 2]), "grey"


def test_printed_characters_are_drawn_from_a_seed_as_many_of_each() -> None:
    pictures, labels = digits.printed(72, seed=3)
    again, _ = digits.printed(72, seed=3)
    other, _ = digits.printed(72, seed=4)
    assert pictures.shape == (72, 3, 8, 8) and pictures.dtype == torch.uint8
    assert labels.bincount().tolist() == [2] * len(digits.CHARACTERS)
    assert torch.equal(pictures, again) and not torch.equal(pictures, other)
    of_one = pictures[labels == 0]
    assert not torch.equal(of_one[0], of_one[1]), "each is drawn anew"


def test_printed_ones_look_as_handwritten_ones_are_made() -> None:
    """Seventeen shades, as much ink, the full height of the picture."""
    handwritten, printed = digits.handwritten()[0], digits.printed(360, seed=0)[0]
    assert set(printed.unique().tolist()) <= set(handwritten.unique().tolist())
    ink = [(255 - pictures.float()).mean().item() for pictures in (handwritten, printed)]
    assert 0.6 < ink[0] / ink[1] < 1.6, ink
    rows_with_ink = (printed[:, 0] < 255).any(2).float().mean()
    assert rows_with_ink > 0.95


def test_the_three_splits_share_no_picture() -> None:
    dataset = load(config.load("quickstart").data)
    rows = torch.cat([split.rows for split in (dataset.train, dataset.validation, dataset.test)])
    assert len(rows) == 160 + 240 + 599 == len(rows.unique())
    assert dataset.classes == tuple("0123456789")
