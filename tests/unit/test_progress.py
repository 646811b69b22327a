"""A log never looks as if nothing happened."""

import time

import pytest

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
        deadline = time.monotonic() + 30
        while len(lines) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert {line.partition(" ·")[0] for line in lines} == {"export, forms: 1/2 forms"}
    assert len(lines) >= 3


def test_it_falls_silent_with_its_end_whatever_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(progress, "log", lines.append)
    with pytest.raises(ValueError, match="in the middle"), progress.task("x", 1):
        raise ValueError("in the middle")
    before = list(lines)
    time.sleep(1.5)
    assert lines == before
