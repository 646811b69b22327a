"""How often a key may ask."""

import pytest

from serving.api import Keys, Limit
from serving.settings import Settings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("serving.api.time.monotonic", lambda: now[0])
    return now


def test_a_minutes_requests_may_come_at_once_and_come_in_again_one_by_one(
    clock: list[float],
) -> None:
    limit = Limit(30)
    assert [limit.seconds_to_wait(b"a") for _ in range(30)] == [0.0] * 30
    assert limit.seconds_to_wait(b"a") == pytest.approx(2.0)
    assert limit.seconds_to_wait(b"a") == pytest.approx(2.0), "a refusal costs nothing"
    assert limit.seconds_to_wait(b"b") == 0.0, "others have their own"
    clock[0] += 2.0
    assert limit.seconds_to_wait(b"a") == 0.0 and limit.seconds_to_wait(b"a") > 0
    clock[0] += 3600
    passed = sum(limit.seconds_to_wait(b"a") == 0.0 for _ in range(100))
    assert passed == 30, "what is not used in an hour is not saved up"


def test_nothing_is_limited_unless_it_is_said(clock: list[float]) -> None:
    limit = Limit(None)
    assert {limit.seconds_to_wait(b"a") for _ in range(1000)} == {0.0}


def test_the_services_own_picture_is_never_refused(clock: list[float]) -> None:
    keys = Keys(Settings(model_uri="x", api_keys="k", key_requests_per_minute=1))
    assert [keys.answer("Bearer k")[0] for _ in range(2)] == [200, 429]
    assert [keys.answer(f"Bearer {keys.own}")[0] for _ in range(3)] == [200] * 3
    status, body, headers = keys.answer("Bearer k")
    assert status == 429 and body["error"]["code"] == "rate_limited"
    assert headers == {"Retry-After": "60"}
    assert keys.answer("Bearer other")[0] == 401
