"""Who wins and by how much, on runs whose results are written down here: nothing is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import tiny_config

from jobs.config import Config
from jobs.errors import UnavailableError
from jobs.report import comparison
from jobs.report.comparison import best_seed, compare, sentence
from jobs.results import Difference, Diverged, Done, Facts
from jobs.runs import RunFolder, write_arrays
from jobs.statistics import mean_over_seeds, wilson
from serving.archive import Counts, Scores
from serving.files import write

IMAGES = 40
LABELS = np.arange(IMAGES) % 2


class One(NamedTuple):
    """A variant with one seed: how good it is."""

    selection: float
    right: Sequence[int]
    """Test images that it gets right."""


def facts(leaked: Sequence[int] = ()) -> Facts:
    return Facts(
        source="generated",
        classes=("a", "b"),
        image_size=(32, 32),
        images=Counts(train=60, validation=20, test=IMAGES),
        test_digest="t",
        digest="d",
        skipped=(),
        leaked=tuple(leaked),
    )


def scores(right: int) -> Scores:
    low, high = wilson(right, IMAGES)
    return Scores(
        images=IMAGES,
        loss=1.0,
        accuracy=right / IMAGES,
        accuracy_low=low,
        accuracy_high=high,
        per_class=(None, None),
        calibration_error=0.0,
    )


def leave(folder: RunFolder, name: str, seed: int, one: One) -> None:
    """What a variant leaves once it is trained and tested."""
    variant = folder.variant(name, seed)
    predicted = np.where(np.isin(np.arange(IMAGES), one.right), LABELS, 1 - LABELS)
    logits = np.eye(2, dtype=np.float32)[predicted]
    write_arrays(variant.path / "test_predictions.npz", {"logits": logits, "labels": LABELS})
    variant.save_result(
        Done(
            seconds=9.0 + seed,
            variant=name,
            seed=seed,
            parameters=10,
            trainable_parameters=5,
            epochs=3,
            best_epoch=2,
            selected_on="validation",
            selection_accuracy=one.selection,
            images_per_second=7.0,
            test=scores(len(one.right)),
            peak_memory_bytes=0,
        )
    )


def run_of(
    path: Path, variants: Mapping[str, Sequence[One]], leaked: Sequence[int] = (), **sections: Any
) -> tuple[RunFolder, Config]:
    """A run in which each variant has a result for each seed, the first of which is 3."""
    seeds = [3 + i for i in range(len(next(iter(variants.values()))))]
    config = tiny_config(runtime={"seeds": seeds}, **sections)
    folder = RunFolder(path / "run")
    folder.begin(config)
    write(folder.path / "data.json", facts(leaked).to_json())
    for name, ones in variants.items():
        for seed, one in zip(seeds, ones, strict=True):
            leave(folder, name, seed, one)
    return folder, config


ALONE = {  # the validation set chooses another one than the test set would
    "scratch": [One(0.3, range(20, 30))],
    "finetune": [One(0.7, range(36))],
    "frozen": [One(0.8, range(2, 34))],
}


def test_a_run_that_went_on_in_another_precision_says_so(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, ALONE)
    day = "2026-01-{}T00:00:00+00:00".format
    times = {"05": "bfloat16", "06": "bfloat16", "08": "float32"}
    folder.add_environments([{"time": day(d), "precision": p} for d, p in times.items()])
    row = {"variant": "frozen", "seed": 3, "epoch": 0, "split": "train", "loss": 1.0}
    folder.append_metrics([{**row, "time": day("07")}])
    assert "float" not in compare(folder, config).sentences[-1], "nothing was trained on the 8th"
    folder.append_metrics([{**row, "epoch": 1, "time": day("09")}])
    assert compare(folder, config).sentences[-1].startswith("trained in bfloat16 and in float32, ")


def test_one_seed_is_judged_on_its_test_images(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, ALONE)
    result = compare(folder, config)
    assert folder.comparison() == result
    assert (result.run_id, result.data) == ("run", facts())
    assert result.weights == "random weights in place of pretrained ones"
    assert (result.winner, result.winner_seed, result.seeds) == ("frozen", 3, 1)
    assert result.selected_on == "validation"
    assert [(p.a, p.b, p.only_a, p.only_b) for p in result.pairs] == [
        ("frozen", "finetune", 0, 4),
        ("frozen", "scratch", 22, 0),
        ("finetune", "scratch", 26, 0),
    ]
    assert [p.p_value_holm for p in result.pairs] == pytest.approx([0.125, 4 / 2**22, 6 / 2**26])
    assert [p.difference for p in result.pairs] == pytest.approx([-0.1, 0.55, 0.65])
    assert result.sentences == (
        "frozen wins, chosen on the validation set: 80.00% of 40 test images are right "
        "(65.2% to 89.5%)",
        "finetune and frozen cannot be told apart: 10.0 points (−1.5 to +20.6), p = 0.12",
        "frozen beats scratch by 55.0 points (+35.9 to +68.9), p < 0.001",
        "finetune beats scratch by 65.0 points (+45.8 to +78.0), p < 0.001",
    )
    winner = result.done["frozen"]
    assert (winner.accuracy_by_seed, winner.accuracy_mean) == ((0.8,), 0.8)
    assert (winner.accuracy_low, winner.accuracy_high) == wilson(32, 40)
    assert winner.accuracy_spread is None and winner.seconds == 12.0


SEVERAL = {
    "scratch": [One(0.4, range(20)), One(0.5, range(18)), One(0.4, range(25))],
    "finetune": [One(0.6, range(30)), One(0.9, range(35)), One(0.8, range(31))],
    "frozen": [One(0.9, range(39)), One(0.5, range(40)), One(0.6, range(39))],
}


def test_several_seeds_are_judged_by_their_spread(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, SEVERAL)
    result = compare(folder, config)
    assert (result.winner, result.winner_seed, result.seeds) == ("finetune", 4, 3)
    winner, frozen = result.done["finetune"], result.done["frozen"]
    accuracies = (0.75, 0.875, 0.775)
    over_seeds = mean_over_seeds(accuracies, IMAGES)
    assert (winner.accuracy_by_seed, winner.selection_by_seed) == (accuracies, (0.6, 0.9, 0.8))
    assert winner.accuracy_mean == pytest.approx(0.8)
    assert winner.selection_accuracy == pytest.approx(2.3 / 3)
    assert winner.accuracy_spread == pytest.approx(stdev(accuracies))
    assert (winner.accuracy_low, winner.accuracy_high) == (over_seeds.low, over_seeds.high)
    assert frozen.accuracy_high == 1.0 > frozen.accuracy_low, "no share is larger"
    assert result.sentences[0] == (
        "finetune wins, chosen on the validation set: 80.00% of 40 test images are right, the mean "
        "of 3 seeds (63.6% to 96.4%)"
    )
    assert [(p.a, p.b) for p in result.pairs] == [
        ("finetune", "frozen"),
        ("finetune", "scratch"),
        ("frozen", "scratch"),
    ]
    expected = mean_over_seeds([0.75 - 0.975, 0.875 - 1.0, 0.775 - 0.975], IMAGES)
    first = result.pairs[0]
    assert first.only_a is None
    assert (first.difference, first.p_value) == pytest.approx(
        (expected.difference, expected.p_value)
    )


def test_two_seeds_are_several(tmp_path: Path) -> None:
    two = {name: ones[:2] for name, ones in SEVERAL.items()}
    result = compare(*run_of(tmp_path, two))
    assert ", the mean of 2 seeds (" in result.sentences[0]
    [best] = [p for p in result.pairs if {p.a, p.b} == {"finetune", "frozen"}]
    assert best.only_a is None
    expected = mean_over_seeds([0.75 - 0.975, 0.875 - 1.0], IMAGES)
    assert abs(best.difference) == pytest.approx(-expected.difference)
    assert best.p_value == pytest.approx(expected.p_value)


def test_what_hardly_anyone_gets_right_has_no_interval_below_zero(tmp_path: Path) -> None:
    hard = {name: [One(0.5, ()), One(0.5, range(2))] for name in ALONE}
    folder, config = run_of(tmp_path, hard)
    assert compare(folder, config).done["scratch"].accuracy_low == 0.0


def test_of_equals_the_first_one_wins_and_with_its_first_seed(tmp_path: Path) -> None:
    equal = {name: [One(0.5, range(20)), One(0.5, range(20))] for name in ALONE}
    result = compare(*run_of(tmp_path, equal))
    assert (result.winner, result.winner_seed) == ("scratch", 3)
    winner = result.done["scratch"]
    for accuracies, seed in (((0.5, 0.7), 8), ((0.7, 0.5), 4), ((0.6, 0.6), 4)):
        changed = winner.model_copy(update={"selection_by_seed": accuracies})
        assert best_seed(changed, (4, 8)) == seed


def test_time_counts_until_the_selecting_split_first_reached_an_accuracy(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, SEVERAL)

    def row(epoch: int, accuracy: float, seconds: float, **other: Any) -> dict[str, Any]:
        own = {"variant": "frozen", "seed": 3, "split": "validation", "epoch": epoch}
        return {**own, "accuracy": accuracy, "seconds": seconds, **other}

    folder.append_metrics(
        [
            row(0, 0.3, 10.0),
            row(1, 0.55, 20.0),
            row(2, 0.45, 30.0),
            row(0, 0.99, 1.0, split="test"),
            row(0, 0.99, 1.0, seed=4),
            row(0, 0.75, 1.0, variant="finetune"),
        ]
    )
    result = compare(folder, config)
    assert result.done["frozen"].seconds_to_accuracy == {"0.30": 10.0, "0.40": 20.0, "0.50": 20.0}
    assert result.done["scratch"].seconds_to_accuracy == {}
    assert result.thresholds == ("0.30", "0.40", "0.50", "0.60", "0.70", "0.75")


def test_what_is_chosen_on_the_test_set_is_said_to_be_flattered(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, ALONE, evaluation={"select_on": "test"})
    assert compare(folder, config).sentences[0] == (
        "frozen wins, chosen on the test set: 80.00% of 40 test images are right "
        "(65.2% to 89.5%); it was chosen on that same set, as the lecture did, which flatters it"
    )


def test_test_images_that_are_trained_on_are_left_out_once_more(tmp_path: Path) -> None:
    """Of 0 to 9, which leak, `frozen` gets two wrong; of the other 30, six."""
    folder, config = run_of(tmp_path, ALONE, leaked=range(10))
    low, high = wilson(24, 30)
    said = compare(folder, config).sentences
    assert len(said) == 1 + 3 + 3
    assert said[4] == (
        f"frozen: 80.00% ({low:.1%} to {high:.1%}) without the 10 test images that are also in "
        "training, 80.00% with them"
    )
    assert said[5].startswith("finetune: 86.67% (") and said[5].endswith("90.00% with them")


def test_leaks_of_several_seeds_are_left_out_of_each(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, SEVERAL, leaked=range(20))
    said = compare(folder, config).sentences
    over_seeds = mean_over_seeds([10 / 20, 15 / 20, 11 / 20], 20)
    assert said[4] == (
        f"finetune: 60.00% ({over_seeds.low:.1%} to {over_seeds.high:.1%}) without the 20 test "
        "images that are also in training, 80.00% with them"
    )
    assert said[5].startswith("frozen: 96.67% (") and " to 100.0%)" in said[5]
    assert said[6].startswith("scratch: 8.33% (0.0% to ")


def test_where_every_test_image_leaks_nothing_is_left_to_say(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, ALONE, leaked=range(IMAGES))
    said = compare(folder, config).sentences
    assert said[4] == "frozen: every test image is trained on or chosen by as well"


def test_a_variant_that_diverged_is_not_compared(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, SEVERAL)
    lost = Diverged(variant="finetune", seed=4, reason="the loss was no longer finite")
    folder.variant("finetune", 4).save_result(lost)
    result = compare(folder, config)
    assert result.variants["finetune"] == lost and set(result.done) == {"scratch", "frozen"}
    assert result.winner == "frozen" and len(result.pairs) == 1
    for name in ("scratch", "frozen"):
        gone = lost.model_copy(update={"variant": name, "seed": 3})
        folder.variant(name, 3).save_result(gone)
    result = compare(folder, config)
    assert (result.winner, result.winner_seed, result.pairs) == (None, None, ())
    assert result.sentences == ("No variant has a result",)


def test_a_variant_without_a_result_is_named(tmp_path: Path) -> None:
    folder, config = run_of(tmp_path, SEVERAL)
    (folder.variant("frozen", 4).path / "result.json").unlink()
    with pytest.raises(UnavailableError, match=r"run: frozen is unfinished; `run` resumes it$"):
        compare(folder, config)


def test_p_values_are_corrected_for_each_other_and_the_corrected_ones_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = run_of(tmp_path, ALONE)
    p_values = iter([0.02, 0.03, 0.9])

    def difference(*_: Any) -> Difference:
        return Difference(difference=0.1, low=0.01, high=0.2, p_value=next(p_values))

    monkeypatch.setattr(comparison, "_difference", difference)
    result = compare(folder, config)
    assert [pair.p_value for pair in result.pairs] == [0.02, 0.03, 0.9]
    assert [pair.p_value_holm for pair in result.pairs] == pytest.approx([0.06, 0.06, 0.9])
    assert all("cannot be told apart" in text for text in result.sentences[1:])
    assert "p = 0.06" in result.sentences[1]
    assert [pair.sentence for pair in result.pairs] == list(result.sentences[1:])


@pytest.mark.parametrize(
    ("p_value", "said"),
    [
        (0.00099, "a beats b by 4.0 points (−1.0 to +9.0), p < 0.001"),
        (0.001, "a beats b by 4.0 points (−1.0 to +9.0), p = 0.001"),
        (0.0499, "a beats b by 4.0 points (−1.0 to +9.0), p = 0.05"),
        (0.05, "a and b cannot be told apart: 4.0 points (−1.0 to +9.0), p = 0.05"),
    ],
)
def test_a_difference_is_called_one_below_five_per_cent(p_value: float, said: str) -> None:
    found = Difference(difference=0.04, low=-0.01, high=0.09, p_value=0.5)
    assert sentence("a", "b", found, p_value) == said
    turned = Difference(difference=-0.04, low=-0.09, high=0.01, p_value=0.5)
    assert sentence("b", "a", turned, p_value) == said


def test_no_difference_leaves_the_order() -> None:
    none = Difference(difference=0.0, low=-0.02, high=0.01, p_value=1.0)
    said = "a and b cannot be told apart: 0.0 points (−2.0 to +1.0), p = 1"
    assert sentence("a", "b", none, 1.0) == said
