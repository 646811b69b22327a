"""Inception-v3 a quarter as wide: every layer under its name, in a tenth of the time.

For tests of what is done with a network, whatever its width. The real one is in the archive that
all tests share, and test_quickstart.py and test_real.py train it.
"""

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from torch import nn
from torchvision.models import inception as parts

from jobs.train import models

VARIABLE = "TESTS_TRAIN_A_THIN_NETWORK"  # tells processes that tests start
NARROWER = 4  # the first layer has 8 kernels then, as many as the report draws in a row


class Thin(parts.BasicConv2d):  # type: ignore[misc]
    def __init__(self, in_channels: int, out_channels: int, **options: Any) -> None:
        inputs = in_channels if in_channels == 3 else in_channels // NARROWER
        super().__init__(inputs, out_channels // NARROWER, **options)


BLOCKS = (parts.InceptionA, parts.InceptionB, parts.InceptionC, parts.InceptionD, parts.InceptionE)


def build(**options: Any) -> parts.Inception3:
    """In the place of torchvision's `inception_v3`, as jobs/train/models.py calls it."""
    del options["weights"]
    blocks = [Thin, *(partial(block, conv_block=Thin) for block in (*BLOCKS, parts.InceptionAux))]
    network = parts.Inception3(inception_blocks=blocks, **options)
    network.fc = nn.Linear(network.fc.in_features // NARROWER, 1000)
    assert network.AuxLogits is not None
    network.AuxLogits.fc = nn.Linear(network.AuxLogits.fc.in_features // NARROWER, 1000)
    return network


@contextmanager
def thin_network() -> Iterator[None]:
    """Every network that is built in the block is thin, in processes that are started there too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "inception_v3", build)
        patch.setenv(VARIABLE, "1")
        yield


def stay_thin() -> None:
    """Goes on with it in a process that was started in such a block."""
    if VARIABLE in os.environ:
        models.inception_v3 = build  # type: ignore[attr-defined]


if __name__ == "__main__":  # python -m thin MODULE-OR-FILE ARGUMENTS…
    stay_thin()
    del sys.argv[0]
    run: Any = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
    run(sys.argv[0], run_name="__main__")
