"""What holds where a run names nothing, in plain values; `python tests/defaults.py` writes it anew."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from crackseg_nb.data.augment import AUGMENTATIONS
from crackseg_nb.data.label_augment import LABEL_AUGMENTATIONS
from crackseg_nb.models.registry import MODELS, create_model
from crackseg_nb.training.losses import LOSSES
from crackseg_nb.training.settings import WARMUP_FRACTIONS, OptimConfig, TrainConfig, loss_settings

REFERENCES = Path(__file__).with_name("reference_defaults.json")


def plain(settings) -> dict:
    "Return the fields of a dataclass as JSON gives them back; a function is told by its name."
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: value.__name__ if callable(value) else value for name, value in values.items()}


def structure(name: str) -> dict:
    "Return what no weight's name or shape tells of a family as it is by default, its encoder aside."
    with torch.device("meta"):
        parts = [*create_model(name, pretrained="false").named_modules()]
    parts = [(path, part) for path, part in parts if not path.startswith("encoder.")]
    return {
        "dropout": {path: part.p for path, part in parts if isinstance(part, nn.Dropout)},
        "dilation": {path: part.dilation[0] for path, part in parts if isinstance(part, nn.Conv2d)},
    }


def defaults() -> dict:
    found = {
        "models": {name: plain(settings()) for name, (settings, _) in MODELS.items()},
        "structure": {name: structure(name) for name in MODELS},
        "losses": {name: loss_settings(name) for name in LOSSES},
        "augmentations": {name: plain(recipe) for name, recipe in AUGMENTATIONS.items()},
        "label augmentations": {name: plain(recipe) for name, recipe in LABEL_AUGMENTATIONS.items()},
        "optimiser": plain(OptimConfig()) | {"warm-up": WARMUP_FRACTIONS},
        "training": plain(TrainConfig()),
    }
    return json.loads(json.dumps(found))


if __name__ == "__main__":
    REFERENCES.write_text(json.dumps(defaults(), indent=1) + "\n")
