"""`make run` as a newcomer meets it: minutes, and a comparison in which transfer helps."""

import json
from pathlib import Path

import pytest
from conftest import job


@pytest.mark.slow
def test_the_quickstart_shows_that_transfer_helps(tmp_path: Path) -> None:
    done = job("run", "--config", "quickstart", "--out", tmp_path, "--run-id", "r")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "comparison.json").read_text())
    assert result["winner"] == "finetune"
    assert "a stand-in for ImageNet" in result["weights"]
    better = next(p for p in result["pairs"] if {p["a"], p["b"]} == {"finetune", "scratch"})
    assert better["a"] == "finetune" and better["low"] > 0 and better["p_value"] < 0.05
