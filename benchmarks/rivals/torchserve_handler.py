"""TorchServe's own image classifier, with this network's input, as its examples do it."""

from torchvision import transforms
from ts.torch_handler.image_classifier import ImageClassifier


class Handler(ImageClassifier):
    def initialize(self, context):
        super().initialize(context)
        side = self.model_yaml_config["side"]
        self.image_processing = transforms.Compose(
            [
                transforms.Resize((side, side)),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3),
            ]
        )
