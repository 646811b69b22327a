"""The service: `python -m serving` serves an archive that the job has made.

>>> from serving import Predictor
>>> Predictor.open("inception_v3_cifar10.mar")("cat.jpg")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.predictor import Predictor

__all__ = ["Predictor"]


def __getattr__(name: str) -> Any:
    """Loads the predictor, and with it NumPy and Pillow, for those alone who ask for it."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serving.predictor import Predictor

    return Predictor
