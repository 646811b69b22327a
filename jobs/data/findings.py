"""What is wrong with data: findings.csv, and the list of pictures to leave out. No torch here."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["leak", "conflict", "label", "duplicate", "damaged", "small class"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # the worst first
COLUMNS = ("kind", "path", "other", "score")


@dataclass(frozen=True)
class Finding:
    kind: Kind
    """`leak`: a training picture that is also a test picture. `conflict`: one picture in two
    classes. `label`: probably of another class. `duplicate`: a picture that is there twice."""
    path: str
    """The picture that one would leave out, below the data's root; empty for a class."""
    other: str
    """Its double, the class that it seems to be of, what is wrong with it, or the small class."""
    score: float
    """How sure, up to 1; of a small class, how many training pictures it has."""


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    def rank(finding: Finding) -> tuple[int, float]:
        falls = finding.kind == "small class"  # the fewer pictures, the worse
        return KINDS.index(finding.kind), finding.score if falls else -finding.score

    return sorted(findings, key=rank)


def to_csv(findings: Iterable[Finding]) -> str:
    text = io.StringIO()
    rows = csv.writer(text)  # with \r\n, or Python 3.11 would not quote a name with \r
    rows.writerow(COLUMNS)
    rows.writerows((*astuple(finding)[:3], f"{finding.score:.4g}") for finding in findings)
    return text.getvalue()


def paths_in(file: Path) -> tuple[str, ...]:
    """The pictures that a file names: in its column `path`, as findings.csv has one, or one in each
    line. In their order, each once.

    Raises:
        ValueError: it cannot be read as text.
    """
    try:
        content = file.expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8") from None
    except (OSError, RuntimeError) as error:  # the latter for the home of nobody
        raise ValueError(f"{file}: {getattr(error, 'strerror', error)}") from None
    header: Sequence[str] = next(csv.reader(content.splitlines()[:1]), [])
    if "path" in header:
        column = header.index("path")
        try:
            rows = list(csv.reader(io.StringIO(content, newline="")))  # in a name, a line may end
        except csv.Error as error:
            raise ValueError(f"{file}: {error}") from None
        found = [row[column] for row in rows[1:] if len(row) > column]
    else:
        found = [line.strip() for line in re.split(r"\r?\n", content)]
    return tuple(dict.fromkeys(filter(None, found)))
