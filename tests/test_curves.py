"Curves over thresholds: equal to slow versions, torchmetrics and networkx on random cases; void, merging, empty cases."

import networkx as nx
import numpy as np
import pytest
import torch
from networkx.algorithms.bipartite import hopcroft_karp_matching
from scipy.ndimage import distance_transform_edt
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_f1_score,
    binary_jaccard_index,
    binary_precision,
    binary_recall,
)

from crackseg_nb.core.checks import VOID, CrackSegError
from crackseg_nb.metrics.curves import CURVE_SCORES, LEVEL_EDGES, ThresholdCurves, levels, one_to_one, show_curves

GRID = (0.1, 0.25, 0.5, 0.7, 0.9)
TOLERANCES = (0.0, 0.5, 1.0, 2**0.5, 2.0, 3.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def random_image(generator, void=True):
    "Return a probability and a mask, with lines, images without cracks, void, and values that sit on thresholds."
    shape = tuple(generator.integers(1, 36, 2))
    mask = (generator.random(shape) < generator.choice([0.01, 0.05, 0.3])).astype(np.uint8)
    if generator.random() < 0.6:
        mask[generator.integers(shape[0])] = 1
    if generator.random() < 0.2:
        mask[:] = 0
    shifted = np.roll(mask, generator.integers(-2, 3, 2), (0, 1))
    probability = np.clip(generator.random(shape) * 0.7 * generator.random() + shifted * generator.random(), 0, 1)
    if generator.random() < 0.1:
        probability[:] = 0
    probability = np.where(generator.random(shape) < 0.2, generator.choice([0, *GRID, 1], shape), probability).astype(
        generator.choice(["float32", "float64"])
    )
    if void and generator.random() < 0.6:
        mask[generator.random(shape) < generator.choice([0.1, 0.5])] = VOID
    if void and generator.random() < 0.05:
        mask[:] = VOID
    return probability, mask


def slow_counts(probability, mask, threshold, tolerance):
    "Return right, predicted, found and true pixels at one threshold."
    predicted, truth = (probability >= threshold) & (mask != VOID), mask == 1

    def within(pixels):
        return distance_transform_edt(~pixels) <= tolerance + 1e-9 if pixels.any() else np.zeros_like(pixels)

    return [(predicted & within(truth)).sum(), predicted.sum(), (truth & within(predicted)).sum(), truth.sum()]


def slow_scores(right, predicted, found, true):
    if predicted == true == 0:
        return 1.0, 1.0, 1.0
    precision, recall = right / predicted if predicted else 0.0, found / true if true else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def slow_miou(right, predicted, found, true, pixels):
    union, errors = predicted + true - right, predicted + true - 2 * right
    background = pixels - union
    return (
        (right / union if union else 1.0) + (background / (background + errors) if background + errors else 1.0)
    ) / 2


def slow_curves(images, thresholds, tolerance, fixed):
    "Compute everything of ThresholdCurves directly; None without a valid pixel."
    images = [(probability, mask) for probability, mask in images if (mask != VOID).any()]
    if not images:
        return None
    counts = np.array(
        [[slow_counts(*image, threshold, tolerance) for threshold in (0, *thresholds)] for image in images]
    )
    f1 = np.array([[slow_scores(*row)[2] for row in rows[1:]] for rows in counts])
    pooled = np.array([slow_scores(*row) for row in counts.sum(0)])
    order = sorted(range(len(thresholds)), key=lambda k: (round(abs(thresholds[k] - 0.5), 9), thresholds[k]))

    def best(values):
        return max(order, key=lambda k: values[k])

    own = [best(row) for row in f1]
    at = thresholds.index(fixed)
    pixels = [int((mask != VOID).sum()) for _, mask in images]
    miou = np.array([[slow_miou(*row, count) for row in rows[1:]] for rows, count in zip(counts, pixels)])
    pooled_miou = [slow_miou(*row, sum(pixels)) for row in counts.sum(0)[1:]]
    found = dict(
        precision=pooled[1 + at, 0],
        recall=pooled[1 + at, 1],
        f1=pooled[1 + at, 2],
        mean_f1=f1[:, at].mean(),
        ods_f1=pooled[1:, 2].max(),
        ods_mean_f1=f1.mean(0).max(),
        ois_f1=f1.max(1).mean(),
        ois_pooled_f1=slow_scores(*sum(rows[1 + k] for rows, k in zip(counts, own)))[2],
        two_class_miou=pooled_miou[at],
        best_two_class_miou=max(pooled_miou),
        best_mean_two_class_miou=miou.mean(0).max(),
    )
    if tolerance >= 1:
        found |= dict.fromkeys([name for name in found if name.endswith("miou")])
    return found, dict(ods=pooled[1:, 2], ods_mean=f1.mean(0)), counts


def measured(images, **settings):
    curves = ThresholdCurves(**settings)
    rows = [curves.update(*image) for image in images]
    return curves, rows


def test_equal_to_a_slow_version(num_cases):
    for seed in range(num_cases):
        generator = np.random.default_rng(seed)
        images, tolerance, fixed = (
            [random_image(generator) for _ in range(generator.integers(1, 5))],
            TOLERANCES[seed % 6],
            GRID[seed % 5],
        )
        curves, rows = measured(images, thresholds=GRID, tolerance=tolerance, threshold=fixed)
        expected, found = slow_curves(images, GRID, tolerance, fixed), curves.compute()
        assert tuple(found) == CURVE_SCORES
        if expected is None:
            assert set(found.values()) == {None} and curves.num_images == 0 and curves.curve()["f1"].isna().all()
            continue
        values, along, counts = expected
        assert (curves.sums["counts"].T == counts.sum(0)).all()
        assert {name: found[name] for name in values} == pytest.approx(values, abs=1e-12)
        assert all(value is None or type(value) is float for value in found.values())
        for name, scores in along.items():
            assert scores[GRID.index(found[f"{name}_threshold"])] == pytest.approx(scores.max(), abs=1e-12)
            nearer = [k for k in range(5) if abs(GRID[k] - 0.5) < abs(found[f"{name}_threshold"] - 0.5) - 1e-9]
            assert all(scores[k] < scores.max() for k in nearer)
        table = curves.curve()
        assert table["f1"].to_numpy() == pytest.approx(along["ods"], abs=1e-12) and table[
            "mean_f1"
        ].to_numpy() == pytest.approx(along["ods_mean"], abs=1e-12)
        assert found["f1"] <= found["ods_f1"] and found["mean_f1"] <= found["ods_mean_f1"] <= found["ois_f1"] + 1e-12
        for image, row in zip(images, rows):
            alone = slow_curves([image], GRID, tolerance, fixed)
            if alone is None:
                assert np.isnan(list(row.values())).all()
            else:
                assert {name: value for name, value in row.items() if name != "ap"} == pytest.approx(
                    dict(
                        precision=alone[0]["precision"],
                        recall=alone[0]["recall"],
                        f1=alone[0]["f1"],
                        best_f1=alone[0]["ods_f1"],
                        best_threshold=row["best_threshold"],
                    ),
                    abs=1e-12,
                    nan_ok=True,
                )
                assert alone[1]["ods"][GRID.index(row["best_threshold"])] == pytest.approx(row["best_f1"], abs=1e-12)


def slow_average_precision(images, tolerance):
    "Add up steps over every probability that occurs, from the highest on."
    thresholds = np.unique(np.concatenate([probability[mask != VOID] for probability, mask in images]))[::-1]
    total, last = 0.0, 0.0
    for threshold in thresholds:
        counts = np.sum([slow_counts(*image, threshold, tolerance) for image in images], axis=0)
        precision, recall, _ = slow_scores(*counts)
        total, last = total + (recall - last) * precision, recall
    return total if sum((mask == 1).sum() for _, mask in images) else None


def test_average_precision_knows_every_probability(num_cases):
    "Probabilities between those of the thresholds, far less than a hundredth apart, and near 0 and 1."
    kinds = np.concatenate([0.5 + np.arange(9) / 3000, 10.0 ** -np.arange(3, 8), 1 - 10.0 ** -np.arange(3, 7), GRID])
    for seed in range(num_cases // 2):
        generator = np.random.default_rng(9000 + seed)
        images = [random_image(generator) for _ in range(2)]
        images = [
            (generator.permutation(kinds)[np.round(probability * (len(kinds) - 1)).astype(int)].astype("float32"), mask)
            for probability, mask in images
        ]
        curves, rows = measured(images, tolerance=TOLERANCES[seed % 6])
        expected = slow_average_precision(images, TOLERANCES[seed % 6])
        assert curves.compute()["ap"] == (None if expected is None else pytest.approx(expected, abs=1e-12))
        for image, row in zip(images, rows):
            expected = slow_average_precision([image], TOLERANCES[seed % 6])
            assert row["ap"] == pytest.approx(np.nan if expected is None else expected, abs=1e-12, nan_ok=True)


def test_equal_to_torchmetrics_without_a_tolerance(num_cases):
    for seed in range(num_cases):
        generator = np.random.default_rng(1000 + seed)
        probability, mask = random_image(generator)
        (curves, _), target = measured([(probability, mask)], threshold=0.3), torch.tensor(mask.astype(np.int64))
        found, positive = (
            curves.compute(),
            torch.tensor((probability >= np.asarray(0.3, probability.dtype)).astype(np.int64)),
        )
        if (mask == 1).any():
            level = torch.tensor(levels(np.where(mask == VOID, 0, probability), LEVEL_EDGES) / 65535)
            expected = binary_average_precision(level, target, ignore_index=VOID)
            assert found["ap"] == pytest.approx(expected.item(), abs=1e-6)
        if (positive[target != VOID] + (target[target != VOID] == 1)).sum() == 0:
            continue  # torchmetrics says 0 here
        for name, function in dict(precision=binary_precision, recall=binary_recall, f1=binary_f1_score).items():
            assert found[name] == pytest.approx(function(positive, target, ignore_index=VOID).item(), abs=1e-6)
        inverse = torch.where(target == VOID, VOID, 1 - target)
        if (1 - positive)[target != VOID].sum() + (inverse == 1).sum():
            ious = [
                binary_jaccard_index(answer, truth, ignore_index=VOID).item()
                for answer, truth in ((positive, target), (1 - positive, inverse))
            ]
            assert found["two_class_miou"] == pytest.approx(sum(ious) / 2, abs=1e-6)


def slow_matching(prediction, mask, tolerance):
    predicted, true = (np.argwhere(pixels & (mask != VOID)) for pixels in (prediction, mask == 1))
    graph = nx.Graph()
    left, right = [("predicted", k) for k in range(len(predicted))], [("true", k) for k in range(len(true))]
    graph.add_nodes_from(left), graph.add_nodes_from(right)
    squared = ((predicted[:, None] - true[None]) ** 2).sum(-1)
    graph.add_edges_from((left[i], right[k]) for i, k in np.argwhere(squared <= tolerance**2 + 1e-9))
    return slow_scores(matched := len(hopcroft_karp_matching(graph, left)) // 2, len(left), matched, len(right))


def test_one_to_one_is_a_largest_matching_and_never_above_many_to_one(num_cases):
    smaller = 0
    for seed in range(num_cases):
        generator = np.random.default_rng(2000 + seed)
        probability, mask = random_image(generator)
        prediction, tolerance = probability >= 0.5, TOLERANCES[seed % 6]
        found = one_to_one(prediction, mask, tolerance)
        assert tuple(found.values()) == pytest.approx(slow_matching(prediction, mask, tolerance), abs=1e-12)
        if (mask == VOID).all():
            continue
        many = ThresholdCurves([0.5], tolerance).update(prediction.astype(np.float32), mask)
        assert all(value <= many[name] + 1e-12 for name, value in found.items())
        if tolerance < 1:
            assert found == pytest.approx({name: many[name] for name in found}, abs=1e-12)
        smaller += found["f1"] < many["f1"]
    assert smaller > num_cases // 4


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_values_under_void_never_matter(tolerance, num_cases):
    for seed in range(num_cases):
        generator = np.random.default_rng(3000 + seed)
        probability, mask = random_image(generator)
        other = probability.copy()
        other[mask == VOID] = generator.choice([0, 0.5, 1, 7, np.nan], (mask == VOID).sum())
        (first, row), (second, other_row) = (
            measured([(plane, mask)], tolerance=tolerance) for plane in (probability, other)
        )
        assert str(row) == str(other_row) and str(first.compute()) == str(second.compute())
        assert one_to_one(probability >= 0.5, mask, tolerance) == one_to_one(
            np.where(mask == VOID, 1, probability >= 0.5), mask, tolerance
        )


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_void_around_an_image_changes_nothing(tolerance, num_cases):
    for seed in range(num_cases):
        probability, mask = random_image(np.random.default_rng(4000 + seed))
        framed = np.pad(probability, 3, constant_values=1), np.pad(mask, 3, constant_values=VOID)
        assert str(measured([framed], tolerance=tolerance)[1]) == str(
            measured([(probability, mask)], tolerance=tolerance)[1]
        )


def test_merging_equals_one_pass_in_any_order():
    generator = np.random.default_rng(5)
    images = [random_image(generator) for _ in range(30)]
    whole = measured(images, tolerance=1.0)[0]
    parts = [measured(images[start::4], tolerance=1.0)[0] for start in range(4)]
    for part in (parts[3], parts[2], parts[1], ThresholdCurves(tolerance=1.0)):
        assert parts[0].merge(part) is parts[0]
    assert parts[0].num_images == whole.num_images and (parts[0].sums["counts"] == whole.sums["counts"]).all()
    assert parts[0].compute() == pytest.approx(whole.compute(), abs=1e-12)
    for settings in (dict(tolerance=0.0), dict(thresholds=GRID), dict(threshold=0.3)):
        with pytest.raises(CrackSegError, match=f"merge: found {next(iter(settings))} "):
            parts[0].merge(ThresholdCurves(**(dict(tolerance=1.0) | settings)))


def test_a_wider_tolerance_never_lowers_a_score_and_nothing_grows(num_cases):
    for seed in range(num_cases):
        image = random_image(np.random.default_rng(6000 + seed))
        scores = [measured([image], tolerance=tolerance)[0].compute() for tolerance in TOLERANCES]
        if scores[0]["f1"] is None:
            continue
        for narrow, wide in zip(scores, scores[1:]):
            assert all(
                narrow[name] <= wide[name] + 1e-12
                for name in ("precision", "recall", "f1", "ods_f1", "ods_mean_f1", "ois_f1")
            )
    curves = ThresholdCurves()
    size = sum(np.asarray(value).nbytes for value in curves.sums.values())
    for _ in range(20):
        curves.update(*image)
    assert sum(np.asarray(value).nbytes for value in curves.sums.values()) == size


def test_more_thresholds_than_a_byte_holds_and_arrays_that_are_views():
    grid = tuple(np.linspace(0.001, 0.999, 400))
    for seed in range(30):
        probability, mask = random_image(np.random.default_rng(7000 + seed))
        curves, _ = measured([(probability, mask)], thresholds=grid, tolerance=2.0, threshold=grid[300])
        for k in (0, 137, 300):
            threshold = probability.dtype.type(grid[k])
            assert (
                curves.sums["counts"][:, 1 + k].tolist() == slow_counts(probability, mask, threshold, 2.0)
                or (mask == VOID).all()
            )
        turned, _ = measured([(probability.T[::-1], mask.T[::-1])], thresholds=grid, tolerance=2.0, threshold=grid[300])
        assert (turned.sums["counts"] == curves.sums["counts"]).all()


@pytest.mark.parametrize(
    "probability, mask, message",
    [
        (np.zeros((2, 3)), np.zeros((3, 2), np.uint8), r"found shape \(2, 3\) with mask \(3, 2\)"),
        (np.zeros((1, 2, 3)), np.zeros((1, 2, 3), np.uint8), r"expected one \(H, W\)"),
        (np.zeros((0, 3)), np.zeros((0, 3), np.uint8), "not empty"),
        (np.full((2, 2), 1.5), np.zeros((2, 2), np.uint8), r"found value 1.5, expected 0..1 \(not logits\)"),
        (np.full((2, 2), np.nan), np.zeros((2, 2), np.uint8), "found value nan"),
        (np.zeros((2, 2)), np.full((2, 2), 7, np.uint8), "mask: found value 7"),
    ],
)
def test_wrong_planes_are_refused_and_leave_the_sums(probability, mask, message):
    curves = ThresholdCurves()
    with pytest.raises(CrackSegError, match=message):
        curves.update(probability, mask)
    assert curves.num_images == 0


def test_the_picture_of_many_curves_and_of_none():
    generator = np.random.default_rng(8)
    curves = {
        f"model {k}": measured([random_image(generator, void=False)], tolerance=float(k % 3))[0] for k in range(6)
    }
    figure = show_curves({**curves, "empty": ThresholdCurves()}, "title")
    assert len(figure.axes[1].get_legend().get_texts()) == 6
    styles = {
        (line.get_color(), line.get_linestyle())
        for line in figure.axes[1].lines
        if line.get_label().startswith("model")
    }
    assert len(styles) == 6
    assert show_curves({}).axes[1].get_legend() is None
