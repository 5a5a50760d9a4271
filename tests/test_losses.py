"Parity of the losses with torch, torchvision and segmentation-models-pytorch, and their properties on random cases."

import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss, TverskyLoss
from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import sigmoid_focal_loss

from crackseg_nb.core.checks import VOID, CrackSegError
from crackseg_nb.core.files import project_root
from crackseg_nb.training import losses as losses_module
from crackseg_nb.training.losses import LOSSES, create_loss
from crackseg_nb.training.settings import LOSS_LIMITS, LOSS_SETTINGS, LossConfig, check_loss, loss_settings, losses_for

ALL = [(name, num_channels) for num_channels in (1, 4) for name in losses_for(num_channels)]
WEIGHTED = [(name, num_channels) for name, num_channels in ALL if "class_weights" in loss_settings(name)]


pytestmark = pytest.mark.usefixtures("one_thread")


def random_case(seed, num_channels=1, num_images=None, dtype=torch.float64, scale=None, void=True):
    "Return logits (B, C, H, W) and target (B, H, W), sometimes with void, empty images and saturated logits."
    generator = np.random.default_rng([seed, num_channels])
    shape = (
        num_images or int(generator.integers(1, 4)),
        int(generator.integers(2, 12)),
        int(generator.integers(2, 12)),
    )
    scale = scale or generator.choice([0.5, 3, 20])
    logits = generator.normal(size=(shape[0], num_channels, *shape[1:])) * scale
    target = generator.integers(0, max(2, num_channels), shape)
    if generator.random() < 0.3:
        target[generator.integers(shape[0])] = 0
    if void:
        target[generator.random(shape) < generator.choice([0, 0.2, 0.7])] = VOID
    return torch.tensor(logits, dtype=dtype), torch.tensor(target)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance
    )


def variants(name, num_channels):
    "Return a loss with its defaults and, where it takes some, with class weights whose sums are exact."
    return [
        create_loss(name, **settings)
        for settings in ({}, dict(class_weights=[0.25, 1.5, 2.0, 0.0][: max(2, num_channels)]))
        if settings.keys() <= loss_settings(name).keys()
    ]


def value_and_gradient(loss, logits, target, normalizers=None):
    variable = logits.clone().requires_grad_()
    value = loss(variable, target, normalizers)
    return value.detach(), torch.autograd.grad(value, variable)[0]


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_binary_cross_entropy_equals_torch(dtype, num_cases):
    for seed in range(num_cases):
        logits, target = random_case(seed, dtype=dtype)
        valid, factor = target != VOID, 1 + seed % 5
        if valid.any():
            expected = F.binary_cross_entropy_with_logits(
                logits[:, 0][valid], target[valid].to(dtype), pos_weight=torch.tensor(float(factor))
            )
            close(create_loss("bce", pos_weight=factor)(logits, target), expected)


def test_cross_entropy_equals_torch_in_value_and_gradient(num_cases):
    for seed in range(num_cases):
        logits, target = random_case(seed, num_channels=2 + seed % 4)
        weights = np.random.default_rng(seed).uniform(0.1, 3, logits.shape[1]).tolist() if seed % 2 else None
        if (target == VOID).all():
            continue
        reference = functools.partial(
            F.cross_entropy, weight=weights and torch.tensor(weights).double(), ignore_index=VOID
        )
        expected, gradient = value_and_gradient(
            lambda first, second, _, reference=reference: reference(first, second), logits, target
        )
        found, found_gradient = value_and_gradient(create_loss("ce", class_weights=weights), logits, target)
        close(found, expected)
        close(found_gradient, gradient)


def test_focal_equals_torchvision_and_smp(num_cases):
    for seed in range(num_cases):
        logits, target = random_case(seed)
        generator = np.random.default_rng(seed)
        alpha, gamma = round(generator.uniform(0, 1), 3), float(generator.choice([0, 1, 2, 3.5]))
        valid = target != VOID
        if not valid.any():
            continue
        found, gradient = value_and_gradient(create_loss("focal", alpha=alpha, gamma=gamma), logits, target)
        variable = logits.clone().requires_grad_()
        expected = sigmoid_focal_loss(
            variable[:, 0][valid], target[valid].double(), alpha=alpha, gamma=gamma, reduction="mean"
        )
        close(found, expected)
        close(gradient, torch.autograd.grad(expected, variable)[0])
        close(found, FocalLoss("binary", alpha=alpha, gamma=gamma, ignore_index=VOID)(logits, target))


def test_softmax_focal_equals_smp_functional_and_two_channels_equal_one(num_cases):
    for seed in range(num_cases):
        logits, target = random_case(seed, num_channels=2 + seed % 4, scale=3)
        gamma, valid = 0.5 * (seed % 6), target != VOID
        if not valid.any():
            continue
        expected = softmax_focal_loss_with_logits(logits.movedim(1, -1)[valid], target[valid], gamma=gamma)
        close(create_loss("focal", alpha=None, gamma=gamma)(logits, target), expected)
        logits, target = random_case(seed)
        plain = create_loss("focal", alpha=None, gamma=gamma)
        close(plain(torch.cat([0 * logits, logits], 1), target), plain(logits, target))


def test_alpha_balances_one_channel_and_scales_several(num_cases):
    for seed in range(num_cases):
        alpha = round(np.random.default_rng(seed).uniform(0, 1), 3)
        logits, target = random_case(seed, num_channels=2 + seed % 4)
        weights = dict(
            class_weights=np.random.default_rng(seed).uniform(0.1, 3, logits.shape[1]).tolist() if seed % 3 else None
        )
        close(
            create_loss("focal", alpha=alpha, **weights)(logits, target),
            alpha * create_loss("focal", alpha=None, **weights)(logits, target),
        )
        logits, target = random_case(seed)
        parts = [
            create_loss("focal", alpha=None).sums(logits, target.masked_fill(target == other, VOID)) for other in (0, 1)
        ]
        close(create_loss("focal", alpha=alpha).sums(logits, target), alpha * parts[0] + (1 - alpha) * parts[1])


def test_focal_without_focus_is_half_the_cross_entropy(num_cases):
    for seed in range(num_cases):
        logits, target = random_case(seed)
        close(create_loss("focal", alpha=0.5, gamma=0)(logits, target), create_loss("bce")(logits, target) / 2)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_and_tversky_equal_smp_on_one_image(smooth, num_cases):
    for seed in range(num_cases):
        logits, target = random_case(seed, num_images=1)
        alpha, beta = np.random.default_rng(seed).uniform(0.1, 1, 2).tolist()
        close(
            create_loss("dice", smooth=smooth)(logits, target),
            DiceLoss("binary", smooth=smooth, ignore_index=VOID)(logits, target),
        )
        close(
            create_loss("dice", smooth=smooth)(logits, target),
            create_loss("tversky", alpha=0.5, beta=0.5, smooth=smooth)(logits, target),
            0,
        )
        close(
            create_loss("tversky", alpha=alpha, beta=beta, smooth=smooth)(logits, target),
            TverskyLoss("binary", smooth=smooth, ignore_index=VOID, alpha=alpha, beta=beta)(logits, target),
        )


def test_dice_over_classes_equals_smp_where_all_classes_occur(num_cases):
    num_compared = 0
    for seed in range(3 * num_cases):
        logits, target = random_case(seed, num_channels=3, num_images=1)
        if set(target.unique().tolist()) - {VOID} == {0, 1, 2}:
            num_compared += 1
            close(
                create_loss("dice", smooth=0)(logits, target), DiceLoss("multiclass", ignore_index=VOID)(logits, target)
            )
    assert num_compared > num_cases


def slow_tversky(logits, target, alpha, beta, smooth, count_absent):
    "The same in numpy, image by image, class by class."
    probability = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    values = []
    for image in range(len(target)):
        valid, scores = (target[image] != VOID).numpy(), []
        for channel in range(logits.shape[1]):
            p = probability[image, channel].numpy()[valid]
            t = (target[image].numpy()[valid] == (1 if logits.shape[1] == 1 else channel)).astype(float)
            if t.sum() or count_absent:
                tp, fp, fn = (p * t).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()
                scores.append(1 - (tp + smooth) / (tp + alpha * fp + beta * fn + smooth))
        if valid.any():
            values.append(np.mean(scores) if scores else 0.0)
    return np.mean(values) if values else 0.0


@pytest.mark.parametrize("num_channels", [1, 4])
@pytest.mark.parametrize("count_absent", [False, True])
def test_tversky_equals_a_slow_version(num_channels, count_absent, num_cases):
    for seed in range(num_cases):
        logits, target = random_case(seed, num_channels)
        alpha, beta, smooth = np.random.default_rng(seed).uniform(0.1, 2, 3).tolist()
        settings = dict(alpha=alpha, beta=beta, smooth=smooth, count_absent=count_absent)
        close(create_loss("tversky", **settings)(logits, target), slow_tversky(logits, target, **settings))


def slow_boundary(logits, target):
    "Kervadec et al.'s one_hot2dist and einsum, over valid pixels."
    probability = (logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)[:, 1:]).numpy()
    total = 0.0
    for image in range(len(target)):
        for channel in range(probability.shape[1]):
            positive = target[image].numpy() == channel + 1
            if positive.any() and not positive.all():
                distance = (
                    distance_transform_edt(~positive) * ~positive - (distance_transform_edt(positive) - 1) * positive
                )
                total += (probability[image, channel] * distance)[target[image].numpy() != VOID].sum()
    return total / probability.shape[1] / max(1, (target != VOID).sum().item())


@pytest.mark.parametrize("num_channels", [1, 3])
def test_boundary_equals_a_slow_version(num_channels, num_cases):
    for seed in range(num_cases):
        logits, target = random_case(seed, num_channels)
        close(create_loss("boundary")(logits, target), slow_boundary(logits, target))


def test_boundary_without_a_contour_is_zero():
    for target in (torch.zeros(1, 6, 6), torch.ones(1, 6, 6)):
        assert create_loss("boundary")(torch.randn(1, 1, 6, 6), target.long()) == 0


def test_published_compounds():
    for seed in range(20):
        logits, target = random_case(seed)
        close(
            create_loss("focal_dice")(logits, target),
            0.6 * create_loss("focal", alpha=0.25, gamma=2)(logits, target) + 0.4 * create_loss("dice")(logits, target),
        )
        close(
            create_loss("bce_dice")(logits, target),
            0.5 * create_loss("bce")(logits, target) + 0.5 * create_loss("dice")(logits, target),
        )
        close(
            create_loss("dice_boundary")(logits, target),
            create_loss("dice")(logits, target) + 0.01 * create_loss("boundary")(logits, target),
        )


def plain_focal_dice(logits, target, class_weights, alpha, gamma, smooth, focal_weight, dice_weight):
    "Write both losses down as papers do, over one-hot targets."
    valid = (target != VOID)[:, None]
    truth = F.one_hot(torch.where(valid[:, 0], target, 0), logits.shape[1]).movedim(-1, 1) * valid
    weights = torch.tensor(class_weights, dtype=logits.dtype).view(1, -1, 1, 1)
    probability = logits.softmax(1)
    focal = -(alpha * weights * truth * (1 - probability) ** gamma * probability.log()).sum() / (weights * truth).sum()
    overlap, both, true = ((part * valid).sum((2, 3)) for part in (probability * truth, probability + truth, truth))
    dice = (2 * overlap + 2 * smooth) / (both + 2 * smooth)
    per_image = [(1 - dice[image][true[image] > 0]).mean() for image in range(len(target)) if valid[image].any()]
    return focal_weight * focal + dice_weight * torch.stack(per_image).mean()


def test_focal_dice_with_class_weights_equals_a_plain_version(num_cases):
    for seed in range(num_cases):
        generator = np.random.default_rng(seed)
        logits, target = random_case(seed, num_channels=2 + seed % 5, scale=2)
        if (target == VOID).all():
            continue
        settings = dict(
            class_weights=generator.uniform(0.1, 3, logits.shape[1]).astype(np.float32).tolist(),
            alpha=round(generator.uniform(0.1, 1), 3),
            gamma=float(generator.choice([1, 2, 3])),
            smooth=float(generator.choice([0, 0.5, 1])),
            focal_weight=0.5,
            dice_weight=0.25,
        )
        expected, gradient = value_and_gradient(
            lambda first, second, _, settings=settings: plain_focal_dice(first, second, **settings), logits, target
        )
        found, found_gradient = value_and_gradient(create_loss("focal_dice", **settings), logits, target)
        close(found, expected)
        close(found_gradient, gradient)


# ---------------------------------------------------------------- properties, for every loss


@pytest.mark.parametrize("num_channels", [1, 2, 5])
def test_losses_for_so_many_channels(num_channels):
    logits, target = random_case(0, num_channels)
    for name in LOSSES:
        if name in losses_for(num_channels):
            assert create_loss(name)(logits, target).isfinite()
        else:
            with pytest.raises(CrackSegError, match=r"expected \(B, C\)" if name == "label_ce" else "take (b?ce)"):
                create_loss(name)(logits, target)


@pytest.mark.parametrize("name, num_channels", ALL)
def test_void_changes_nothing_and_gets_no_gradient(name, num_channels, num_cases):
    for loss in variants(name, num_channels):
        for seed in range(num_cases // 4):
            logits, target = random_case(seed, num_channels)
            void = (target == VOID)[:, None].expand_as(logits)
            value, gradient = value_and_gradient(loss, logits, target)
            assert (gradient[void] == 0).all()
            for filler in (1e4, -7.0, float("nan"), float("inf")):
                changed, changed_gradient = value_and_gradient(loss, logits.masked_fill(void, filler), target)
                assert torch.equal(changed, value) and torch.equal(changed_gradient, gradient)


@pytest.mark.parametrize("name, num_channels", ALL)
def test_padding_with_void_changes_nothing(name, num_channels):
    if "boundary" in name:
        pytest.skip("a crack that fills the canvas has no contour until void is put around it")
    for seed in range(20):
        logits, target = random_case(seed, num_channels)
        close(
            create_loss(name)(F.pad(logits, (1, 3, 2, 0), value=5.0), F.pad(target, (1, 3, 2, 0), value=VOID)),
            create_loss(name)(logits, target),
            1e-12,
        )


@pytest.mark.parametrize("name, num_channels", ALL)
@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_nothing_but_void_is_zero(name, num_channels, num_images):
    logits = torch.randn(num_images, num_channels, 5, 4)
    for loss in variants(name, num_channels):
        value, gradient = value_and_gradient(loss, logits, torch.full((num_images, 5, 4), VOID, dtype=torch.uint8))
        assert value == 0 and not gradient.any() and gradient.isfinite().all()
        assert not loss.normalizers(torch.full((num_images, 5, 4), VOID, dtype=torch.uint8)).any()


def pixel_part(name, class_weights):
    "Return a loss with class weights, or of a compound the part that takes them."
    loss = create_loss(name, class_weights=class_weights)
    return getattr(loss, "parts", [loss])[0]


@pytest.mark.parametrize("name, num_channels", WEIGHTED)
def test_a_class_of_weight_0_counts_like_void(name, num_channels):
    for seed in range(20):
        logits, target = random_case(seed, num_channels)
        removed = seed % max(2, num_channels)
        weights = np.random.default_rng(seed).uniform(0.1, 3, max(2, num_channels)).tolist()
        zero = weights[:removed] + [0.0] + weights[removed + 1 :]
        value, gradient = value_and_gradient(pixel_part(name, zero), logits, target)
        expected, expected_gradient = value_and_gradient(
            pixel_part(name, weights), logits, target.masked_fill(target == removed, VOID)
        )
        close(value, expected)
        close(gradient, expected_gradient)
        value, gradient = value_and_gradient(pixel_part(name, zero), logits, torch.full_like(target, removed))
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize("name, num_channels", [(name, num_channels) for name, num_channels in ALL if num_channels > 1])
def test_a_class_that_never_occurs_does_not_count(name, num_channels):
    for seed in range(20):
        logits, target = random_case(seed, num_channels)
        more = torch.cat([logits, torch.full_like(logits[:, :1], -1e4)], 1)  # nor is it predicted
        for extra in ([], [0.0], [7.0]):
            weights = [0.3, 1.7, 2.2, 0.9]
            if extra and "class_weights" not in loss_settings(name):
                continue
            settings = [dict(class_weights=weights), dict(class_weights=weights + extra)] if extra else [{}, {}]
            value, gradient = value_and_gradient(create_loss(name, **settings[0]), logits, target)
            found, found_gradient = value_and_gradient(create_loss(name, **settings[1]), more, target)
            if "boundary" not in name:  # which takes the mean over all classes but the background, as its authors do
                close(found, value)
                close(found_gradient, torch.cat([gradient, 0 * gradient[:, :1]], 1))
            found, found_gradient = value_and_gradient(create_loss(name, **settings[1]), more.clamp(min=0), target)
            assert found.isfinite() and found_gradient.isfinite().all()


@pytest.mark.parametrize("name, num_channels", ALL)
def test_accumulated_gradients_equal_the_large_batch(name, num_channels):
    for loss in variants(name, num_channels):
        for seed in range(8):
            logits, target = random_case(seed, num_channels, num_images=7)
            target[seed % 7] = VOID
            target[(seed + 3) % 7, 1:] = VOID
            value, gradient = value_and_gradient(loss, logits, target)
            for sizes in ([3, 3, 1], [1] * 7, [2, 5]):
                chunks = list(zip(logits.split(sizes), target.split(sizes)))
                total = sum(loss.normalizers(part) for _, part in chunks)
                assert torch.equal(total, loss.normalizers(target))
                close(sum(loss.sums(*chunk) for chunk in chunks), loss.sums(logits, target), 1e-12)
                parts = [value_and_gradient(loss, *chunk, total) for chunk in chunks]
                close(sum(part[0] for part in parts), value, 1e-12)
                close(torch.cat([part[1] for part in parts]), gradient, 1e-12)


@pytest.mark.parametrize("name, num_channels", ALL)
def test_analytic_gradients(name, num_channels):
    logits, target = random_case(1, num_channels, num_images=2, scale=2)
    loss = create_loss(name)
    logits, target = logits[..., :4, :4].clone().requires_grad_(), target[..., :4, :4]
    assert (target == 1).any() and (target == VOID).any()
    assert torch.autograd.gradcheck(lambda variable: loss(variable, target), logits)


@pytest.mark.parametrize("name, num_channels", ALL)
def test_saturated_logits_stay_finite(name, num_channels):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for seed in range(10):
            logits, target = random_case(seed, num_channels, dtype=torch.float32)
            logits = (logits.sign() * 100).to(dtype)
            for settings in [{}, dict(gamma=0.5), dict(gamma=0)] if "gamma" in loss_settings(name) else [{}]:
                value, gradient = value_and_gradient(create_loss(name, **settings), logits, target)
                assert value.isfinite() and gradient.isfinite().all() and value.dtype == torch.float32


@pytest.mark.parametrize("name, num_channels", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_precision(name, num_channels, dtype):
    logits, target = random_case(5, num_channels, num_images=2, dtype=torch.float32)
    for given in (logits, logits.to(dtype)):  # a model under autocast hands over half precision
        with torch.autocast("cpu", dtype=dtype):
            found = create_loss(name)(given, target)
        assert torch.equal(found, create_loss(name)(given.float(), target)) and found.dtype == torch.float32


@pytest.mark.parametrize("name, num_channels", ALL)
def test_dtype_of_the_target_and_normalizers(name, num_channels):
    logits, target = random_case(6, num_channels, num_images=2)
    expected = create_loss(name)(logits, target)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(create_loss(name)(logits, target.to(dtype)), expected)
    if num_channels == 1:
        plain = target == 1
        assert torch.equal(create_loss(name)(logits, plain), create_loss(name)(logits, plain.long()))
    loss = create_loss(name)
    assert loss.sums(logits, target).shape == loss.normalizers(target).shape == loss.weights.shape
    close((loss.weights * loss.sums(logits, target) / loss.normalizers(target)).sum(), expected)


@pytest.mark.parametrize("name, num_channels", ALL)
def test_better_predictions_cost_less(name, num_channels):
    "A sharper right answer never costs more, and the wrong answer costs more than the right one."
    target = torch.zeros(2, 16, 16, dtype=torch.long)
    target[:, 5:9], target[:, :, :2] = 1, VOID
    if num_channels == 4:
        target[:, 10:13], target[:, 13:] = 2, 3
    ids = target.clamp(max=3)
    right = (
        (ids == 1)[:, None].float() * 2 - 1 if num_channels == 1 else F.one_hot(ids, 4).movedim(-1, 1).float() * 2 - 1
    )
    costs = [create_loss(name)(scale * right, target).item() for scale in (-5, -1, 0, 1, 5)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name, num_channels", ALL)
def test_class_ids_beyond_the_classes_are_refused(name, num_channels):
    logits, target = random_case(1, num_channels, num_images=2, void=False)
    for beyond in (max(2, num_channels), 254, -1, 256):
        wrong = target.clone()
        wrong[1, 0, 1] = beyond
        for _ in range(2):
            with pytest.raises(CrackSegError, match=f"found class id {beyond},") as error:
                create_loss(name)(logits, wrong)
            assert "\n" not in str(error.value)


def test_wrong_input_gets_one_line():
    logits, target = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4).long()
    for call, text in [
        (lambda: create_loss("bce")(logits, target[:1]), "target: found shape"),
        (lambda: create_loss("bce")(logits, target[:, None]), "target: found shape"),
        (lambda: create_loss("bce")(logits[0], target), "logits: found"),
        (lambda: create_loss("bce")(logits.long(), target), "logits: found"),
        (lambda: create_loss("bce")(logits, target.float()), "expected class ids"),
        (lambda: create_loss("ce")(logits, target), "take bce"),
        (lambda: create_loss("bce_dice")(logits.expand(2, 3, 4, 4), target), "take ce"),
        (lambda: create_loss("ce", class_weights=[1, 1, 1])(logits.expand(2, 2, 4, 4), target), "expected 2"),
        (lambda: create_loss("focal", class_weights=[0, 0]), "class_weights: found only zeros"),
        (lambda: create_loss("ce", class_weights=[]), "class_weights: found only zeros"),
        (
            lambda: LossConfig("tversky").create([1, 2]),
            "class_weights: found with loss tversky, which takes none; expected one of ce, focal, focal_dice, ce_dice",
        ),
        (lambda: LossConfig("ce").create([1, -2]), "class_weights: found -2"),
        (lambda: create_loss("focal", gamma="two"), "focal.gamma"),
        (lambda: create_loss("focal", gamma=-1), "focal.gamma"),
        (lambda: create_loss("dice", smoth=1), "did you mean 'smooth'"),
        (lambda: create_loss("dise"), "did you mean 'dice'"),
        (lambda: create_loss("boundary", weights=[2]), "expected none"),
        (lambda: LossConfig("focal_dice", dict(gama=2)), "did you mean 'gamma'"),
    ]:
        with pytest.raises(CrackSegError) as error:
            call()
        assert text in str(error.value) and "\n" not in str(error.value)


def refusal(call):
    "Return the text of the error that a call raises, None if it raises none."
    try:
        call()
    except CrackSegError as error:
        return str(error)


@pytest.mark.parametrize("name", LOSSES)
def test_settings_refuse_what_the_losses_refuse_in_the_same_words(name):
    numbers = (-1, -0.5, 0, 0.5, 1.5, "two", float("nan"), None)
    for key in loss_settings(name):
        for value in ([0, 0], [-1, 2], ["x"], [1, 2], None) if key == "class_weights" else numbers:
            expected = refusal(functools.partial(LOSSES[name], **{key: value}))
            assert refusal(functools.partial(LossConfig, name, {key: value})) == expected
    if "smooth" in loss_settings(name):
        assert "smooth: found 0" in refusal(lambda: LossConfig(name, dict(smooth=0, count_absent=True)))
    weights = {key: 0 for key in loss_settings(name) if key.endswith("_weight") and key != "pos_weight"}
    if weights:
        assert "weights: found only zeros" in refusal(lambda: LossConfig(name, weights))


def test_class_weights_from_the_data_replace_those_of_the_settings():
    for name in ("ce", "focal", "focal_dice", "ce_dice"):
        config = LossConfig(name, dict(class_weights=[1, 2], **({"gamma": 3} if "focal" in name else {})))
        for given, expected in ((None, [1, 2]), (np.array([0.5, 4, 2]), [0.5, 4, 2])):
            loss = config.create(given)
            part = getattr(loss, "parts", [loss])[0]
            assert part.class_weights.tolist() == expected and getattr(part, "gamma", 3) == 3
        assert config.settings["class_weights"] == [1, 2]


def test_losses_leave_no_trace_in_checkpoints():
    for name in LOSSES:
        assert not create_loss(name).state_dict() and not list(create_loss(name).parameters())


@pytest.mark.parametrize(
    "name, num_channels", [(name, num_channels) for name, num_channels in ALL if "boundary" not in name]
)
def test_nothing_waits_for_a_gpu(name, num_channels):
    "Tensors without numbers in them refuse whatever would make the host ask the device for a number."
    with FakeTensorMode():
        for loss in variants(name, num_channels):
            loss = loss.to("cuda")
            loss.ids_checked = True  # the first batch may wait
            logits, target = (
                torch.empty(2, num_channels, 6, 6, device="cuda"),
                torch.empty(2, 6, 6, dtype=torch.uint8, device="cuda"),
            )
            assert loss(logits, target).device.type == "cuda"
            with pytest.raises(Exception, match="item|local_scalar"):
                loss(logits, target).item()


@pytest.mark.gpu
@pytest.mark.parametrize("name, num_channels", ALL)
def test_gpu_agrees_with_cpu_without_waiting(name, num_channels):
    logits, target = random_case(2, num_channels, num_images=3, dtype=torch.float32, scale=3)
    loss = variants(name, num_channels)[-1]
    expected, gradient = value_and_gradient(loss, logits, target)
    loss, logits, target = loss.cuda(), logits.cuda(), target.cuda()
    torch.use_deterministic_algorithms(True)
    try:
        value_and_gradient(loss, logits, target)  # the first batch may wait
        if "boundary" not in name:
            torch.cuda.set_sync_debug_mode("error")
        found, found_gradient = value_and_gradient(loss, logits, target)
        wrong, _ = value_and_gradient(loss, logits, target.masked_fill(target == 1, 77))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    close(found.cpu(), expected, 1e-5)
    close(found_gradient.cpu(), gradient, 1e-5)
    assert wrong.isnan()
    with pytest.raises(CrackSegError, match="found class id 77"):
        create_loss(name).cuda()(logits, target.masked_fill(target == 1, 77))


def test_the_example_in_contributing_is_a_loss(monkeypatch):
    text = (project_root() / "CONTRIBUTING.md").read_text("utf-8")
    [example] = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "class HardPixels" in block]
    limit = re.search(r"`\"(hard_pixels\.limit)\": \((\S+), (\S+)\)`", text)
    monkeypatch.setitem(LOSS_LIMITS, limit[1], (float(limit[2]), float(limit[3])))
    names = dict(vars(losses_module))
    exec(example, names)
    logits, target = random_case(1, num_channels=4)
    logits.requires_grad_()
    names["HardPixels"]()(logits, target).backward()
    assert logits.grad.isfinite().all() and not logits.grad.movedim(1, -1)[target == VOID].any()
    with pytest.raises(CrackSegError, match="hard_pixels.limit"):
        names["HardPixels"](2)
    monkeypatch.setitem(LOSS_SETTINGS, "hard_pixels", {"limit": (float, 0.7)})
    with pytest.raises(CrackSegError, match="hard_pixels.limit"):  # before anything is built
        check_loss("hard_pixels", {"limit": 2})
