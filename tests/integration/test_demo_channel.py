"""The demo serves what it has promoted, whatever the channel is called."""

from pathlib import Path

import pytest

from jobs import demo
from jobs.errors import UnavailableError


def test_the_service_follows_the_channel_that_the_run_was_promoted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(model_uri: str, _: Path) -> None:
        raise UnavailableError(model_uri)  # it is not to start

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")  # which the demo sets, so that it is undone
    for name in ("_need_packages", "_use", "_train_and_promote"):
        monkeypatch.setattr(demo, name, lambda *_: None)
    monkeypatch.setattr(demo.ObjectStore, "start", lambda _: None)
    monkeypatch.setattr(demo, "_service", serve)
    with pytest.raises(UnavailableError, match=r"/channels/staging\.json$"):
        demo.run(tmp_path, ["promotion.channel=staging"])
