"""Probable label errors, by confident learning (Northcutt et al. 2021, arXiv 1911.00068).

The probabilities of each picture come from a linear classifier that has not seen it (discriminant
analysis: in closed form, and little moved by a few wrong labels). Where one gives a class at least
the probability that the class's own pictures have on average, the picture counts as one of it; if
its label is another, it is off the diagonal of the confident joint, and suspected.
"""

import numpy as np
from numpy.typing import NDArray

from jobs import interruption

FOLDS = 5
DIRECTIONS = 128  # principal ones, of the features
SHRINKAGE = 0.1  # of their covariance, towards that of independent ones
Array = NDArray[np.float32]
Labels = NDArray[np.int64]


def cross_validated(features: Array, labels: Labels, num_classes: int) -> Array:
    """Probabilities float32 [N, num_classes], each picture's by a classifier that has not seen it.

    Args:
        features: [N, D].
        labels: [N].
    """
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.pipeline import make_pipeline

    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # so each fold has its share of a class
    probabilities = np.zeros((len(labels), num_classes), dtype=np.float32)
    for fold in range(FOLDS):
        interruption.check()
        left_out = order[fold::FOLDS]
        rest = np.setdiff1d(order, left_out)
        counts = np.bincount(labels[rest], minlength=num_classes)
        rest = rest[counts[labels[rest]] > 1]  # one picture says nothing of its class's spread
        if not len(left_out) or (counts > 1).sum() < 2:
            continue  # there is nothing to tell apart
        known = features[rest]
        directions = PCA(min(DIRECTIONS, *known.shape), svd_solver="randomized", random_state=0)
        learner = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=SHRINKAGE)
        fitted = make_pipeline(directions, learner).fit(known, labels[rest])
        places = left_out[:, None], learner.classes_
        probabilities[places] = fitted.predict_proba(features[left_out])
    return probabilities


def thresholds(probabilities: Array, labels: Labels) -> Array:
    """float32 [C]: of every class, the mean probability that its own pictures have of it; 2, which
    nothing reaches, for a class without pictures, or with so few that no classifier learned it."""
    own = [probabilities[labels == c, c] for c in range(probabilities.shape[1])]
    return np.array([p.mean() if p.any() else 2.0 for p in own], dtype=np.float32)


def suspects(probabilities: Array, labels: Labels) -> tuple[Labels, Labels, Array]:
    """The pictures off the diagonal of the confident joint, the surest first.

    Args:
        probabilities: [N, C], of a classifier that has not seen the picture.
        labels: [N], as given.

    Returns:
        Their positions, the classes that they seem to be of, and by how much the probability of
        that class is above that of the given one.
    """
    limits = thresholds(probabilities, labels)
    confident = probabilities >= limits
    counted = np.where(confident, probabilities, -1).argmax(1)
    rows = np.arange(len(labels))
    margins = probabilities[rows, counted] - probabilities[rows, labels]
    off = np.flatnonzero(confident.any(1) & (margins > 0) & (limits[labels] <= 1))
    order = off[np.argsort(-margins[off], kind="stable")]
    return order, counted[order], margins[order]
