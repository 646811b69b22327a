"""The command line: exit codes, and what one command leaves for the next."""

import json
import os
import pwd
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from command import called
from conftest import changed_at, copy_of
from object_store import exported_run
from rich.console import Console

from jobs import config, environment, pipeline, table
from jobs.__main__ import main
from jobs.delivery import promotion, pruning
from jobs.errors import NotPromoted
from jobs.runs import RunFolder


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["run", "--set", "runtime.device=cuda"], 2, "PyTorch sees no GPU"),
        (["report", "."], 3, "not a run folder"),
        (["train", "frozen", "--out", "/proc/nowhere"], 3, "/proc/nowhere"),
        (
            ["run", "--set", "data.source=folder", "--set", "data.root=/nowhere"],
            3,
            "/nowhere/train: no such folder",
        ),
        (
            ["train", "frozen", "--set", "weights.source=/no.safetensors"],
            3,
            "weights /no.safetensors: no such file",
        ),
        *(
            (["prune", "--older-than", days], 2, f"--older-than {float(days)}: 0 to 36500 days")
            for days in ("nan", "inf", "-1")
        ),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line_and_a_documented_code(
    arguments: list[str], code: int, complaint: str, tiny_yaml: Path, tmp_path: Path
) -> None:
    if "cuda" in str(arguments) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if arguments[0] in ("run", "train"):
        first = [arguments[0], "--config", str(tiny_yaml), "--out", str(tmp_path)]
        arguments = [*first, *arguments[1:]]
    done = called(*arguments)
    assert done.returncode == code, done.stderr
    assert complaint in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_weights_that_are_missing_are_told_before_any_variant_is_trained(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    missing = ("--set", "weights.source=/no.safetensors")
    done = called("run", "--config", tiny_yaml, "--out", tmp_path, *missing)
    assert done.returncode == 3 and "weights /no.safetensors: no such file" in done.stderr
    [config] = tmp_path.glob("*/config.yaml")
    assert not config.with_name("variants").exists()


def test_doctor_says_whether_a_configuration_can_run_here(tiny_yaml: Path) -> None:
    fine = called("doctor", "--config", tiny_yaml)
    assert fine.returncode == 0, fine.stderr
    for subject in ("versions", "device", "memory", "cache", "data", "weights"):
        assert f"ok  {subject}" in fine.stdout
    bad = called("doctor", "--config", tiny_yaml, "--set", "weights.source=/nowhere.safetensors")
    assert bad.returncode == 3
    assert "NO  weights" in bad.stdout and "cannot run here yet: weights" in bad.stderr


def test_the_cache_of_whoever_runs_the_tests_is_left_alone() -> None:
    real = Path(pwd.getpwuid(os.getuid()).pw_dir)
    shown = called("doctor", "--config", "quickstart").stdout
    assert str(Path.home() / ".cache" / "inception-transfer") in shown
    assert real != Path.home() and str(real / ".cache") not in shown


def test_a_second_call_of_a_finished_run_does_nothing_more(
    compared: RunFolder, tmp_path: Path
) -> None:
    run = copy_of(compared, tmp_path)
    before = changed_at(run.path)
    config = run.path / "config.yaml"
    again = called("run", "--config", config, "--out", tmp_path, "--run-id", run.run_id)
    assert again.returncode == 0 and "is finished; --run-id" in again.stderr
    assert changed_at(run.path) == before
    result = json.loads((run.path / "comparison.json").read_text())
    assert result["sentences"][-1] in again.stdout.replace("\n", " ")


@pytest.mark.usefixtures("thin")
def test_train_does_one_variant_and_run_does_the_rest(tiny_yaml: Path, tmp_path: Path) -> None:
    """… though another of them diverges."""
    arguments: list[str | Path] = ["--config", tiny_yaml, "--out", tmp_path]
    arguments += ["--set", "optim.epochs=1"]
    arguments += ["--set", "variants.scratch.optim.learning_rate=1e30"]
    first = called("train", "frozen", *arguments)
    assert first.returncode == 0, first.stderr
    folder = Path(first.stdout.strip())
    assert [p.name for p in (folder / "variants").iterdir()] == ["frozen"]
    assert not (folder / "manifest.json").exists()
    weights = (folder / "variants" / "frozen" / "best.safetensors").stat().st_mtime_ns
    rest = called("run", *arguments)
    assert rest.returncode == 0, rest.stderr
    assert (folder / "manifest.json").exists()
    assert (folder / "variants" / "frozen" / "best.safetensors").stat().st_mtime_ns == weights
    assert str(folder / "report" / "index.html") in rest.stdout
    before = (folder / "environment.json").read_bytes()
    again = called("train", "frozen", *arguments)
    assert again.returncode == 0 and (folder / "environment.json").read_bytes() == before, "listed"

    assert "scratch: stopped: the loss was no longer finite in epoch 1, step " in rest.stderr
    result = json.loads((folder / "comparison.json").read_text())
    assert result["variants"]["scratch"]["status"] == "diverged"
    assert result["variants"]["finetune"]["status"] == "done"
    assert result["winner"] in ("finetune", "frozen")
    assert "no longer finite" in (folder / "report" / "index.html").read_text()


def test_the_closing_summary_fits_80_columns_whatever_the_names_are(
    compared: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "output", lambda: Console(width=80, highlight=False))
    found = compared.comparison()
    names = ("probe-the-head-then-tune-all-of-the-trunk", "finetune", "frozen")
    variants = dict(zip(names, found.variants.values(), strict=True))
    table.show(found.model_copy(update={"variants": variants}))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    [head] = [line for line in lines if line.startswith("variant")]
    rows = lines[lines.index(head) + 1 :][:3]
    assert head.split()[1:5] == ["test", "%", "95", "%"] and "memory" not in head
    assert rows[0].startswith(names[0][:20]) and [r.split()[0] for r in rows[1:]] == [*names[1:]]
    for cells, variant in zip(rows, found.done.values(), strict=True):
        assert (
            f"{variant.accuracy_mean * 100:.2f} ±" in cells and f"{variant.test.loss:.3f}" in cells
        )
        assert "…" not in cells.partition(" ")[2], "names alone are cut short"


def test_programs_get_results_as_json(compared: RunFolder, tmp_path: Path) -> None:
    run = copy_of(compared, tmp_path)
    settings = ("--config", run.path / "config.yaml", "--out", tmp_path)
    done = called("run", *settings, "--run-id", run.run_id, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["comparison"] == json.loads(run.comparison().to_json())
    assert Path(said["page"]).is_file() and said["run"] == str(run.path)


def test_programs_get_what_a_promotion_did_as_json(
    settings: config.Storage,
    credentials: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = [f"storage.{key}={value}" for key, value in settings.model_dump().items() if value]
    options = [part for setting in [*where, "export.name=m"] for part in ("--set", setting)]
    run = exported_run(tmp_path / "one", right=150)
    promoted = called("promote", run.path, *options, "--json")
    assert promoted.returncode == 0, promoted.stderr
    assert json.loads(promoted.stdout) == {"uri": f"{settings.uri}/models/m/one/"}
    listed = json.loads(called("models", *options, "--json").stdout)
    assert [v["description"]["version"] for v in listed["versions"]] == ["one"]
    assert listed["channels"]["production"]["version"] == "one"
    monkeypatch.setattr(pruning, "UNTOUCHED", timedelta(0))  # all of it is seconds old …
    monkeypatch.setattr(pruning, "protected", lambda _: set())  # … and serves
    pruned = json.loads(called("prune", "--keep", "0", "--dry-run", *options, "--json").stdout)
    assert pruned["dry_run"] and len(pruned["deleted"]) == 2
    assert all(item["prefix"] and item["bytes"] > 0 for item in pruned["deleted"])


@pytest.mark.parametrize("passes", [True, False])
def test_a_run_that_promotes_prints_one_document_whether_it_is_promoted_or_not(
    passes: bool,
    compared: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def promote(*_: object) -> str:
        if not passes:
            raise NotPromoted("1.0 % of the test images are right")
        return "s3://b/m/"

    run = copy_of(compared, tmp_path)
    monkeypatch.setattr(pipeline, "run", lambda *_: None)
    monkeypatch.setattr(promotion, "promote", promote)
    options = ["--config", run.path / "config.yaml", "--out", tmp_path, "--run-id", run.run_id]
    options += ["--set", "storage.uri=s3://bucket", "--set", "export.enabled=true"]
    options += ["--promote", "--json"]
    monkeypatch.setattr(sys, "argv", ["jobs", "run", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == (0 if passes else 4)
    said = json.loads(capsys.readouterr().out)
    assert said["run"] == str(run.path) and said["comparison"]["winner"]
    assert said.get("uri") == ("s3://b/m/" if passes else None)


def test_without_git_a_run_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None
