"""The examples run as they are written, on a job that has been made small."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import job
from conftest import ROOT, classes_of, pictures, predictions, tiny
from drawings import make_photos
from readme import Block, command_lines, to_run
from test_readme import SMALL

from jobs.results import Done
from jobs.runs import RunFolder

PYTHONPATH = f"{ROOT}:{ROOT / 'tests'}"


def run_example(name: str, cwd: Path, replaced: Mapping[str, str | Path], *more: str) -> str:
    """What an example prints: called as examples/README.md says, but for words (of paths, the
    last part) that are replaced, and with more arguments."""
    words = next(w for w in command_lines("python") if w[1] == f"examples/{name}")
    here = [str(replaced.get(word.strip("/").split("/")[-1], word)) for word in words[2:]]
    done = subprocess.run(
        [sys.executable, "-m", "thin", ROOT / "examples" / name, *here, *more],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_pictures_of_one_s_own_are_trained_on_and_the_hard_classes_named(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    few: dict[str, object] = {
        "data.train_images": None,
        "data.test_images": None,
        "optim.batch_size": 4,
    }
    few |= {"evaluation.batch_norm_images": 0, "weights.source": "random"}
    few |= {"variants": [{"name": "frozen", "init": "pretrained", "trainable": "head"}]}
    settings = [f"--set={key}={json.dumps(value)}" for key, value in {**SMALL, **few}.items()]
    said = run_example("own_pictures.py", tmp_path, {"photos": tmp_path / "photos"}, *settings)
    first, *_, page = said.splitlines()
    assert first.startswith("frozen wins, chosen on the validation set: ")
    rates = [int(rate) for rate in re.findall(r"^(?:cat|dog): (\d+)% of", said, re.MULTILINE)]
    assert rates == sorted(rates) and len(rates) == 2
    assert (tmp_path / page).is_file()


@pytest.mark.slow
def test_a_variant_of_one_s_own_trains_what_it_says(tmp_path: Path) -> None:
    name = "examples/own_variant.yaml"
    small = {**SMALL, "data.source": "generated", "weights.source": "random"}
    settings = [f"--set={key}={json.dumps(value)}" for key, value in small.items()]
    done = job("train", "upper", "--config", name, *settings, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    [run] = [RunFolder(path) for path in tmp_path.iterdir()]
    assert [variant.name for variant in run.config().variants] == ["frozen", "upper", "finetune"]
    result = run.variant("upper", 0).result()
    assert isinstance(result, Done)
    assert 100_000 < result.trainable_parameters < 20_000_000, "not the last layer alone, nor all"


def test_a_folder_is_labelled_and_the_pictures_to_look_at_are_named(
    archive: Path, exported: RunFolder, tmp_path: Path
) -> None:
    (photos := tmp_path / "photos").mkdir()
    for number, picture in enumerate(pictures(exported, 6)):
        (photos / f"{number}.png").write_bytes(picture)
    (photos / "text.png").write_text("no picture")
    paths = {"photos": photos, archive.name: archive, "answers": tmp_path / "answers"}
    said = run_example("score_folder.py", tmp_path, paths)
    assert said.startswith("7 scored, ") and "  1 refused: " in said
    expected = dict(zip("012345", predictions(exported, 6), strict=True))
    _, unsure, unfamiliar = re.split(r"least sure:|least familiar:", said)
    for part in (unsure, unfamiliar):
        rows = re.findall(r"^  ([01]\.\d{3}) (.+) (\d)\.png$", part, re.MULTILINE)
        assert len(rows) == 5 and all(expected[number] == label for _, label, number in rows)
        values = [float(value) for value, _, _ in rows]
        assert values == sorted(values)


@pytest.mark.parametrize("block", to_run("python"), ids=str)
def test_the_documentation_s_python_gives_the_job_s_answers(
    block: Block,
    archive: Path,
    exported: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cat.jpg").write_bytes(pictures(exported, 1)[0])
    (folder := Path("runs/RUN_ID/model")).mkdir(parents=True)
    (folder / archive.name).symlink_to(archive)
    names: dict[str, Any] = {}
    exec(block.text, names)
    [label] = predictions(exported, 1)
    assert names["answer"]["label"] == label and len(names["rows"]) == 1, "at 75 pixels"
    assert classes_of(exported)[names["probabilities"].argmax()] == label


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_optuna_finds_the_best_of_its_trials_by_their_validation_accuracy(tmp_path: Path) -> None:
    """… and another start goes on with the same study."""
    raw = tiny(data={"train_images": 40, "test_images": 20}, optim={"epochs": 1})
    config, out = tmp_path / "tiny.yaml", tmp_path / "runs"
    config.write_text(yaml.safe_dump(raw))
    replaced: dict[str, str | Path] = {"quickstart": config, "20": "1"}
    for _ in range(2):
        said = run_example("optuna_search.py", tmp_path, replaced, "--out", str(out))
    trials = [out / f"trial-{number}" for number in range(2)]
    resolved = [yaml.safe_load((trial / "config.yaml").read_text()) for trial in trials]
    rates = [settings["optim"]["learning_rate"] for settings in resolved]
    assert rates[0] != rates[1] and [v["name"] for v in resolved[0]["variants"]] == ["finetune"]
    results = [json.loads((trial / "comparison.json").read_text()) for trial in trials]
    accuracies = [result["variants"]["finetune"]["selection_accuracy"] for result in results]
    best = max(range(2), key=lambda number: accuracies[number])
    found = re.fullmatch(r"(.*)% of the validation set with (.*)\n", said)
    assert found is not None and found[1] == f"{accuracies[best] * 100:.2f}"
    assert str(rates[best]) in found[2]


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
