"""Every model family, small, and its answer to weights of a formula; `python tests/families.py` writes them anew."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from crackseg_nb.models.registry import create_model
from crackseg_nb.models.settings import ENCODERS, Architecture

REFERENCES = Path(__file__).with_name("reference_outputs.json")
TINY_SWIN = dict(depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 2, 2, 4))
NARROW = dict(unet_channels=(24, 20, 16, 12, 8))
POOLING = dict(aspp_channels=24, aspp_rates=(1, 2, 3))  # rates that reach a neighbour on a map of 3x3
SEGMENTERS = {  # how a test calls it -> the family, and what keeps it small
    "swinv2_hybrid": ("swinv2_hybrid", dict(decoder_channels=(20, 16, 12), **POOLING, cbam_reduction=4)),
    "swinv2_hybrid_plain": (
        "swinv2_hybrid",
        dict(decoder_channels=(20, 16, 12), **POOLING, aspp=False, cbam=False),
    ),
    "unet": ("unet", dict(encoder="mobilenet_v3_small", **NARROW)),
    "unet_without_stride_2": ("unet", dict(encoder="mit_b0", **NARROW)),
    "deeplab_original": ("deeplab_original", dict(POOLING)),
    "deeplab_optimized": ("deeplab_optimized", dict(POOLING)),
}
FAMILIES = {**SEGMENTERS, "swin_classifier": ("swin_classifier", dict(encoder="swinv2", **TINY_SWIN))}


def build(name: str, num_classes: int) -> torch.nn.Module:
    "Return a family's small model, ready to predict; the hybrid's encoder is a SwinV2 of four blocks."
    family, settings = FAMILIES[name]
    usual = ENCODERS["swinv2"]
    if family == "swinv2_hybrid":
        ENCODERS["swinv2"] = Architecture(usual.name, usual.family, TINY_SWIN)
    torch.manual_seed(0)
    try:
        return create_model(family, image_size=64, num_classes=num_classes, pretrained="false", **settings).eval()
    finally:
        ENCODERS["swinv2"] = usual


def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    "Return numbers from -1 to 1 that only `name` decides; NumPy promises this stream for ever."
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.from_numpy(2 * np.random.RandomState(seed).random_sample(shape) - 1)


def fill(model: torch.nn.Module) -> torch.nn.Module:
    "Give `model` the weights that follow from their names, in double precision, so that no machine decides a digit."
    model.double()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            learned = name.endswith(("running_mean", "running_var")) or name in dict(model.named_parameters())
            if not learned:
                continue
            drawn = numbers(name, tuple(value.shape))
            if value.ndim > 1:
                value.copy_(drawn * (6 / value[0].numel()) ** 0.5)
            else:
                value.copy_(1 + drawn / 2 if name.endswith(("weight", "running_var")) else drawn / 2)
    return model


def answers(name: str) -> dict:
    "Return what pins a family: the names and shapes of its weights, and its answer to one image."
    model = fill(build(name, 3))
    lines = sorted(f"{key}:{tuple(value.shape)}" for key, value in model.state_dict().items())
    with torch.no_grad():
        logits = model(numbers("image", (1, 3, 65, 95)))[0]
    places = logits if logits.ndim == 1 else logits[:, [0, 5, 16, 40, 63, 64], [1, 80, 23, 48, 94, 0]]
    summary = [logits.mean(), logits.std()]
    return dict(
        weights=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        logits=[float(f"{value:.9g}") for value in [*places.flatten(), *summary]],
    )


if __name__ == "__main__":
    REFERENCES.write_text(json.dumps({name: answers(name) for name in FAMILIES}, indent=1) + "\n")
