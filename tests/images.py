"Images for models that tests run."

import torch


def photos(height, width, batch=1):
    "Return random images (B, 3, H, W), always the same for a size."
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))
