"""The command line: `python -m jobs`. Imports of torch wait until a command needs it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jobs.config import Config
    from jobs.runs import RunFolder

EXIT_CODES = (
    "Exit codes: 0 done · 1 unexpected · 2 configuration or usage · 3 data, weights or storage "
    "not reachable · 4 not good enough to serve · 75 interrupted, state saved, run again to resume."
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
        "that the same command continues the same run.",
    ),
]
DeploymentOption = Annotated[
    str | None,
    typer.Option(
        "--deployment",
        metavar="NAME",
        help="Then also make this Deployment, in the cluster, serve that exact version.",
    ),
]
VersionArgument = Annotated[
    str | None, typer.Argument(help="A version, as `models` lists them.", show_default=False)
]


@app.command()
def run(
    config: ConfigOption = "default",
    settings: SetOption = None,
    run_id: RunIdOption = None,
    out: OutOption = Path("runs"),
    promote: Annotated[
        bool, typer.Option("--promote", help="Then promote the winner, if it passes the gate.")
    ] = False,
    deployment: DeploymentOption = None,
) -> None:
    """Train every variant, test, compare and report. Run again to resume after an interruption."""
    resolved, folder = _open(config, settings, run_id, out)
    if deployment and not promote:
        raise typer.BadParameter("--deployment: needs --promote")
    if promote and resolved.storage.uri is None:
        raise typer.BadParameter("--promote: needs --set storage.uri=s3://bucket/prefix")
    if _nothing_to_do(resolved, folder):
        _show(folder)
        return
    from serving.progress import log

    first_of_all = os.environ.get("RANK", "0") == "0"
    if first_of_all:
        log(f"{folder.path}: loading PyTorch")  # which takes ten seconds the first time
    import torch  # noqa: F401

    if first_of_all:
        log(f"{folder.path}: loading the job")
    from jobs import distributed, pipeline
    from jobs.interruption import graceful

    with distributed.joined() as first, graceful():
        pipeline.run(resolved, folder)
    if first:
        _show(folder)
        if promote:
            _promote(resolved, folder, deployment)


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
    from jobs.errors import JobError
    from jobs.interruption import graceful
    from jobs.results import Diverged

    with distributed.joined() as first, graceful():
        results = pipeline.train(resolved, folder, variant)
    lost = [result for result in results if isinstance(result, Diverged)]
    if len(lost) == len(results):
        raise JobError(f"{folder.path}: {variant} has no result: {lost[0].reason}")
    if first:
        print(folder.path)


@app.command()
def inspect(
    config: ConfigOption = "default",
    settings: SetOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the page.")] = Path(
        "inspection"
    ),
) -> None:
    """Look for doubles, leaks and wrong labels in the data, before anything is trained on it."""
    from jobs import config as configuration

    resolved = configuration.load(config, settings or ())
    from jobs import inspection
    from jobs.interruption import graceful

    with graceful():
        counts = inspection.inspect(resolved, out)
    print(" · ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing found")
    print(f"\n{out / 'index.html'}")


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="A finished run's folder.")],
) -> None:
    """Draw the plots and the page again from what a run left behind."""
    from jobs import pipeline
    from jobs.runs import RunFolder

    folder = RunFolder(run_folder)
    pipeline.report_again(folder)
    _show(folder)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    settings: SetOption = None,
) -> None:
    """Pack a finished run's winner as a TorchServe archive, checked against the job."""
    resolved, folder = _existing(run_folder, settings)
    from jobs.delivery import export as exporting
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
    from jobs.delivery import publishing
    from jobs.delivery.storage import Storage
    from jobs.interruption import graceful

    with graceful():
        sent = publishing.publish(Storage(resolved.storage), folder)
    print(f"{sent} files sent")


@app.command()
def promote(
    run_folder: Annotated[Path, typer.Argument(help="An exported run's folder.")],
    settings: SetOption = None,
    deployment: DeploymentOption = None,
) -> None:
    """Publish a run and make production serve its model, if it passes the gate; else exit 4."""
    resolved, folder = _existing(run_folder, settings)
    _promote(resolved, folder, deployment)


@app.command()
def rollback(
    version: VersionArgument = None,
    config: ConfigOption = "default",
    settings: SetOption = None,
    deployment: DeploymentOption = None,
) -> None:
    """Make production serve the previous version, or a version of your choice."""
    from jobs import config as configuration
    from jobs.delivery import promotion

    uri = promotion.rollback(configuration.load(config, settings or ()), version)
    print(uri)
    _deploy(deployment, uri, "rollback")


@app.command()
def models(config: ConfigOption = "default", settings: SetOption = None) -> None:
    """List the versions of a model in S3, and which of them serves."""
    from jobs import config as configuration
    from jobs import table
    from jobs.delivery.registry import Registry
    from jobs.delivery.storage import Storage

    resolved = configuration.load(config, settings or ())
    registry = Registry(Storage(resolved.storage), resolved.export.name)
    table.show_models(registry.whole(), registry.channels())


@app.command()
def fetch(
    version: VersionArgument = None,
    config: ConfigOption = "default",
    settings: SetOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to put it in.")] = Path(),
) -> None:
    """Download a version's archive, by default the one that serves, and check its digest."""
    from jobs import config as configuration
    from jobs.delivery import promotion
    from jobs.interruption import graceful

    with graceful():
        print(promotion.fetch(configuration.load(config, settings or ()), version, out))


@app.command()
def prune(
    config: ConfigOption = "default",
    settings: SetOption = None,
    days: Annotated[
        float | None, typer.Option("--older-than", metavar="DAYS", help="Keep what is younger.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=0, help="Keep this many of the newest runs and versions.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List, do not delete.")] = False,
) -> None:
    """Delete old runs and versions from S3; never one that a channel points to or remembers."""
    if days is None and keep is None:
        raise typer.BadParameter("a rule is needed: --older-than DAYS, --keep COUNT, or both")
    from jobs import config as configuration
    from jobs import table
    from jobs.delivery import pruning
    from jobs.delivery.storage import Storage
    from jobs.interruption import graceful

    storage = Storage(configuration.load(config, settings or ()).storage)
    with graceful():
        gone = pruning.prune(storage, days=days, keep=keep or 0, dry_run=dry_run)
    table.show_pruned(gone, dry_run=dry_run)


@app.command()
def demo(
    settings: SetOption = None,
    out: OutOption = Path("runs"),
) -> None:
    """Run the whole path on this machine: S3, training, promotion, service; until Ctrl-C."""
    from jobs import demo as demonstration

    demonstration.run(out, settings or ())


@app.command()
def doctor(config: ConfigOption = "default", settings: SetOption = None) -> None:
    """Check this machine, and whether it can reach what a configuration needs."""
    from jobs import config as configuration
    from jobs import doctor as checks

    checks.examine(configuration.load(config, settings or ()))


def _nothing_to_do(config: "Config", folder: "RunFolder") -> bool:
    """Whether a run is finished and packed, and goes nowhere: known without loading PyTorch."""
    if "RANK" in os.environ or not folder.finished or config.storage.uri is not None:
        return False
    with folder.open(config):
        packed = folder.archive(config.export.name) in folder.manifest()["files"]
        won = folder.comparison().winner is not None
    if won and (packed or not config.export.enabled):
        from serving.progress import log

        log(f"{folder.path} is finished; --run-id NAME starts another")
        return True
    return False


def _show(folder: "RunFolder") -> None:
    from jobs import table

    table.show(folder.comparison())
    print(f"\n{folder.path / 'report' / 'index.html'}")


def _promote(config: "Config", folder: "RunFolder", deployment: str | None) -> None:
    from jobs.delivery import promotion
    from jobs.interruption import graceful

    with graceful():
        uri = promotion.promote(folder, config)
    print(uri)
    _deploy(deployment, uri, "promote")


def _deploy(deployment: str | None, uri: str, command: str) -> None:
    if deployment is not None:
        from jobs.delivery.deployment import patch

        patch(deployment, uri, f"{command} {uri}")


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
