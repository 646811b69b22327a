"""What would silently do something else than it says is refused, in one line, with exit code 2."""

from pathlib import Path

import pytest
from conftest import tiny_config

from jobs import pipeline
from jobs.errors import ConfigurationError
from jobs.runs import RunFolder


def test_a_validation_share_that_rounds_to_no_image_cannot_choose(tmp_path: Path) -> None:
    config = tiny_config(data={"validation": 0.001})
    with pytest.raises(ConfigurationError, match=r"data.validation: 0.001 of 80 .* is none"):
        pipeline.run(config, RunFolder(tmp_path / "r"))


def test_where_the_test_set_chooses_there_need_be_none(tmp_path: Path) -> None:
    config = tiny_config(data={"validation": 0.001}, evaluation={"select_on": "test"})
    dataset = pipeline.Job(config, RunFolder(tmp_path / "r")).dataset
    assert len(dataset.validation) == 0 and len(dataset.train) == 80
