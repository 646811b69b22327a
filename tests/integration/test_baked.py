"""What the image for clusters without internet downloads while it is built."""

import re

import pytest
from conftest import ROOT

from jobs import config
from jobs.data.sources import cifar10
from jobs.train import models


def test_data_and_weights_are_baked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(
        r'python -c "(.*)"', (ROOT / "Dockerfile").read_text().rpartition("ARG BAKE_DATA=")[2]
    )
    assert found is not None
    fetched: list[object] = []
    monkeypatch.setattr(cifar10, "load", fetched.append)
    monkeypatch.setattr(models, "load_pretrained", fetched.append)
    exec(found[1], {})
    assert fetched == [config.Data(), config.load("default").weights.source]
