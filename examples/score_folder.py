"""Labels all pictures of a folder, then counts the labels and names the least familiar pictures.

    pip install 'inception-transfer[score]'
    python examples/score_folder.py photos/ --model model.mar --out answers/

The same call answers what is new in the folder. `python -m serving score` does the scoring alone.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq

from serving import Predictor
from serving.processes import cores
from serving.scoring import score


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    threads = cores()
    predictor = Predictor.open(given.model, threads=threads, callers=threads)
    print(score(predictor, given.folder, given.out, threads=threads).text())
    answers = pq.read_table(given.out)
    labels = answers.group_by("label").aggregate([("path", "count")])
    for row in labels.sort_by([("path_count", "descending")]).to_pylist():
        print(
            f"{row['path_count']:6} {row['label'] or 'not answered; the column `error` says why'}"
        )
    print("least like the pictures of the training:")
    for row in answers.sort_by("familiarity").slice(0, 5).to_pylist():
        print(f"{row['familiarity'] or 0:6.3f} {row['path']}")


if __name__ == "__main__":
    main()
