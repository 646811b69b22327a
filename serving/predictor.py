"""Predictions from picture bytes, with an archive that is loaded in this process.

Every serving engine calls it; it depends on none. On a CPU it needs neither torch nor TorchServe.
"""

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serving import archive, messages, runtimes
from serving.archive import TOLERANCES, Form, Golden, Model, ModelError
from serving.explanations import overlay
from serving.images import decode, to_pixels, to_png
from serving.messages import TOP, Explain, Found, Picture, Request, RequestError
from serving.trust import Trust

AT_ONCE = 4  # golden pictures: they take no more memory than a service with few requests does
logger = logging.getLogger(__name__)


class Predictor:
    """One archive's network, ready to answer; threads may call it at the same time."""

    def __init__(
        self, opened: Model, form: Form, network: runtimes.Predict, trust: Trust | None
    ) -> None:
        self.description, self.form = opened.description, form
        self.network, self.trust = network, trust
        self.classes = opened.classes
        self.size = self.description.data.image_size
        self.model = {"name": opened.name, "version": opened.version}

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
            form: by default the first one that is meant for the device and that gives the golden
                pictures' answers on this machine; the last one is taken as it is.
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
        opened = archive.open_model(path)
        forms = _forms_for(opened, gpu) if form is None else [form]
        if not forms or not set(forms) <= set(opened.description.forms):
            names = ", ".join(opened.description.forms)
            raise ModelError(f"{path}: has the network only as {names}")
        for preferred, next_one in pairwise(forms):
            predictor = cls._load(opened, preferred, gpu, threads, callers)
            if (deviation := predictor.deviation(opened.golden)) is None:
                return predictor
            logger.warning("%s: %s; %s serves instead", preferred, deviation, next_one)
        return cls._load(opened, forms[-1], gpu, threads, callers)

    @classmethod
    def _load(
        cls, opened: Model, form: Form, gpu: int | None, threads: int | None, callers: int
    ) -> Self:
        file, size = archive.FILES[form][0], opened.description.data.image_size
        network = runtimes.load(opened.path / file, gpu, size, threads, callers)
        return cls(opened, form, network, _trust(opened))

    def __call__(
        self,
        picture: bytes | str | Path,
        top: int = TOP,
        *,
        abstain: float = 0.0,
        confidence: float | None = None,
        explain: bool = False,
    ) -> dict[str, Any]:
        """The prediction for a JPEG, PNG or WebP, in the service's form: `label`, `probability`,
        `familiarity`, `top` classes, `model`.

        Args:
            picture: the file's bytes, or its path.
            abstain: a picture whose familiarity is no larger gets no label.
            confidence: adds `set`, classes of which one is the right one with that probability.
            explain: adds `explanation`, the likeliest class as `label` and its `map`: rows of what
                each place of the picture says for it; the mean of all is the logit less its bias.

        Raises:
            ImageError: it is not a picture that can be read.
            RequestError: the archive has no familiarity or no maps, and they are asked for.
        """
        content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        how = Explain.MAP if explain else None
        request = Request([content], top=top, abstain=abstain, confidence=confidence, explain=how)
        self.require(request)
        return self.answer(request, self.find(self.pixels(content)[None]))

    def require(self, request: Request) -> None:
        """Raises:
        RequestError: it asks for what this archive cannot tell.
        """
        if self.trust is None and (request.abstain or request.confidence is not None):
            raise RequestError(
                "abstain, confidence: this model has none of it, as too few pictures were held out"
            )
        if request.explain and self.description.map_size is None:
            raise RequestError(
                "this archive gives no class maps; `python -m jobs export RUN` makes one that does"
            )

    def answer(self, request: Request, found: Found) -> dict[str, Any]:
        """What is sent back for a request whose pictures gave this."""
        least = None
        if self.trust is not None and request.confidence is not None:
            least = self.trust.least_probability(request.confidence)
        return messages.answer(request, found, self.classes, self.model, least)

    def explanation(self, request: Request, found: Found) -> bytes:
        """A PNG file of a request's only picture with the map that was found laid over it."""
        assert found.maps is not None, "`require` comes first"
        (picture,) = request.pictures
        assert isinstance(picture, bytes), "`parse` refuses others"
        lit = overlay(decode(picture), found.maps[0])
        return to_png(np.asarray(lit).transpose(2, 0, 1))

    def find(self, images: NDArray[np.uint8]) -> Found:
        """Probabilities, familiarity and the likeliest classes' maps of images uint8 [N, 3, H, W],
        N any number but 0, from one run of the network."""
        outputs = self.network(images)
        probabilities = messages.softmax(outputs.logits / self.description.temperature)
        maps = outputs.maps
        likeliest = maps[np.arange(len(maps)), probabilities.argmax(1)] if maps.size else None
        if self.trust is None:
            return Found(probabilities, None, maps=likeliest)
        strangeness = self.trust.strange(outputs.features)
        return Found(probabilities, self.trust.familiarity(strangeness), strangeness, likeliest)

    def deviation(self, golden: Sequence[Golden]) -> str | None:
        """How the answers to golden pictures are further off than the form's tolerance allows;
        None if they are not. The spread of logits cannot be told from probabilities."""
        allowed = TOLERANCES[self.form]
        expected = np.array([one.probabilities for one in golden])
        pixels = np.stack([self.pixels(one.picture) for one in golden])
        parts = np.split(pixels, range(AT_ONCE, len(pixels), AT_ONCE))
        given = np.concatenate([self.probabilities(part) for part in parts])
        agreement = (given.argmax(1) == expected.argmax(1)).mean()
        error, _ = messages.probability_errors(given, expected)
        if agreement >= allowed.agreement and error <= allowed.probability_error:  # not so for NaN
            return None
        return f"{agreement:.0%} of the golden labels, probabilities off by {error:.2f}"

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

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [N, C] of images uint8 [N, 3, H, W] in that size, N any number but 0."""
        return self.find(images).probabilities


def _forms_for(opened: Model, gpu: int | None) -> list[Form]:
    """The forms that a device can run, the preferred one first."""
    if gpu is not None:
        return ["program"]
    return [form for form in opened.description.forms if form != "program"]


def _trust(opened: Model) -> Trust | None:
    if not opened.description.held_out:
        return None
    file = opened.path / archive.FAMILIARITY
    try:
        return Trust.load(file)
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise ModelError(f"{file}: {error}") from None
