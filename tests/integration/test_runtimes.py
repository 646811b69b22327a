"""The network's runtimes, called by threads."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT

FIRST_RUNS = """
import sys, threading, time
import numpy.lib
from serving import Predictor

version = numpy.lib.NumpyVersion

def asked(name):  # once in a process, by OpenVINO's binding; other threads may run meanwhile
    time.sleep(0.5)
    return version(name)

numpy.lib.NumpyVersion = asked
predictor = Predictor.open(sys.argv[1], form="float", threads=2, callers=2)
pixels = numpy.zeros((1, 3, *predictor.size), numpy.uint8)
threads = [threading.Thread(target=predictor.find, args=[pixels]) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("answered")
"""


def test_the_first_runs_of_two_threads_do_not_wait_for_each_other(archive: Path) -> None:
    command = [sys.executable, "-c", FIRST_RUNS, str(archive)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "answered\n"
