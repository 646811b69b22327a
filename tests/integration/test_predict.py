"""The client and its command, `python -m serving predict`, against the service."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from conftest import MODEL, ROOT, pictures, predictions
from service import Service

from jobs.runs import RunFolder
from serving.cli import Answer, _print_lines, _print_table
from serving.client import Client, ClientError, Model, Prediction, Score


@pytest.fixture(scope="module")
def files(exported: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ten good pictures with a text and a missing file among them."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{number}.png" for number in range(10)]
    for path, picture in zip(paths, pictures(exported, 10), strict=True):
        path.write_bytes(picture)
    (folder / "text.png").write_text("no picture")
    return [*paths[:4], folder / "text.png", *paths[4:], folder / "missing.png"]


def test_every_picture_has_its_answer_in_order_and_the_bad_ones_cost_no_other(
    service: Service, exported: RunFolder, files: list[Path]
) -> None:
    with Client(service.address) as client:
        answers = list(client.predict_many(files))
        first = client.predict(files[0].read_bytes())
    good = [answer for answer in answers if isinstance(answer, Prediction)]
    assert [answer.label for answer in good] == predictions(exported, 10)
    assert good[0].model == Model(MODEL, exported.run_id)
    assert good[0].top[0] == Score(predictions(exported, 1)[0], good[0].probability)
    assert first.label == good[0].label
    text, missing = answers[4], answers[11]
    assert isinstance(text, ClientError) and (text.status, text.code) == (400, "bad_image")
    assert isinstance(missing, ClientError) and missing.code == "unreadable"


def test_the_command_prints_a_line_for_each_file(
    service: Service, exported: RunFolder, files: list[Path]
) -> None:
    lines = command(service.address, *files)
    assert lines.returncode == 2, "two of the files have no answer"
    cells = [line.split("\t") for line in lines.stdout.splitlines()]
    assert [label for _, label, _ in cells] == predictions(exported, 10)
    assert "text.png: not a picture" in lines.stderr
    assert "missing.png: No such file" in lines.stderr
    good = command(service.address, *files[:4], "--json")
    assert (good.returncode, good.stderr) == (0, "")
    answers = [json.loads(line) for line in good.stdout.splitlines()]
    assert [answer["file"] for answer in answers] == list(map(str, files[:4]))
    assert [answer["label"] for answer in answers] == predictions(exported, 4)


def test_the_command_draws_a_table_on_a_terminal(service: Service, files: list[Path]) -> None:
    import pty

    ours, theirs = pty.openpty()
    process = command_process(service.address, *files, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b"".join(iter(lambda: read(ours), b"")).decode()
    os.close(ours)
    assert process.wait() == 2
    assert "probability" in shown and "not a picture" in shown and "%" in shown


def test_a_label_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Prediction("a [b] [/c]", 0.5, (), Model("m", "1"))
    _print_table([Path("x.png")], [answer])
    assert "a [b] [/c]" in capsys.readouterr().out


@pytest.mark.parametrize("show", [partial(_print_lines, as_json=False), _print_table])
def test_a_name_that_is_not_utf_8_is_shown(
    show: Callable[[list[Path], Iterable[Answer]], list[Answer]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The captured output is UTF-8 and strict, as a pipe is."""
    answer = Prediction("cat", 0.5, (), Model("m", "1"))
    show([Path(os.fsdecode(b"caf\xe9.png"))], [answer])
    assert r"caf\xe9.png" in capsys.readouterr().out


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that nobody has the other end
        return b""


def command_process(
    address: str, *arguments: str | Path, stdout: int, stderr: int
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "serving", "predict", "--url", address, *arguments],
        cwd=ROOT,
        stdout=stdout,
        stderr=stderr,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )


def command(address: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    pipe = subprocess.PIPE
    process = command_process(address, *arguments, stdout=pipe, stderr=pipe)
    stdout, stderr = process.communicate()
    assert "Traceback" not in stderr
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.mark.parametrize(
    ("address", "code", "complaint"),
    [
        ("http://127.0.0.1:9", 3, "Connection refused"),
        ("localhost:8080", 2, "not an address"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    address: str, code: int, complaint: str, files: list[Path]
) -> None:
    done = command(address, files[0])
    assert done.returncode == code
    assert complaint in done.stderr and done.stderr.count("\n") == 1
