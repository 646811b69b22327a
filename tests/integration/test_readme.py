"""What the README tells people to type works, on a job that has been made small."""

import json
import shlex
from pathlib import Path

import pytest
from command import called
from conftest import MODEL, TINY, copy_of
from drawings import make_photos
from object_store import BUCKET, exported_run
from readme import JOBS

from jobs import config
from jobs.demo import ObjectStore
from jobs.runs import RunFolder
from serving.archive import open_model
from serving.files import digest_of

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


def verb(command: str) -> str:
    return shlex.split(command)[3]


@pytest.mark.parametrize("command", [c for c in JOBS if verb(c) in ("run", "train", "inspect")])
@pytest.mark.usefixtures("thin", "undrawn")
def test_a_command_of_the_job_runs_as_it_is_written(
    command: str, cache: Path, tmp_path: Path, store: ObjectStore, credentials: None
) -> None:
    arguments = shlex.split(command)[3:]
    small = {**SMALL, "data.cache": str(cache)}
    if "data.source=folder" in command:
        make_photos(tmp_path / "photos")
        for file in (tmp_path / "photos").rglob("*.png"):
            store.client().upload_file(str(file), BUCKET, file.relative_to(tmp_path).as_posix())
        places = {"/data/photos": str(tmp_path / "photos"), "s3://bucket": f"s3://{BUCKET}"}
        for place, ours in places.items():
            arguments = [a.replace(place, ours) for a in arguments]
        small |= {"data.s3.endpoint_url": store.address, "data.s3.path_style": True}
        small |= {"data.s3.region": "us-east-1"}
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
    done = called(*arguments, "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr


def written(name: str) -> list[str]:
    [command] = [command for command in JOBS if verb(command) == name]
    return shlex.split(command)[3:]


def test_doctor_runs_as_it_is_written() -> None:
    done = called(
        *written("doctor"), "--set", "data.source=digits", "--set", "weights.source=random"
    )
    assert done.returncode == 0, done.stderr
    assert "digits, needs nothing" in done.stdout


def test_a_versions_life_runs_as_it_is_written(settings: config.Storage, tmp_path: Path) -> None:
    """Two runs are published and promoted; the first one serves again, and is fetched."""
    runs = [exported_run(tmp_path / name, right) for name, right in (("one", 150), ("two", 160))]
    sets = [f"storage.{key}={json.dumps(value)}" for key, value in settings.model_dump().items()]
    sets.append("export.name=m")

    def typed(name: str, **replaced: object) -> str:
        """The output of the command, with its placeholders filled in."""
        arguments = [str(replaced.get(a.split("/")[-1], a)) for a in written(name)]
        done = called(*arguments, *(part for s in sets for part in ("--set", s)))
        assert done.returncode == 0, done.stderr
        return done.stdout

    for run in runs:
        typed("publish", RUN_ID=run.path)
        assert run.run_id in typed("promote", RUN_ID=run.path)
    assert f"/{runs[0].run_id}/" in typed("rollback")
    assert {"one", "two", "production"} <= set(typed("models").split())
    typed("fetch", DIR=tmp_path / "got")
    assert digest_of(tmp_path / "got" / "m.mar") == digest_of(runs[0].path / "model" / "m.mar")
    typed("prune")
    assert {"one", "two"} <= set(typed("models").split()), "they are not 90 days old"


@pytest.mark.slow
def test_export_runs_as_it_is_written(exported: RunFolder, tmp_path: Path) -> None:
    run = copy_of(exported, tmp_path)
    archive = run.path / "model" / f"{MODEL}.mar"
    archive.unlink()
    done = called(written("export")[0], run.path, "--set", "export.calibration_images=2")
    assert done.returncode == 0, done.stderr
    assert open_model(archive).version == run.run_id
