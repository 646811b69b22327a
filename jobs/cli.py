"""The command line: `python -m jobs`. Imports of torch wait until a command needs it."""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.errors import JobError, NotPromoted, UnavailableError
from jobs.interruption import graceful

if TYPE_CHECKING:
    from jobs.config import Config
    from jobs.runs import RunFolder

EXIT_CODES = (
    "Exit codes: 0 done · 1 unexpected · 2 configuration or usage · 3 data, weights or storage "
    "not reachable · 4 not good enough to serve · 5 not settled yet · 75 interrupted, state saved, "
    "run again to resume."
)
app = typer.Typer(
    help="Trains variants of Inception-v3, compares them honestly and reports.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # A shell completes words by the name of a program, which `python -m jobs` is not.
    add_completion=Path(sys.argv[0]).name != "__main__.py",
)

ConfigOption = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        help="quickstart, cifar10-small, default, probe-finetune, h200, lecture, or the path of a "
        "YAML file.",
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
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON, for programs, instead of text.")
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
    part: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="INDEX",
            help="Train part number INDEX, counted from 0, of all pairs of variant and seed; other "
            "processes do the others, and the one that finds all of them done does the rest.",
        ),
    ] = None,
    of: Annotated[
        int | None,
        typer.Option(metavar="COUNT", help="With --part: refuse unless there are COUNT parts."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train every variant, test, compare and report. Run again to resume after an interruption."""
    resolved, folder = _open(config, settings, run_id, out)
    if part is not None or of is not None:
        _check_part(resolved, part, of)
    if deployment and not promote:
        raise typer.BadParameter("--deployment: needs --promote")
    if promote and resolved.storage.uri is None:
        raise typer.BadParameter("--promote: needs --set storage.uri=s3://bucket/prefix")
    if promote and not resolved.export.enabled:
        raise typer.BadParameter("--promote: needs export.enabled=true; `deliver` exports later")
    from serving.progress import log

    if _nothing_to_do(resolved, folder):
        log(f"{folder.path} is finished; --run-id NAME starts another")
        _show(folder, as_json)
        return
    first_of_all = os.environ.get("RANK", "0") == "0"
    if first_of_all:
        log(f"{folder.path}: loading PyTorch")  # which takes ten seconds the first time
    import torch  # noqa: F401

    if first_of_all:
        log(f"{folder.path}: loading the job")
    from jobs import distributed, parts, pipeline

    with distributed.joined() as first:
        with graceful():
            if part is None:
                pipeline.run(resolved, folder)
            elif not parts.run(resolved, folder, resolved.parts[part]):
                return
        # Fails in all processes or in none: a machine that has succeeded takes no part in a retry.
        with nullcontext() if first else graceful():  # so that the others hear what the first says
            distributed.once(_finish, resolved, folder, promote, deployment, as_json)


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
    from jobs.results import Diverged

    with distributed.joined() as first, graceful():
        results = pipeline.train(resolved, folder, variant)
    lost = [result for result in results if isinstance(result, Diverged)]
    if len(lost) == len(results):
        raise JobError(f"{folder.path}: {variant} has no result: {lost[0].reason}")
    if first:
        print(folder.path)


@app.command()
def gather(
    config: ConfigOption = "default",
    settings: SetOption = None,
    run_id: RunIdOption = None,
    out: OutOption = Path("runs"),
) -> None:
    """Fetch what `run --part` left in S3; exit 3, and names, if parts are missing."""
    resolved, folder = _open(config, settings, run_id, out)
    from jobs import parts

    with graceful():
        parts.gather(resolved, folder)
    print(folder.path)


@app.command()
def watch(
    run: Annotated[
        str, typer.Argument(help="A run's folder, or s3://… where the job publishes it.")
    ],
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how far a run is, here or in S3, until it is finished; --json: once, as it is now.

    0 it is finished, with --json: told · 3 no such run, or S3 not reachable · 130 Ctrl-C."""
    from jobs import watching

    if as_json:
        _print_json(**watching.state(run, settings or ()))
    else:
        watching.watch(run, settings or ())


@app.command()
def inspect(
    config: ConfigOption = "default",
    settings: SetOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the page.")] = Path(
        "inspection"
    ),
    as_json: JsonOption = False,
) -> None:
    """Look for duplicates, leaks and wrong labels in the data, before anything is trained on it."""
    resolved = _load(config, settings)
    from jobs import inspection

    with graceful():
        counts = inspection.inspect(resolved, out)
    page = out / "index.html"
    found = " · ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing found"
    _say(f"{found}\n\n{page}", as_json, findings=counts, page=str(page))


@app.command()
def report(
    run_folders: Annotated[list[Path], typer.Argument(help="Finished runs' folders.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page that compares several runs.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the plots and the page again from what a run left behind; of several, compare them."""
    if (out is None) != (len(run_folders) == 1):
        raise typer.BadParameter("--out: needed for the page of several runs, and for that alone")
    from jobs.runs import RunFolder

    folders = [RunFolder(path) for path in run_folders]
    if out is not None:
        from jobs.report import runs
        from serving.files import write

        write(out, runs.render(folders))
        _say(str(out), as_json, page=str(out))
        return
    from jobs import pipeline

    pipeline.report_again(folders[0])
    _show(folders[0], as_json)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    settings: SetOption = None,
) -> None:
    """Pack a finished run's winner as a TorchServe archive, checked against the job."""
    resolved, folder = _existing(run_folder, settings)
    from jobs.delivery import export as exporting

    with graceful():
        print(exporting.export(folder, resolved.export))


@app.command()
def publish(
    run_folder: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send what S3 lacks of a finished run, as often as needed; --set storage.uri=s3://…"""
    resolved, folder = _existing(run_folder, settings)
    from jobs.delivery import publishing
    from jobs.delivery.storage import Storage

    with graceful():
        sent = publishing.publish(Storage(resolved.storage), folder)
    _say(f"{sent} files sent", as_json, sent=sent)


@app.command()
def promote(
    run_folder: Annotated[Path, typer.Argument(help="An exported run's folder.")],
    settings: SetOption = None,
    deployment: DeploymentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a run and make production serve its model, if it passes the gate; else exit 4."""
    resolved, folder = _existing(run_folder, settings)
    _promote(resolved, folder, deployment, as_json)


@app.command()
def deliver(
    out: Annotated[Path, typer.Argument(help="The folder that holds the runs.")] = Path("runs"),
    deployment: DeploymentOption = None,
) -> None:
    """Export and promote the newest run, unless `run` has exported it: once, and without a GPU."""
    from jobs.runs import DELIVERED, undelivered
    from serving.progress import log

    folder = undelivered(out)
    if folder is None:
        log(f"{out}: nothing to deliver")
        return
    if folder.in_use:  # the job that has trained it still publishes
        log(f"{folder.path}: another process is working on this run; the next call delivers it")
        return
    resolved = folder.config()
    if not folder.packed(resolved.export.name):
        from jobs.delivery import export as exporting

        with graceful():
            exporting.export(folder, resolved.export)
    try:
        _promote(resolved, folder, deployment)
    except NotPromoted:
        (folder.path / DELIVERED).touch()
        raise
    (folder.path / DELIVERED).touch()


@app.command()
def verdict(
    metrics: Annotated[
        list[str], typer.Argument(help="Of each replica: http://…:8082/metrics", metavar="URL…")
    ],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Percentage points of accuracy that may be lost.")
    ] = 0.5,
    as_json: JsonOption = False,
) -> None:
    """Say whether a service's shadow should serve: exit 0 promote, 4 stop, 5 keep looking."""
    from jobs.delivery import verdict as verdicts

    found = verdicts.verdict(verdicts.read(metrics), tolerance)
    _say(str(found), as_json, **found.model_dump(mode="json"))
    raise typer.Exit(verdicts.EXIT_CODES[found.advice])


@app.command()
def rollback(
    version: VersionArgument = None,
    config: ConfigOption = "default",
    settings: SetOption = None,
    deployment: DeploymentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make production serve the previous version, or a version of your choice."""
    from jobs.delivery import deployment as deploying
    from jobs.delivery import promotion

    resolved = _load(config, settings)
    if deployment is not None:  # before the channel moves: called again, it would move further back
        deploying.check(deployment)
    uri = promotion.rollback(resolved, version)
    _say(uri, as_json, uri=uri)
    try:
        _deploy(resolved, deployment, uri, "rollback")
    except UnavailableError as error:
        chosen = uri.split("/")[-2]
        advice = f"the channel has moved; the same command with version {chosen} goes on"
        raise UnavailableError(f"{error}; {advice}") from None


@app.command()
def models(
    config: ConfigOption = "default", settings: SetOption = None, as_json: JsonOption = False
) -> None:
    """List the versions of a model in S3, and which of them serves."""
    from jobs import table
    from jobs.delivery.registry import Registry
    from jobs.delivery.storage import Storage

    resolved = _load(config, settings)
    registry = Registry(Storage(resolved.storage), resolved.export.name)
    versions, channels = registry.whole_versions(), registry.channels()
    if as_json:
        pointers = {
            name: channel.pointer.model_dump(mode="json") for name, channel in channels.items()
        }
        records = [version.model_dump(mode="json") for version in versions]
        _print_json(versions=records, channels=pointers)
    else:
        table.show_models(versions, channels)


@app.command()
def fetch(
    version: VersionArgument = None,
    config: ConfigOption = "default",
    settings: SetOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to put it in.")] = Path(),
) -> None:
    """Download a version's archive, by default the one that serves, and check its digest."""
    from jobs.delivery import promotion

    with graceful():
        print(promotion.fetch(_load(config, settings), version, out))


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
    as_json: JsonOption = False,
) -> None:
    """Delete old runs and versions from S3; never one that a channel points to or remembers."""
    if days is None and keep is None:
        raise typer.BadParameter("a rule is needed: --older-than DAYS, --keep COUNT, or both")
    if days is not None and not 0 <= days <= 36_500:
        raise typer.BadParameter(f"--older-than {days}: 0 to 36500 days")
    from jobs import table
    from jobs.delivery import pruning
    from jobs.delivery.storage import Storage

    storage = Storage(_load(config, settings).storage)
    with graceful():
        gone = pruning.prune(storage, days=days, keep=keep or 0, dry_run=dry_run)
    if as_json:
        items = [{"prefix": item.prefix, "bytes": item.size} for item in gone]
        _print_json(deleted=items, dry_run=dry_run)
    else:
        table.show_pruned(gone, dry_run=dry_run)


@app.command()
def demo(settings: SetOption = None, out: OutOption = Path("runs")) -> None:
    """Run the whole path on this machine: S3, training, promotion, service; until Ctrl-C."""
    from jobs import demo as demonstration

    demonstration.run(out, settings or ())


@app.command()
def doctor(config: ConfigOption = "default", settings: SetOption = None) -> None:
    """Check this machine, and whether it can reach what a configuration needs."""
    from jobs import doctor as checks

    checks.examine(_load(config, settings))


def _check_part(config: "Config", part: int | None, of: int | None) -> None:
    count = len(config.parts)
    if part is None or "RANK" in os.environ:
        raise typer.BadParameter("--part: takes one process, not torchrun; --of needs --part")
    if part >= count or of not in (None, count):
        raise typer.BadParameter(
            f"--part {part}" + f" --of {of}" * (of is not None) + f": the configuration has "
            f"{count} parts, 0 to {count - 1}: {', '.join(map(str, config.parts))}"
        )


def _nothing_to_do(config: "Config", folder: "RunFolder") -> bool:
    """Whether a run is finished and packed, and goes nowhere: known without loading PyTorch."""
    if "RANK" in os.environ or not folder.finished or config.storage.uri is not None:
        return False
    with folder.open(config):
        packed = not config.export.enabled or folder.packed(config.export.name)
        return packed and folder.comparison().winner is not None


def _say(text: str, as_json: bool, **values: Any) -> None:
    """The result of a command: the only thing that it prints on standard output."""
    if as_json:
        _print_json(**values)
    else:
        print(text)


def _print_json(**values: Any) -> None:
    print(json.dumps(values, ensure_ascii=False))


def _show(folder: "RunFolder", as_json: bool) -> None:
    from jobs import table

    result = _result(folder)
    if as_json:
        _print_json(**result)
    else:
        table.show(folder.comparison())
        print(f"\n{result['page']}")


def _result(folder: "RunFolder") -> dict[str, Any]:
    page = folder.path / "report" / "index.html"
    comparison = folder.comparison().model_dump(mode="json")
    return {"run": str(folder.path), "page": str(page), "comparison": comparison}


def _finish(
    config: "Config", folder: "RunFolder", promote: bool, deployment: str | None, as_json: bool
) -> None:
    """Shows what a finished run came to, and promotes its winner if that is wanted."""
    if not (promote and as_json):  # else results and promotion are one document
        _show(folder, as_json)
    if promote:
        _promote(config, folder, deployment, as_json, **(_result(folder) if as_json else {}))


def _promote(
    config: "Config",
    folder: "RunFolder",
    deployment: str | None,
    as_json: bool = False,
    **trained: Any,
) -> None:
    """Promotes and rolls out. JSON has training's results, too, even if the gate is closed."""
    from jobs.delivery import promotion

    try:
        with graceful():
            uri = trained["uri"] = promotion.promote(folder, config)
    finally:
        if as_json and trained:
            _print_json(**trained)
    if not as_json:
        print(uri)
    _deploy(config, deployment, uri, "promote")


def _deploy(config: "Config", deployment: str | None, uri: str, command: str) -> None:
    """Rolls out this version, and then what the channel names, until that is the same: a rollback
    that came meanwhile would else be overwritten in the cluster."""
    if deployment is None:
        return
    from jobs.delivery import promotion
    from jobs.delivery.deployment import patch

    rolled_out, cause = None, f"{command} {uri}"
    while rolled_out != uri:
        patch(deployment, uri, cause)
        rolled_out, uri = uri, promotion.served_uri(config)
        cause = f"the channel names {uri}"


def _load(config: str, settings: list[str] | None) -> "Config":
    from jobs import config as configuration

    return configuration.load(config, settings or ())


def _open(
    config: str, settings: list[str] | None, run_id: str | None, out: Path
) -> "tuple[Config, RunFolder]":
    from jobs.runs import RunFolder

    resolved = _load(config, settings)
    if run_id is None:
        run_id = f"{Path(config).stem.lstrip('.')}-{resolved.digest}"
    if not run_id or "/" in run_id or run_id.startswith("."):
        raise typer.BadParameter(f"--run-id {run_id}: a plain name is needed")
    return resolved, RunFolder(out / run_id)


def _existing(path: Path, settings: list[str] | None) -> "tuple[Config, RunFolder]":
    """A run and its configuration, with settings of how it is packed or sent on top."""
    from jobs import config as configuration
    from jobs.runs import RunFolder

    folder = RunFolder(path)
    return configuration.apply(folder.config(), settings or ()), folder
