"""What the README tells people to type works, on a job that has been made small."""

import json
import shlex
from pathlib import Path

import pytest
from command import job
from conftest import TINY
from drawings import make_photos
from readme import JOBS

from jobs import config

SMALL = {
    **{f"data.{k}": v for k, v in TINY["data"].items() if k not in ("source",)},
    **{f"optim.{k}": v for k, v in TINY["optim"].items()},
    "data.train_images": 40,
    "data.test_images": 20,
    "optim.epochs": 1,
    "weights.source": "stand-in",
    "weights.stand_in.images": 40,
    "weights.stand_in.optim.epochs": 1,
    "weights.stand_in.optim.batch_size": 20,
    "export.enabled": False,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all commands, as people have it: the stand-in weights are trained but once."""
    return tmp_path_factory.mktemp("cache")


def one_variant(arguments: list[str], number: int) -> dict[str, str]:
    """Of the command's configuration; each command takes another one."""
    name = arguments[arguments.index("--config") + 1] if "--config" in arguments else "default"
    variants = config.load(name).variants
    variant = variants[number % len(variants)]
    return variant.model_dump(mode="json", exclude={"optim"})


@pytest.mark.parametrize("command", JOBS)
def test_a_command_of_the_job_runs_as_it_is_written(
    command: str, cache: Path, tmp_path: Path
) -> None:
    arguments = shlex.split(command)[3:]
    if arguments[0] not in ("run", "train"):
        pytest.skip("needs a run's folder or the network; see test_cli.py and test_promotion.py")
    small = {**SMALL, "data.cache": str(cache)}
    if "data.source=folder" in command:
        make_photos(tmp_path / "photos")
        arguments = [a.replace("/data/photos", str(tmp_path / "photos")) for a in arguments]
        small |= {"data.train_images": None, "data.test_images": None}
        small |= {"optim.batch_size": 4, "evaluation.batch_norm_images": 0}
    else:
        small |= {"data.source": "generated"}
    if "lecture" in command:
        small |= {"data.validation": 0.0}
    if arguments[0] == "run":
        small |= {"variants": [one_variant(arguments, JOBS.index(command))]}
    if arguments[0] == "train":
        small |= {f"variants.{arguments[1]}.optim.epochs": 1}
    for key, value in small.items():
        arguments += ["--set", f"{key}={json.dumps(value)}"]  # JSON is YAML
    done = job(*arguments, "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
