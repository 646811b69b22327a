"""`make run` as a newcomer meets it: minutes, and a comparison in which transfer helps."""

import json
from pathlib import Path

import pytest
from command import job


@pytest.mark.slow
def test_the_quickstart_shows_that_transfer_helps(tmp_path: Path) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"  # so that the weights are trained, too
    arguments = ("--set", cache, "--out", tmp_path, "--run-id", "r")
    done = job("run", "--config", "quickstart", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "comparison.json").read_text())
    assert result["winner"] in ("finetune", "frozen")
    assert "a stand-in for ImageNet" in result["weights"]
    pairs = [p for p in result["pairs"] if {p["a"], p["b"]} == {result["winner"], "scratch"}]
    assert pairs[0]["a"] == result["winner"], "pairs are ordered by validation accuracy"
    assert pairs[0]["low"] > 0 and pairs[0]["p_value"] < 0.05
