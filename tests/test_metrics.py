"Parity of the metrics with torchmetrics and with a slow version, and their properties on random cases."
import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryJaccardIndex, MulticlassF1Score, MulticlassJaccardIndex
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index, binary_precision, binary_recall
from torchmetrics.functional.segmentation import dice_score

from crackseg_nb.core import VOID, CrackSegError
from crackseg_nb.metrics import PROTOCOL, SCORES, THRESHOLDS, BinaryMetrics, ConfusionMatrix, count_keys, count_sorted

NUM_CASES = 200
REFERENCES = dict(iou=binary_jaccard_index, f1=binary_f1_score, dice=binary_f1_score, precision=binary_precision, recall=binary_recall)


pytestmark = pytest.mark.usefixtures('one_thread')


def random_case(seed, dtype=torch.float32):
    "Return probabilities and targets (B, H, W) with void, images without cracks, and values that sit on thresholds."
    generator = np.random.default_rng(seed)
    shape = (int(generator.integers(1, 6)), int(generator.integers(1, 20)), int(generator.integers(1, 20)))
    target = (generator.random(shape) < generator.choice([0.02, 0.2, 0.6])).astype(np.uint8)
    if generator.random() < 0.3:
        target[generator.integers(shape[0])] = 0
    probability = torch.tensor(np.clip(generator.random(shape) * 0.8 + target * generator.random() * 0.6, 0, 1), dtype=dtype)
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
    return dict(iou=tp / (tp + fp + fn), f1=f1, dice=f1, precision=tp / (tp + fp) if tp + fp else 0.0, recall=tp / (tp + fn) if tp + fn else 0.0)


def slow_metrics(probability, target, threshold):
    "Compute everything directly with numpy; None if all is void."
    counts = []
    for p, t in zip(probability.numpy(), target.numpy()):
        positive, truth = (p >= threshold)[t != VOID], (t == 1)[t != VOID]
        if len(truth):
            counts.append([int((positive & truth).sum()), int((positive & ~truth).sum()), int((~positive & truth).sum())])
    if not counts:
        return None
    per_image = [slow_scores(*count) for count in counts]
    return dict(pooled=slow_scores(*np.sum(counts, axis=0).tolist()), num_images=len(counts),
                per_image={key: float(np.mean([scores[key] for scores in per_image])) for key in SCORES})


def measured(probability, target, sizes=None, order=None, thresholds=THRESHOLDS):
    metrics = BinaryMetrics(thresholds)
    order = torch.arange(len(target)) if order is None else torch.as_tensor(order)
    for chosen in order.split(sizes or len(order)):
        metrics.update(probability[chosen], target[chosen], chosen)
    return metrics


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_equal_to_a_slow_version_at_every_threshold(dtype):
    for seed in range(NUM_CASES):
        probability, target = random_case(seed, dtype)
        metrics = measured(probability, target)
        if (target == VOID).all():
            with pytest.raises(CrackSegError, match='no image with a valid pixel'):
                metrics.compute()
            continue
        curve = metrics.curve()
        for k, threshold in enumerate(THRESHOLDS):
            expected = slow_metrics(probability, target, threshold)
            for key in ('precision', 'recall', 'f1', 'iou'):
                assert curve[key][k] == pytest.approx(expected['pooled'][key], abs=1e-12)
                assert curve[f'per_image_{key}'][k] == pytest.approx(expected['per_image'][key], abs=1e-12)
        for threshold in (0.5, THRESHOLDS[seed % len(THRESHOLDS)]):
            expected, found = slow_metrics(probability, target, threshold), metrics.compute(threshold)
            assert found['num_images'] == expected['num_images'] and found['threshold'] == threshold
            for kind in ('pooled', 'per_image'):
                assert list(found[kind]) == list(SCORES) and all(type(value) is float for value in found[kind].values())
                assert found[kind] == pytest.approx(expected[kind], abs=1e-12)


def test_equal_to_torchmetrics():
    for seed in range(NUM_CASES):
        probability, target = random_case(seed)
        if (target == VOID).all():
            continue
        threshold = THRESHOLDS[seed % len(THRESHOLDS)]
        found, positive = measured(probability, target).compute(threshold), (probability >= threshold).long()
        if (positive + (target == 1))[target != VOID].sum() == 0:
            assert set(found['pooled'].values()) == {1.0}  # torchmetrics says 0 here
            continue
        for key, function in REFERENCES.items():
            assert found['pooled'][key] == pytest.approx(function(positive, target.long(), ignore_index=VOID).item(), abs=1e-6)
        per_image = measured(probability, target).per_image(threshold)
        for line in per_image.itertuples():
            image_positive, image_target = positive[line.index], target[line.index].long()
            if line.crack_pixels + line.predicted_pixels:
                for key, function in REFERENCES.items():
                    assert getattr(line, key) == pytest.approx(function(image_positive, image_target, ignore_index=VOID).item(), abs=1e-6)


@pytest.mark.filterwarnings('ignore:dice_score')
def test_streaming_torchmetrics_and_its_dice():
    reference, metrics = BinaryJaccardIndex(ignore_index=VOID), BinaryMetrics()
    for seed in range(NUM_CASES):
        probability, target = random_case(seed)
        reference.update((probability >= 0.5).long(), target.long())
        metrics.update(probability, target, range(seed * 10, seed * 10 + len(target)))
        truth = target.clamp(max=1)
        if truth.any():
            found = measured(probability, truth).compute()['pooled']['dice']
            expected = dice_score((probability >= 0.5).long().reshape(1, 1, -1), truth.long().reshape(1, 1, -1), num_classes=1, input_format='one-hot', average='micro')
            assert found == pytest.approx(expected.item(), abs=1e-6)
    assert metrics.compute()['pooled']['iou'] == pytest.approx(reference.compute().item(), abs=1e-6)


def test_order_batches_and_processes_change_nothing():
    for seed in range(NUM_CASES):
        probability, target = random_case(seed)
        if (target == VOID).all():
            continue
        generator = np.random.default_rng(seed)
        expected = measured(probability, target)
        order = generator.permutation(len(target)).tolist()
        shuffled = measured(probability, target, sizes=int(generator.integers(1, 4)), order=order)
        half = len(order) // 2
        shares = [share for share in (order[:half + 1], order[half:]) if share]  # one image is given to both
        merged = BinaryMetrics()
        for share in shares:
            merged.merge(measured(probability, target, order=share))
        gathered, padding = BinaryMetrics(), expected.state()[:1].clone()
        padding[:, 0] = -1
        gathered.add_state(torch.cat([measured(probability, target, order=share).state() for share in shares] + [padding]))
        for other in (shuffled, merged, gathered):
            assert other.compute() == expected.compute()
            assert other.curve().equals(expected.curve()) and other.per_image(0.3).equals(expected.per_image(0.3))
            assert other.best_threshold('per_image_iou') == expected.best_threshold('per_image_iou')


def test_void_changes_nothing():
    for seed in range(NUM_CASES):
        probability, target = random_case(seed)
        if (target == VOID).all():
            continue
        for filler in (0.0, 1.0, float('nan'), 50.0, -3.0):
            changed = probability.masked_fill(target == VOID, filler)
            assert measured(changed, target).compute() == measured(probability, target).compute()


def test_best_threshold_is_the_first_of_all_by_hand():
    for seed in range(NUM_CASES):
        probability, target = random_case(seed)
        if (target == VOID).all():
            continue
        for kind in ('pooled', 'per_image'):
            for score in SCORES:
                values = [measured(probability, target).compute(threshold)[kind][score] for threshold in THRESHOLDS[::3]]
                best = measured(probability, target, thresholds=THRESHOLDS[::3]).best_threshold(f'{kind}_{score}')
                tied = [threshold for threshold, value in zip(THRESHOLDS[::3], values) if value == max(values)]
                assert best == min(tied, key=lambda threshold: (round(abs(threshold - 0.5), 9), threshold))
        if seed > NUM_CASES // 10:
            break


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_not_rounded(dtype):
    probability = torch.tensor(THRESHOLDS).to(dtype)[None, None]
    target = torch.ones(1, 1, len(THRESHOLDS), dtype=torch.long)
    curve = measured(probability, target).curve()
    assert curve.recall.tolist() == [(probability.float() >= threshold).double().mean().item() for threshold in THRESHOLDS]


def test_limiting_cases():
    target = torch.zeros(2, 16, 16, dtype=torch.uint8)
    target[:, 6:10] = 1
    truth = target.float()
    for probability, expected in [(truth, [1] * 5), (1 - truth, [0] * 5), (torch.zeros_like(truth), [0] * 5),
                                  (torch.ones_like(truth), [1 / 4, 2 / 5, 2 / 5, 1 / 4, 1]), (truth.roll(2, 1), [1 / 3, 1 / 2, 1 / 2, 1 / 2, 1 / 2])]:
        result = measured(probability, target).compute()
        for kind in ('pooled', 'per_image'):
            assert list(result[kind].values()) == pytest.approx(expected)
    empty = torch.zeros_like(target)
    assert set(measured(torch.zeros_like(truth), empty).compute()['per_image'].values()) == {1.0}
    assert set(measured(torch.ones_like(truth), empty).compute()['per_image'].values()) == {0.0}
    half = torch.stack([truth[0], 0 * truth[0]])  # one found, one missed: pooled and per-image differ where images do
    half_target = target.clone()
    half_target[1, :, 4:] = 0
    assert measured(half, half_target).compute()['per_image']['recall'] == 0.5
    assert measured(half, half_target).compute()['pooled']['recall'] == 64 / 80


def test_mistakes_get_one_line():
    probability, target = torch.rand(2, 4, 4), torch.ones(2, 4, 4).long()

    def after(*updates):
        metrics = BinaryMetrics()
        for update in updates:
            metrics.update(*update)
        return metrics.compute()
    for call, text in [
        (lambda: after((probability[:, None], target)), 'probability: found shape'),
        (lambda: after((probability, target[:1])), 'probability: found shape'),
        (lambda: after((probability, target.float())), 'expected class ids'),
        (lambda: after((probability * 9, target, [3, 8])), 'not logits'),
        (lambda: after((probability * float('nan'), target)), 'image 0: found values'),
        (lambda: after((probability, target + 1)), 'image 0: found values'),
        (lambda: after((probability, target, [3, 8]), (probability, 1 - target, [9, 8])), 'image 8: found two masks'),
        (lambda: after((probability, target, [3])), 'expected (2,)'),
        (lambda: after((probability, target, [3, 4]), (probability, target)), 'in all of them or in none'),
        (lambda: after(), 'no image with a valid pixel'),
        (lambda: measured(probability, target).compute(0.51), 'nearest is 0.5'),
        (lambda: measured(probability, target).compute('half'), 'threshold'),
        (lambda: measured(probability, target).best_threshold('pooled_fl'), "did you mean 'pooled_f1'"),
        (lambda: BinaryMetrics([-0.1]), 'thresholds'),
    ]:
        with pytest.raises(CrackSegError) as error:
            call()
        assert text in str(error.value) and '\n' not in str(error.value)


def test_reset_and_protocol():
    metrics = measured(*random_case(1))
    metrics.reset()
    metrics.update(*random_case(4))
    assert metrics.compute() == measured(*random_case(4)).compute()
    for word in ('>=', 'Void', 'pooled', 'per_image', 'validation'):
        assert word in PROTOCOL


# ---------------------------------------------------------------- several classes

def random_classes(seed):
    generator = np.random.default_rng(seed)
    num_classes = int(generator.integers(2, 7))
    shape = (int(generator.integers(1, 4)), int(generator.integers(2, 12)), int(generator.integers(2, 12)))
    used = generator.choice(num_classes, int(generator.integers(1, num_classes + 1)), replace=False)
    prediction, target = generator.choice(used, shape), generator.choice(used[:max(1, len(used) - 1)], shape)
    target[generator.random(shape) < 0.2] = VOID
    return num_classes, torch.tensor(prediction), torch.tensor(target)


def test_confusion_matrix_equals_torchmetrics():
    for seed in range(NUM_CASES):
        num_classes, prediction, target = random_classes(seed)
        confusion = ConfusionMatrix(num_classes)
        for image in range(len(target)):
            confusion.update(prediction[[image]], target[[image]].to(torch.uint8))
        result = confusion.compute()
        for average, key, metric in [('macro', 'iou', MulticlassJaccardIndex), ('macro', 'f1', MulticlassF1Score), ('none', 'iou', MulticlassJaccardIndex)]:
            expected = metric(num_classes, average=average, ignore_index=VOID)(prediction, target)
            if average == 'macro':
                assert result['mean'][key] == pytest.approx(expected.item(), abs=1e-6)
            else:
                for found, value in zip(result['per_class'].values(), expected.tolist()):
                    assert found[key] is None and value == 0 or found[key] == pytest.approx(value, abs=1e-6)
        valid = target != VOID
        assert result['num_pixels'] == valid.sum() and result['accuracy'] == pytest.approx((prediction == target)[valid].double().mean().item())


def test_confusion_matrix_of_two_classes_pools_as_the_binary_metric():
    for seed in range(NUM_CASES):
        probability, target = random_case(seed)
        if (target == 1).any():
            confusion = ConfusionMatrix(2)
            confusion.update(probability >= 0.5, target)
            scores = confusion.compute()['per_class']['1']
            assert {key: scores[key] for key in SCORES} == measured(probability, target).compute()['pooled']


def test_confusion_matrix_mistakes():
    for prediction, target in [(3, 0), (0, 3), (-1, 0), (0, -1), (0, 254)]:
        confusion = ConfusionMatrix(3)
        confusion.update(torch.tensor([[[prediction, 300]]]), torch.tensor([[[target, VOID]]]))
        with pytest.raises(CrackSegError, match='found 1 pixels beyond the 3 classes'):
            confusion.compute()


def test_counting_by_sorting_equals_counting_by_bins():
    for seed in range(NUM_CASES):
        generator = np.random.default_rng(seed)
        length = int(generator.integers(1, 50))
        keys = torch.tensor(generator.integers(0, generator.integers(1, 60), int(generator.integers(0, 400))))
        expected = [int((keys == k).sum()) for k in range(length)]
        assert count_keys(keys, length).tolist() == count_sorted(keys, length).tolist() == expected


@pytest.mark.gpu
def test_gpu_agrees_with_cpu_without_waiting():
    probability, target = random_case(3)
    expected = measured(probability, target)
    metrics, confusion = BinaryMetrics(), ConfusionMatrix(2)
    index = torch.arange(len(target)).cuda()
    on_gpu = probability.cuda(), target.cuda()
    metrics.update(*on_gpu, index)
    confusion.update(on_gpu[0] >= 0.5, on_gpu[1])
    torch.use_deterministic_algorithms(True)
    try:
        torch.cuda.set_sync_debug_mode('error')
        metrics.update(*on_gpu, index)
        confusion.update(on_gpu[0] >= 0.5, on_gpu[1])
    finally:
        torch.cuda.set_sync_debug_mode('default')
        torch.use_deterministic_algorithms(False)
    assert metrics.compute() == expected.compute()
    assert confusion.compute()['per_class']['1']['iou'] == expected.compute()['pooled']['iou']
