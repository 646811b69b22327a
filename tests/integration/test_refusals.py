"""What would silently do something else than it says is refused, in one line, with exit code 2."""

import sys
from pathlib import Path

import pytest
from conftest import tiny_config
from drawings import make_photos

from jobs import pipeline
from jobs.__main__ import main
from jobs.config import apply
from jobs.errors import ConfigurationError
from jobs.runs import RunFolder


def test_a_validation_share_that_rounds_to_no_image_cannot_choose(tmp_path: Path) -> None:
    config = tiny_config(data={"validation": 0.001})
    with pytest.raises(ConfigurationError, match=r"data.validation: 0.001 of 80 .* is none"):
        pipeline.run(config, RunFolder(tmp_path / "r"))


def test_a_batch_that_a_later_variant_cannot_fill_is_told_before_the_first_is_trained(
    tmp_path: Path,
) -> None:
    first, second = tiny_config().variants[:2]
    larger = second.model_copy(update={"optim": second.optim.model_copy(update={"batch_size": 61})})
    folder = RunFolder(tmp_path / "r")
    said = r"^variants.finetune.optim.batch_size: 61 is more than the 60 training images"
    with pytest.raises(ConfigurationError, match=said):
        pipeline.run(tiny_config().model_copy(update={"variants": (first, larger)}), folder)
    assert not list(folder.path.glob("variants/*"))


@pytest.mark.usefixtures("thin", "undrawn")
def test_a_run_that_was_refused_for_too_few_pictures_begins_once_there_are_enough(
    tmp_path: Path,
) -> None:
    own = {"source": "folder", "root": str(tmp_path / "photos"), "cache": str(tmp_path / "cache")}
    every = {"train_images": None, "test_images": None}
    config = tiny_config(data={**own, **every}, optim={"epochs": 1})
    config = config.model_copy(update={"variants": config.variants[2:]})
    folder = RunFolder(tmp_path / "r")
    make_photos(tmp_path / "photos", train=4, test=2, size=(32, 32))
    with pytest.raises(ConfigurationError, match="batch_size: 10 is more than the 6 training"):
        pipeline.run(config, folder)
    make_photos(tmp_path / "photos", train=16, test=4, size=(32, 32))
    assert pipeline.run(config, folder).data.images.train == 24
    assert folder.variant("frozen", 0).finished


def test_where_the_test_set_chooses_there_need_be_none(tmp_path: Path) -> None:
    config = tiny_config(data={"validation": 0.001}, evaluation={"select_on": "test"})
    dataset = pipeline.Job(config, RunFolder(tmp_path / "r")).dataset
    assert len(dataset.validation) == 0 and len(dataset.train) == 80


@pytest.mark.parametrize("command", ["export", "publish", "promote"])
@pytest.mark.parametrize(
    "setting", ["optim.epochs=3", "data.cache=/x", "variants.frozen.init=random"]
)
def test_settings_of_training_are_refused_for_a_run_that_is_made(
    command: str,
    setting: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").write_text(tiny_config().to_yaml())
    arguments = [command, str(tmp_path), "--set", "export.images=5", "--set", setting]
    monkeypatch.setattr(sys, "argv", ["jobs", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--set {setting}: the run is made; export, promotion, storage can still be set" in said


def test_the_home_of_nobody_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs", "doctor", "--set", "data.cache=~nobody0/cache"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: a path begins with ~, a folder that is not known\n"


def test_settings_of_what_is_done_with_it_are_not() -> None:
    settings = ["export.images=5", "promotion.channel=staging", "storage.uri=s3://bucket/p"]
    applied = apply(tiny_config(), settings)
    assert (applied.export.images, applied.promotion.channel) == (5, "staging")
