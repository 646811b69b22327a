"""The examples run as they are written, on a job that has been made small."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny

from jobs.runs import RunFolder

PYTHONPATH = f"{ROOT}:{ROOT / 'tests'}"


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_optuna_finds_the_best_of_its_trials_by_their_validation_accuracy(tmp_path: Path) -> None:
    """… and another start goes on with the same study."""
    raw = tiny(data={"train_images": 40, "test_images": 20}, optim={"epochs": 1})
    config, out = tmp_path / "tiny.yaml", tmp_path / "runs"
    config.write_text(yaml.safe_dump(raw))
    command: list[str | Path] = [sys.executable, "-m", "thin", ROOT / "examples/optuna_search.py"]
    command += ["--config", config, "--out", out, "--trials", "1"]
    for _ in range(2):
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    trials = [out / f"trial-{number}" for number in range(2)]
    resolved = [yaml.safe_load((trial / "config.yaml").read_text()) for trial in trials]
    rates = [settings["optim"]["learning_rate"] for settings in resolved]
    assert rates[0] != rates[1] and [v["name"] for v in resolved[0]["variants"]] == ["finetune"]
    results = [json.loads((trial / "comparison.json").read_text()) for trial in trials]
    accuracies = [result["variants"]["finetune"]["selection_accuracy"] for result in results]
    best = max(range(2), key=lambda number: accuracies[number])
    said = re.fullmatch(r"(.*)% of the validation set with (.*)\n", done.stdout)
    assert said is not None and said[1] == f"{accuracies[best] * 100:.2f}"
    assert str(rates[best]) in said[2]


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    """… as it is kept: without what it printed for somebody."""
    notebook = json.loads((ROOT / "examples" / "digits.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    (tmp_path / "cells.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "thin", str(tmp_path / "cells.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "MPLBACKEND": "svg"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "runs").iterdir()
    assert done.stdout.splitlines() == list(RunFolder(path).comparison().sentences)
