"""The same in LitServe, after the image classifier of its documentation ("Speed up serving by
200x"): `litserve_app.py FOLDER SIDE PORT`, with the files of the stock archive in FOLDER."""

import base64
import io
import sys

import litserve
import torch
from PIL import Image
from torchvision import transforms


class Api(litserve.LitAPI):
    def __init__(self, folder, side):
        super().__init__(max_batch_size=8, batch_timeout=0.05)
        self.folder, self.side = folder, side

    def setup(self, device):
        sys.path.insert(0, self.folder)
        from model import CLASSES, ImageClassifier

        self.classes = CLASSES
        self.network = ImageClassifier().to(device).eval()
        self.network.load_state_dict(torch.load(f"{self.folder}/weights.pth"))
        self.image_processing = transforms.Compose(
            [
                transforms.Resize((self.side, self.side)),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3),
            ]
        )

    def decode_request(self, request):
        image = Image.open(io.BytesIO(base64.b64decode(request["image_data"]))).convert("RGB")
        return self.image_processing(image)

    def predict(self, x):
        with torch.inference_mode():
            return torch.softmax(self.network(x), dim=1)

    def encode_response(self, output):
        shares, numbers = output.topk(5)
        pairs = zip(numbers.tolist(), shares.tolist(), strict=True)
        return {self.classes[str(number)]: share for number, share in pairs}


if __name__ == "__main__":
    folder, side, port = sys.argv[1:]
    server = litserve.LitServer(Api(folder, int(side)), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False)
