"""Each model family answers at the pixel that it was asked about, also where an image has to be padded."""

import functools

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, SEGMENTERS, build

from crackseg_nb.models.registry import MODELS
from crackseg_nb.models.settings import CLASSIFIER

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = ((33, 47), (65, 95), (97, 64))
built = functools.cache(functools.partial(build, num_classes=2))


def padding(model, size):
    "Return what a family adds at the right and at the bottom."
    return [-side % model.encoder.multiple for side in reversed(size)]


def test_every_family_is_looked_at():
    assert {family for family, _ in SEGMENTERS.values()} == set(MODELS) - {CLASSIFIER}
    assert set(SEGMENTERS) < set(FAMILIES)


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("size", SIZES)
def test_what_the_head_says_of_a_place_comes_out_there(name, size):
    "The head gives the place of the middle of each of its cells; enlarged and cropped, each pixel must read its own."
    model, image = built(name), torch.zeros(1, 3, *size)
    right, bottom = padding(model, size)
    padded = size[0] + bottom, size[1] + right
    margins = []

    def say_place(_, __, output):
        scale = padded[0] // output.shape[-2]
        assert tuple(scale * side for side in output.shape[-2:]) == padded
        margins.append((scale - 1) / 2)  # from the border to the middle of the first cell
        rows, columns = (scale * torch.arange(side) + margins[0] for side in output.shape[-2:])
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]

    hook = model.head.register_forward_hook(say_place)
    with torch.no_grad():
        found = model(image)[0]
    hook.remove()
    for axis in range(2):
        expected = torch.arange(size[axis]).clamp(margins[0], padded[axis] - 1 - margins[0])
        torch.testing.assert_close(found[axis].select(1 - axis, 9), expected, atol=1e-3, rtol=0)
        assert found[axis].std(1 - axis).max() < 1e-3


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("size", SIZES)
def test_padding_repeats_the_right_and_the_bottom_border(name, size):
    model = built(name)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    right, bottom = padding(model, size)
    assert right or bottom
    with torch.no_grad():
        by_hand = model(F.pad(image, (0, right, 0, bottom), mode="replicate"))[..., : size[0], : size[1]]
        torch.testing.assert_close(model(image), by_hand)


@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("size", [SIZES[0], SIZES[2]])
def test_a_pixel_depends_on_what_lies_around_it(name, size):
    "The squared gradient in the image has its centre at the pixel, within the few pixels of the coarse maps."
    height, width = size
    places = [(2, 2), (2, width - 3), (height - 3, 2), (height - 3, width - 3), (height // 2, width // 2)]
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).repeat(len(places), 1, 1, 1)
    images.requires_grad_()
    logits = built(name)(images)
    sum(logits[number, 0, row, column] for number, (row, column) in enumerate(places)).backward()
    weight = images.grad.square().sum(1)
    weight = weight / weight.sum((1, 2), keepdim=True)
    rows, columns = torch.arange(height), torch.arange(width)
    centres = torch.stack([(weight.sum(2) * rows).sum(1), (weight.sum(1) * columns).sum(1)], dim=1)
    assert (centres - torch.tensor(places)).abs().max() < 9
