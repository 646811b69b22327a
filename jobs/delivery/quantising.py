"""Quantises a network in a process of its own, beside the one that makes the network.

    python -m jobs.delivery.quantising DESCRIPTOR

imports what it needs, and then gets, through a pipe, a folder that has `network.xml`, OpenVINO's in
floats, and `images.npy`, uint8 [N, 3, H, W]. It writes the network in 8-bit integers, with the
ranges that these images give, to `int8.xml` there. It sends the number of each image it has run,
and None at the end.
"""

import io
import logging
import sys
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NETWORK, IMAGES, QUANTISED = "network.xml", "images.npy", "int8.xml"


def main(descriptor: int) -> None:
    # One of the libraries that nncf works with, and does without, in a third of the time.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)  # it says on stdout which operations stay as they are
    pipe: Connection[Any, Any] = Connection(descriptor)
    folder = Path(pipe.recv())
    images = np.load(folder / IMAGES, mmap_mode="r")

    def image(index: int) -> NDArray[np.uint8]:
        pipe.send(index)
        return np.array(images[index : index + 1])

    dataset = nncf.Dataset(range(len(images)), image)
    with redirect_stdout(io.StringIO()):  # bars
        network = openvino.Core().read_model(folder / NETWORK)
        quantised = nncf.quantize(network, dataset, subset_size=len(images))
    openvino.save_model(quantised, folder / QUANTISED)
    pipe.send(None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
