"""The reference says what the code does."""

import json
import runpy

import yaml
from conftest import ROOT


def test_the_reference_is_what_the_code_gives() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    assert module["FILE"].read_text() == module["reference"](), "make reference"


def test_every_key_of_the_configuration_is_there_once() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    keys = [key for key, *_ in module["rows"](module["Config"], "")]
    assert len(keys) == len(set(keys)) > 50
    assert {"data.source", "optim.epochs", "variants.NAME.init", "storage.uri"} <= set(keys)


def test_every_request_is_there_with_its_refusals() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "reference.py"))
    _, *rows = module["requests"]()
    methods = ("| `POST /", "| `PUT /", "| `GET /")
    assert len(rows) > 10 and all(row.startswith(methods) for row in rows)
    document = json.dumps(yaml.safe_load(module["API"].read_text()))
    assert ": null" not in document, "a comma ends an unquoted text in braces"
    [predict] = [row for row in rows if "`POST /predictions/{model}`" in row]
    assert "`abstain`" in predict and "`image/*`" in predict and "413 Too large" in predict
