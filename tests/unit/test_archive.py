"""Archives are read whole or refused in one line, and nothing lands outside of their folder."""

import errno
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from serving import archive as archives
from serving.archive import (
    Check,
    Counts,
    Data,
    Description,
    Golden,
    ModelError,
    Record,
    Tolerance,
    beside_channel,
    channel_key,
    check_digest,
    describe_file,
    is_channel,
    open_model,
    parse_description,
    unpack,
    unpacked,
    version_key,
)
from serving.files import digest_of

ANSWERS = [[0.25, 0.75], [1.0, 0.0]]
PICTURES = [b"first picture", b"second picture"]


def description() -> Description:
    return Description(
        name="m",
        version="one",
        variant="frozen",
        seed=0,
        weights="none",
        data=Data(
            source="generated",
            classes=("a", "b"),
            image_size=(32, 32),
            images=Counts(train=60, validation=20, test=40),
            test_digest="t",
        ),
        selected_on="validation",
        forms=("float",),
    )


def packed(path: Path, **files: bytes) -> Path:
    """An archive that has no network, with some other files."""
    folder = path.parent / f"{path.name}-files"
    (folder / "golden").mkdir(parents=True)
    archives.write_description(folder, description())
    (folder / "golden" / "probabilities.json").write_text(json.dumps(ANSWERS))
    for name, picture in zip(("00.png", "01.png"), PICTURES, strict=True):
        (folder / "golden" / name).write_bytes(picture)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder).as_posix())
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_an_archive_and_its_folder_are_read_alike(tmp_path: Path) -> None:
    file = packed(tmp_path / "m.mar")
    model = open_model(file)
    assert model.path == file.resolve() and model.description == description()
    assert (model.name, model.version, model.classes) == ("m", "one", ("a", "b"))
    assert model.golden == [Golden(p, a) for p, a in zip(PICTURES, ANSWERS, strict=True)]
    unpack(file, tmp_path / "folder")
    assert open_model(tmp_path / "folder").golden == model.golden
    with unpacked(file) as folder:
        assert (folder / "golden" / "01.png").read_bytes() == PICTURES[1]
    assert not folder.exists()


def test_an_archive_has_to_have_the_digest_that_is_known(tmp_path: Path) -> None:
    file = packed(tmp_path / "m.mar")
    digest = digest_of(file)
    assert describe_file(file) == archives.File(size=file.stat().st_size, sha256=digest)
    check_digest(file, digest)
    with pytest.raises(ModelError) as caught:
        check_digest(file, "other")
    assert str(caught.value) == f"{file}: its SHA-256 is {digest}, not other"


def test_what_is_no_archive_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "m.mar"
    with pytest.raises(ModelError, match=f"^{file}: no such file$"):
        open_model(file)
    file.write_bytes(b"something else")
    for read in (open_model, lambda file: unpack(file, tmp_path / "out")):
        with pytest.raises(ModelError, match=f"^{file}: not a model archive: File is not a zip"):
            read(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some", b"content")
    for path in (file, tmp_path):
        with pytest.raises(ModelError, match=rf"^{path}: not a model archive: .*model\.json"):
            open_model(path)


@pytest.mark.parametrize("content", ["null", "3", "[", "[1"])
def test_probabilities_that_are_none_are_told(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "out"
    unpack(packed(tmp_path / "m.mar"), folder)
    (folder / "golden" / "probabilities.json").write_text(content)
    with pytest.raises(ModelError, match=f"^{folder}: not a model archive: "):
        open_model(folder)


def test_a_file_of_an_archive_that_has_changed_is_named(tmp_path: Path) -> None:
    file = packed(tmp_path / "m.mar")
    file.write_bytes(file.read_bytes().replace(PICTURES[1], PICTURES[1].upper()))
    with pytest.raises(ModelError, match=rf"^{file}: damaged at golden/01\.png$"):
        open_model(file)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "\\x", "..\\x", "a\\..\\x"])
def test_an_archive_that_would_land_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    file = packed(tmp_path / "m.mar", **{name: b"x"})
    for read in (open_model, lambda file: unpack(file, tmp_path / "out")):
        with pytest.raises(ModelError) as caught:
            read(file)
        assert str(caught.value) == f"{file}: {name} would be unpacked outside of its folder"
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_no_damage_of_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file, out = packed(tmp_path / "m.mar"), tmp_path / "out"
    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(ModelError) as caught:
        unpack(file, out)
    said = f"[Errno {errno.ENOSPC}] No space left on device: '{out}'"
    assert str(caught.value) == f"{file}: not unpacked: {said}"


def test_names_that_only_look_like_it_are_unpacked(tmp_path: Path) -> None:
    unpack(packed(tmp_path / "m.mar", **{"a..b/..c": b"x"}), tmp_path / "out")
    assert (tmp_path / "out" / "a..b" / "..c").read_bytes() == b"x"


def test_a_description_is_of_this_format() -> None:
    whole = description()
    assert parse_description("m.mar", whole.to_json()) == whole
    assert whole.to_json().startswith(b'{\n  "format": 2,\n') and whole.to_json().endswith(b"}\n")

    def refused(content: Any) -> str:
        with pytest.raises(ModelError) as caught:
            parse_description("m.mar", json.dumps(content).encode())
        return str(caught.value)

    for number, given in ((1, {}), (3, {"format": 3})):
        assert refused(given) == (
            f"m.mar: an archive of format {number}, and this reads format 2; `python -m jobs "
            "export RUN` makes a new one"
        )
    fields = json.loads(whole.to_json())
    assert refused({**fields, "seed": "x"}).startswith("m.mar: model.json: seed: Input should be")
    counts = {**fields["data"], "images": {"train": 1, "validation": 2}}
    assert refused({**fields, "data": counts}) == (
        "m.mar: model.json: data.images.test: Field required"
    )
    assert refused([]) == "m.mar: model.json: 'list' object has no attribute 'get'"
    with pytest.raises(ModelError, match=r"^m\.mar: model\.json: Expecting value"):
        parse_description("m.mar", b"no JSON")
    assert archives.in_one_line(ValueError("two\n  lines")) == "two lines"


class Figure(Record):
    value: float


def test_figures_that_are_none_come_back() -> None:
    assert Figure(value=float("inf")).to_json() == b'{\n  "value": Infinity\n}\n'


def test_keys_are_those_of_the_layout() -> None:
    channel = channel_key("m", "production")
    assert channel == "models/m/channels/production.json"
    assert version_key("m", "one") == "models/m/one/version.json"
    assert version_key("m", "one", "model.mar") == "models/m/one/model.mar"
    assert is_channel(f"some/prefix/{channel}") and not is_channel("models/m/one/version.json")
    assert beside_channel(f"some/prefix/{channel}", "one") == "some/prefix/models/m/one"


@pytest.mark.parametrize(
    ("changes", "within"),
    [
        ({}, True),
        ({"agreement": 0.89}, False),
        ({"logit_error": 0.21}, False),
        ({"logit_error": float("nan")}, False),
        ({"probability_error": 0.16}, False),
    ],
)
def test_answers_are_within_a_tolerance_in_every_way(
    changes: dict[str, float], within: bool
) -> None:
    at_most = {"agreement": 0.9, "logit_error": 0.2, "probability_error": 0.15}
    check = Check(images=1, accuracy=0.0, largest_probability_error=1.0, **{**at_most, **changes})
    assert check.within(Tolerance(**at_most)) is within
