"""Predictions from picture bytes, with an archive that is loaded in this process.

Every serving engine calls it; it depends on none. On a CPU it needs neither torch nor TorchServe.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving import archive, runtimes
from serving.archive import Description, Form
from serving.images import decode, to_pixels
from serving.messages import TOP, Picture, prediction, softmax


class Predictor:
    """One archive's network, ready to answer; threads may call it at the same time."""

    def __init__(self, description: Description, network: runtimes.Predict) -> None:
        self.description, self.network = description, network
        self.classes = description.classes
        self.size = description.data.image_size
        self.model = {"name": description.name, "version": description.version}

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        form: Form | None = None,
        gpu: int | None = None,
        threads: int | None = None,
        callers: int = 1,
    ) -> Self:
        """Loads an archive, or the folder that one was unpacked to.

        Args:
            form: by default the one that is meant for the device.
            gpu: a GPU's number, which then runs the program in bf16; None for the CPU.
            threads: of the CPU; by default one for each core.
            callers: threads that will call it at the same time; each has a share of those.

        Raises:
            ModelError: it is not an archive of this project, or has no such form.
        """
        path = Path(path)
        if not path.is_dir():
            with archive.unpacked(path) as folder:
                return cls.open(folder, form=form, gpu=gpu, threads=threads, callers=callers)
        described = path / archive.DESCRIPTION
        if not described.is_file():
            raise archive.ModelError(f"{path}: not a model archive, it has no {described.name}")
        description = archive.describe(path, described.read_bytes())
        if form is None:
            form = description.forms[0] if gpu is None else "program"
        if form not in description.forms:
            raise archive.ModelError(f"{path}: has the network as {', '.join(description.forms)}")
        network = runtimes.load(
            path / archive.FILES[form][0], gpu, description.data.image_size, threads, callers
        )
        return cls(description, network)

    def __call__(self, picture: bytes | str | Path, top: int = TOP) -> dict[str, Any]:
        """The prediction for a JPEG, PNG or WebP, in the service's form: `label`, `probability`,
        `top` classes, `model`.

        Args:
            picture: the file's bytes, or its path.

        Raises:
            ImageError: it is not a picture that can be read.
        """
        content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        row = self.probabilities(self.pixels(content)[None])[0]
        return prediction(row, self.classes, self.model, top)

    def pixels(self, picture: Picture) -> NDArray[np.uint8]:
        """uint8 [3, H, W] in the size that the network takes, of a file or of other pixels.

        Raises:
            ImageError: it is not a picture that can be read.
        """
        if isinstance(picture, bytes):
            return to_pixels(decode(picture), self.size)
        if picture.shape[1:] == self.size:
            return picture
        return to_pixels(Image.fromarray(picture.transpose(1, 2, 0)), self.size)

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [N, C] of images uint8 [N, 3, H, W] in that size, N any number but 0."""
        return self.network(images)

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [N, C], as :meth:`logits`."""
        return softmax(self.logits(images))
