"Parity of the metrics with torchmetrics and with a slow version, and their properties on random cases."

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.metrics import get_stats
from torch._subclasses.fake_tensor import FakeTensorMode
from torchmetrics.classification import BinaryJaccardIndex, MulticlassConfusionMatrix
from torchmetrics.functional.classification import (
    binary_f1_score,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
    multiclass_f1_score,
    multiclass_jaccard_index,
    multiclass_precision,
    multiclass_recall,
)
from torchmetrics.functional.segmentation import dice_score

from crackseg_nb.core.checks import VOID, CrackSegError
from crackseg_nb.metrics.counts import (
    CLASS_PROTOCOL,
    PROTOCOL,
    SCORES,
    THRESHOLDS,
    BinaryMetrics,
    ClassMetrics,
    count_keys,
    count_sorted,
    create_metrics,
)

REFERENCES = dict(
    iou=binary_jaccard_index, f1=binary_f1_score, dice=binary_f1_score, precision=binary_precision, recall=binary_recall
)
CLASS_REFERENCES = dict(
    iou=multiclass_jaccard_index,
    f1=multiclass_f1_score,
    dice=multiclass_f1_score,
    precision=multiclass_precision,
    recall=multiclass_recall,
)


pytestmark = pytest.mark.usefixtures("one_thread")


def random_case(seed, dtype=torch.float32):
    "Return probabilities and targets (B, H, W) with void, images without cracks, and values that sit on thresholds."
    generator = np.random.default_rng(seed)
    shape = (int(generator.integers(1, 6)), int(generator.integers(1, 20)), int(generator.integers(1, 20)))
    target = (generator.random(shape) < generator.choice([0.02, 0.2, 0.6])).astype(np.uint8)
    if generator.random() < 0.3:
        target[generator.integers(shape[0])] = 0
    probability = torch.tensor(
        np.clip(generator.random(shape) * 0.8 + target * generator.random() * 0.6, 0, 1), dtype=dtype
    )
    on_edge = torch.tensor(generator.random(shape) < 0.3)
    edges = torch.tensor(generator.choice([0.0, *THRESHOLDS, 1.0], shape), dtype=torch.float64).to(dtype)
    probability = torch.where(on_edge, edges, probability)
    target[generator.random(shape) < generator.choice([0, 0.1, 0.5])] = VOID
    if generator.random() < 0.2:
        target[generator.integers(shape[0])] = VOID
    return probability, torch.tensor(target)


def slow_scores(tp, fp, fn):
    if tp + fp + fn == 0:
        return dict.fromkeys(SCORES, 1.0)
    f1 = 2 * tp / (2 * tp + fp + fn)
    return dict(
        iou=tp / (tp + fp + fn),
        f1=f1,
        dice=f1,
        precision=tp / (tp + fp) if tp + fp else 0.0,
        recall=tp / (tp + fn) if tp + fn else 0.0,
    )


def slow_metrics(probability, target, threshold):
    "Compute everything directly with numpy; None if all is void."
    counts = []
    for p, t in zip(probability.numpy(), target.numpy()):
        positive, truth = (p >= threshold)[t != VOID], (t == 1)[t != VOID]
        if len(truth):
            counts.append(
                [int((positive & truth).sum()), int((positive & ~truth).sum()), int((~positive & truth).sum())]
            )
    if not counts:
        return None
    per_image = [slow_scores(*count) for count in counts]
    return dict(
        pooled=slow_scores(*np.sum(counts, axis=0).tolist()),
        num_images=len(counts),
        per_image={key: float(np.mean([scores[key] for scores in per_image])) for key in SCORES},
    )


def measured(probability, target, sizes=None, order=None, thresholds=THRESHOLDS):
    metrics = BinaryMetrics(thresholds)
    order = torch.arange(len(target)) if order is None else torch.as_tensor(order)
    for chosen in order.split(sizes or len(order)):
        metrics.update(probability[chosen], target[chosen], chosen)
    return metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_a_slow_version_at_every_threshold(dtype, num_cases):
    for seed in range(num_cases):
        probability, target = random_case(seed, dtype)
        metrics = measured(probability, target)
        if (target == VOID).all():
            with pytest.raises(CrackSegError, match="no image with a valid pixel"):
                metrics.compute()
            continue
        curve = metrics.curve()
        for k, threshold in enumerate(THRESHOLDS):
            expected = slow_metrics(probability, target, threshold)
            for key in ("precision", "recall", "f1", "iou"):
                assert curve[key][k] == pytest.approx(expected["pooled"][key], abs=1e-12)
                assert curve[f"per_image_{key}"][k] == pytest.approx(expected["per_image"][key], abs=1e-12)
        for threshold in (0.5, THRESHOLDS[seed % len(THRESHOLDS)]):
            expected, found = slow_metrics(probability, target, threshold), metrics.compute(threshold)
            assert found["num_images"] == expected["num_images"] and found["threshold"] == threshold
            for kind in ("pooled", "per_image"):
                assert list(found[kind]) == list(SCORES) and all(type(value) is float for value in found[kind].values())
                assert found[kind] == pytest.approx(expected[kind], abs=1e-12)


def test_equal_to_torchmetrics(num_cases):
    for seed in range(num_cases):
        probability, target = random_case(seed)
        if (target == VOID).all():
            continue
        threshold = THRESHOLDS[seed % len(THRESHOLDS)]
        found, positive = measured(probability, target).compute(threshold), (probability >= threshold).long()
        if (positive + (target == 1))[target != VOID].sum() == 0:
            assert set(found["pooled"].values()) == {1.0}  # torchmetrics says 0 here
            continue
        for key, function in REFERENCES.items():
            assert found["pooled"][key] == pytest.approx(
                function(positive, target.long(), ignore_index=VOID).item(), abs=1e-6
            )
        per_image = measured(probability, target).per_image(threshold)
        for line in per_image.itertuples():
            image_positive, image_target = positive[line.index], target[line.index].long()
            if line.crack_pixels + line.predicted_pixels:
                for key, function in REFERENCES.items():
                    assert getattr(line, key) == pytest.approx(
                        function(image_positive, image_target, ignore_index=VOID).item(), abs=1e-6
                    )


@pytest.mark.filterwarnings("ignore:dice_score")
def test_streaming_torchmetrics_and_its_dice(num_cases):
    reference, metrics = BinaryJaccardIndex(ignore_index=VOID), BinaryMetrics()
    for seed in range(num_cases):
        probability, target = random_case(seed)
        reference.update((probability >= 0.5).long(), target.long())
        metrics.update(probability, target, range(seed * 10, seed * 10 + len(target)))
        truth = target.clamp(max=1)
        if truth.any():
            found = measured(probability, truth).compute()["pooled"]["dice"]
            expected = dice_score(
                (probability >= 0.5).long().reshape(1, 1, -1),
                truth.long().reshape(1, 1, -1),
                num_classes=1,
                input_format="one-hot",
                average="micro",
            )
            assert found == pytest.approx(expected.item(), abs=1e-6)
    assert metrics.compute()["pooled"]["iou"] == pytest.approx(reference.compute().item(), abs=1e-6)


def test_order_batches_and_processes_change_nothing(num_cases):
    for seed in range(num_cases):
        probability, target = random_case(seed)
        if (target == VOID).all():
            continue
        generator = np.random.default_rng(seed)
        expected = measured(probability, target)
        order = generator.permutation(len(target)).tolist()
        shuffled = measured(probability, target, sizes=int(generator.integers(1, 4)), order=order)
        half = len(order) // 2
        shares = [share for share in (order[: half + 1], order[half:]) if share]  # one image is given to both
        merged = BinaryMetrics()
        for share in shares:
            merged.merge(measured(probability, target, order=share))
        gathered, padding = BinaryMetrics(), expected.state()[:1].clone()
        padding[:, 0] = -1
        gathered.add_state(
            torch.cat([measured(probability, target, order=share).state() for share in shares] + [padding])
        )
        for other in (shuffled, merged, gathered):
            assert other.compute() == expected.compute()
            assert other.curve().equals(expected.curve()) and other.per_image(0.3).equals(expected.per_image(0.3))
            assert other.best_threshold("per_image_iou") == expected.best_threshold("per_image_iou")


def test_void_changes_nothing(num_cases):
    for seed in range(num_cases):
        probability, target = random_case(seed)
        if (target == VOID).all():
            continue
        for filler in (0.0, 1.0, float("nan"), 50.0, -3.0):
            changed = probability.masked_fill(target == VOID, filler)
            assert measured(changed, target).compute() == measured(probability, target).compute()


def test_best_threshold_is_the_first_of_all_by_hand(num_cases):
    for seed in range(num_cases // 4):
        probability, target = random_case(seed)
        if (target == VOID).all():
            continue
        for kind in ("pooled", "per_image"):
            for score in SCORES:
                values = [
                    measured(probability, target).compute(threshold)[kind][score] for threshold in THRESHOLDS[::3]
                ]
                best = measured(probability, target, thresholds=THRESHOLDS[::3]).best_threshold(f"{kind}_{score}")
                tied = [threshold for threshold, value in zip(THRESHOLDS[::3], values) if value == max(values)]
                assert best == min(tied, key=lambda threshold: (round(abs(threshold - 0.5), 9), threshold))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_not_rounded(dtype):
    probability = torch.tensor(THRESHOLDS).to(dtype)[None, None]
    target = torch.ones(1, 1, len(THRESHOLDS), dtype=torch.long)
    curve = measured(probability, target).curve()
    assert curve.recall.tolist() == [
        (probability.float() >= threshold).double().mean().item() for threshold in THRESHOLDS
    ]


def test_limiting_cases():
    target = torch.zeros(2, 16, 16, dtype=torch.uint8)
    target[:, 6:10] = 1
    truth = target.float()
    for probability, expected in [
        (truth, [1] * 5),
        (1 - truth, [0] * 5),
        (torch.zeros_like(truth), [0] * 5),
        (torch.ones_like(truth), [1 / 4, 2 / 5, 2 / 5, 1 / 4, 1]),
        (truth.roll(2, 1), [1 / 3, 1 / 2, 1 / 2, 1 / 2, 1 / 2]),
    ]:
        result = measured(probability, target).compute()
        for kind in ("pooled", "per_image"):
            assert list(result[kind].values()) == pytest.approx(expected)
    empty = torch.zeros_like(target)
    assert set(measured(torch.zeros_like(truth), empty).compute()["per_image"].values()) == {1.0}
    assert set(measured(torch.ones_like(truth), empty).compute()["per_image"].values()) == {0.0}
    half = torch.stack([truth[0], 0 * truth[0]])  # one found, one missed: pooled and per-image differ where images do
    half_target = target.clone()
    half_target[1, :, 4:] = 0
    assert measured(half, half_target).compute()["per_image"]["recall"] == 0.5
    assert measured(half, half_target).compute()["pooled"]["recall"] == 64 / 80


def test_mistakes_get_one_line():
    probability, target = torch.rand(2, 4, 4), torch.ones(2, 4, 4).long()

    def after(*updates):
        metrics = BinaryMetrics()
        for update in updates:
            metrics.update(*update)
        return metrics.compute()

    for call, text in [
        (lambda: after((probability[:, None], target)), "probability: found shape"),
        (lambda: after((probability, target[:1])), "probability: found shape"),
        (lambda: after((probability, target.float())), "expected class ids"),
        (lambda: after((probability * 9, target, [3, 8])), "not logits"),
        (lambda: after((probability * float("nan"), target)), "image 0: found values"),
        (lambda: after((probability, target + 1)), "image 0: found values"),
        (lambda: after((probability, target, [3, 8]), (probability, 1 - target, [9, 8])), "image 8: found two masks"),
        (lambda: after((probability, target, [3])), "expected (2,)"),
        (lambda: after((probability, target, [3, 4]), (probability, target)), "in all of them or in none"),
        (lambda: after(), "no image with a valid pixel"),
        (lambda: measured(probability, target).compute(0.51), "nearest is 0.5"),
        (lambda: measured(probability, target).compute("half"), "threshold"),
        (lambda: measured(probability, target).best_threshold("pooled_fl"), "did you mean 'pooled_f1'"),
        (lambda: BinaryMetrics([-0.1]), "thresholds"),
    ]:
        with pytest.raises(CrackSegError) as error:
            call()
        assert text in str(error.value) and "\n" not in str(error.value)


def test_reset_and_protocol():
    metrics = measured(*random_case(1))
    metrics.reset()
    metrics.update(*random_case(4))
    assert metrics.compute() == measured(*random_case(4)).compute()
    for word in (">=", "Void", "pooled", "per_image", "validation"):
        assert word in PROTOCOL


# ---------------------------------------------------------------- several classes


def names(num_classes):
    return [f"class {k}" for k in range(num_classes)]


def random_classes(seed):
    "Return a number of classes, predictions and targets (B, H, W) with classes missing or only predicted, and void."
    generator = np.random.default_rng(seed)
    num_classes = int(generator.integers(2, 8))
    shape = (int(generator.integers(1, 6)), int(generator.integers(1, 14)), int(generator.integers(1, 14)))
    used = generator.choice(num_classes, int(generator.integers(1, num_classes + 1)), replace=False)
    target = generator.choice(used[: max(1, len(used) - 1)], shape)
    if generator.random() < 0.3:
        target[generator.integers(shape[0])] = used[0]
    prediction = np.where(
        generator.random(shape) < generator.choice([0.1, 0.5, 1]), generator.choice(used, shape), target
    )
    target[generator.random(shape) < generator.choice([0, 0.2, 0.7])] = VOID
    if generator.random() < 0.2:
        target[generator.integers(shape[0])] = VOID
    return num_classes, torch.tensor(prediction), torch.tensor(target).to(torch.uint8)


def classified(num_classes, prediction, target, sizes=None, order=None):
    metrics = ClassMetrics(names(num_classes))
    order = torch.arange(len(target)) if order is None else torch.as_tensor(order)
    for chosen in order.split(sizes or len(order)):
        metrics.update(prediction[chosen], target[chosen], chosen)
    return metrics


def slow_class_scores(prediction, target, num_classes):
    "Return for each class its scores over the given valid pixels, None without a true one."
    counts = [
        [
            ((prediction == k) & (target == k)).sum(),
            ((prediction == k) & (target != k)).sum(),
            ((prediction != k) & (target == k)).sum(),
        ]
        for k in range(num_classes)
    ]
    return [slow_scores(*map(int, count)) if (target == k).any() else None for k, count in enumerate(counts)]


def slow_mean(scores):
    scores = [score for score in scores if score is not None]
    return {key: float(np.mean([score[key] for score in scores])) if scores else None for key in SCORES}


def slow_classes(num_classes, prediction, target):
    "Compute everything directly with numpy; None if all is void."
    prediction, target = prediction.numpy(), target.numpy()
    images = [(p[t != VOID], t[t != VOID]) for p, t in zip(prediction, target) if (t != VOID).any()]
    if not images:
        return None
    all_predicted, all_true = (np.concatenate(parts) for parts in zip(*images))
    scores = slow_class_scores(all_predicted, all_true, num_classes)
    per_image = [slow_mean(slow_class_scores(p, t, num_classes)) for p, t in images]
    return dict(
        pooled=slow_mean(scores),
        pooled_without_background=slow_mean(scores[1:]),
        per_image={key: float(np.mean([image[key] for image in per_image])) for key in SCORES},
        per_class={
            name: (scores[k] or dict.fromkeys(SCORES))
            | dict(pixels=int((all_true == k).sum()), images=sum(bool((t == k).any()) for _, t in images))
            for k, name in enumerate(names(num_classes))
        },
        accuracy=float((all_predicted == all_true).mean()),
        num_images=len(images),
        num_classes_occurring=sum(score is not None for score in scores),
        void="ignored",
    )


def same(found, expected):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    else:
        assert type(found) is type(expected) and found == (
            pytest.approx(expected, abs=1e-12) if isinstance(expected, float) else expected
        )


def test_classes_equal_a_slow_version(num_cases):
    for seed in range(num_cases):
        num_classes, prediction, target = random_classes(seed)
        metrics, expected = classified(num_classes, prediction, target), slow_classes(num_classes, prediction, target)
        if expected is None:
            for result in (metrics.compute, metrics.per_image, functools.partial(getattr, metrics, "matrix")):
                with pytest.raises(CrackSegError, match="no image with a valid pixel"):
                    result()
            continue
        same(metrics.compute(), expected)
        assert (
            metrics.compute(0.5) == metrics.compute() and json.loads(json.dumps(metrics.compute())) == metrics.compute()
        )
        counts = np.zeros((num_classes, num_classes), dtype=np.int64)
        valid = (target != VOID).numpy()
        np.add.at(counts, (target.numpy()[valid], prediction.numpy()[valid]), 1)
        assert metrics.matrix.dtype == np.int64 and (metrics.matrix == counts).all()
        table = metrics.per_image()
        assert table.equals(metrics.per_image(0.5)) and len(table) == expected["num_images"]
        assert table[list(SCORES)].mean().to_dict() == pytest.approx(expected["per_image"], abs=1e-12)
        for line in table.to_dict("records"):
            p, t = (ids[line["index"]].numpy()[valid[line["index"]]] for ids in (prediction, target))
            scores = slow_class_scores(p, t, num_classes)
            assert {key: line[key] for key in SCORES} == pytest.approx(slow_mean(scores), abs=1e-12)
            assert [line[f"iou_{name}"] for name in names(num_classes)] == pytest.approx(
                [np.nan if score is None else score["iou"] for score in scores], abs=1e-12, nan_ok=True
            )


def test_classes_equal_torchmetrics(num_cases):
    for seed in range(num_cases):
        num_classes, prediction, target = random_classes(seed)
        if (target == VOID).all():
            continue
        metrics = classified(num_classes, prediction, target)
        result, settings = metrics.compute(), dict(num_classes=num_classes, ignore_index=VOID)
        assert metrics.matrix.tolist() == MulticlassConfusionMatrix(**settings)(prediction, target.long()).tolist()
        for key, function in CLASS_REFERENCES.items():
            expected = function(prediction, target.long(), average="none", **settings).tolist()
            true = [k for k, scores in enumerate(result["per_class"].values()) if scores["pixels"]]
            for k, (scores, value) in enumerate(zip(result["per_class"].values(), expected)):
                assert scores[key] == pytest.approx(value, abs=1e-6) if k in true else scores[key] is None
            assert result["pooled"][key] == pytest.approx(np.mean([expected[k] for k in true]), abs=1e-6)


def test_per_image_scores_of_classes_equal_smp(num_cases):
    for seed in range(num_cases):
        num_classes, prediction, target = random_classes(seed)
        if (target == VOID).all():
            continue
        tp, fp, fn, _ = (
            part.numpy()
            for part in get_stats(
                prediction, target.long(), mode="multiclass", num_classes=num_classes, ignore_index=VOID
            )
        )
        for line in classified(num_classes, prediction, target).per_image().to_dict("records"):
            image = line["index"]
            true = tp[image] + fn[image] > 0
            assert line["iou"] == pytest.approx(np.mean(tp[image][true] / (tp + fp + fn)[image][true]))
            assert line["recall"] == pytest.approx(np.mean(tp[image][true] / (tp + fn)[image][true]))


def test_order_batches_processes_and_duplicates_change_no_class(num_cases):
    for seed in range(num_cases):
        num_classes, prediction, target = random_classes(seed)
        if (target == VOID).all():
            continue
        generator = np.random.default_rng(seed)
        expected = classified(num_classes, prediction, target)
        order = generator.permutation(len(target)).tolist()
        half = len(order) // 2
        shares = [
            classified(num_classes, prediction, target, order=share)
            for share in (order[: half + 1], order[half:])
            if share
        ]  # one image is given to both
        gathered, padding, merged = expected.blank(), expected.state()[:1].clone(), expected.blank()
        padding[:, 0] = -1
        gathered.add_state(torch.cat([share.state() for share in shares] + [padding]))
        for share in shares:
            merged.merge(share)
        one_by_one = classified(num_classes, prediction, target, sizes=1, order=order + order[:2])
        numbered = expected.blank()
        numbered.update(prediction, target)
        for other in (gathered, merged, one_by_one, numbered):
            assert (
                other.compute() == expected.compute()
                and (other.matrix == expected.matrix).all()
                and other.per_image().equals(expected.per_image())
            )


def test_what_lies_under_void_changes_no_class(num_cases):
    for seed in range(num_cases):
        num_classes, prediction, target = random_classes(seed)
        for filler in (0, num_classes - 1, num_classes, VOID, -7):
            changed = classified(num_classes, prediction.masked_fill(target == VOID, filler), target)
            assert torch.equal(changed.state(), classified(num_classes, prediction, target).state())


def test_a_class_that_never_occurs_counts_nowhere(num_cases):
    for seed in range(num_cases):
        num_classes, prediction, target = random_classes(seed)
        if (target == VOID).all():
            continue
        few, many = (
            classified(num_classes, prediction, target).compute(),
            classified(num_classes + 3, prediction, target).compute(),
        )
        for name in names(num_classes + 3)[num_classes:]:
            assert many["per_class"].pop(name) == dict.fromkeys(SCORES) | dict(pixels=0, images=0)
        same(many, few)
        # A wrong prediction as a class that is not there costs the pixels' own class what any wrong class costs it.
        missed = classified(num_classes + 3, torch.full_like(prediction, num_classes), target).compute()
        assert (
            set(missed["pooled"].values()) == {0.0} and missed["num_classes_occurring"] == few["num_classes_occurring"]
        )


def test_limiting_cases_of_classes():
    target = torch.arange(4).repeat(2, 4, 2).to(torch.uint8)
    assert set(classified(4, target, target).compute()["pooled"].values()) == {1.0}
    assert set(classified(4, (target + 1) % 4, target).compute()["per_image"].values()) == {0.0}
    result = classified(
        4, torch.zeros_like(target), target
    ).compute()  # nothing but background is found, on a quarter of the pixels
    assert (
        result["pooled"] == dict(iou=1 / 16, f1=0.4 / 4, dice=0.4 / 4, precision=1 / 16, recall=1 / 4)
        and result["accuracy"] == 1 / 4
    )
    assert set(result["pooled_without_background"].values()) == {0.0}
    plain = classified(4, torch.zeros_like(target), torch.zeros_like(target)).compute()
    assert set(plain["pooled"].values()) == {1.0} and set(plain["pooled_without_background"].values()) == {None}
    # Rare damage in one of two images: pooled over pixels, per image over images.
    target = torch.zeros(2, 10, 10, dtype=torch.uint8)
    target[0, 0] = 3
    result = classified(4, torch.zeros_like(target), target).compute()
    assert result["pooled"]["iou"] == 190 / 200 / 2 and result["per_image"]["iou"] == (0.9 / 2 + 1) / 2
    assert result["per_class"]["class 3"] == dict(
        iou=0.0, f1=0.0, dice=0.0, precision=0.0, recall=0.0, pixels=10, images=1
    )


def test_two_classes_pool_as_the_binary_metric(num_cases):
    for seed in range(num_cases):
        probability, target = random_case(seed)
        if (target == 1).any():
            scores = classified(2, probability >= 0.5, target).compute()["per_class"]["class 1"]
            assert {key: scores[key] for key in SCORES} == measured(probability, target).compute()["pooled"]


def test_wrong_class_ids_are_reported_with_their_image():
    for prediction, target in [(3, 0), (0, 3), (-1, 0), (0, -1), (0, 254), (VOID, 0)]:
        metrics = ClassMetrics(names(3))
        metrics.update(
            torch.tensor([[[0, 0]], [[prediction, 300]]]), torch.tensor([[[0, 1]], [[target, VOID]]]), [4, 9]
        )
        for result in (metrics.compute, metrics.per_image, functools.partial(getattr, metrics, "matrix")):
            with pytest.raises(CrackSegError, match="image 9: found class ids beyond the 3 classes") as error:
                result()
            assert "\n" not in str(error.value)


def test_observe_takes_logits(num_cases):
    for seed in range(num_cases):
        num_classes, prediction, target = random_classes(seed)
        logits = torch.randn(
            len(target), num_classes, *target.shape[1:], generator=torch.Generator().manual_seed(seed)
        ) + 2 * F.one_hot(prediction, num_classes).movedim(-1, 1)
        metrics = ClassMetrics(names(num_classes))
        answer = metrics.observe(logits.masked_fill(target[:, None] == VOID, torch.nan), target, range(len(target)))
        assert (
            answer.dtype == torch.uint8
            and answer.shape == target.shape
            and torch.equal(answer[target != VOID], logits.argmax(1)[target != VOID].to(torch.uint8))
        )
        assert torch.equal(metrics.state(), classified(num_classes, logits.argmax(1), target).state())
        probability, target = random_case(seed)
        binary = BinaryMetrics()
        answer = binary.observe(torch.logit(probability.double())[:, None], target, range(len(target)))
        assert torch.equal(answer, torch.logit(probability.double()).sigmoid()) and torch.equal(
            binary.state(), measured(answer, target).state()
        )
    for channel in range(3):  # one NaN among the logits of a pixel is enough
        logits = torch.randn(1, 3, 2, 2)
        logits[0, channel, 1, 1] = torch.nan
        metrics = ClassMetrics(names(3))
        metrics.observe(logits, torch.zeros(1, 2, 2).long(), [6])
        with pytest.raises(CrackSegError, match="image 6: found .* NaN"):
            metrics.compute()


def test_as_many_classes_as_void_leaves_room_for():
    ids = torch.arange(VOID).view(1, 15, 17)
    metrics = ClassMetrics(names(VOID))
    answer = metrics.observe(F.one_hot(ids, VOID).movedim(-1, 1).float(), ids.to(torch.uint8))
    assert (
        torch.equal(answer.long(), ids)
        and metrics.compute()["num_classes_occurring"] == VOID
        and metrics.compute()["pooled"]["iou"] == 1
    )


@pytest.mark.parametrize("num_classes", [2, 5])
def test_both_metrics_are_gathered_and_kept_alike(num_classes):
    metrics = create_metrics(names(num_classes))
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(4, 1 if num_classes == 2 else num_classes, 6, 6, generator=generator)
    target = torch.randint(0, num_classes, (4, 6, 6), generator=generator)
    target[0] = 0
    for part in torch.arange(4).split(3):
        metrics.observe(logits[part], target[part], part)
    total = metrics.blank()
    for rows in metrics.state().split(1):
        part = metrics.blank()
        part.add_state(rows)
        part.numbered = metrics.numbered
        total.merge(part)
    assert (
        not metrics.numbered
        and metrics.state().shape == (4, 1 + metrics.num_counts)
        and metrics.state().dtype == torch.int64
    )
    assert total.compute(0.5) == metrics.compute(0.5) and total.per_image(0.5).equals(metrics.per_image(0.5))
    assert {"pooled", "per_image", "num_images", "void"} <= set(metrics.compute(0.5)) and list(
        metrics.compute()["pooled"]
    ) == list(SCORES)
    blank = metrics.blank()
    assert not len(blank.state()) and type(blank) is type(metrics) and len(metrics.state()) == 4
    with pytest.raises(CrackSegError, match="in all of them or in none"):
        metrics.observe(logits, target)
    with pytest.raises(CrackSegError, match=r"expected \(4,\)"):
        metrics.observe(logits, target, [1])
    with pytest.raises(CrackSegError, match=f"expected .N, {1 + metrics.num_counts}. for "):
        metrics.add_state(metrics.state()[:, 1:])
    blank.observe(logits, target)
    for first, second in ((metrics, blank), (metrics.blank().merge(blank), metrics)):
        with pytest.raises(CrackSegError, match="expected an index in each update"):
            first.merge(second)
    assert len(metrics.state()) == 4  # what was refused left nothing behind
    metrics.observe(logits[:1], (target[:1] + 1) % num_classes, [0])
    with pytest.raises(CrackSegError, match="image 0: found two masks"):
        metrics.compute()
    metrics.reset()
    metrics.observe(logits, target)
    assert metrics.compute() == blank.compute()


def test_class_mistakes_get_one_line():
    ids, metrics = torch.zeros(2, 4, 4).long(), ClassMetrics(names(3))
    for call, text in [
        (lambda: ClassMetrics(names(1)), "expected 2 to 255 different names"),
        (lambda: ClassMetrics(["crack", "crack", "rust"]), "different names"),
        (lambda: ClassMetrics("rust"), "class_names: found 'rust'"),
        (lambda: ClassMetrics(names(256)), "expected 2 to 255"),
        (lambda: create_metrics([]), "expected 2 to 255"),
        (lambda: metrics.update(ids[:, None], ids), "prediction: found shape"),
        (lambda: metrics.update(ids, ids[:1]), "prediction: found shape"),
        (lambda: metrics.update(ids, ids.float()), "expected class ids"),
        (lambda: metrics.update(ids.float(), ids), "logits.argmax(1)"),
        (lambda: metrics.observe(torch.zeros(2, 4, 4, 4), ids), "expected (B, 3, H, W)"),
        (lambda: metrics.observe(torch.zeros(2, 3, 4), ids), "expected (B, 3, H, W)"),
        (lambda: BinaryMetrics().observe(torch.zeros(2, 3, 4, 4), ids), "expected (B, 1, H, W)"),
        (lambda: metrics.merge(ClassMetrics(names(4))), "merge: found class_names"),
        (lambda: metrics.merge(BinaryMetrics()), "merge: found class_names None"),
        (lambda: BinaryMetrics().merge(metrics), "merge: found thresholds None"),
        (lambda: metrics.compute(), "no image with a valid pixel"),
    ]:
        with pytest.raises(CrackSegError) as error:
            call()
        assert text in str(error.value) and "\n" not in str(error.value)


def test_class_protocol_says_the_rules():
    assert create_metrics(names(3)).protocol == CLASS_PROTOCOL and create_metrics(names(2)).protocol == PROTOCOL
    for word in (
        "highest logit",
        "Void",
        "pooled",
        "pooled_without_background",
        "per_image",
        "true pixel",
        "background included",
        "accuracy",
    ):
        assert word in CLASS_PROTOCOL


@pytest.mark.parametrize("num_classes", [2, 5])
def test_nothing_waits_for_a_gpu(num_classes):
    "Tensors without numbers in them refuse whatever would make the host ask the device for a number."
    with FakeTensorMode():
        metrics = create_metrics(names(num_classes))
        logits = torch.empty(2, 1 if num_classes == 2 else num_classes, 6, 6, device="cuda")
        target = torch.empty(2, 6, 6, dtype=torch.uint8, device="cuda")
        assert metrics.observe(logits, target, torch.arange(2)).device.type == metrics.state().device.type == "cuda"
        with pytest.raises(Exception, match="bincount"):
            torch.bincount(target.flatten().long())


def test_counting_by_sorting_equals_counting_by_bins(num_cases):
    for seed in range(num_cases):
        generator = np.random.default_rng(seed)
        length = int(generator.integers(1, 50))
        keys = torch.tensor(generator.integers(0, generator.integers(1, 60), int(generator.integers(0, 400))))
        expected = [int((keys == k).sum()) for k in range(length)]
        assert count_keys(keys, length).tolist() == count_sorted(keys, length).tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("num_classes", [2, 5])
def test_gpu_agrees_with_cpu_without_waiting(num_classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1 if num_classes == 2 else num_classes, 40, 30, generator=generator)
    target = torch.randint(0, num_classes, (3, 40, 30), generator=generator).to(torch.uint8)
    target[1, :9] = VOID
    expected, metrics = create_metrics(names(num_classes)), create_metrics(names(num_classes))
    answer = expected.observe(logits, target, range(3))
    on_gpu, index = (logits.cuda(), target.cuda()), torch.arange(3).cuda()
    metrics.observe(*on_gpu, index)
    torch.use_deterministic_algorithms(True)
    try:
        torch.cuda.set_sync_debug_mode("error")
        found = metrics.observe(*on_gpu, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert metrics.compute() == expected.compute()
    torch.testing.assert_close(found.cpu(), answer)
