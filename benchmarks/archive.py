"""An archive to benchmark with, made by the job as any other, in a few minutes.

Only its size is like a real one's: a random trunk, a last layer that has seen 80 generated pictures
of 299 px. What a network has learnt does not change how long it takes, so int8 may cost any
accuracy; it is left out all the same where a random trunk's answers move too far. The figures say
which form was measured.
"""

import subprocess
import sys
from pathlib import Path

CONFIG = """
data: {source: generated, train_images: 100, test_images: 40, validation: 0.2, shift: 0.0}
weights: {source: random}
optim: {epochs: 20, batch_size: 16, learning_rate: 0.02, label_smoothing: 0.0}
variants: [{name: frozen, init: pretrained, trainable: head}]
evaluation: {batch_size: 20, batch_norm_images: 40}
export: {calibration_images: 80, max_accuracy_drop: 100}
"""


def make_archive(folder: Path) -> Path:
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    run = ["run", "--config", str(config), "--run-id", "benchmark", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "jobs", *run], check=True)
    return next((folder / "benchmark" / "model").glob("*.mar"))
