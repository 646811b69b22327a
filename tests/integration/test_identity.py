"""A run is known by what decides its result: where it is worked on may change half-way."""

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config

from jobs.config import Config
from jobs.errors import ConfigurationError
from jobs.runs import RunFolder

ELSEWHERE: list[dict[str, dict[str, Any]]] = [
    {"data": {"cache": "/another"}},
    {"runtime": {"device": "auto"}},
    {"runtime": {"compile": False}},
    {"runtime": {"checkpoint_every": 7}},
    {"runtime": {"price_per_hour": 2.5}},
    {"evaluation": {"batch_size": 9}},
    {"storage": {"uri": "s3://bucket/prefix"}},
    {"export": {"enabled": False, "name": "another"}},
    {"promotion": {"channel": "staging"}},
    {"tracking": {"prometheus": 9400}},
]
ANOTHER: list[dict[str, dict[str, Any]]] = [
    {"data": {"seed": 1}},
    {"runtime": {"precision": "bf16"}},
    {"runtime": {"seeds": [1]}},
    {"optim": {"epochs": 3}},
    {"evaluation": {"batch_norm_images": 10}},
]


@pytest.mark.parametrize("change", ELSEWHERE, ids=str)
def test_a_run_goes_on_elsewhere_under_the_same_name(
    change: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    folder, moved = RunFolder(tmp_path), tiny_config(**change)
    with folder.open(tiny_config()):
        pass
    with folder.open(moved):
        assert folder.config() == moved, "`export` and `deliver` do as was said last"
    assert moved.digest == tiny_config().digest


@pytest.mark.parametrize("change", ANOTHER, ids=str)
def test_what_decides_the_result_makes_another_run(
    change: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    another: Config = tiny_config(**change)
    with RunFolder(tmp_path).open(tiny_config()):
        pass
    with (
        pytest.raises(ConfigurationError, match="another configuration"),
        RunFolder(tmp_path).open(another),
    ):
        pass
    assert another.digest != tiny_config().digest
