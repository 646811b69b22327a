"""How far a run is, by what it has written so far, here or in S3."""

import time
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.live import Live

from jobs import config, results, table
from jobs.config import Config, Part
from jobs.delivery.publishing import LIVE
from jobs.delivery.storage import Storage
from jobs.errors import UnavailableError
from jobs.results import RESULT, Diverged, read
from jobs.runs import MANIFEST, Row, RunFolder, Shown
from serving.files import temporary, write

SECONDS_BETWEEN_LOOKS = 3.0


Progress = dict[str, Any]
"""Of one variant with one seed, as `watch --json` prints it; null is what nobody knows yet."""


def progress(config: Config, folder: RunFolder) -> list[Progress]:
    """Of every variant with every seed, in the order in which one process trains them."""
    rows = folder.metrics()
    outcomes = [read(path, RESULT) for path in folder.path.glob("variants/**/result.json")]
    diverged = {(r.variant, r.seed) for r in outcomes if isinstance(r, Diverged)}
    return [_of(part, config, rows) | {"diverged": part in diverged} for part in config.parts]


def _of(part: Part, config: Config, rows: Sequence[Row]) -> Progress:
    own = [row for row in rows if (row["variant"], row["seed"]) == part]
    train = [row for row in own if row["split"] == "train"]
    newest = {row["split"]: row for row in own}
    last, epochs = newest.get("train", {}), config.variant(part.variant).optim.epochs
    return {
        **part._asdict(),
        "epoch": len(train),
        "epochs": epochs,
        "loss": last.get("loss"),
        "accuracy": newest.get("validation", last).get("accuracy"),
        "test": newest.get("test", {}).get("accuracy"),
        "images_per_second": last.get("images_per_second"),
        "ends": _end(train, epochs),
    }


def _end(train: Sequence[Row], epochs: int) -> str | None:
    """When its training ends, at the pace since the first epoch, which may have waited for features
    or a compiler."""
    if not train:
        return None
    seconds = [row["seconds"] for row in train]
    each = (seconds[-1] - seconds[0]) / (len(train) - 1) if len(train) > 1 else seconds[0]
    left = timedelta(seconds=each * (epochs - len(train)))
    return (datetime.fromisoformat(train[-1]["time"]) + left).isoformat(timespec="seconds")


def watch(run: str, settings: Sequence[str]) -> None:
    """Shows a run until it is finished: a table on a terminal, else a line for each new row.

    Raises:
        UnavailableError: there is none, or it is out of reach.
    """
    console, shown = table.output(), Shown()
    live = Live(console=console, auto_refresh=False) if console.is_interactive else None
    with live or nullcontext():
        for folder, _ in snapshots(run, settings):
            config = folder.config()
            if live is not None:
                live.update(table.progress(progress(config, folder)), refresh=True)
            else:
                for _, row in shown.new(folder.metrics()):
                    print(_line(row, config), flush=True)


def state(run: str, settings: Sequence[str]) -> dict[str, Any]:
    """What `watch` shows, once and for programs.

    Raises:
        UnavailableError: there is no such run, or it is out of reach.
    """
    with closing(snapshots(run, settings)) as found:
        folder, finished = next(found)
        return {"run": run, "finished": finished, "parts": progress(folder.config(), folder)}


def snapshots(run: str, settings: Sequence[str]) -> Generator[tuple[RunFolder, bool], None, None]:
    """Every few seconds until the run is finished: its folder, or one with what S3 has of it, and
    whether it is finished.

    Raises:
        UnavailableError: no run is there, or S3 is out of reach.
    """
    storage = None
    if run.startswith("s3://"):
        storage = Storage(config.load("default", [*settings, f"storage.uri={run}"]).storage)
    with temporary() as place:
        folder, finished = RunFolder(place if storage else Path(run)), False
        while not finished:
            finished = _fetch(storage, folder) if storage else folder.finished
            yield folder, finished
            if not finished:
                time.sleep(SECONDS_BETWEEN_LOOKS)


def _fetch(storage: Storage, folder: RunFolder) -> bool:
    manifest, where = storage.get(MANIFEST), f"{storage.uri}/{MANIFEST}"
    listed = results.parse(where, manifest.body, results.MANIFEST).files if manifest else {}
    for name in (*LIVE, *(name for name in listed if name.endswith("/result.json"))):
        if found := storage.get(name):
            write(folder.path / name, found.body)
        elif name == "config.yaml":
            raise UnavailableError(f"{storage.uri}: no config.yaml is there, so it is no run")
    return manifest is not None


def _line(row: Row, config: Config) -> str:
    name, stand_in = row["variant"], config.weights.stand_in
    epochs = (stand_in if name == "stand-in" else config.variant(name)).optim.epochs
    said = [f"accuracy {row['accuracy'] * 100:.2f} %", f"loss {row['loss']:.3f}"]
    if row["images_per_second"] is not None:
        said.append(f"{row['images_per_second']:,.0f} images/s")
    where = f"{Part(name, row['seed'])}, epoch {row['epoch'] + 1} of {epochs}"
    return f"{where}, {row['split']}: {' · '.join(said)}"
