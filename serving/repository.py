"""An archive's network for servers that read OpenVINO's format: OpenVINO Model Server, KServe."""

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving import archive, runtimes
from serving.archive import FILES, Model, ModelError
from serving.files import naming, temporary
from serving.messages import logarithms
from serving.predictor import Predictor

INPUT, OUTPUT = "pictures", "probabilities"


def write(file: Path, out: Path, form: Literal["float", "int8"] = "float") -> Path:
    """Writes the folder NAME/1 with model.xml and model.bin, and asks it the golden pictures.

    Its input is `pictures`, uint8 [N, 3, H, W] in the archive's size, its output `probabilities`,
    float32 [N, C]. The names of the classes are its `model_info`'s `labels`, as OpenVINO's Model
    API reads them: separated by spaces, with underscores for spaces within.

    Args:
        file: an archive.
        form: int8 is faster, and right on processors with VNNI alone; no server checks that.

    Raises:
        ModelError: it is no archive, has no such form, or is there already; or what was written
            does not give the golden answers on this machine.
        OSError: it cannot be written; nothing is there then.
    """
    with archive.unpacked(file) as folder, temporary() as work:
        opened = archive.open_model(folder)
        target = out / opened.name / "1"
        if target.exists():
            raise ModelError(f"{target} is there already")
        if form not in opened.description.forms:
            raise ModelError(f"{file}: has no {form}: {', '.join(opened.description.forms)}")
        _convert(opened, opened.path / FILES[form][0], work / "model.xml")
        if (deviation := _deviation(opened, form, work / "model.xml")) is not None:
            raise ModelError(f"{form} is not right on this machine: {deviation}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary(target.parent) as part, naming(target):
            (part / target.name).mkdir()
            for name in ("model.bin", "model.xml"):
                shutil.copyfile(work / name, part / target.name / name)
            (part / target.name).rename(target)  # not onto what another call has written
    return target


def _convert(opened: Model, source: Path, target: Path) -> None:
    import openvino
    from openvino import opset13 as ops

    network = runtimes.core().read_model(source)
    logits = network.outputs[0].get_node().input_value(0)
    temperature = np.float32(opened.description.temperature)
    probabilities = ops.softmax(ops.divide(logits, temperature), axis=1)
    probabilities.output(0).tensor.names = {OUTPUT}
    [pictures] = network.get_parameters()
    pictures.output(0).tensor.names = {INPUT}
    model = openvino.Model([probabilities.output(0)], [pictures], opened.name)
    # Whatever Python takes for space ends a name there, and would shift those that follow.
    labels = " ".join("_".join(label.split()) for label in opened.classes)
    model.set_rt_info(labels, ["model_info", "labels"])
    model.set_rt_info("Classification", ["model_info", "model_type"])
    openvino.save_model(model, target)


def _deviation(opened: Model, form: Literal["float", "int8"], written: Path) -> str | None:
    answers = runtimes.load_ir(written, opened.description.data.image_size)

    def network(images: NDArray[np.uint8]) -> runtimes.Outputs:
        given = answers(images)  # with probabilities for logits
        logits = logarithms(given.logits) * np.float32(opened.description.temperature)
        return given._replace(logits=logits)

    return Predictor(opened, form, network, None).deviation(opened.golden)
