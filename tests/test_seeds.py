"""What the seed of an image's augmentation and of the order of images is made of."""

import numpy as np
import pytest
import torch
from PIL import Image

from crackseg_nb.data.augment import create_augmentation
from crackseg_nb.data.dataset import CrackDataset, LabelDataset
from crackseg_nb.data.label_augment import create_label_augmentation
from crackseg_nb.data.loaders import EpochSampler
from crackseg_nb.sources.samples import Sample


def samples(folder, masked):
    "Return two samples whose files have the same content."
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    found = []
    for name in ("one", "two"):
        image, mask = folder / f"{name}.png", folder / f"{name}_mask.png"
        Image.fromarray(pixels).save(image)
        Image.fromarray((pixels[..., 0] > 200).astype(np.uint8)).save(mask)
        found.append(Sample(name, image, mask, name) if masked else Sample(name, image, None, name, label=0))
    return found


def masks(folder, seed):
    return CrackDataset(samples(folder, True), "ids", create_augmentation("crack", 32), seed=seed)


def labels(folder, seed):
    return LabelDataset(samples(folder, False), create_label_augmentation("advanced", 32), seed=seed)


@pytest.mark.parametrize("create", [masks, labels])
def test_seed_epoch_and_index_each_change_an_image(tmp_path, create):
    data, others = create(tmp_path, 3), create(tmp_path, 4)
    keys = [(epoch, index) for epoch in range(3) for index in range(2)]
    drawn = [part[key]["image"] for part in (data, others) for key in keys]
    for number, image in enumerate(drawn):
        assert not any(torch.equal(image, other) for other in drawn[:number])
    again = create(tmp_path, 3)
    for key, image in zip(
        keys[::-1], drawn[: len(keys)][::-1]
    ):  # in another order: nothing depends on what came before
        assert torch.equal(again[key]["image"], image)
    assert torch.equal(again[1]["image"], again[0, 1]["image"])


def test_seed_and_epoch_each_change_the_order():
    def order(seed, epoch):
        sampler = EpochSampler(40, 4, seed=seed)
        sampler.set_epoch(epoch)
        return [index for batch in sampler for _, index in batch]

    orders = [order(seed, epoch) for seed in (3, 4) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == len(orders)
    assert all(sorted(found) == list(range(40)) for found in orders)
    assert order(3, 1) == orders[1]
