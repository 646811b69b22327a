"""CITATION.cff is valid, and agrees with pyproject.toml."""

import tomllib

import pytest
import yaml
from conftest import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_keys_that_the_format_requires_are_there() -> None:
    """Required by the schema of the Citation File Format 1.2.0."""
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software" and CITATION["abstract"]
    assert CITATION["authors"] and all(author.get("name") for author in CITATION["authors"])


@pytest.mark.parametrize(
    ("key", "project_key"), [("title", "name"), ("version", "version"), ("license", "license")]
)
def test_it_agrees_with_the_project(key: str, project_key: str) -> None:
    assert CITATION[key] == PROJECT[project_key]


def test_the_licence_is_the_one_that_is_named() -> None:
    first = (ROOT / "LICENSE").read_text().split()[:4]
    assert first == ["Apache", "License", "Version", "2.0,"]
    assert PROJECT["license"] == "Apache-2.0" and PROJECT["license-files"] == ["LICENSE"]
