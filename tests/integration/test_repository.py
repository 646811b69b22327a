"""An archive's network, for servers that read OpenVINO's format."""

import errno
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino
import pytest
from conftest import pictures
from test_service import packed
from typer.testing import CliRunner

from jobs.runs import RunFolder
from serving import Predictor, repository
from serving.archive import FILES, ModelError, open_model, unpacked
from serving.cli import app
from serving.files import MARK


def test_it_gives_the_archives_answers_and_names_its_classes(
    archive: Path, exported: RunFolder, tmp_path: Path
) -> None:
    done = CliRunner().invoke(
        app, ["repository", "--model", str(archive), "--out", str(tmp_path)], catch_exceptions=False
    )
    folder = tmp_path / archive.stem / "1"
    assert done.exit_code == 0 and done.output.strip() == str(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["model.bin", "model.xml"]
    model = openvino.Core().read_model(folder / "model.xml")
    assert [names.names for names in (*model.inputs, *model.outputs)] == [
        {"pictures"},
        {"probabilities"},
    ]
    predictor = Predictor.open(archive, form="float")
    labels = model.get_rt_info(["model_info", "labels"]).astype(str)
    assert labels.split() == [name.replace(" ", "_") for name in predictor.classes]
    images = np.stack([predictor.pixels(file) for file in pictures(exported, 5)])
    answers = openvino.Core().compile_model(model, "CPU")(images)["probabilities"]
    assert answers == pytest.approx(predictor.probabilities(images), abs=0.05)
    assert answers.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-3)
    with pytest.raises(ModelError, match="is there already"):
        repository.write(archive, tmp_path)


def test_what_is_wrong_on_this_machine_is_not_written(
    strange_integers: Path, tmp_path: Path
) -> None:
    archive, out = packed(strange_integers, tmp_path / "strange.mar"), "out"
    with pytest.raises(ModelError, match=r"int8 is not right on this machine: .* golden labels"):
        repository.write(archive, tmp_path / out, "int8")
    assert not (tmp_path / out).exists()


def test_a_full_disk_leaves_nothing_and_a_killed_call_is_in_nobodys_way(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path, target: Path) -> None:
        target.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ["repository", "--model", str(archive), "--out", str(tmp_path)]
    folder = tmp_path / archive.stem
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.stderr.count("\n")) == (3, 1), done.stderr
    assert f"No space left on device: '{folder}" in done.stderr
    assert list(folder.iterdir()) == []

    killed = Path(tempfile.mkdtemp(dir=folder))
    (killed / MARK).touch()
    (killed / "model.bin.half").touch()
    assert CliRunner().invoke(app, command).exit_code == 0
    found = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*"))]
    assert found == ["1", "1/model.bin", "1/model.xml"]


def test_of_two_calls_at_once_one_has_written_all_of_it(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile
    begun: list[Path] = []

    def overtaken(source: Path, target: Path) -> None:
        if not begun:
            begun.append(target)
            repository.write(archive, tmp_path)
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", overtaken)
    with pytest.raises(OSError, match="Directory not empty"):
        repository.write(archive, tmp_path)
    folder = tmp_path / archive.stem
    found = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*"))]
    assert found == ["1", "1/model.bin", "1/model.xml"]


def test_names_with_any_kind_of_space_stay_one_label_each(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(archive)
    names = ("New\u00a0York", "東京\u3000都", *opened.classes[2:])
    data = opened.description.data.model_copy(update={"classes": names})
    renamed = replace(opened, description=opened.description.model_copy(update={"data": data}))
    with unpacked(archive) as folder:
        repository._convert(renamed, folder / FILES["float"][0], tmp_path / "model.xml")
    model = openvino.Core().read_model(tmp_path / "model.xml")
    labels = model.get_rt_info(["model_info", "labels"]).astype(str).split()
    assert labels[:2] == ["New_York", "東京_都"] and len(labels) == len(names)


@pytest.mark.parametrize(
    ("model", "code", "message"), [("nothing.mar", 3, "nothing.mar"), ("x.txt", 3, "x.txt")]
)
def test_what_is_no_archive_is_one_line(
    tmp_path: Path, model: str, code: int, message: str
) -> None:
    (tmp_path / "x.txt").write_text("no archive")
    arguments = ["repository", "--model", str(tmp_path / model), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
