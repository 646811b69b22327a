"""Labels all pictures of a folder, then names those that a person should look at.

    pip install 'inception-transfer[score]'
    python examples/score_folder.py photos/ --model model.mar --out answers/

The same call answers what is new in the folder. `python -m serving score` does the scoring alone.
"""

import argparse
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from serving import Predictor
from serving.answers import SCHEMA
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
    answers = pq.read_table(given.out, schema=SCHEMA)  # of an empty folder, too
    for column, what in (("probability", "least sure"), ("familiarity", "least familiar")):
        print(f"{what}:")
        lowest = answers.filter(pc.field(column).is_valid()).sort_by(column).slice(0, 5)
        for row in lowest.to_pylist():
            print(f"  {row[column]:.3f} {row['label']} {row['path']}")


if __name__ == "__main__":
    main()
