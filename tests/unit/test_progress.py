"""A log never looks as if nothing happened."""

import sys
import time

import pytest
from terminal import COLOUR, on_a_terminal

from serving import progress


def test_work_without_steps_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.5)
    monkeypatch.setattr(progress, "log", lines.append)
    monkeypatch.setattr(progress, "_last_line", [0.0])
    with progress.task("export, forms", 2, "forms") as advance:
        advance(1)
        while len(lines) < 3:
            time.sleep(0.05)
    assert {line.partition(" ·")[0] for line in lines} == {"export, forms: 1/2 forms"}


def test_work_of_no_steps_is_told_without_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(progress, "log", lines.append)
    with progress.task("features", 0) as advance:
        advance(0)
    assert lines[0].startswith("features: 0/0")


def test_it_falls_silent_with_its_end_whatever_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(progress, "log", lines.append)
    with pytest.raises(ValueError, match="in the middle"), progress.task("x", 1):
        raise ValueError("in the middle")
    before = list(lines)
    time.sleep(1.5)
    assert lines == before


WORK = """
import time
from serving import progress
progress.above.append("the table")
with progress.task("an epoch", 10) as advance:
    for _ in range(10):
        advance(1)
        time.sleep(0.05)
progress.log("the end")
"""


def test_a_terminal_has_a_bar_in_colour_and_what_belongs_above_it() -> None:
    shown = on_a_terminal([sys.executable, "-c", WORK])
    assert COLOUR.search(shown) and "\x1b[2K" in shown, "it is drawn again and again"
    assert 0 <= shown.index("the table") < shown.index("an epoch")
    assert shown.rstrip().endswith("the end")


def test_who_wants_no_colour_gets_the_same_without() -> None:
    shown = on_a_terminal([sys.executable, "-c", WORK], NO_COLOR="1")
    assert not COLOUR.search(shown)
    assert "\x1b[2K" in shown and "an epoch" in shown and "the table" in shown


@pytest.mark.parametrize("environment", [{"CI": "true"}, {"TERM": "dumb"}])
def test_a_log_that_looks_like_a_terminal_gets_plain_lines(environment: dict[str, str]) -> None:
    shown = on_a_terminal([sys.executable, "-c", WORK], **environment)
    assert "\x1b" not in shown and "the table" not in shown
    assert shown.splitlines()[0].startswith("an epoch: ") and shown.splitlines()[-1] == "the end"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((-3, "0 s"), (20.4, "20 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min")),
        *((8880, "2 h 28 min"), (47 * 3600, "47 h 0 min"), (49 * 3600, "2 d")),
    ],
)
def test_a_duration_is_rounded_for_people(seconds: float, said: str) -> None:
    assert progress.duration(seconds) == said
