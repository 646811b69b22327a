"""What the documentation leads to is there, and what it tells people to type is right."""

import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import typer
from conftest import ROOT
from manifests import kustomize
from readme import (
    BLOCKS,
    COMMANDS,
    DOCUMENTS,
    JOBS,
    Block,
    command_lines,
    to_run,
    within_comments,
    within_sentences,
)

from jobs import cli, config
from serving import cli as serving_cli

REAL = ("git", "id", "seq", "xargs")  # what blocks start besides the programs that are checked
STAND_IN = """#!/bin/sh
call=$(printf '%s\t' "${0##*/}" "$@")
printf '%s\n' "$call" >> calls
"""


def test_the_readme_has_commands() -> None:
    assert {"make run", "make test"} <= set(COMMANDS)
    assert len(JOBS) >= 4


def calls(text: str, folder: Path) -> list[list[str]]:
    """The programs that bash starts, with their arguments. It finds stand-ins for them, which
    only write down how they are called."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in CHECKS:
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    for name in REAL:
        (programs / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={"PATH": str(programs), "GIT_DIR": str(ROOT / ".git")},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [line.split("\t")[:-1] for line in (folder / "calls").read_text().splitlines()]


def python(*arguments: str) -> None:
    """What follows `-m`, of torchrun, too, is read by the command line that it is for."""
    if "-m" not in arguments:
        elsewhere("python", *arguments)
        return
    module, *rest = arguments[arguments.index("-m") + 1 :]
    if module.startswith("benchmarks."):
        benchmark = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert not [word for word in rest if word[0] == "-" and f'"{word}"' not in benchmark]
        return
    command = typer.main.get_command({"jobs": cli.app, "serving": serving_cli.app}[module])
    assert isinstance(command, typer.core.TyperGroup)
    context = command.make_context(module, [*rest])
    if rest and rest[0][0] != "-":
        context = command.commands[rest[0]].make_context(rest[0], rest[1:])
    if module == "jobs":
        values = context.params
        resolved = config.load(values.get("config", "default"), values.get("settings") or ())
        if "run_folder" in values:
            config.apply(resolved, values.get("settings") or ())
        assert (values.get("part") or 0) < len(resolved.parts)
        assert values.get("variant") in {None, *(variant.name for variant in resolved.variants)}


def make(*arguments: str) -> None:
    """Has a target whose commands can be typed, too: ARGS ends up in one of them."""
    # Without what `make test ARGS=…` hands down.
    command = ["env", "--unset=MAKEFLAGS", "--unset=ARGS", "make", *arguments, "--dry-run"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in said.splitlines():
        if "/python -m jobs " in line:
            python(*shlex.split(line)[1:])


def kubectl(*arguments: str) -> None:
    assert arguments[:2] == ("apply", "-k"), "needs a cluster: say so before the block"
    assert kustomize(ROOT / arguments[2])


def docker(verb: str, *arguments: str) -> None:
    """The target and the build arguments are in the Dockerfile, and what follows an image's name
    is a command of its program. (`make test-images` builds and runs the images.)"""
    dockerfile = (ROOT / "Dockerfile").read_text()
    if verb == "build":
        given = dict.fromkeys(("--target", "--build-arg"), "") | dict(itertools.pairwise(arguments))
        assert f" AS {given['--target']}\n" in dockerfile
        assert f"\nARG {given['--build-arg'].partition('=')[0]}" in dockerfile
        return
    [image] = [argument for argument in arguments if argument.startswith("inception-transfer-")]
    target = image.partition(":")[0].removeprefix("inception-transfer-")
    program = {"train": "jobs", "serve": "serving"}[target]
    if rest := arguments[arguments.index(image) + 1 :]:
        python("-m", program, *rest)


def pip(*arguments: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.fullmatch(rf"install {project['name']}\[(\w+)\]", " ".join(arguments))
    assert found and found[1] in project["optional-dependencies"]


def elsewhere(*words: str) -> None:
    """Run as it is written by a test that takes all such lines, so it has to be a line."""
    test = (ROOT / "tests" / "integration" / RUN_IN[words[0]]).read_text()
    assert f'command_lines("{words[0]}")' in test
    assert words[0] != "python" or Path(words[1]).name in test
    assert list(words) in command_lines(words[0])


RUN_IN = {"curl": "test_service.py", "openssl": "test_signing.py", "python": "test_examples.py"}
CHECKS: dict[str, Callable[..., None]] = {
    **{"python": python, "torchrun": python, "make": make, "kubectl": kubectl, "docker": docker},
    **{"pip": pip, "curl": partial(elsewhere, "curl"), "openssl": partial(elsewhere, "openssl")},
}


def check(text: str, folder: Path) -> None:
    found = calls(text, folder)
    (folder / "exclude.csv").write_text("path\n")
    (folder / "FILE").write_text((config.CONFIGS / "quickstart.yaml").read_text())
    (folder / "examples").symlink_to(ROOT / "examples")
    with contextlib.chdir(folder):
        for program, *arguments in found:
            CHECKS[program](*arguments)


@pytest.mark.parametrize("block", to_run("sh"), ids=str)
def test_what_the_documentation_tells_to_type_is_right(block: Block, tmp_path: Path) -> None:
    check(block.text, tmp_path)


@pytest.mark.parametrize("command", within_sentences() + within_comments())
def test_a_command_within_a_sentence_or_a_comment_is_right(command: str, tmp_path: Path) -> None:
    check(command, tmp_path)


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        ("python -m jobs run --set optim.epoch=1", "optim.epoch: Extra inputs"),
        ("for c in default lektion; do python -m jobs run --config $c; done", "lektion: no such"),
        ("python -m jobs run --sed optim.epochs=1", "No such option"),
        ("python -m jobs train fourth", "fourth"),
        ("seq 0 3 | xargs -n 1 python -m jobs run --part", "< 3"),
        ("python -m serving predikt cat.jpg", "predikt"),
        ("make runn", "non-zero exit status"),
        ("make run ARGS='--config lektion'", "lektion: no such"),
        ("python -m benchmarks.scoring --pictures 600", "--pictures"),
        ("docker build --target training .", "AS training"),
        ("docker build --target train --build-arg BAKED=1 .", "ARG BAKED"),
        ("docker run inception-transfer-train run --config lektion", "lektion: no such"),
        ("kubectl apply -k k8s/overlays/lokal", "lokal"),
        ("kubectl delete namespace inception-transfer", "needs a cluster"),
        ("pip install 'inception-transfer[gpus]'", "gpus"),
        ("curl http://localhost:8080/", "localhost"),
        ("wget http://localhost:8080/", "wget: command not found"),
    ],
)
def test_a_mistake_in_a_command_is_found(mistake: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=complaint):
        check(mistake, tmp_path)


def test_commands_stand_in_blocks_that_tests_find() -> None:
    fences = [re.findall(r"^ *```", file.read_text(), re.MULTILINE) for file in DOCUMENTS]
    assert sum(map(len, fences)) == 2 * len(BLOCKS), "a fence begins its line"
    languages = {"sh", "python", "json", "yaml", "sql", "mermaid", "console", ""}
    assert {block.language for block in BLOCKS} <= languages
    others = [block for block in BLOCKS if block.language not in ("sh", "console")]
    command = re.compile(rf"^ *(\$ )?({'|'.join(CHECKS)}) ", re.MULTILINE)
    assert not [str(block) for block in others if command.search(block.text)]


@pytest.mark.parametrize(
    "file",
    sorted(
        p.relative_to(ROOT).as_posix()
        for d in ("", "docs", "examples")
        for p in (ROOT / d).glob("*.md")
    ),
)
def test_links_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text()
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    missing = [link for link in links if not ((ROOT / file).parent / link).exists()]
    assert not missing


def test_every_page_is_on_the_site_and_every_example_in_their_list() -> None:
    site = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert {file.relative_to(ROOT).as_posix() for file in DOCUMENTS} == set(site)
    listed = (ROOT / "examples" / "README.md").read_text()
    files = {file.name for file in (ROOT / "examples").glob("*.*")} - {"README.md"}
    assert not [name for name in files if f"({name})" not in listed]


def quoted_messages() -> list[str]:
    """Of the left column of docs/troubleshooting.md: what stands between backticks."""
    rows = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    cells = [row.split(" | ")[0] for row in rows if row.startswith("| `")]
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


def test_the_messages_that_are_explained_are_those_of_the_code() -> None:
    files = [path for folder in ("jobs", "serving") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "serving" / "gateway" / "Caddyfile"]
    # Long messages are put together of several literals.
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in files)
    elsewhere = {"No space left on device", "Retry-After"}  # the system's, and HTTP's
    assert len(quoted_messages()) > 25
    missing = [m for m in quoted_messages() if m not in code and m not in elsewhere]
    assert not missing
