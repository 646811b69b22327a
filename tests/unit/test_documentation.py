"""What the documentation leads to is there."""

import re
import shlex
import subprocess

import pytest
from conftest import ROOT
from readme import COMMANDS, JOBS


def test_the_readme_has_commands() -> None:
    assert {"make run", "make test"} <= set(COMMANDS)
    assert len(JOBS) >= 4


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith("make ")}))
def test_a_make_target_exists(command: str) -> None:
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.parametrize(
    "file",
    sorted(p.relative_to(ROOT).as_posix() for d in ("", "docs") for p in (ROOT / d).glob("*.md")),
)
def test_links_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text()
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    missing = [link for link in links if not ((ROOT / file).parent / link).exists()]
    assert not missing
