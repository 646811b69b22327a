"""Whether a shadow should serve, by what the service has counted of it (serving/shadow.py).

Nobody knows the right labels of what clients send. Where both models agree, they are right or wrong
together; where they differ, the calibrated probability of each for its own label stands in for
being right. So each picture on which they differ is shared between them by their probabilities,
which makes a test like McNemar's, with intervals that allow one to look as often as one likes.
"""

import math
import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from http.client import HTTPException

from jobs.errors import UnavailableError
from jobs.statistics import confidence_sequence
from serving.archive import Interval, Record

SECONDS = 10.0
FAILURES = 0.01  # of the requests; more is no service
SAMPLE = re.compile(r"^inception_shadow_(\w+?)(\{[^}]*\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Advice(Enum):
    """What to do with the shadow."""

    PROMOTE = "promote"
    KEEP_LOOKING = "keep looking"
    STOP = "stop"


EXIT_CODES = {Advice.PROMOTE: 0, Advice.STOP: 4, Advice.KEEP_LOOKING: 5}


@dataclass(frozen=True)
class Seen:
    """What services have counted, all replicas together."""

    versions: tuple[str, str]
    """The one that serves, and the shadow."""
    agree: int
    """Pictures on which both name the same class."""
    live_surer: float
    """Of the pictures on which they differ, the part that counts for the one that serves: each is
    shared between the two by their probabilities."""
    shadow_surer: float
    """The rest of them."""
    answered: int
    """Requests that the shadow got and answered."""
    failed: int
    dropped: int
    live_seconds: float
    """Mean time of an answer."""
    shadow_seconds: float
    live_probability: float
    """Mean over the pictures, of the likeliest class."""
    shadow_probability: float
    errors: float | None
    """Upper ends of both models' error rates on their test sets, added; None where an archive was
    not tested."""

    @property
    def differ(self) -> int:
        return round(self.live_surer + self.shadow_surer)


class Verdict(Record):
    """What `python -m jobs verdict --json` prints."""

    advice: Advice
    reason: str
    seen: Seen
    differ: Interval
    """Share of the pictures on which they differ."""
    surer: Interval
    """The shadow's share of those: 0.5 where both are as likely to be right."""
    failures: Interval
    """Share of the requests that the shadow did not answer."""

    def __str__(self) -> str:
        seen = self.seen
        live, shadow = seen.versions
        pictures = seen.agree + seen.differ
        gained = 2 * self.surer.value - 1 if seen.differ else 0.0
        return "\n".join(
            [
                f"{self.advice.value}: {self.reason}",
                f"serves {live}, its shadow is {shadow}",
                f"{pictures:,} pictures: they differ on {seen.differ:,}, {_percent(self.differ)}; "
                f"the shadow's probability less the other's is {gained:+.3f} there",
                f"mean probability of the likeliest class: {seen.live_probability:.3f}, the "
                f"shadow's {seen.shadow_probability:.3f}",
                f"{seen.failed:,} of {seen.failed + seen.answered:,} requests without an answer "
                f"by the shadow; {seen.dropped:,} more were not sent to it, as it was busy",
                f"{seen.live_seconds:.3f} s an answer, the shadow {seen.shadow_seconds:.3f} s",
            ]
        )


def verdict(seen: Seen, tolerance: float) -> Verdict:
    """
    Args:
        tolerance: percentage points of accuracy that the shadow may lose.
    """
    differ = _interval(seen.differ, seen.agree + seen.differ)
    surer = _interval(seen.shadow_surer, seen.live_surer + seen.shadow_surer)
    failures = _interval(seen.failed, seen.failed + seen.answered)
    allowed = tolerance / 100
    lost = (1 - 2 * surer.high) * differ.low  # at least, of accuracy
    if failures.low > FAILURES:
        advice, reason = Advice.STOP, f"the shadow fails on {_percent(failures)} of the requests"
    elif seen.errors is not None and differ.low > seen.errors:
        advice = Advice.STOP
        reason = f"they differ on {_percent(differ)} of the pictures, and both models' errors on "
        reason += f"their test sets explain {seen.errors * 100:.1f} % at most"
    elif lost > allowed:
        advice, reason = Advice.STOP, "the one that serves is surer where they differ"
    elif failures.high > FAILURES:
        advice, reason = Advice.KEEP_LOOKING, "too few requests to know how often it fails"
    elif differ.high <= allowed:
        advice = Advice.PROMOTE
        reason = f"they differ on {differ.high * 100:.1f} % of the pictures at most"
    elif surer.low > 0.5:
        advice, reason = Advice.PROMOTE, "the shadow is surer where they differ"
    else:
        advice, reason = Advice.KEEP_LOOKING, "which one is surer where they differ is not settled"
    intervals = {"differ": differ, "surer": surer, "failures": failures}
    return Verdict(advice=advice, reason=reason, seen=seen, **intervals)


def read(addresses: Iterable[str]) -> Seen:
    """The counts of services, each of which has its metrics at an address.

    Raises:
        UnavailableError: one is out of reach, has no shadow, itself or another one than the others.
    """
    counts: defaultdict[tuple[str, str], float] = defaultdict(float)
    for address in addresses:
        found = _samples(address)
        if not any(what == "info" for what, _ in found):
            raise UnavailableError(f"{address}: this service has no shadow")
        for key, value in found.items():
            # What is no count is the same in every replica.
            counts[key] = value if key[0] in ("info", "tested_accuracy") else counts[key] + value
    pairs = sorted(labels for what, labels in counts if what == "info")
    if len(pairs) > 1:
        raise UnavailableError(f"the services have other versions: {'; '.join(pairs)}")
    versions = dict(LABEL.findall(pairs[0]))
    if versions["live"] == versions["shadow"]:
        raise UnavailableError(f"the shadow is {versions['live']}, too: nothing to compare")
    errors = [1 - value for (what, _), value in counts.items() if what == "tested_accuracy"]

    def mean(what: str, role: str) -> float:
        label = f'role="{role}"'
        return counts[f"{what}_sum", label] / max(counts[f"{what}_count", label], 1)

    def count(what: str, outcome: str) -> float:
        return counts[f"{what}_total", f'outcome="{outcome}"']

    return Seen(
        versions=(versions["live"], versions["shadow"]),
        agree=int(count("pictures", "agree")),
        live_surer=count("pictures", "live_surer"),
        shadow_surer=count("pictures", "shadow_surer"),
        answered=int(count("requests", "answered")),
        failed=int(count("requests", "failed")),
        dropped=int(count("requests", "dropped")),
        live_seconds=mean("seconds", "live"),
        shadow_seconds=mean("seconds", "shadow"),
        live_probability=mean("probability", "live"),
        shadow_probability=mean("probability", "shadow"),
        errors=sum(errors) if len(errors) == 2 else None,
    )


def _samples(address: str) -> dict[tuple[str, str], float]:
    """Of the shadow: name and labels to value."""
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as response:
            found = SAMPLE.findall(response.read().decode())
        samples = {(n, labels.strip("{}")): float(value) for n, labels, value in found}
    except (OSError, HTTPException, ValueError) as error:
        raise UnavailableError(f"{address}: {error}") from None
    if odd := [name for (name, _), value in samples.items() if not 0 <= value < math.inf]:
        raise UnavailableError(f"{address}: {odd[0]} is no count")
    return samples


def _interval(count: float, total: float) -> Interval:
    low, high = confidence_sequence(count, total)
    return Interval(value=count / total if total else 0.0, low=low, high=high)


def _percent(share: Interval) -> str:
    return f"{share.low * 100:.1f} to {share.high * 100:.1f} %"
