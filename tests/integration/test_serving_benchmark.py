"""The benchmarks still run: all contenders, one short round, on the tiny archive."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODEL, ROOT

from jobs.runs import RunFolder


@pytest.mark.slow
def test_the_benchmark_of_serving_asks_every_contender(exported: RunFolder, tmp_path: Path) -> None:
    archive = exported.path / "model" / f"{MODEL}.mar"
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.serving", "--archive", str(archive)]
    command += ["--rounds", "1", "--seconds", "10", "--clients", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["servers"]) == {"service", "stock", "litserve", "asgi"}
    for name, server in result["servers"].items():
        [load] = server["loads"]
        assert load["images"] > 0 and load["failures"] == 0, (name, load)
        assert 0 < load["p50_ms"] <= load["p99_ms"]
        assert load["cpu_ms_per_image"][0] > 0 and server["memory"]["pss"] > 0
        assert server["labels_as_stock"] >= 0.75, "they answer with the same network"
    assert all(rates[0] > 0 for rates in result["alone"].values())
    others = [ratio["other"] for ratio in result["ratios"]]
    assert others == ["stock", "litserve", "asgi", "raw", "network"]
    assert "service / stock, 2 clients" in done.stdout
