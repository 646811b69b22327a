"""The page of `python -m jobs report RUN RUN…`: what several runs came to, side by side."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from jobs.report import html
from jobs.report.comparison import right_answers, sentence
from jobs.results import Comparison
from jobs.runs import RunFolder, read_arrays
from jobs.statistics import holm, paired_difference
from serving.progress import duration


def render(folders: Sequence[RunFolder]) -> str:
    """The page as HTML.

    Raises:
        UnavailableError: one of them is not the folder of a run that was compared.
    """
    ids = [folder.run_id for folder in folders]
    names = ids if len(set(ids)) == len(ids) else [str(folder.path) for folder in folders]
    runs = dict(zip(names, folders, strict=True))
    found = {name: folder.comparison() for name, folder in runs.items()}
    sources = {(c.data.digest, c.data.test_digest, c.data.images) for c in found.values()}
    return html.render(
        "runs.html",
        runs=found,
        devices={
            name: ", ".join(dict.fromkeys(start["device"] for start in folder.environments()))
            for name, folder in runs.items()
        },
        same_data=len(sources) == 1,
        sentences=_differences(runs, found),
        duration=duration,
    )


def _differences(runs: Mapping[str, RunFolder], found: Mapping[str, Comparison]) -> list[str]:
    """In words, of what any two runs export, where both were asked the same test pictures."""
    right, titles = {}, {}
    for name, comparison in found.items():
        if comparison.winner is not None and comparison.winner_seed is not None:
            winner = runs[name].variant(comparison.winner, comparison.winner_seed)
            right[name] = right_answers(read_arrays(winner.path / "test_predictions.npz"))
            titles[name] = f"{comparison.winner} of {name}"
    digests = {name: comparison.data.test_digest for name, comparison in found.items()}
    both = [(a, b) for a, b in combinations(right, 2) if digests[a] == digests[b]]
    differences = [paired_difference(right[a], right[b]) for a, b in both]
    corrected = holm([difference.p_value for difference in differences])
    return [
        sentence(titles[a], titles[b], difference, p_value)
        + "".join(_flattered(titles[name], found[name]) for name in (a, b))
        for (a, b), difference, p_value in zip(both, differences, corrected, strict=True)
    ]


def _flattered(title: str, comparison: Comparison) -> str:
    """The end of a sentence: what makes a winner look better than it is on these test pictures."""
    if comparison.selected_on == "test":
        return f"; {title} was chosen on these same pictures, which flatters it"
    if leaked := len(comparison.data.leaked):
        return f"; {title} was also trained on, or chosen by, {leaked:,} of these pictures"
    return ""
