"""What the images install is listed in a form that scanners read."""

import json
import re
import subprocess

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_bills_of_materials_have_every_package_of_the_locks_with_its_digests() -> None:
    done = subprocess.run(["make", "sbom"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for lock in ("train", "serve", "serve-gpu"):
        pinned = re.findall(
            r"^([a-z0-9-]+)==([^ ;]+)",
            (ROOT / f"requirements/{lock}.txt").read_text(),
            re.MULTILINE,
        )
        listed = json.loads((ROOT / f"build/{lock}.cdx.json").read_text())
        assert listed["bomFormat"] == "CycloneDX"
        found = {(c["name"], c["version"]) for c in listed["components"]}
        assert set(pinned) == found and len(pinned) > 40
        references = [r for c in listed["components"] for r in c["externalReferences"]]
        assert any(reference.get("hashes") for reference in references)
