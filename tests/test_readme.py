"""What the README tells people to type works, on a job that has been made small."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, TINY, job

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
JOBS = sorted({c for c in COMMANDS if c.startswith("python -m jobs")})
SMALL = {
    **{f"data.{k}": v for k, v in TINY["data"].items() if k not in ("source",)},
    **{f"optim.{k}": v for k, v in TINY["optim"].items()},
    "optim.epochs": 1,
    "weights.stand_in.images": 20,
    "export.enabled": False,
}


def test_the_readme_has_commands() -> None:
    assert {"make run", "make test"} <= set(COMMANDS)
    assert len(JOBS) >= 4


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("make ")}))
def test_a_make_target_exists(command: str) -> None:
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.parametrize("command", JOBS)
def test_a_command_of_the_job_runs_as_it_is_written(command: str, tmp_path: Path) -> None:
    arguments = shlex.split(command)[3:]
    if arguments[0] not in ("run", "train"):
        pytest.skip("needs a run's folder or the network; see test_cli.py and test_report.py")
    small = dict(SMALL)
    if "data.source=folder" in command:
        make_photos(tmp_path / "photos")
        arguments = [a.replace("/data/photos", str(tmp_path / "photos")) for a in arguments]
        small |= {"data.train_images": None, "data.test_images": None}
        small |= {"optim.batch_size": 4, "evaluation.batch_norm_images": 0}
    else:
        small |= {"data.source": "generated"}
    if "lecture" in command:
        small |= {"data.validation": 0.0}
    small |= {"weights.source": "stand-in", "data.cache": str(tmp_path / "cache")}
    for key, value in small.items():
        arguments += ["--set", f"{key}={json.dumps(value)}"]  # JSON is YAML
    done = job(*arguments, "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr


def make_photos(root: Path) -> None:
    from test_data import photo

    for split, count in (("train", 10), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                photo(root / split / name / f"{i}.png", size=(90, 60), seed=100 * label + i)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing
