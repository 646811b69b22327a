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
