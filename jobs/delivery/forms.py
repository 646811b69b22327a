"""The forms of a trained network in an archive: `torch.export`, OpenVINO float and int8.

Images enter as uint8 in the size of the training images; scaling to the network's input and
normalisation are part of every form, so serving cannot deviate from training there.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models import Inception3
from torchvision.models.feature_extraction import create_feature_extractor

import jobs
from jobs import interruption
from jobs.config import BLOCKS
from jobs.data.images import Images, to_input
from jobs.delivery import quantising
from jobs.delivery.children import Child, child
from jobs.delivery.parity import ExportError
from jobs.seeds import generator
from jobs.train import models
from serving import runtimes
from serving.archive import FILES
from serving.files import temporary
from serving.progress import task

MAX_BATCH = 1024


class Served(nn.Module):
    """From images as they come, uint8 [N, 3, H, W], to logits float32 [N, C], the inputs of the
    last layer, float32 [N, 2048], and class maps, float32 [N, C, h, w]: one run of the network
    gives all three."""

    def __init__(self, network: Inception3, input_size: int, normalization: str) -> None:
        super().__init__()
        # Without the last layer and dropout, which does nothing in eval mode.
        outputs = {BLOCKS[-1]: "places", "flatten": "features"}
        self.trunk, self.fc = create_feature_extractor(network, outputs), network.fc
        self.input_size, self.normalization = input_size, normalization

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.trunk(to_input(images, self.input_size, self.normalization))
        maps = models.class_maps(found["places"], self.fc.weight)
        return self.fc(found["features"]), found["features"], maps


def served(best: Path, num_classes: int, input_size: int, normalization: str) -> Served:
    """The network with trained weights, without its auxiliary head, in eval mode on the CPU.

    Args:
        best: a safetensors file.
    """
    network = models.build(num_classes, aux=False)
    state = {k: v for k, v in models.read(best).items() if not k.startswith("AuxLogits.")}
    network.load_state_dict(state)
    network.to(memory_format=torch.contiguous_format)
    return Served(network, input_size, normalization).eval()


def eager(network: Served) -> runtimes.Predict:
    """The trained network as it is, in float32: the reference for every form."""

    @torch.inference_mode()
    def predict(images: NDArray[np.uint8]) -> runtimes.Outputs:
        return runtimes.from_torch(network(torch.from_numpy(images)))

    return predict


@contextmanager
def written(
    network: Served, train: Images, calibration_images: int, folder: Path
) -> Iterator[None]:
    """Writes all three forms. int8, whose ranges come from at most `calibration_images` training
    images, is made while the block runs, and is there once the block is left.

    Raises:
        ExportError: int8 could not be made.
    """
    import openvino

    package = Path(jobs.__file__).parents[1]
    # It is started first: its imports take as long as the other forms.
    with temporary() as work, child(package, "jobs.delivery.quantising") as quantiser:
        runtimes.core()  # OpenVINO's own, before the steps below create others and free them
        with task("export, forms", 2, "forms") as advance:
            program = _program(network, train)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="No complete tensor found")
                torch.export.save(program, folder / FILES["program"][0])
            advance(1)
            model = openvino.convert_model(program)
            openvino.save_model(model, folder / FILES["float"][0])
            advance(1)
        order = torch.randperm(len(train), generator=generator("calibration"))[:calibration_images]
        openvino.save_model(model, work / quantising.NETWORK, compress_to_fp16=False)
        np.save(work / quantising.IMAGES, train.raw(order).cpu().numpy())
        with suppress(BrokenPipeError):  # a child that has ended is noticed below
            quantiser.pipe.send(str(work))
        yield
        _follow(quantiser, len(order))
        for name in FILES["int8"]:
            made = (work / quantising.QUANTISED).with_suffix(Path(name).suffix)
            shutil.move(made, folder / name)


def _program(network: Served, train: Images) -> torch.export.ExportedProgram:
    example = train.raw(torch.arange(2))
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes={"images": {0: batch}})
    program._example_inputs = None  # which would be pickled
    return program


def _follow(quantiser: Child, images: int) -> None:
    """Shows how far the quantiser is, until it is done.

    Raises:
        ExportError: it has failed; the message has its last line of output.
    """
    with task("export, ranges for int8", images) as advance:
        try:
            while True:
                while not quantiser.pipe.poll(1):
                    interruption.check()
                if quantiser.pipe.recv() is None:
                    return
                advance(1)
        except (EOFError, OSError):
            interruption.check()  # the signal was for all processes of the group
            raise ExportError(f"int8 was not made: {quantiser.last_words()}") from None
