"Images for models that tests run."

import torch
from torch.utils.data import Dataset


def photos(height, width, batch=1):
    "Return random images (B, 3, H, W), always the same for a size."
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


class Noise(Dataset):
    "Images of noise, 8 x 8, with the bright pixels of one channel as the mask."

    def __init__(self, count):
        self.sizes = [(8, 8)] * count

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, key):
        image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(key[1]))
        return {"image": image, "target": (image[0] > 1).long(), "index": key[1]}
