"""`make run` as a newcomer meets it: minutes, a comparison that shows the lesson, and no noise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, job
from conftest import tiny_config
from readme import README

from jobs.runs import RunFolder
from serving.archive import open_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The quickstart as it is: its folder, what it printed, and what it said on the way."""
    out = tmp_path_factory.mktemp("quickstart")
    cache = f"data.cache={out / 'cache'}"  # so that the weights are trained, too
    done = job("run", "--config", "quickstart", "--set", cache, "--out", out, "--run-id", "r")
    assert done.returncode == 0, done.stderr
    return out / "r", done.stdout, done.stderr


@pytest.mark.slow
def test_fine_tuning_is_far_ahead_of_a_random_start(run: tuple[Path, str, str]) -> None:
    result = RunFolder(run[0]).comparison()
    assert result.winner == "finetune"
    assert "printed characters, a stand-in for ImageNet" in result.weights
    assert result.done["finetune"].test.images >= 500
    [pair] = [p for p in result.pairs if {p.a, p.b} == {"finetune", "scratch"}]
    assert pair.a == "finetune" and pair.difference > 0.1 and pair.p_value < 0.001


def shape(text: str) -> list[str]:
    """The lines of an output, with a # for what differs from machine to machine."""
    lines = (" ".join(line.split()) for line in text.splitlines() if line.strip())
    return [re.sub(r"[+−]?\d[\d.,]*( × 10\S+)?", "#", line) for line in lines]


@pytest.mark.slow
def test_the_readme_shows_what_it_prints_in_the_same_order(run: tuple[Path, str, str]) -> None:
    printed = shape(run[1].partition("\n\n")[0])
    [shown] = [block for block in README.split("```") if block.lstrip().startswith("data: hand")]
    assert printed[:6] == shape(shown)[:6], "the table"
    # Whether two of them can be told apart depends on the machine's arithmetic, and so does the
    # order in a sentence that says that they cannot.
    said, written = (
        [re.sub(r" (beats|cannot be told apart).*", "", line) for line in lines]
        for lines in (printed[6:], shape(shown)[6:])
    )
    assert said[0] == written[0], "who wins, and how that was chosen"
    assert len(said) == len(written) == 4
    assert said[1:3] == written[1:3] == ["finetune", "finetune"]


@pytest.mark.slow
def test_it_says_what_comes_and_nothing_that_is_not_ours(run: tuple[Path, str, str]) -> None:
    said = run[2].splitlines()
    assert "to do: scratch, the stand-in for ImageNet, finetune, frozen, report, archive" in run[2]
    ours = re.compile(r"(/\S+|data|to do|weights|stand-in|scratch|finetune|frozen|export)[:, ]")
    assert [line for line in said if not ours.match(line)] == []


@pytest.mark.slow
def test_its_archive_is_one_of_digits(run: tuple[Path, str, str]) -> None:
    data = open_model(run[0] / "model" / "inception_v3_digits.mar").description.data
    assert data.classes == tuple("0123456789") and data.image_size == (8, 8)


@pytest.mark.usefixtures("thin", "undrawn")
def test_stand_in_weights_are_trained_once_and_kept_for_other_runs(tmp_path: Path) -> None:
    from jobs import pipeline

    small = {"task": "textures", "images": 20, "optim": {"epochs": 1}}
    resolved = tiny_config(
        data={"cache": str(tmp_path / "cache")},
        weights={"source": "stand-in", "stand_in": small},
        optim={"epochs": 1},
    )
    resolved = resolved.model_copy(update={"variants": resolved.variants[1:]})
    first, second = RunFolder(tmp_path / "first"), RunFolder(tmp_path / "second")
    results = [pipeline.run(resolved, folder).done for folder in (first, second)]
    rows = [[row["variant"] for row in folder.metrics()] for folder in (first, second)]
    assert "stand-in" in rows[0] and "stand-in" not in rows[1]
    losses = [[variant.test.loss for variant in result.values()] for result in results]
    assert losses[0] == losses[1]

    [kept] = (tmp_path / "cache").glob("stand-in-*.safetensors")
    other = resolved.model_copy(
        update={"data": resolved.data.model_copy(update={"seed": 1}), "variants": ()}
    )
    job_of_another_seed = pipeline.Job(other, second)
    assert job_of_another_seed._kept_stand_in != kept, "other pictures make other weights"
    scoring = resolved.evaluation.model_copy(update={"batch_size": 7, "select_on": "test"})
    job_that_scores_otherwise = pipeline.Job(
        resolved.model_copy(update={"evaluation": scoring}), second
    )
    assert job_that_scores_otherwise._kept_stand_in == kept, "they are never scored"


def test_a_finished_run_is_shown_without_loading_torch(exported: RunFolder) -> None:
    arguments = ["run", "--config", str(exported.path / "config.yaml"), "--run-id", "exported"]
    code = (
        "import sys; from jobs.cli import app\n"
        f"app({[*arguments, '--out', str(exported.path.parent)]!r}, standalone_mode=False)\n"
        "assert not {'torch', 'boto3', 'matplotlib'} & set(sys.modules), 'a finished run is quick'"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "frozen wins" in done.stdout and "is finished; --run-id" in done.stderr
