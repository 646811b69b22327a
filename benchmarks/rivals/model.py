"""The network as TorchServe's eager mode wants it: one class, beside its weights."""

import json
from pathlib import Path

from torchvision.models.inception import Inception3

CLASSES = json.loads(Path(__file__).with_name("index_to_name.json").read_text())


class ImageClassifier(Inception3):
    def __init__(self) -> None:
        super().__init__(len(CLASSES), aux_logits=False, transform_input=False, init_weights=False)
