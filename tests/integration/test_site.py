"""The documentation as a site."""

import re
import subprocess

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_site_has_every_page_and_no_broken_link() -> None:
    done = subprocess.run(["make", "site"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"contains a link.*|not included in the .nav.*", done.stderr)
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages == {page.parent.name for page in (ROOT / "build/site/docs").glob("*/index.html")}
    assert "make run" in (ROOT / "build/site/index.html").read_text()
