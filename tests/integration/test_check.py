"""`make check` is quick, and stays so."""

import subprocess
import sys

from conftest import ROOT


def test_the_tests_of_make_check_are_collected_without_torch() -> None:
    """… which takes longer to import than they take; should one import it later, conftest.py
    makes that an error where nothing but these tests is run."""
    options = ("--collect-only", "-q", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *options, "tests/unit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " tests collected" in done.stdout
