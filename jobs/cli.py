"""The command line: `python -m jobs`. Imports of torch wait until a command needs it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jobs.config import Config
    from jobs.runs import RunFolder

EXIT_CODES = (
    "Exit codes: 0 done · 1 unexpected · 2 configuration or usage · 3 data, weights or storage "
    "not reachable · 75 interrupted, state saved, run again to go on."
)
app = typer.Typer(
    help="Trains variants of Inception-v3, compares them honestly and reports.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        help="quickstart, cifar10-small, default, lecture, h200, or the path of a YAML file.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change one key, e.g. optim.epochs=3 or variants.frozen.optim.learning_rate=0.01.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="The folder that holds the runs.")]
RunIdOption = Annotated[
    str | None,
    typer.Option(
        "--run-id",
        help="The run's folder under --out. By default the configuration's name and digest, so "
        "that the same command goes on with the same run.",
    ),
]


@app.command()
def run(
    config: ConfigOption = "default",
    settings: SetOption = None,
    run_id: RunIdOption = None,
    out: OutOption = Path("runs"),
) -> None:
    """Train every variant, test, compare and report. Run again to go on after an interruption."""
    resolved, folder = _open(config, settings, run_id, out)
    from jobs import distributed, pipeline, table
    from jobs.interruption import graceful

    with distributed.joined() as first, graceful():
        result = pipeline.run(resolved, folder)
    if first:
        table.show(result)
        print(f"\n{folder.path / 'report' / 'index.html'}")


@app.command()
def train(
    variant: Annotated[str, typer.Argument(help="The variant's name in the configuration.")],
    config: ConfigOption = "default",
    settings: SetOption = None,
    run_id: RunIdOption = None,
    out: OutOption = Path("runs"),
) -> None:
    """Train and test one variant; a later `run` of the same configuration does the others."""
    resolved, folder = _open(config, settings, run_id, out)
    names = [v.name for v in resolved.variants]
    if variant not in names:
        raise typer.BadParameter(f"the configuration has {', '.join(names)}, not {variant}")
    from jobs import distributed, pipeline
    from jobs.interruption import graceful

    with distributed.joined() as first, graceful():
        pipeline.train(resolved, folder, variant)
    if first:
        print(folder.path)


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="A finished run's folder.")],
) -> None:
    """Draw the plots and the page again from what a run left behind."""
    from jobs import pipeline, table
    from jobs.runs import RunFolder

    folder = RunFolder(run_folder)
    result: dict[str, Any] = pipeline.report_again(folder)
    table.show(result)
    print(f"\n{folder.path / 'report' / 'index.html'}")


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    settings: SetOption = None,
) -> None:
    """Pack a finished run's winner as a TorchServe archive, checked against the job."""
    resolved, folder = _existing(run_folder, settings)
    from jobs import export as exporting
    from jobs.interruption import graceful

    with graceful():
        print(exporting.export(folder, resolved.export))


@app.command()
def publish(
    run_folder: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    settings: SetOption = None,
) -> None:
    """Send what S3 lacks of a finished run, as often as needed; --set storage.uri=s3://…"""
    resolved, folder = _existing(run_folder, settings)
    from jobs.interruption import graceful
    from jobs.storage import Storage

    with graceful():
        sent = Storage(resolved.storage).publish(folder)
    print(f"{sent} files sent")


@app.command()
def doctor(config: ConfigOption = "default", settings: SetOption = None) -> None:
    """Say what this machine can do, and whether it can reach what a configuration needs."""
    from jobs import config as configuration
    from jobs import doctor as checks

    checks.examine(configuration.load(config, settings or ()))


def _open(
    config: str, settings: list[str] | None, run_id: str | None, out: Path
) -> "tuple[Config, RunFolder]":
    from jobs import config as configuration
    from jobs.runs import RunFolder

    resolved = configuration.load(config, settings or ())
    if run_id is None:
        run_id = f"{Path(config).stem}-{resolved.digest}"
    if "/" in run_id or run_id.startswith("."):
        raise typer.BadParameter(f"--run-id {run_id}: a plain name is needed")
    return resolved, RunFolder(out / run_id)


def _existing(path: Path, settings: list[str] | None) -> "tuple[Config, RunFolder]":
    """A run and its configuration, with settings of how it is packed or sent on top."""
    from jobs import config as configuration
    from jobs.runs import RunFolder

    folder = RunFolder(path)
    return configuration.apply(folder.config(), settings or ()), folder
