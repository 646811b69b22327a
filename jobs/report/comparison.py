"""Which variant wins, by how much, and whether that is statistically significant."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from operator import itemgetter
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.config import Config, Variant
from jobs.errors import UnavailableError
from jobs.results import Comparison, Difference, Diverged, Done, Facts, Pair, Summary
from jobs.runs import RunFolder, now, read_arrays
from jobs.statistics import holm, mean_over_seeds, paired_difference, wilson
from serving.files import write

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98)
SURE = 0.05  # below this p-value a difference is called one


def compare(folder: RunFolder, config: Config) -> Comparison:
    """Reads the variants' results and writes comparison.json.

    The winner has the best accuracy on the split that selects, averaged over seeds; the test set
    then says how good it is. With one seed, intervals and p-values are over test images; with
    several, over the seeds, which all answer the same test images. Of all pairs together,
    p-values are corrected for their number.

    Raises:
        UnavailableError: a variant has no result yet.
    """
    summaries = {v.name: _summary(folder, config, v) for v in config.variants}
    done = {name: s for name, s in summaries.items() if isinstance(s, Summary)}
    ranked = sorted(done, key=lambda name: -done[name].selection_accuracy)
    winner = done[ranked[0]] if ranked else None
    facts = folder.facts()
    pairs = _pairs(folder, config, [done[name] for name in ranked])
    result = Comparison(
        run_id=folder.run_id,
        time=now(),
        data=facts,
        weights=config.weights.description,
        selected_on=config.evaluation.select_on,
        winner=winner.variant if winner else None,
        winner_seed=best_seed(winner, config.runtime.seeds) if winner else None,
        sentences=(
            _winner_sentence(config, winner),
            *(pair.sentence for pair in pairs),
            *(_without_leaks(folder, config, facts, done[name]) for name in ranked if facts.leaked),
            *_mixed(folder),
        ),
        seeds=len(config.runtime.seeds),
        thresholds=tuple(sorted({t for s in done.values() for t in s.seconds_to_accuracy})),
        variants=summaries,
        pairs=tuple(pairs),
    )
    write(folder.path / "comparison.json", result.to_json())
    return result


def best_seed(winner: Summary, seeds: Sequence[int]) -> int:
    """The seed whose weights were best on the split that selects; the earlier one of two."""
    return max(zip(winner.selection_by_seed, seeds, strict=True), key=itemgetter(0))[1]


def _summary(folder: RunFolder, config: Config, variant: Variant) -> Summary | Diverged:
    """One variant over its seeds: the first seed's result, and mean, interval and spread of all."""
    results = [folder.variant(variant.name, seed).result() for seed in config.runtime.seeds]
    if None in results:
        raise UnavailableError(f"{folder.path}: {variant.name} is unfinished; `run` resumes it")
    if diverged := [r for r in results if isinstance(r, Diverged)]:
        return diverged[0]
    done = [r for r in results if isinstance(r, Done)]
    accuracies = [r.test.accuracy for r in done]
    low, high = _interval(accuracies, done[0].test.images)
    selection = [r.selection_accuracy for r in done]
    return Summary(
        **{**dict(done[0]), "selection_accuracy": fmean(selection)},
        selection_by_seed=tuple(selection),
        accuracy_by_seed=tuple(accuracies),
        accuracy_mean=fmean(accuracies),
        accuracy_low=low,
        accuracy_high=high,
        accuracy_spread=stdev(accuracies) if len(accuracies) > 1 else None,
        seconds_to_accuracy=_seconds_to_accuracy(folder, config, variant),
    )


def _interval(accuracies: Sequence[float], images: int) -> tuple[float, float]:
    """Of the mean over seeds, each on so many images; of a single one, over these."""
    if len(accuracies) == 1:
        return wilson(round(accuracies[0] * images), images)
    over_seeds = mean_over_seeds(accuracies, images)
    return max(0.0, over_seeds.low), min(1.0, over_seeds.high)


def _seconds_to_accuracy(folder: RunFolder, config: Config, variant: Variant) -> dict[str, float]:
    """Device-seconds of training until the selecting split first reached each threshold."""
    split, seed = config.evaluation.select_on, config.runtime.seeds[0]
    rows = [
        row
        for row in folder.metrics()
        if (row["variant"], row["seed"], row["split"]) == (variant.name, seed, split)
    ]
    reached = {}
    for threshold in THRESHOLDS:
        seconds = [row["seconds"] for row in rows if row["accuracy"] >= threshold]
        if seconds:
            reached[f"{threshold:.2f}"] = min(seconds)
    return reached


def _pairs(folder: RunFolder, config: Config, ranked: Sequence[Summary]) -> list[Pair]:
    """All pairs, the better one first."""
    both = list(combinations(ranked, 2))
    differences = [_difference(folder, config, a, b) for a, b in both]
    corrected = holm([difference.p_value for difference in differences])
    return [
        Pair(
            **difference.model_dump(),
            a=a.variant,
            b=b.variant,
            p_value_holm=p_value,
            sentence=sentence(a.variant, b.variant, difference, p_value),
        )
        for (a, b), difference, p_value in zip(both, differences, corrected, strict=True)
    ]


def _difference(folder: RunFolder, config: Config, a: Summary, b: Summary) -> Difference:
    if len(config.runtime.seeds) > 1:
        by_seed = zip(a.accuracy_by_seed, b.accuracy_by_seed, strict=True)
        return mean_over_seeds([one - other for one, other in by_seed], a.test.images)
    folders = [folder.variant(summary.variant).path for summary in (a, b)]
    predictions = (read_arrays(folder / "test_predictions.npz") for folder in folders)
    return paired_difference(*map(right_answers, predictions))


def right_answers(predictions: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Bool [N], which test images are right, from the arrays of a test_predictions.npz."""
    right: NDArray[np.bool_] = predictions["logits"].argmax(1) == predictions["labels"]
    return right


def sentence(a: str, b: str, difference: Difference, p_value: float) -> str:
    """A paired difference in words; of several that are looked at together, `p_value` is the
    corrected one."""
    if difference.difference < 0:
        a, b = b, a
        low, high = -difference.high, -difference.low
    else:
        low, high = difference.low, difference.high
    points = abs(difference.difference) * 100
    interval = f"{_signed(low)} to {_signed(high)}"
    p = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"
    if p_value < SURE:
        return f"{a} beats {b} by {points:.1f} points ({interval}), {p}"
    return f"{a} and {b} cannot be told apart: {points:.1f} points ({interval}), {p}"


def _signed(share: float) -> str:
    return f"{share * 100:+.1f}".replace("-", "−")


def _without_leaks(folder: RunFolder, config: Config, facts: Facts, of: Summary) -> str:
    """A variant's accuracy on the test images that it was not trained on or chosen by."""
    paths = [folder.variant(of.variant, seed).path for seed in config.runtime.seeds]
    right = (right_answers(read_arrays(path / "test_predictions.npz")) for path in paths)
    clean = [np.delete(one, facts.leaked) for one in right]
    images = len(clean[0])
    if not images:
        return f"{of.variant}: every test image is trained on or chosen by as well"
    accuracies = [float(one.mean()) for one in clean]
    low, high = _interval(accuracies, images)
    return (
        f"{of.variant}: {fmean(accuracies):.2%} ({low:.1%} to {high:.1%}) without the "
        f"{len(facts.leaked):,} test images that are also in training, {of.accuracy_mean:.2%} with "
        "them"
    )


def _mixed(folder: RunFolder) -> list[str]:
    """A sentence if the run was continued on a machine of another precision."""
    trained = max((row["time"] for row in folder.metrics()), default="")  # later starts did nothing
    found = (one for one in folder.environments() if one["time"] <= trained)
    precisions = sorted({str(one["precision"]) for one in found})
    if len(precisions) < 2:
        return []
    return [
        f"trained in {' and in '.join(precisions)}, on machines of different kinds: part of the "
        "differences may be theirs"
    ]


def _winner_sentence(config: Config, best: Summary | None) -> str:
    if best is None:
        return "No variant has a result"
    split, seeds = config.evaluation.select_on, len(config.runtime.seeds)
    mean = f", the mean of {seeds} seeds" if seeds > 1 else ""
    sentence = (
        f"{best.variant} wins, chosen on the {split} set: {best.accuracy_mean:.2%} of "
        f"{best.test.images:,} test images are right{mean} "
        f"({best.accuracy_low:.1%} to {best.accuracy_high:.1%})"
    )
    if split == "test":
        sentence += "; it was chosen on that same set, as the lecture did, which flatters it"
    return sentence
