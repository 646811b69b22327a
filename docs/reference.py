"""Writes docs/reference.md, from the code: every key of the configuration, every command, and every
request that the service answers.

python docs/reference.py          (`make reference`)
"""

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from jobs.config import Config, Optim, Section, Variant

FILE = Path(__file__).with_suffix(".md")
HEAD = """# Reference

Written by `make reference` from the code, and compared with it by a test.

## Configuration

A YAML file with these sections, or `--set section.key=value`. What is left out has its default;
only `variants` must be given.
"""

HTTP = """## HTTP

From `serving/gateway/openapi.yaml`, which the service has as `/openapi.json`, with the name and the
classes of its model. [The service](serving.md) explains it.
"""
API = Path(__file__).parents[1] / "serving" / "gateway" / "openapi.yaml"


def main() -> None:
    FILE.write_text(reference())


def reference() -> str:
    parts = [HEAD, *table(Config), commands("jobs"), commands("serving"), HTTP, *requests()]
    return "\n".join(parts) + "\n"


def table(model: type[Section]) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for key, kind, default, meaning in rows(model, ""):
        cells = (f"`{key}`", f"`{kind}`", default, " ".join(meaning.split()))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def rows(model: type[Section], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if annotation is Optim and prefix:
            yield f"{prefix}{name}.…", "", "as `optim.…`", field.description or ""
        elif isinstance(annotation, type) and issubclass(annotation, Section):
            yield from rows(annotation, f"{prefix}{name}.")
        elif Variant in get_args(annotation):
            yield from rows(Variant, f"{prefix}{name}.NAME.")
        else:
            default = "required" if field.is_required() else shown(field.get_default())
            yield f"{prefix}{name}", typed(annotation), default, field.description or ""


def typed(annotation: Any) -> str:
    """Such as `int`, `float | null` or `"auto" | "cpu"`."""
    if annotation is type(None):
        return "null"
    arguments = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return typed(arguments[0])
    if get_origin(annotation) in (list, tuple, dict):
        return str(annotation).replace("typing.", "")
    if arguments and all(isinstance(a, (str, int)) for a in arguments):
        return " | ".join(str(a) for a in arguments)
    if arguments:
        return " | ".join(typed(a) for a in arguments)
    return str(getattr(annotation, "__name__", annotation))


def shown(default: Any) -> str:
    if default is None:
        return "null"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def commands(package: str) -> str:
    """What `--help` says, as Markdown."""
    command = [sys.executable, "-m", "typer", f"{package}.cli", "utils", "docs"]
    command += ["--name", f"python -m {package}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.sub(r"^#", "##", html.unescape(said), flags=re.MULTILINE).rstrip() + "\n"


def requests() -> Iterator[str]:
    """One row each."""
    yield "| request | what | parameters | body | answers |\n|---|---|---|---|---|"
    for path, methods in yaml.safe_load(API.read_text())["paths"].items():
        for method, one in methods.items():
            named = ", ".join(f"`{p['name']}`" for p in one.get("parameters", ()))
            body = ", ".join(f"`{kind}`" for kind in one.get("requestBody", {}).get("content", ()))
            said = {s: a["description"].rstrip(".") for s, a in one["responses"].items()}
            answers = " · ".join(f"{status} {text}" for status, text in sorted(said.items()))
            yield f"| `{method.upper()} {path}` | {one['summary']} | {named} | {body} | {answers} |"


if __name__ == "__main__":
    main()
