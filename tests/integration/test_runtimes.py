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
    time.sleep(2)
    return version(name)

def answer():
    predictor = Predictor.open(sys.argv[1], form="float")
    predictor.find(numpy.zeros((1, 3, *predictor.size), numpy.uint8))

numpy.lib.NumpyVersion = asked
threads = [threading.Thread(target=answer) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("answered")
"""


def test_the_first_runs_of_two_threads_do_not_wait_for_each_other(archive: Path) -> None:
    command = [sys.executable, "-c", FIRST_RUNS, str(archive)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "answered\n"
