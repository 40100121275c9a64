"""As much of a model and an image processor as `embed_images` uses; an image's embedding is its first pixel and 1."""

from types import SimpleNamespace

import torch
from PIL import Image

from siglip_model.embed import embed_images

WIDTH = 4


class ColourModel:
    """Models of different seeds differ as checkpoints do."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(vision_config=SimpleNamespace(vision_use_head=True, hidden_size=WIDTH))

    def __init__(self, seed=0):
        self.named_parameters = torch.nn.Linear(1, 1, bias=False).named_parameters
        torch.nn.init.constant_(dict(self.named_parameters())["weight"], seed)

    def eval(self):
        return self

    def get_image_features(self, pixel_values):
        colours = pixel_values.mean(dim=(2, 3))
        return SimpleNamespace(pooler_output=torch.cat([colours, torch.ones(len(colours), 1)], dim=1))


class ColourProcessor:
    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.tensor([image.getpixel((0, 0)) for image in images]).float()[:, :, None, None]}

    def to_dict(self):
        return {"size": 1}


def save_colours(folder, count):
    """Images 0.png, 1.png ... of one pixel each."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (1, 1), (number, len(folder.name), count)).save(folder / f"{number}.png")


def embed_colours(inputs, out, *, seed=0, **options):
    options = {"batch_size": 2, "num_workers": 0, **options}
    return embed_images(ColourModel(seed), ColourProcessor(), inputs, out, **options)
