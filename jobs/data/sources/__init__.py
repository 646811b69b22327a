"""A module here is a source: its name is what `data.source` says.

It has `load(settings)`, which gives a :class:`Source`, and `check(settings)`, which says whether
that would work on this machine. If the data may change while a run trains, it also has
`remember(source, digest)` and `recalled(settings, digest)`, with which a run that is resumed gets
what it began with. `PUBLISHED = True` says that anybody may see its pictures. No other code refers
to it.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from jobs import config
    from jobs.data.images import Images


@dataclass(frozen=True)
class Source:
    """A data set as it was found, before subsets and splits."""

    train: "Images"
    test: "Images"
    classes: tuple[str, ...]
    name: str
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Files that are no picture, and why."""


class Module(Protocol):
    def load(self, settings: "config.Data") -> Source:
        """
        Raises:
            UnavailableError: the data cannot be reached or read.
        """
        ...

    def check(self, settings: "config.Data") -> tuple[bool, str]:
        """Whether the data is there or can be reached, and a line that says so."""
        ...


def names() -> Sequence[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def find(name: str) -> Module:
    return cast(Module, importlib.import_module(f"{__name__}.{name}"))
