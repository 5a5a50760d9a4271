"Calibration and uncertainty: equal to torchmetrics and slow versions on random cases; void, merging, poses, doubt."

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from scipy.stats import entropy as scipy_entropy
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error

from crackseg_nb.core.checks import VOID, CrackSegError
from crackseg_nb.evidence.uncertainty import show_uncertainty, tta_probabilities, turn, turn_back, uncertainty_maps
from crackseg_nb.metrics.calibration import Calibration, show_reliability
from crackseg_nb.models.settings import UnetConfig
from crackseg_nb.models.unet import Unet
from crackseg_nb.synthetic.cracks import synthesize

NAMES = ("ece", "brier", "near_ece", "near_brier")

pytestmark = pytest.mark.usefixtures("one_thread")


def random_image(generator):
    "Return a probability and a mask, with images without cracks, void, and values that sit on the edges of bins."
    shape = tuple(generator.integers(1, 40, 2))
    mask = (generator.random(shape) < generator.choice([0.0, 0.01, 0.1, 0.5])).astype(np.uint8)
    probability = np.clip(generator.random(shape) ** 3 + mask * generator.random(), 0, 1)
    probability = np.where(generator.random(shape) < 0.2, generator.integers(0, 16, shape) / 15, probability)
    if generator.random() < 0.6:
        mask[generator.random(shape) < generator.choice([0.1, 0.5])] = VOID
    if generator.random() < 0.05:
        mask[:] = VOID
    return probability.astype(generator.choice(["float32", "float64"])), mask


def slow_scores(images, bins, distance, threshold):
    "Compute the four scores directly; None without pixels."
    kept = {"": [], "near_": []}
    for probability, mask in images:
        crack = ((mask == 1) | (probability >= np.asarray(threshold, probability.dtype))) & (mask != VOID)
        near = (mask != VOID) & ((distance_transform_edt(~crack) <= distance + 1e-9) if crack.any() else False)
        for prefix, region in (("", mask != VOID), ("near_", near)):
            kept[prefix].append(
                np.stack(
                    [
                        probability[region].astype(np.float64),
                        mask[region] == 1,
                        probability[region] == probability.dtype.type(1),
                    ]
                )
            )
    found = {}
    for prefix, parts in kept.items():
        values, truth, _ = np.concatenate(parts, 1)
        if not len(values):
            found |= {f"{prefix}ece": None, f"{prefix}brier": None}
            continue
        number = np.minimum(np.floor(values * bins + 1e-6), bins - 1)  # float32 multiples of 1/bins are on the edge
        gaps = [abs(values[number == k].sum() - truth[number == k].sum()) for k in range(bins)]
        found |= {f"{prefix}ece": sum(gaps) / len(values), f"{prefix}brier": ((values - truth) ** 2).mean()}
    return found


def test_equal_to_a_slow_version(num_cases):
    for seed in range(num_cases):
        generator = np.random.default_rng(seed)
        images = [random_image(generator) for _ in range(generator.integers(1, 4))]
        settings = dict(
            bins=(15, 5, 3)[seed % 3], distance=(0.0, 1.0, 2.5, 5.0)[seed % 4], threshold=(0.5, 0.3)[seed % 2]
        )
        metric = Calibration(**settings)
        rows = [metric.update(*image) for image in images]
        found, expected = metric.compute(), slow_scores(images, **settings)
        assert tuple(found) == NAMES and found == pytest.approx(expected, abs=1e-9)
        assert metric.num_images == sum((mask != VOID).any() for _, mask in images)
        for image, row in zip(images, rows):
            alone = slow_scores([image], **settings)
            assert row == pytest.approx(
                {name: np.nan if alone[name] is None else alone[name] for name in NAMES}, abs=1e-9, nan_ok=True
            )
        for region, prefix in (("all", ""), ("near", "near_")):
            table = metric.table(region)
            gaps = ((table["probability"] - table["crack_share"]).abs() * table["pixels"]).sum()
            assert (gaps / table["pixels"].sum() if table["pixels"].sum() else None) == pytest.approx(
                found[f"{prefix}ece"], abs=1e-12
            )
            assert (
                table["probability"].isna() | table["probability"].between(table["low"] - 1e-6, table["high"] + 1e-6)
            ).all()


def test_equal_to_torchmetrics(num_cases):
    for seed in range(num_cases):
        probability, mask = random_image(np.random.default_rng(1000 + seed))
        if (mask == VOID).all():
            continue
        probability = np.minimum(probability.astype(np.float64), 0.999)  # torchmetrics gives 1 a bin of its own
        edges = np.isclose(probability * 15, np.round(probability * 15))
        probability = np.where(edges, probability + 1e-5, probability)  # and rounds the edges of its bins to float32
        metric = Calibration()
        metric.update(probability, mask)
        expected = binary_calibration_error(
            torch.tensor(probability), torch.tensor(mask).long(), n_bins=15, ignore_index=VOID
        )
        assert metric.compute()["ece"] == pytest.approx(expected.item(), abs=1e-6)
        valid = mask != VOID
        assert metric.compute()["brier"] == pytest.approx(((probability - mask)[valid] ** 2).mean(), abs=1e-12)


def test_the_folded_error_of_the_predicted_class_is_never_larger(num_cases):
    for seed in range(num_cases):
        generator = np.random.default_rng(2000 + seed)
        probability = generator.random((20, 20))
        mask = (generator.random((20, 20)) < probability ** generator.choice([0.5, 1, 2])).astype(np.uint8)
        confidence, right = np.maximum(probability, 1 - probability), (probability >= 0.5) == (mask == 1)
        folded = binary_calibration_error(torch.tensor(confidence), torch.tensor(right).long(), n_bins=10)
        assert folded.item() <= Calibration(bins=10).update(probability, mask)["ece"] + 1e-6


def test_values_under_void_never_matter_and_void_around_changes_nothing(num_cases):
    for seed in range(num_cases):
        generator = np.random.default_rng(3000 + seed)
        probability, mask = random_image(generator)
        other = probability.copy()
        other[mask == VOID] = generator.choice([0, 0.5, 1, 7, np.nan], (mask == VOID).sum())
        framed = np.pad(probability, 4, constant_values=1), np.pad(mask, 4, constant_values=VOID)
        expected, *rows = (str(Calibration().update(*image)) for image in ((probability, mask), (other, mask), framed))
        assert rows == [expected] * 2


def test_merging_equals_one_pass():
    generator = np.random.default_rng(5)
    images = [random_image(generator) for _ in range(20)]
    whole, parts = Calibration(), [Calibration() for _ in range(3)]
    for number, image in enumerate(images):
        whole.update(*image), parts[number % 3].update(*image)
    assert parts[2].merge(parts[0]).merge(parts[1]) is parts[2]
    assert parts[2].compute() == pytest.approx(whole.compute(), abs=1e-12) and parts[2].num_images == whole.num_images
    for settings in (dict(bins=10), dict(distance=2.0), dict(threshold=0.3)):
        with pytest.raises(CrackSegError, match=f"merge: found {next(iter(settings))} "):
            whole.merge(Calibration(**settings))


def test_bins_of_saved_eight_bit_probabilities_lie_on_their_edges():
    saved = (np.arange(256, dtype=np.float32) / 255)[None]
    metric = Calibration()
    metric.update(saved, np.zeros((1, 256), np.uint8))
    assert metric.table()["pixels"].tolist() == [17] * 14 + [18]


def test_the_diagram_of_nothing_and_of_rare_pixels():
    metric = Calibration()
    assert len(show_reliability({}).axes) == 4
    figure = show_reliability({"empty": metric})
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "empty, ECE –"
    metric.update(np.full((20, 20), 0.3), np.zeros((20, 20), np.uint8))
    metric.update(np.full((3, 3), 0.9), np.ones((3, 3), np.uint8))
    assert len(show_reliability({"few": metric}).axes[0].lines[1].get_xdata()) == 1  # nine pixels are no point


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (40, 25), (1, 5)])
def test_poses_are_undone_and_all_different(size):
    planes = torch.rand(2, 3, *size)
    for pose in range(8):
        assert torch.equal(turn_back(turn(planes, pose), pose), planes)
    if min(size) > 1:
        turned = [turn(planes, pose) for pose in range(8)]
        assert all(
            one.shape != two.shape or not torch.equal(one, two) for k, one in enumerate(turned) for two in turned[:k]
        )
    references = [np.rot90(planes.numpy(), k, (2, 3)) for k in range(4)]
    references += [reference[..., ::-1] for reference in references]
    for pose, reference in enumerate(references):
        assert np.array_equal(turn(planes, pose).numpy(), reference)


def test_a_real_model_on_an_odd_size_and_the_mean_that_turns_with_the_photo():
    torch.manual_seed(0)
    model = Unet(UnetConfig("mobilenet_v2_same", image_size=64, pretrained="false")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    photo = torch.randn(1, 3, 45, 70)
    answers = tta_probabilities(model, photo)
    assert answers.shape == (8, 1, 1, 45, 70) and not answers.requires_grad and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(answers[0], model.eval()(photo).sigmoid(), atol=1e-6)
    turned = tta_probabilities(model, turn(photo, 5))
    assert torch.allclose(turn_back(turned.mean(0), 5), answers.mean(0), atol=1e-5) and not model.training


def test_a_model_that_fails_goes_back_to_training():
    class Broken(nn.Module):
        def forward(self, images):
            raise RuntimeError("broken")

    model = Broken()
    with pytest.raises(RuntimeError, match="broken"):
        tta_probabilities(model, torch.zeros(1, 3, 4, 4))
    assert model.training


def test_doubt_equals_scipy(num_cases):
    for seed in range(num_cases):
        generator = np.random.default_rng(seed)
        answers = generator.random((generator.integers(1, 9), 2, 1, 5, 4)) ** generator.choice([1, 8])
        answers[generator.random(answers.shape) < 0.2] = generator.choice([0, 1])
        found = uncertainty_maps(torch.tensor(answers))
        mean = answers.mean(0)

        def doubt(p):
            return scipy_entropy(np.stack([p, 1 - p]), axis=0)

        expected = dict(
            mean=mean,
            standard_deviation=answers.std(0),
            entropy=doubt(mean),
            mutual_information=doubt(mean) - doubt(answers).mean(0),
        )
        assert list(found) == list(expected)
        for name, values in expected.items():
            assert found[name].numpy() == pytest.approx(values, abs=1e-12)
        assert (found["mutual_information"] >= 0).all() and (found["entropy"] <= math.log(2) + 1e-12).all()
        order = torch.tensor(generator.permutation(len(answers)))
        shuffled = uncertainty_maps(torch.tensor(answers)[order])
        for name in found:
            assert torch.allclose(found[name], shuffled[name], atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 1, 1, 4, 4), (2, 1, 2, 4, 4), (2, 1, 4, 4)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(CrackSegError, match=r"expected \(K, B, 1, H, W\)"):
        uncertainty_maps(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, 1.01, -0.1])
def test_wrong_values_are_refused(value):
    with pytest.raises(CrackSegError, match="not logits"):
        uncertainty_maps(torch.full((2, 1, 1, 4, 4), value))


def test_the_picture_of_doubt_with_void_and_without_doubt():
    image, mask = synthesize(3, (300, 200))
    mask[:40] = VOID
    figure = show_uncertainty(
        image, mask, uncertainty_maps(torch.full((4, 2, 1, 300, 200), 0.25)), index=1, title="title"
    )
    assert [axis.get_title() for axis in figure.axes] == [
        "photo",
        "mask",
        "mean",
        "standard deviation, up to 0.00",
        "entropy, up to 0.56",
        "mutual information, up to 0.00",
    ]
    assert figure.axes[3].images[0].get_array().max() == 0
