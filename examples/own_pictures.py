"""Trains three variants on pictures of yours, and says which classes the winner finds hard.

    python examples/own_pictures.py /data/photos

The folder has `train/<class>/<picture>` and, if you have a test set, `test/<class>/<picture>`. The
same call continues what was interrupted. `python -m jobs inspect` shows what is wrong with them.
"""

import argparse
from pathlib import Path

from jobs import load_config, run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--config", default="default")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    given = parser.parse_args()

    own = ["data.source=folder", f"data.root={given.folder}", "export.name=own_pictures"]
    comparison = run(load_config(given.config, [*own, *given.settings]), out=given.out)
    print(*comparison.sentences, sep="\n")
    if comparison.winner is None:
        return
    accuracies = comparison.done[comparison.winner].test.per_class
    tested = [
        (accuracy, name)
        for accuracy, name in zip(accuracies, comparison.data.classes, strict=True)
        if accuracy is not None
    ]
    for accuracy, name in sorted(tested)[:5]:
        print(f"{name}: {accuracy:.0%} of the test pictures are right")
    print(given.out / comparison.run_id / "report" / "index.html")


if __name__ == "__main__":
    main()
