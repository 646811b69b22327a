"""Hooks and templates for contributors are well formed and lead to what exists."""

import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
FORMS = sorted(
    path
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    if path.name != "config.yml"
)


def test_hooks_run_tools_of_the_projects_own_environment() -> None:
    assert [repo["repo"] for repo in HOOKS] == ["local"], "a remote hook would pin a version twice"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for hook in HOOKS[0]["hooks"]:
        program = hook["entry"].split()[0]
        assert hook["language"] == "system"
        assert Path(program).parent == Path(".venv/bin")
        name = Path(program).name.removesuffix("-hook")
        assert any(r.startswith(name) for r in extras["test"]), program


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_has_what_forms_require(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    identifiers = [item["id"] for item in content["body"]]
    assert len(set(identifiers)) == len(identifiers) > 0
    assert all(item["attributes"]["label"] for item in content["body"])


def test_a_bug_report_asks_for_what_makes_it_reproducible() -> None:
    [bug] = [form for form in FORMS if form.stem == "bug"]
    required = {
        item["id"]
        for item in yaml.safe_load(bug.read_text())["body"]
        if item.get("validations", {}).get("required")
    }
    assert {"happened", "expected", "command", "doctor"} <= required
