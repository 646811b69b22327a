"""What services have counted of a shadow is added up, and decides by rules that are told."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.delivery import verdict
from jobs.delivery.verdict import Advice, Seen
from jobs.errors import UnavailableError
from jobs.statistics import confidence_sequence
from serving.shadow import Guess, outcomes

SEEN = Seen(
    versions=("one", "two"),
    agree=4000,
    live_surer=0,
    shadow_surer=0,
    answered=4000,
    failed=0,
    dropped=0,
    live_seconds=0.05,
    shadow_seconds=0.06,
    live_probability=0.9,
    shadow_probability=0.91,
    errors=0.2,
)
WORSE = replace(SEEN, shadow_surer=40, live_surer=160)


@pytest.mark.parametrize(
    ("seen", "tolerance", "advice"),
    [
        (SEEN, 0.5, Advice.PROMOTE),  # they hardly differ
        (replace(SEEN, agree=0, answered=0), 0.5, Advice.KEEP_LOOKING),
        (replace(SEEN, agree=50, answered=50), 100, Advice.KEEP_LOOKING),  # it might still fail
        (replace(SEEN, failed=100), 0.5, Advice.STOP),
        (replace(SEEN, shadow_surer=160, live_surer=40), 0.5, Advice.PROMOTE),
        (WORSE, 0.5, Advice.STOP),
        (WORSE, 10, Advice.PROMOTE),  # no loss that counts
        (replace(SEEN, shadow_surer=48, live_surer=52), 0.5, Advice.KEEP_LOOKING),
        (replace(SEEN, shadow_surer=1800, live_surer=40), 0.5, Advice.STOP),  # others than tested
        (replace(SEEN, shadow_surer=1800, live_surer=40, errors=None), 0.5, Advice.PROMOTE),
    ],
)
def test_what_was_seen_decides(seen: Seen, tolerance: float, advice: Advice) -> None:
    found = verdict.verdict(seen, tolerance)
    assert found.advice is advice and found.reason
    assert str(found).startswith(f"{advice.value}: ")


@pytest.mark.parametrize(
    ("seen", "tolerance", "reason"),
    [
        (SEEN, 0.5, "they differ on 0.3 % of the pictures at most"),
        (
            replace(SEEN, shadow_surer=1800, live_surer=40, errors=None),
            50,
            "they differ on 33.8 % of the pictures at most",
        ),
        (replace(SEEN, failed=100), 0.5, "the shadow fails on 1.6 to 3.5 % of the requests"),
        (
            replace(SEEN, shadow_surer=1800, live_surer=40),
            0.5,
            "they differ on 29.2 to 33.8 % of the pictures, and both models' errors on their test "
            "sets explain 20.0 % at most",
        ),
        (WORSE, 0.5, "the one that serves is surer where they differ"),
        (
            replace(SEEN, agree=50, answered=50),
            100,
            "too few requests to know how often it fails",
        ),
        (
            replace(SEEN, shadow_surer=160, live_surer=40),
            0.5,
            "the shadow is surer where they differ",
        ),
        (
            replace(SEEN, shadow_surer=48, live_surer=52),
            0.5,
            "which one is surer where they differ is not settled",
        ),
    ],
)
def test_the_reason_has_the_figures_that_decided(seen: Seen, tolerance: float, reason: str) -> None:
    assert verdict.verdict(seen, tolerance).reason == reason


@pytest.mark.parametrize(("share", "advice"), [(0.999, Advice.STOP), (1.001, Advice.KEEP_LOOKING)])
def test_a_shadow_is_stopped_for_what_it_loses_at_least(share: float, advice: Advice) -> None:
    """Of the pictures on which they differ, it is right on one side and wrong on the other."""
    surest, fewest = confidence_sequence(40, 200)[1], confidence_sequence(200, 4200)[0]
    lost = 100 * ((1 - surest) - surest) * fewest
    assert verdict.verdict(WORSE, share * lost).advice is advice


def test_being_a_little_surer_more_often_does_not_make_up_for_being_far_less_sure() -> None:
    """A shadow that is surer on most of the pictures on which they differ, and loses 1.4 points."""
    shares = [outcomes(Guess("cat", 0.46), Guess("dog", 0.5))] * 360
    shares += [outcomes(Guess("cat", 0.8), Guess("dog", 0.15))] * 240
    live, shadow = (sum(one[f"{role}_surer"] for one in shares) for role in ("live", "shadow"))
    seen = replace(SEEN, agree=9_400, live_surer=live, shadow_surer=shadow, answered=10_000)
    found = verdict.verdict(seen, 0.5)
    assert found.seen.differ == 600
    assert found.differ.value * (2 * found.surer.value - 1) == pytest.approx(-0.01416)
    assert found.advice in (Advice.STOP, Advice.KEEP_LOOKING)
    assert "the shadow's probability less the other's is -0.236 there" in str(found)


def test_limits_themselves_are_within() -> None:
    differ = confidence_sequence(200, 4200)
    even = replace(SEEN, shadow_surer=100, live_surer=100, errors=differ[0])
    assert verdict.verdict(even, 0.5).advice is Advice.KEEP_LOOKING
    assert verdict.verdict(even, differ[1] * 100).advice is Advice.PROMOTE
    fewer = replace(even, errors=differ[0] * 0.999)
    assert verdict.verdict(fewer, 0.5).advice is Advice.STOP
    assert verdict.verdict(even, differ[1] * 99.9).advice is Advice.KEEP_LOOKING


def test_a_verdict_is_told_in_words_and_as_json() -> None:
    seen = replace(WORSE, failed=3, answered=3999, dropped=1200)
    found = verdict.verdict(seen, 0.5)
    assert str(found).splitlines() == [
        "stop: the one that serves is surer where they differ",
        "serves one, its shadow is two",
        "4,200 pictures: they differ on 200, 3.6 to 6.2 %; the shadow's probability less the "
        "other's is -0.600 there",
        "mean probability of the likeliest class: 0.900, the shadow's 0.910",
        "3 of 4,002 requests without an answer by the shadow; 1,200 more were not sent to it, as "
        "it was busy",
        "0.050 s an answer, the shadow 0.060 s",
    ]
    given = found.model_dump(mode="json")
    assert (given["advice"], given["reason"]) == ("stop", found.reason)
    assert given["seen"]["agree"] == 4000 and given["seen"]["versions"] == ["one", "two"]
    for name, count, total in (("differ", 200, 4200), ("surer", 40, 200), ("failures", 3, 4002)):
        low, high = confidence_sequence(count, total)
        assert given[name] == {"value": count / total, "low": low, "high": high}
    nothing = verdict.verdict(replace(SEEN, agree=0, answered=0), 0.5).model_dump(mode="json")
    assert nothing["differ"] == {"value": 0.0, "low": 0.0, "high": 1.0}


PAGE = """\
Requests2XX 12.0
inception_shadow_info{live="one",shadow="two"} 1.0
inception_shadow_pictures_total{outcome="agree"} 30.0
inception_shadow_pictures_total{outcome="live_surer"} 3.75
inception_shadow_pictures_total{outcome="shadow_surer"} 5.25
inception_shadow_pictures_created{outcome="agree"} 1.7e+09
inception_shadow_requests_total{outcome="answered"} 20.0
inception_shadow_requests_total{outcome="failed"} 2.0
inception_shadow_requests_total{outcome="dropped"} 3.0
inception_shadow_seconds_sum{role="live"} 6.0
inception_shadow_seconds_count{role="live"} 20.0
inception_shadow_seconds_sum{role="shadow"} 8.0
inception_shadow_seconds_count{role="shadow"} 20.0
inception_shadow_probability_sum{role="live"} 23.4
inception_shadow_probability_count{role="live"} 39.0
inception_shadow_probability_sum{role="shadow"} 31.2
inception_shadow_probability_count{role="shadow"} 39.0
inception_shadow_tested_accuracy{role="live"} 0.875
inception_shadow_tested_accuracy{role="shadow"} 0.75
"""


def test_counts_of_replicas_are_added_and_what_is_the_same_in_each_is_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(PAGE)
    found = verdict.read([(tmp_path / name).as_uri() for name in ("a", "b")])
    assert found == Seen(
        versions=("one", "two"),
        agree=60,
        live_surer=7.5,
        shadow_surer=10.5,
        answered=40,
        failed=4,
        dropped=6,
        live_seconds=12 / 40,
        shadow_seconds=16 / 40,
        live_probability=46.8 / 78,
        shadow_probability=62.4 / 78,
        errors=0.375,
    )
    assert found.differ == 18


def test_means_of_nothing_are_zero_and_of_one_are_that_one(tmp_path: Path) -> None:
    page = tmp_path / "page"
    page.write_text(
        'inception_shadow_info{live="one",shadow="two"} 1.0\n'
        'inception_shadow_seconds_sum{role="live"} 0.25\n'
        'inception_shadow_seconds_count{role="live"} 1.0\n'
        'inception_shadow_tested_accuracy{role="live"} 0.9\n'
    )
    found = verdict.read([page.as_uri()])
    assert found.live_seconds == 0.25 and found.shadow_seconds == 0
    assert found.errors is None, "an archive has no test"


def test_services_that_cannot_be_counted_together_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, none = (tmp_path / name for name in ("one", "other", "none"))
    one.write_text(PAGE)
    other.write_text(PAGE.replace('"two"', '"three"'))
    none.write_text(PAGE.replace("_info", "_other"))
    with pytest.raises(UnavailableError) as caught:
        verdict.read([one.as_uri(), other.as_uri()])
    assert str(caught.value) == (
        'the services have other versions: live="one",shadow="three"; live="one",shadow="two"'
    )
    with pytest.raises(UnavailableError, match=f"^{none.as_uri()}: this service has no shadow"):
        verdict.read([one.as_uri(), none.as_uri()])
    one.write_text(PAGE.replace('"two"', '"one"'))
    with pytest.raises(UnavailableError, match=r"^the shadow is one, too: nothing to compare$"):
        verdict.read([one.as_uri()])
    for changed, said in (
        (PAGE.replace(" 6.0", " NaN"), r"seconds_sum is no count$"),
        (PAGE.replace(" 6.0", " -1"), r"seconds_sum is no count$"),
        (PAGE.replace(" 6.0", " six"), "could not convert string to float: 'six'$"),
    ):
        other.write_text(changed)
        with pytest.raises(UnavailableError, match=said):
            verdict.read([other.as_uri()])
    with pytest.raises(UnavailableError, match=r"absent: .*No such file"):
        verdict.read([(tmp_path / "absent").as_uri()])
    monkeypatch.setattr(verdict, "SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/metrics"
        with pytest.raises(UnavailableError, match=f"^{address}: timed out"):
            verdict.read([address])
