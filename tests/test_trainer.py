"""Which epoch the trainer keeps, told by scores that are written beforehand; what its steps and its table hold."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from images import Noise
from torch import nn

from crackseg_nb.core.run_folder import create_run_folder
from crackseg_nb.core.seeds import capture_rng_state, lent_generator
from crackseg_nb.data.loaders import create_loader
from crackseg_nb.metrics.counts import BinaryMetrics
from crackseg_nb.training.checkpoint import load_checkpoint
from crackseg_nb.training.losses import create_loss
from crackseg_nb.training.optim import learning_rate_curve
from crackseg_nb.training.settings import OptimConfig, TrainConfig
from crackseg_nb.training.trainer import Trainer, TrainSettings, epoch_line, fit, restore, training_state

pytestmark = pytest.mark.usefixtures("one_thread")


class Scripted(BinaryMetrics):
    "Count as ever, but tell the scores of a script, one epoch after the other; F1 goes the other way."

    def __init__(self, script):
        super().__init__()
        self.script = script

    def blank(self):
        return Scripted(self.script)

    def compute(self, threshold=0.5):
        found, iou = super().compute(threshold), self.script.pop(0)
        return {**found, "pooled": {**found["pooled"], "iou": iou, "f1": 1 - iou}}


class Tiny(nn.Module):
    "An encoder and a head, with or without batch norm."

    def __init__(self, norm=True):
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 1, 1)
        self.norm = nn.BatchNorm2d(1) if norm else nn.Identity()

    def forward(self, image):
        return self.norm(self.head(self.encoder(image)))


def train(folder, script, validated=True, optim=None, norm=True, loss="dice", **settings):
    "Train a tiny model; return the trainer, and the weights and validation counts of each epoch."
    torch.manual_seed(0)
    seen = []

    def keep(trainer):
        seen.append((copy.deepcopy(trainer.model.state_dict()), trainer.val_rows))

    config = TrainConfig(
        **dict(epochs=len(script), batch_size=2, accumulation=2, gradient_checkpointing=False, amp="off") | settings
    )
    trainer = Trainer(
        Tiny(norm),
        create_loss(loss),
        create_loader(Noise(7), 2, train=True, accumulation=config.accumulation),
        create_loader(Noise(7), 4, train=False) if validated else None,
        TrainSettings(
            config,
            optim or OptimConfig(lr=0.1),
            create_run_folder(folder, "run"),
            torch.device("cpu"),
            on_epoch=keep,
            metrics=Scripted(list(script)),
        ),
    )
    fit(trainer)
    return trainer, seen


def assert_kept(trainer, seen, epoch):
    "The checkpoint and the trainer hold the weights and counts of `epoch`, which no other epoch has."
    best = load_checkpoint(trainer.folder / "checkpoints", "best")
    assert trainer.best.epoch == best.metadata["epoch"] == epoch
    for kept in (best.model_state, trainer.best_weights):
        same = [all(torch.equal(kept[name], value) for name, value in weights.items()) for weights, _ in seen]
        assert [number for number, found in enumerate(same, start=1) if found] == [epoch]


@pytest.mark.parametrize(
    ("script", "epoch"),
    [((0.1, 0.6, 0.3, 0.5), 2), ((0.6, 0.2, 0.1), 1), ((0.1, 0.2, 0.3), 3), ((0.2, 0.5, 0.5, 0.1), 2), ((0.0, 0.0), 1)],
)
def test_the_best_epoch_is_kept_and_of_equals_the_first(tmp_path, script, epoch):
    trainer, seen = train(tmp_path, script)
    assert_kept(trainer, seen, epoch)
    assert torch.equal(trainer.best_rows, seen[epoch - 1][1])
    assert trainer.best.value == max(script)


def test_without_validation_the_last_epoch_is_kept(tmp_path):
    trainer, seen = train(tmp_path, (0.9, 0.1, 0.2), validated=False)
    assert_kept(trainer, seen, 3)


def test_the_last_epoch_is_kept_whatever_its_score(tmp_path):
    trainer, seen = train(tmp_path, (0.9, 0.1, 0.2), keep_epoch="last", patience=0)
    assert_kept(trainer, seen, 3)
    assert torch.equal(trainer.best_rows, seen[2][1])  # by which the threshold is chosen
    assert "best so far" not in epoch_line(trainer, trainer.history[-1], trainer.performance[-1], True)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 4), (0, 6)])
def test_patience_counts_the_epochs_after_the_best(tmp_path, patience, epochs):
    trainer, seen = train(tmp_path, (0.1, 0.5, 0.5, 0.4, 0.3, 0.2), patience=patience)
    assert trainer.epoch == len(seen) == epochs
    assert_kept(trainer, seen, 2)


def test_the_rates_are_those_of_the_whole_run_and_of_its_batch(tmp_path):
    "Seven images are two windows of up to four; the rate is meant for eight; the table holds the decoder's."
    optim = OptimConfig(lr=0.1, scheduler="cosine", lr_batch_size=8, encoder_lr_scale=0.1)
    trainer, _ = train(tmp_path, (0.1, 0.2, 0.3), optim=optim)
    expected = learning_rate_curve(OptimConfig(lr=0.05), 6)[::2]
    assert [row["train_learning_rate"] for row in trainer.history] == pytest.approx(expected)
    rates = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates["encoder_decay"] == pytest.approx(0.005) and rates["decoder_decay"] == pytest.approx(0.05)


def test_the_loss_of_an_epoch_is_the_mean_over_its_images(tmp_path):
    "The last window is smaller; at a rate of almost nothing the model stays as it is."
    optim = OptimConfig(lr=1e-12, scheduler="constant")
    trainer, seen = train(tmp_path, (0.1,), optim=optim, norm=False, loss="bce")
    images = [Noise(7)[0, index] for index in range(7)]
    with torch.no_grad():
        logits = trainer.model(torch.stack([item["image"] for item in images]))
        expected = create_loss("bce")(logits, torch.stack([item["target"] for item in images]))
    for name in ("train_loss", "val_loss"):
        assert trainer.history[0][name] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("clip", [0.01, 0.02])
def test_gradients_are_clipped_to_the_norm_of_the_settings(tmp_path, clip):
    "A step of plain gradient descent at rate 1 is as long as the gradient."
    optim = OptimConfig(optimizer="sgd", lr=1.0, betas=(0.0, 0.9), weight_decay=0.0, scheduler="constant")
    torch.manual_seed(0)
    before = nn.utils.parameters_to_vector(Tiny(False).parameters())
    trainer, _ = train(tmp_path, (0.1,), optim=optim, norm=False, loss="bce", clip_norm=clip, accumulation=4)
    after = nn.utils.parameters_to_vector(trainer.model.parameters())
    assert (after - before).norm().item() == pytest.approx(clip, rel=1e-3)


def test_each_process_takes_up_its_own_random_numbers(tmp_path, monkeypatch):
    trainer, _ = train(tmp_path, (0.1, 0.2))
    states = [torch.Generator().manual_seed(seed).get_state() for seed in (5, 6)]
    state = {"rng": [capture_rng_state() | {"torch": one} for one in states]}
    checkpoint = replace(
        load_checkpoint(trainer.folder / "checkpoints", "best"),
        training_state=training_state(trainer) | state,
    )
    for rank, seed in ((0, 5), (1, 6)):
        monkeypatch.setattr(Accelerator, "process_index", rank)
        monkeypatch.setattr(Accelerator, "num_processes", 2)
        with lent_generator(0):
            restore(trainer, checkpoint)
            assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(seed)))
