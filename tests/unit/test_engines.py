"""One list of engines, wherever they are named."""

from typing import get_args

from serving.engines import PORTS, START
from serving.settings import Settings


def test_every_engine_can_be_started() -> None:
    engines = set(get_args(Settings.model_fields["engine"].annotation))
    assert engines == set(START) == set(PORTS)
    assert all("inference" in ports for ports in PORTS.values())
