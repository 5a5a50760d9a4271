"Lives of a training process, for tests/test_resume.py; a fork server imports this once: a new life costs no imports."

import multiprocessing
import os
import random
import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from crackseg_nb.metrics.counts import BinaryMetrics
from crackseg_nb.models import encoders, registry
from crackseg_nb.models.settings import MODEL_SETTINGS
from crackseg_nb.runs import experiment as experiment_module
from crackseg_nb.runs.config import configure
from crackseg_nb.training import checkpoint as checkpoint_module
from crackseg_nb.training import trainer as trainer_module

SETTINGS = dict(
    synthetic_images=24,
    image_size=32,
    batch_size=2,
    accumulation=2,
    eval_batch_size=2,
    device="cpu",
    preload="false",
    gradient_checkpointing=False,
    scheduler="onecycle",
    clip_norm=1.0,
    patience=0,
    checkpoint_every=2,
    checkpoint_minutes=1e-6,
)
MODELS = {  # small, and with everything that draws random numbers or keeps statistics
    "hybrid": dict(
        model="swinv2_hybrid",
        encoder="swinv2",
        pretrained="false",
        drop_path_rate=0.2,
        aspp_dropout=0.2,
        aspp_channels=16,
        decoder_channels=(16, 8, 8),
        amp="bf16",
    ),
    "conv_norm": dict(model="conv_norm", amp="off"),
}


@dataclass
class ConvNormConfig:
    width: int = 8
    image_size: int = 32
    num_classes: int = 1


class ConvNorm(nn.Sequential):
    "Convolution, batch normalisation and dropout."

    def __init__(self, config):
        layers = [
            nn.Conv2d(3, config.width, 3, padding=1),
            nn.BatchNorm2d(config.width),
            nn.ReLU(),
            nn.Dropout2d(0.2),
            nn.Conv2d(config.width, 1, 3, padding=1),
        ]
        super().__init__(*layers)
        self.weights = {"requested": "false", "loaded": "from scratch"}


class NarrowTimm:
    "timm, with SwinV2 encoders of a few channels."

    @staticmethod
    def create_model(name, **settings):
        return timm.create_model(name, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), **settings)


def prepare():
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of the loader's workers; a fork server's child would start another server
    torch.set_num_threads(1)
    registry.MODELS["conv_norm"] = (ConvNormConfig, ConvNorm)
    MODEL_SETTINGS["conv_norm"] = ConvNormConfig
    encoders.timm = NarrowTimm


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, count, before):
    "Let `before(arguments)` run ahead of the `count`-th call of `owner.name`."
    original, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            before(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def half_written(path, data):
    "Write half of a file under its temporary name, as a process does that dies in the middle."
    (path.parent / f".{path.name}.half").write_bytes(data[: len(data) // 2])
    die()


def arm(kind, number):
    "Let this process kill itself: in a step, in a checkpoint's n-th file, in evaluation, or at a random time."
    if kind == "step":
        at_call(trainer_module, "gradient_norm", number % 3 + 1, lambda *_: die())
    if kind == "checkpoint":
        at_call(checkpoint_module, "write_bytes", number % 7 + 1, half_written)
    if kind == "evaluation":
        at_call(trainer_module, "evaluate", 1, lambda *_, **__: die())
    if kind == "in evaluation":
        at_call(BinaryMetrics, "update", number % 2 + 1, lambda *_, **__: die())
    if kind == "start":
        at_call(experiment_module, "create_model", 1, lambda *_, **__: die())
    if kind == "time":
        at_call(
            experiment_module, "fit", 1, lambda *_: threading.Timer(random.Random(number).uniform(0, 0.4), die).start()
        )


def live(outputs, name, epochs, model, workers, fault=None):
    "Begin or resume the run `name`, and come to the end of it or of this life."
    prepare()
    folder = Path(outputs) / name
    if (folder / "config.yaml").is_file():
        config = configure(resume=str(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        config = configure(
            **SETTINGS, **MODELS[model], epochs=epochs, num_workers=workers, outputs=str(outputs), run_name=name
        )
    if fault:
        arm(*fault)
    experiment_module.run(config)
