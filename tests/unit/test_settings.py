"""The service's settings: where they come from, what is refused, what is documented."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from serving.settings import Settings, SettingsError, from_environment


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({}, "MODEL_URI: Field required"),
        ({"MODEL_URI": "m.mar", "SERVING_PRT": "80"}, "SERVING_PRT: Extra inputs"),
        ({"MODEL_URI": "m.mar", "SERVING_PORT": "many"}, "SERVING_PORT: Input should be"),
        ({"MODEL_URI": "m.mar", "SERVING_API_KEYS": ","}, "SERVING_API_KEYS: has no key"),
        ({"MODEL_URI": "m.mar", "SERVING_API_KEYS": " , "}, "SERVING_API_KEYS: has no key"),
        (
            {"MODEL_URI": "m.mar", "SERVING_METRICS_PORT": "8080"},
            "SERVING_METRICS_PORT: 8080 is SERVING_PORT, too",
        ),
        *(
            (
                {"MODEL_URI": "m.mar", "SERVING_ENDPOINT_SECONDS": seconds},
                "SERVING_ENDPOINT_SECONDS: Input should be",
            )
            for seconds in ("inf", "nan", "-1", "3601")
        ),
    ],
)
def test_settings_that_make_no_service_are_refused(
    environment: dict[str, str], complaint: str
) -> None:
    with pytest.raises(SettingsError, match=complaint):
        from_environment(environment)


def test_a_setting_that_is_refused_is_told_in_one_line() -> None:
    environment = {**os.environ, "MODEL_URI": "m.mar", "SERVING_API_KEYS": ","}
    command = [sys.executable, "-m", "serving"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: SERVING_API_KEYS: has no key")
    assert done.stderr.count("\n") == 1


def test_settings_come_from_a_file_too_and_the_environment_wins(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model_uri: m.mar\nport: 9000\nworkers: 3\n")
    settings = from_environment({"SERVING_CONFIG": str(file), "SERVING_PORT": "9001"})
    assert (settings.model_uri, settings.port, settings.workers) == ("m.mar", 9001, 3)
    for content, complaint in (
        ("model_uri: m\nprt: 1", "prt: Extra inputs"),
        ("a: [", "SERVING_CONFIG: "),
        ("port: !!bool x", "SERVING_CONFIG: not YAML: 'x'"),
        ("port: 1\nport: 2", "SERVING_CONFIG: not YAML: port is there twice"),
        ("- 1", "not a mapping"),
    ):
        file.write_text(content)
        with pytest.raises(SettingsError, match=complaint):
            from_environment({"SERVING_CONFIG": str(file)})


def test_the_documentation_has_every_setting_and_metric() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    metrics = yaml.safe_load((ROOT / "serving" / "metrics.yaml").read_text())["model_metrics"]
    names = [metric["name"] for kind in metrics.values() for metric in kind]
    own = [name for name in names if name.startswith("inception_")]
    keys = [f"SERVING_{field.upper()}" for field in Settings.model_fields if field != "model_uri"]
    shadow = re.findall(r'"(inception_\w+)"', (ROOT / "serving" / "shadow.py").read_text())
    assert len(shadow) == 6
    own += [f"{n}_total" if f"`{n}_total`" in text else n for n in shadow]
    missing = [name for name in (*keys, *own, "MODEL_URI") if f"`{name}`" not in text]
    assert not missing
