"""What benchmarks/bare.sh packs is what a machine with torch alone lacks."""

import re
from importlib.metadata import distribution

from conftest import ROOT
from packaging.requirements import Requirement

SCRIPT = (ROOT / "benchmarks" / "bare.sh").read_text()
THERE = {"torch", "torchvision"}
LEFT_OUT = {"boto3", "scikit-learn", "scipy"}


def needed(name: str, without: set[str]) -> set[str]:
    """A package and all that it needs on Python 3.12, but for some and what they need."""
    if name in without:
        return set()
    found, environment = {name}, {"python_version": "3.12", "extra": ""}
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            found |= needed(requirement.name.lower().replace("_", "-"), without | found)
    return found


def test_it_is_all_that_is_needed() -> None:
    listed = re.search(r"packages=\((.*?)\)", SCRIPT, re.DOTALL)
    assert listed is not None
    packed = set(listed[1].split())
    with_torch = needed("torch", set()) | needed("torchvision", set())
    wanted = needed("inception-transfer", THERE | LEFT_OUT) - {"inception-transfer"}
    assert packed >= wanted - with_torch
    assert packed <= wanted
