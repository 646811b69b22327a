"""Searches a learning rate and a label smoothing with Optuna; the job is what it is.

    pip install optuna
    python examples/optuna_search.py --config quickstart --trials 20

Every trial is a run of its own, judged on the validation set by what comparison.json says; the test
set chooses nothing. The same command goes on with the study in OUT/search.db; on several GPUs,
start it once for each, with CUDA_VISIBLE_DEVICES.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import optuna

VARIANTS = "[{name: finetune, init: pretrained}]"  # the one to be improved


def validation_accuracy(trial: optuna.Trial, config: str, out: Path) -> float:
    settings = {
        "variants": VARIANTS,
        "optim.learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True),
        "optim.label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.2),
        "export.enabled": False,
    }
    run_id = f"trial-{trial.number}"
    command = [sys.executable, "-m", "jobs", "run", "--config", config]
    command += ["--out", str(out), "--run-id", run_id]
    command += [f"--set={key}={value}" for key, value in settings.items()]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    comparison = out / run_id / "comparison.json"
    if not comparison.is_file():
        sys.exit(done.returncode)  # it has said why
    result = json.loads(comparison.read_text())
    if result["winner"] is None:
        raise optuna.TrialPruned("its loss became infinite")
    accuracy: float = result["variants"][result["winner"]]["selection_accuracy"]
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="search",
        storage=f"sqlite:///{given.out}/search.db",
        load_if_exists=True,
        direction="maximize",
    )
    study.optimize(
        lambda trial: validation_accuracy(trial, given.config, given.out), n_trials=given.trials
    )
    print(f"{study.best_value:.2%} of the validation set with {study.best_params}")


if __name__ == "__main__":
    main()
