"""Claim: of known pictures a share of α has a familiarity of α at most, sets of classes hold the
right one as often as they say, strangers are caught better than by probabilities alone, and a
service whose pictures change notices it, with hardly a false alarm.

    python -m benchmarks.trust --data FOLDER --weights FILE      (some 10 minutes on 2 cores)

FOLDER has train/<class>/ and test/<class>/, such as CIFAR-10 as JPEG files of 32 pixels, FILE the
trunk's weights. The trunk stays as it is, so its features of a few thousand pictures are computed
once and kept in `--cache`; a linear head learns from them. What is fitted is what an export fits.
Known pictures are dealt anew to training, held-out and test ones for each of five seeds. Strangers
are the classes of five pairs, each left out in turn, and pictures that are none of them: printed
glyphs, noise, test pictures blurred, pixelated and darkened in five strengths each.

Every way of telling strangers has its threshold from the held-out pictures, at 5 % false alarms.

A service is imitated by test pictures one after the other, in an order that is drawn. From some
request on, a share of them is strangers. It notices at the first request at which its evidence is
20, which it should reach in 5 % of the orders at most while nothing changes.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from math import log10
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own idiom

from benchmarks import record
from jobs import config, devices
from jobs.data.dataset import Dataset, load
from jobs.data.images import Draws, Images
from jobs.data.sources import digits
from jobs.delivery import trust
from jobs.seeds import generator
from jobs.train import models
from jobs.train.features import extract
from serving.drift import Drift
from serving.messages import softmax
from serving.trust import Trust, roots

TRAIN, HELD_OUT, TEST, STRANGE = 2000, 500, 4000, 250  # pictures
SIDES = (24, 16, 12, 8, 4)  # pixels that are left of 32 in each strength of blur and pixelation
LIGHT = (0.8, 0.6, 0.4, 0.2, 0.1)  # that is left in each strength of darkness, as a share
SEEDS, CLASSES = 5, 10
SHARES, CONFIDENCES = (0.01, 0.05, 0.1), (0.8, 0.9, 0.95, 0.99)
FALSE_ALARMS = 0.05
ORDERS, CHANGED_ORDERS = 200, 50  # of test pictures, over all seeds
BEFORE, AFTER = 500, 2000  # requests before the change, and those it has to be noticed within
STRANGERS = (0.1, 0.3, 1.0)  # their share of the requests after it

Array = NDArray[np.float32]
Split = tuple[Array, NDArray[np.int64]]
"""Features [N, 2048] and labels [N]."""
Strangeness = Callable[[Array, Array], Array]
"""From features [N, 2048] and logits [N, C] to what is larger for strangers, [N]."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--cache", type=Path, default=Path("build/trust"))
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    arrays = features_of(options.data, options.weights, options.cache)
    known = [
        np.concatenate([arrays[f"{name}{kind}"] for name in ("train", "held out", "test")])
        for kind in ("", " labels")
    ]
    strangers = {n: a for n, a in arrays.items() if not n.startswith(("train", "held", "test"))}
    strangers = {n: a for n, a in strangers.items() if not n.endswith("labels")}
    promises = [kept(*deal(known, seed)) for seed in range(SEEDS)]
    caught = [told_apart(known, strangers, seed) for seed in range(SEEDS)]
    served = [streams(known, strangers, seed) for seed in range(SEEDS)]
    figures: dict[str, dict[str, Any]] = {
        "pictures": {"train": TRAIN, "held_out": HELD_OUT, "test": TEST, "strangers": STRANGE},
        "promises": _spread(promises),
        "strangers": _spread(caught),
        "unchanged": {
            "requests": TEST,
            "orders": ORDERS,
            "passed": alarms(served, Drift),
            "passed, by familiarity": alarms(served, AgainstHeldOut),
        },
        "changed": {"before": BEFORE, "within": AFTER, "orders": CHANGED_ORDERS},
        "noticed": noticed(served, list(strangers)),
    }
    record.show(
        ("promise", "kept, mean of seeds", "least", "most"),
        [(name, f["mean"], f["least"], f["most"]) for name, f in figures["promises"].items()],
    )
    record.show(
        ("strangers, by", "mean of seeds", "least", "most"),
        [(name, f["mean"], f["least"], f["most"]) for name, f in figures["strangers"].items()],
    )
    print(f"alarms without a change, in {ORDERS} orders: {figures['unchanged']}")
    record.show(
        ("noticed after so many requests of", *(f"{share:.0%}" for share in STRANGERS)),
        [
            (name, *(by_share[str(share)]["median"] for share in STRANGERS))
            for name, by_share in figures["noticed"].items()
        ],
    )
    record.save("trust", options.out, SEEDS, figures)


def _spread(seeds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for name in seeds[0]:
        values = [one[name] for one in seeds]
        found[name] = {"mean": fmean(values), "least": min(values), "most": max(values)}
    return found


def deal(known: list[NDArray[Any]], seed: int) -> tuple[Split, Split, Split]:
    """Training, held-out and test pictures."""
    order = np.random.default_rng(seed).permutation(len(known[1]))
    parts = np.split(order, [TRAIN, TRAIN + HELD_OUT])
    train, held_out, test = ((known[0][part], known[1][part]) for part in parts)
    return train, held_out, test


def kept(train: Split, held_out: Split, test: Split) -> dict[str, float]:
    """What came of the promises on the test pictures."""
    logits = head(train)
    temperature = trust.fit_temperature(logits(held_out[0]), held_out[1])
    fitted = trust.fit(train[0], held_out[0], logits(held_out[0]) / temperature, held_out[1])
    p = softmax(logits(test[0]) / temperature)
    familiarity = fitted.familiarity(fitted.strange(test[0]))
    found = {"accuracy": float((p.argmax(1) == test[1]).mean())}
    found |= {f"familiarity at {share}": float((familiarity <= share).mean()) for share in SHARES}
    for confidence in CONFIDENCES:
        least = fitted.least_probability(confidence)
        members = p >= np.minimum(least, p.max(1, keepdims=True))
        found[f"set at {confidence}"] = float(members[np.arange(len(p)), test[1]].mean())
        found[f"classes in a set at {confidence}"] = float(members.sum(1).mean())
    for name, divisor in (("before", 1.0), ("after", temperature)):
        found[f"calibration error {name}"] = _calibration_error(logits(test[0]) / divisor, test[1])
    return found


def _calibration_error(logits: Array, labels: NDArray[np.int64]) -> float:
    from jobs.train.evaluation import calibration_error

    return calibration_error(torch.from_numpy(logits), torch.from_numpy(labels))


def head(train: Split) -> Callable[[Array], Array]:
    """A linear layer that has learnt from features along their principal directions, which is
    quicker; gives logits [N, C]."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    directions = PCA(128, svd_solver="randomized", random_state=0)
    learner = LogisticRegression(C=0.1, max_iter=100)
    fitted = make_pipeline(directions, StandardScaler(), learner).fit(*train)
    return lambda features: fitted.decision_function(features).astype(np.float32)


def told_apart(
    known: list[NDArray[Any]], strangers: Mapping[str, Array], seed: int
) -> dict[str, float]:
    """AUROC and the share of strangers that is caught, by each way of telling them."""
    train, held_out, test = deal(known, seed)
    found = _judged(train, held_out, test, strangers)
    pair = (2 * seed, 2 * seed + 1)
    left = [(x[~np.isin(y, pair)], y[~np.isin(y, pair)]) for x, y in (train, held_out, test)]
    outside = {"left-out classes": test[0][np.isin(test[1], pair)]}
    return found | _judged(left[0], left[1], left[2], outside)


def _judged(
    train: Split, held_out: Split, test: Split, strangers: Mapping[str, Array]
) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    logits = head(train)
    found: dict[str, float] = {}
    for way, strangeness in ways(train).items():
        at_home = strangeness(test[0], logits(test[0]))
        limit = np.quantile(strangeness(held_out[0], logits(held_out[0])), 1 - FALSE_ALARMS)
        for name, features in strangers.items():
            strange = strangeness(features, logits(features))
            sides = np.repeat([0, 1], [len(at_home), len(strange)])
            auroc = roc_auc_score(sides, np.concatenate([at_home, strange]))
            found[f"{name}, {way}, AUROC"] = float(auroc)
            found[f"{name}, {way}, caught"] = float((strange > limit).mean())
    return found


Served = tuple[Array, dict[str, Array]]
"""Strangeness of known pictures that are not those of training, and of strangers by their kind."""


def streams(known: list[NDArray[Any]], strangers: Mapping[str, Array], seed: int) -> Served:
    """What one deal's services get."""
    train, held_out, test = deal(known, seed)
    some = model_of(train)
    others = np.concatenate([some.strange(held_out[0]), some.strange(test[0])])
    return others, {name: some.strange(features) for name, features in strangers.items()}


class AgainstHeldOut(Drift):
    """What familiarity by itself would give: ranks among the held-out pictures alone."""

    def _rank(self, strangeness: float) -> float:
        before = list(self.remembered)
        rank = super()._rank(strangeness)
        self.remembered = before
        return rank


def alarms(served: list[Served], kind: type[Drift]) -> float:
    """Share of the orders of unchanged pictures in which the evidence is ever 20."""
    passed = []
    for seed, (others, _) in enumerate(served):
        for turn in range(ORDERS // SEEDS):
            order = np.random.default_rng([seed, turn]).permutation(others)
            drift = kind(order[:HELD_OUT], seed=turn)
            passed.append(first_alarm(drift, order[HELD_OUT:].tolist()) is not None)
    return fmean(passed)


def first_alarm(drift: Drift, stream: Iterable[float]) -> int | None:
    """At which request the evidence is 20, the first being 1; None if at none."""
    for request, strangeness in enumerate(stream, start=1):
        drift.add(strangeness)
        if drift.evidence >= log10(1 / FALSE_ALARMS):
            return request
    return None


def noticed(served: list[Served], names: list[str]) -> dict[str, dict[str, Any]]:
    """By kind of strangers and their share, after how many requests, as a median over orders, and
    in which share of the orders at all."""
    found: dict[str, dict[str, list[int | None]]] = {
        name: {str(share): [] for share in STRANGERS} for name in names
    }
    for seed, (others, strangers) in enumerate(served):
        for turn in range(CHANGED_ORDERS // SEEDS):
            rng = np.random.default_rng([seed, turn])
            order = rng.permutation(others)
            held_out, before, after, _ = np.split(order, np.cumsum([HELD_OUT, BEFORE, AFTER]))
            drift = Drift(held_out, seed=turn)
            if first_alarm(drift, before.tolist()) is not None:
                continue  # a false alarm, which is counted elsewhere
            for name in names:
                for share in STRANGERS:
                    drawn = rng.choice(strangers[name], AFTER)
                    stream = np.where(rng.random(AFTER) < share, drawn, after).tolist()
                    found[name][str(share)].append(first_alarm(deepcopy(drift), stream))
    return {
        name: {share: _summary(requests) for share, requests in by_share.items()}
        for name, by_share in found.items()
    }


def _summary(requests: list[int | None]) -> dict[str, float | None]:
    """The median counts those that were not noticed as later than all others."""
    middle = median(AFTER + 1 if request is None else request for request in requests)
    seen = fmean(request is not None for request in requests)
    return {"median": None if middle > AFTER else middle, "noticed": seen}


def ways(train: Split) -> dict[str, Strangeness]:
    """The chosen one, others that use features, and those that use the logits alone."""
    some = model_of(train)
    return {
        "likelihood": lambda features, _: some.strange(features),
        "neighbours": neighbours(train, some),
        "relative Mahalanobis": relative_mahalanobis(train, some),
        "probability": lambda _, logits: -softmax(logits).max(1),
        "energy": lambda _, logits: -np.logaddexp.reduce(logits, axis=1),
    }


def model_of(train: Split) -> Trust:
    """What tells how strange a picture is; nothing of it is calibrated."""
    none = np.zeros((50, CLASSES), np.float32)
    return trust.fit(train[0], train[0][:50], none, train[1][:50])


def neighbours(train: Split, some: Trust, nearest: int = 5) -> Strangeness:
    """Sun et al. 2022: distance to the `nearest`-th training picture, as directions of unit length
    among the principal ones."""

    def unit(features: Array) -> Array:
        along = (roots(features) - some.centre) @ some.directions
        directions: Array = along / np.linalg.norm(along, axis=1, keepdims=True)
        return directions

    known = unit(train[0])
    return lambda features, _: -np.partition(unit(features) @ known.T, -nearest)[:, -nearest]


def relative_mahalanobis(train: Split, some: Trust) -> Strangeness:
    """Ren et al. 2021: distance to the nearest class less that to all pictures together."""
    along = (roots(train[0]) - some.centre) @ some.directions
    means = np.stack([along[train[1] == label].mean(0) for label in np.unique(train[1])])
    own = along - means[np.searchsorted(np.unique(train[1]), train[1])]
    within, whole = (np.linalg.inv(np.cov(x, rowvar=False)) for x in (own, along))

    def strangeness(features: Array, _: Array) -> Array:
        x = (roots(features) - some.centre) @ some.directions
        off = x[:, None] - means
        to_classes = np.einsum("ncd,de,nce->nc", off, within, off).min(1)
        relative: Array = to_classes - np.einsum("nd,de,ne->n", x, whole, x)
        return relative

    return strangeness


def features_of(folder: str, weights: str, cache: Path) -> dict[str, NDArray[Any]]:
    """float32 [N, 2048] of every kind of pictures by the trunk, and their `… labels`."""
    file = cache / "features.npz"
    if not file.is_file():
        device = devices.choose(config.Runtime(device="cpu"))
        variant = config.Variant(name="frozen", init="pretrained", trainable="head")
        network = models.create(variant, CLASSES, models.load_pretrained(weights), seed=0)
        found: dict[str, NDArray[Any]] = {}
        for name, some in kinds(data_of(folder, cache)).items():
            none = [Draws.none(len(some))]
            values = extract(network, some, 25, device, versions=none, advance=lambda _: None)
            found |= {name: values.values[0].numpy(), f"{name} labels": some.labels.numpy()}
            print(f"{len(some)} pictures of {name}", flush=True)
        np.savez(file, **found)  # type: ignore[arg-type]
    with np.load(file) as arrays:
        return dict(arrays)


def data_of(folder: str, cache: Path) -> Dataset:
    return load(
        config.Data(
            source="folder",
            root=folder,
            cache=str(cache),
            train_images=TRAIN + HELD_OUT,
            validation=HELD_OUT / (TRAIN + HELD_OUT),
            test_images=TEST,
        )
    )


def kinds(dataset: Dataset) -> dict[str, Images]:
    """The pictures by what they are: those known, and the strangers."""
    test = dataset.test
    some = test.take(torch.arange(0, TEST, TEST // STRANGE))
    pixels = some.raw(torch.arange(len(some)))
    glyphs, _ = digits.printed(STRANGE, seed=0)
    noise = torch.randint(256, pixels.shape, generator=generator("noise"), dtype=torch.uint8)
    strange = {"glyphs": _scaled(glyphs, 32), "noise": noise}
    strange |= {f"blurred to {side}": _scaled(_scaled(pixels, side), 32) for side in SIDES}
    strange |= {f"pixelated to {side}": _pixelated(pixels, side) for side in SIDES}
    strange |= {f"darkened to {share:.0%}": (pixels * share).to(torch.uint8) for share in LIGHT}
    known = {"train": dataset.train, "held out": dataset.validation, "test": test}
    return known | {
        name: Images.all(p, torch.zeros(len(p), dtype=torch.int64), test.settings)
        for name, p in strange.items()
    }


def _scaled(pixels: Tensor, side: int) -> Tensor:
    """uint8 [N, 3, side, side], bilinear."""
    x = F.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8)


def _pixelated(pixels: Tensor, side: int) -> Tensor:
    """uint8 [N, 3, H, W] of so many squares a side."""
    few = _scaled(pixels, side).float()
    return F.interpolate(few, pixels.shape[-2:], mode="nearest-exact").to(torch.uint8)


if __name__ == "__main__":
    main()
