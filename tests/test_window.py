"""A window that is repeated with fewer images at a time, since memory ran out, gives the same."""

import pytest
import torch
from torch import nn

from crackseg_nb.training.exchange import RunningStatistics
from crackseg_nb.training.losses import create_loss
from crackseg_nb.training.window import accumulate_window, create_accelerator

pytestmark = pytest.mark.usefixtures("one_thread")


class Crowded(nn.Module):
    "Use random numbers and change statistics, then find more than two images too many."

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.conv = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 1, 1)

    def forward(self, image):
        features = self.dropout(self.norm(image))
        if len(image) > 2:
            raise torch.OutOfMemoryError("too many images")
        return self.conv(features)


def accumulate(micro_batch):
    torch.manual_seed(0)
    model = Crowded().train()
    image = torch.randn(2, 4, 3, 6, 5)
    window = [{"image": part, "target": (part[:, 0] > 0).long()} for part in image]
    accelerator = create_accelerator(torch.device("cpu"))
    found, fitted = accumulate_window(
        model, create_loss("focal_dice"), window, accelerator, RunningStatistics(model), micro_batch
    )
    gradients = {name: value.grad for name, value in model.named_parameters()}
    return {"loss": found, **gradients, **dict(model.named_buffers()), "next": torch.rand(3)}, fitted


def test_a_repeated_window_has_the_same_loss_gradients_statistics_and_random_numbers():
    (expected, _), (found, fitted) = accumulate(2), accumulate(4)
    assert fitted == 2
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
