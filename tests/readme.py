"""The commands that README.md, docs/ and examples/ tell people to type.

A block that no test can run says so, and why, in the line before it: `<!-- not run: … -->`; a
command in a comment has `(not run: …)` after it.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(
    file for folder in ("", "docs", "examples") for file in (ROOT / folder).glob("*.md")
)
FENCE = re.compile(
    r"^(?:<!-- not run: ([^\n]+) -->\n+)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    """What stands between two fences."""

    file: str
    language: str
    text: str
    why_not: str  # it is not run by a test; empty where it is

    def __str__(self) -> str:
        return f"{self.file}: {self.text.splitlines()[0]}"


BLOCKS = [
    Block(file.relative_to(ROOT).as_posix(), language, text, why_not)
    for file in DOCUMENTS
    for why_not, language, text in FENCE.findall(file.read_text())
]


def to_run(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and not block.why_not]


def _lines(text: str) -> list[str]:
    lines = [line.split("  #")[0].strip() for line in text.replace("\\\n", "").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def command_lines(program: str) -> list[list[str]]:
    """All lines that start a program, split as a shell does; but for Python's modules."""
    lines = sorted({line for block in to_run("sh") for line in _lines(block.text)})
    split = [shlex.split(line) for line in lines if line.startswith(f"{program} ")]
    return [words for words in split if words[1] != "-m"]


def within_sentences() -> list[str]:
    """Whole commands between backticks. The reference and the changelog have but their names."""
    files = [file for file in DOCUMENTS if file.stem not in ("reference", "CHANGELOG")]
    texts = [FENCE.sub("", file.read_text()) for file in files]
    found = {c for text in texts for c in re.findall(r"`((?:make|python -m) [^`…<]+)`", text)}
    return sorted(" ".join(command.split()) for command in found)


def within_comments() -> list[str]:
    """Of the Dockerfile, manifests and configurations, up to the remark that follows."""
    files = [ROOT / "Dockerfile", *(ROOT / "examples").glob("*.yaml")]
    files += [
        file for folder in ("k8s", "jobs/configs") for file in (ROOT / folder).rglob("*.yaml")
    ]
    command = re.compile(
        r"^#   ((?:docker|kind|kubectl|make|python) (?!.*\(not run: ).+?)(?: {2,}.*)?$",
        re.MULTILINE,
    )
    texts = [re.sub(r"\\\n# +", "", file.read_text()) for file in files]
    return sorted({found for text in texts for found in command.findall(text)})


COMMANDS = [line for b in to_run("sh") if b.file == "README.md" for line in _lines(b.text)]
JOBS = sorted({c for c in COMMANDS if c.startswith("python -m jobs")})
