"Lines, boundaries, connections and widths: against slow versions, under void, in limiting cases, over many images."

import time
from math import hypot, inf, isnan, nan

import cv2
import numpy as np
import pandas as pd
import pytest
from messages import one_line
from scipy.spatial.distance import cdist
from skimage.morphology import skeletonize

from crackseg_nb.core.checks import VOID
from crackseg_nb.figures.photos import OUTCOMES
from crackseg_nb.metrics.geometry import (
    SHAPE_SCORES,
    GeometryScores,
    line_outcomes,
    match_pair,
    shape_scores,
    show_geometry,
)
from crackseg_nb.metrics.widths import (
    WIDTHS,
    inscribed,
    local_widths,
    show_widths,
    trace,
    trace_pair,
    width_classes,
    width_counts,
    width_scores,
)
from crackseg_nb.synthetic.cracks import SyntheticConfig, synthesize

EIGHT = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]
FOUR = [(-1, 0), (1, 0), (0, -1), (0, 1)]
SCORES_OF_MATCHES = SHAPE_SCORES[:11]


def random_case(seed, void=True):
    "Return a probability and a mask of lines, blobs or single pixels; the prediction is the mask disturbed or another."
    generator = np.random.default_rng(seed)
    size = tuple(generator.integers(24, 37, 2))

    def draw():
        plane = np.zeros(size, np.uint8)
        if seed % 3 == 0:
            for _ in range(generator.integers(1, 5)):
                ends = generator.integers(-5, 41, (2, 2)).tolist()
                cv2.line(plane, *ends, 1, int(generator.integers(1, 14)))
            return plane
        if seed % 3 == 1:
            return (cv2.GaussianBlur(generator.random(size), (0, 0), generator.uniform(1, 3)) > 0.52).astype(np.uint8)
        return (generator.random(size) < 0.15).astype(np.uint8)

    mask = draw()
    other = np.roll(mask, generator.integers(-1, 2, 2), (0, 1)) if generator.random() < 0.7 else draw()
    other = np.where(generator.random(size) < 0.03, 1 - other, other)
    if void:
        rows, columns = (slice(start, start + 8) for start in generator.integers(0, 30, 2))
        mask[rows, columns] = VOID
        mask[generator.random(size) < 0.01] = VOID
    return np.clip(other * 0.6 + 0.39 * generator.random(size), 0, 1).astype(np.float32), mask


def neighbours(pixel, steps, size):
    rows_columns = [(pixel[0] + down, pixel[1] + right) for down, right in steps]
    return [(row, column) for row, column in rows_columns if 0 <= row < size[0] and 0 <= column < size[1]]


def ratio(part, whole):
    return part / whole if whole else 0.0


def count_parts(area):
    "Count 8-connected parts by walking."
    left, parts = set(map(tuple, np.argwhere(area))), 0
    while left:
        parts, border = parts + 1, [left.pop()]
        while border:
            for pixel in neighbours(border.pop(), EIGHT, area.shape):
                if pixel in left:
                    left.remove(pixel)
                    border.append(pixel)
    return parts


def partnered(pixels, others, tolerance):
    if not pixels or not others:
        return 0
    return int((cdist(pixels, others).min(1) <= tolerance + 1e-9).sum())


def direct_matches(predicted, hits, true, found, empty):
    if not predicted and not true:
        return [empty] * 5
    precision, recall = ratio(hits, predicted), ratio(found, true)
    return [
        precision,
        recall,
        ratio(2 * precision * recall, precision + recall),
        hits / (hits + (predicted - hits) + (true - found)),
        (hits + found) / (predicted + true),
    ]


def direct_scores(probability, mask, threshold, tolerance):
    "Follow the protocol, pixel by pixel."
    size, known = mask.shape, mask != VOID
    true, predicted = known & (mask == 1), known & (probability >= threshold)
    counted = {
        pixel
        for pixel in np.ndindex(size)
        if known[pixel] and all(known[other] for other in neighbours(pixel, EIGHT, size))
    }

    def edge(area):
        return [
            pixel
            for pixel in np.ndindex(size)
            if area[pixel] and any(known[other] and not area[other] for other in neighbours(pixel, FOUR, size))
        ]

    def line(area):
        return [tuple(pixel) for pixel in np.argwhere(skeletonize(area))]

    def kept(pixels):
        return [pixel for pixel in pixels if pixel in counted]

    def tolerant(one, two):
        return direct_matches(
            len(kept(one)),
            partnered(kept(one), two, tolerance),
            len(kept(two)),
            partnered(kept(two), one, tolerance),
            empty,
        )

    parts, parts_predicted = count_parts(true), count_parts(predicted)
    empty = nan if parts + parts_predicted else 1.0
    lines, edges = (line(predicted), line(true)), (edge(predicted), edge(true))
    inside = direct_matches(
        len(kept(lines[0])),
        sum(true[pixel] for pixel in kept(lines[0])),
        len(kept(lines[1])),
        sum(predicted[pixel] for pixel in kept(lines[1])),
        empty,
    )
    centre, border = tolerant(*lines), tolerant(*edges)
    return [
        inside[2],
        inside[0],
        inside[1],
        *centre[:4],
        *border[:3],
        border[4],
        abs(parts - parts_predicted),
        parts,
        parts_predicted,
    ]


def direct_widths(area):
    "Return the class of width of each pixel: all distances written out, in integers of half pixels."
    line, foreign, size = np.argwhere(skeletonize(area)), np.argwhere(~area), area.shape
    squares = np.full(len(line), inf)
    for number, (row, column) in enumerate(line):
        points = [
            (r, c)
            for r in range(2 * row - 2, 2 * row + 3)
            for c in range(2 * column - 2, 2 * column + 3)
            if 0 <= r <= 2 * size[0] - 2 and 0 <= c <= 2 * size[1] - 2
        ]
        if len(foreign):
            squares[number] = cdist(points, 2 * foreign, "sqeuclidean").min(1).max()
    classes = np.full(size, -1)
    if not len(line):
        return classes
    powers = 4 * cdist(np.argwhere(area), line, "sqeuclidean") - squares
    widest = np.where(powers == powers.min(1, keepdims=True), squares, 0).max(1)
    classes[area] = (widest[:, None] ** 0.5 - 0.5**0.5 > np.array([2.5, 5.5, 10.5])).sum(1)
    return classes


def direct_width_counts(probability, mask, threshold):
    known = mask != VOID
    true, predicted = mask == 1, known & (probability >= threshold)
    classes, own = direct_widths(true), direct_widths(predicted)
    return [
        [int(plane.sum()) for plane in planes]
        for planes in (
            [classes == k for k in range(4)],
            [(classes == k) & predicted for k in range(4)],
            [(own == k) & ~true for k in range(4)],
        )
    ]


def test_scores_equal_the_slow_direct_version(num_cases):
    seen = 0
    for seed in range(num_cases):
        probability, mask = random_case(seed, void=seed % 4 > 0)
        tolerance = (0, 2, 1, 2.5, 13**0.5)[seed % 5]
        row = GeometryScores(0.5, tolerance).update(probability, mask)
        direct = direct_scores(probability, mask, 0.5, tolerance)
        np.testing.assert_allclose([row[name] for name in SHAPE_SCORES], direct, rtol=1e-12, err_msg=f"seed {seed}")
        seen += 0 < row["boundary_f1"] < 1
    assert seen > 0.65 * num_cases


def test_width_counts_equal_the_slow_direct_version(num_cases):
    total = np.zeros((3, 4), int)
    for seed in range(num_cases):
        probability, mask = random_case(seed, void=seed % 4 > 0)
        counts = width_counts(trace_pair(probability >= 0.5, mask))
        assert counts.tolist() == direct_width_counts(probability, mask, 0.5), seed
        total += counts
    assert (total > 0).all()


def test_what_lies_under_void_never_matters(num_cases):
    for seed in range(num_cases):
        probability, mask = random_case(seed)
        generator = np.random.default_rng(seed)
        hidden = np.where(mask == VOID, generator.choice([0, 1, 0.3, np.nan, 7, -2], mask.shape), probability).astype(
            np.float32
        )
        first, second = GeometryScores(0.5), GeometryScores(0.5)
        pd.testing.assert_series_equal(
            pd.Series(first.update(probability, mask)), pd.Series(second.update(hidden, mask))
        )
        assert first.width_table().equals(second.width_table())


def test_a_perfect_prediction_stays_perfect_beside_void(num_cases):
    for seed in range(num_cases):
        _, mask = random_case(seed)
        scores = shape_scores(trace_pair(mask == 1, mask), 0)
        assert {scores[name] for name in SCORES_OF_MATCHES if not isnan(scores[name])} <= {1.0}
        assert scores["betti0_error"] == 0
        counts = width_counts(trace_pair(mask == 1, mask))
        assert (counts[0] == counts[1]).all() and not counts[2].any()


def test_no_boundary_and_no_line_arises_at_void_or_at_the_border():
    mask = np.ones((30, 30), np.uint8)
    mask[10:20, 10:20] = VOID
    pair = trace_pair(mask == 1, mask)
    assert not pair.true.edge.any()
    mask[mask == 1] = 0
    fringe = cv2.dilate((mask == VOID).astype(np.uint8), np.ones((3, 3)))
    scores = shape_scores(trace_pair(fringe, mask), 2)
    assert isnan(scores["cldice"]) and isnan(scores["centreline_f1"]) and isnan(scores["boundary_f1"])
    assert scores["components_predicted"] == 1


def test_a_line_found_only_by_pixels_that_touch_void_has_no_precision():
    mask = np.zeros((12, 30), np.uint8)
    mask[4, 8:22], mask[1] = 1, VOID
    prediction = np.zeros(mask.shape, bool)
    prediction[2, 8:22] = True  # touches void: matched with, not counted
    scores = shape_scores(trace_pair(prediction, mask), 2)
    for kind in ("centreline", "boundary"):
        assert [scores[f"{kind}_{name}"] for name in ("precision", "recall", "f1")] == [0, 1, 0]
    assert scores["centreline_iou"] == 0


def test_truth_and_prediction_change_places():
    for seed in range(30):
        probability, mask = random_case(seed, void=False)
        prediction = (probability >= 0.5).astype(np.uint8)
        one, two = shape_scores(trace_pair(prediction, mask), 1), shape_scores(trace_pair(mask, prediction), 1)
        for name in ("cldice", "centreline_f1", "boundary_f1", "nsd", "betti0_error"):
            assert one[name] == pytest.approx(two[name])
        for kind in ("centreline", "boundary"):
            assert one[f"{kind}_precision"] == two[f"{kind}_recall"]
        assert (one["topology_precision"], one["components"]) == (
            two["topology_sensitivity"],
            two["components_predicted"],
        )


def test_tolerance_never_lowers_a_score():
    for seed in range(30):
        probability, mask = random_case(seed)
        pair = trace_pair(probability >= 0.5, mask)
        rows = pd.DataFrame([shape_scores(pair, tolerance) for tolerance in (0, 0.9, 1, 1.5, 2, 3, 9, 60)])[
            list(SCORES_OF_MATCHES)
        ]
        assert (rows.diff().dropna() >= -1e-12).all(axis=None)
        assert (rows.loc[0] == rows.loc[1])[~rows.loc[0].isna()].all()
        if pair.true.line.any() and pair.predicted.line.any() and not isnan(rows["centreline_f1"][7]):
            assert rows["centreline_iou"][7] in (0, 1)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, 1)])
def test_a_shift_is_forgiven_within_the_tolerance(shift):
    for seed in range(0, 60, 3):
        _, mask = random_case(seed, void=False)
        mask = np.pad(mask, 4)
        pair = trace_pair(np.roll(mask, shift, (0, 1)), mask)
        tolerant = shape_scores(pair, hypot(*shift))
        assert all(tolerant[name] == 1 for name in SCORES_OF_MATCHES[3:])
        assert shape_scores(pair, hypot(*shift) - 0.1)["boundary_f1"] < 1 or not mask.any()


def test_limiting_cases_of_random_masks():
    for seed in range(30):
        _, mask = random_case(seed, void=False)
        if not 0 < mask.sum() < mask.size:
            continue
        nothing = np.zeros_like(mask)
        for pair, parts in (((nothing, mask), count_parts(mask)), ((mask, nothing), count_parts(mask))):
            scores = shape_scores(trace_pair(*pair), 2)
            assert {scores[name] for name in SCORES_OF_MATCHES} == {0.0} and scores["betti0_error"] == parts
        scores = shape_scores(trace_pair(nothing, nothing), 2)
        assert {scores[name] for name in SCORES_OF_MATCHES} == {1.0} and scores["betti0_error"] == 0
        inverted = shape_scores(trace_pair(1 - mask, mask), 0)
        assert {inverted[name] for name in SCORES_OF_MATCHES} == {0.0}
        counts = width_counts(trace_pair(1 - mask, mask))
        assert not counts[1].any() and counts[2].sum() == (mask == 0).sum()


def test_thinning_loses_no_part():
    "All patterns of 4 x 4 pixels; a lost part would leave its pixels without a centre line, and so without a width."
    patterns = np.zeros((256, 256, 6, 6), bool)
    patterns[..., 1:5, 1:5] = (np.arange(65536)[:, None] >> np.arange(16) & 1).reshape(256, 256, 4, 4)
    area = patterns.transpose(0, 2, 1, 3).reshape(256 * 6, 256 * 6)
    parts, lines = (
        cv2.connectedComponents(plane.astype(np.uint8), connectivity=8)[0] for plane in (area, skeletonize(area))
    )
    assert parts == lines


@pytest.mark.parametrize("width", range(1, 16))
def test_lines_of_known_width(width):
    area, inner = np.zeros((2, 50, 120), bool)
    area[17 : 17 + width] = inner[17 : 17 + width, 20:-20] = True
    for plane, inside in ((area, inner), (area.T, inner.T)):
        outline = trace(plane, plane | True)
        assert (abs(local_widths(outline, inside) - width) < 0.6).all()
        assert set(width_classes(outline, inside)) == {
            0 if width <= 2 else 1 if width <= 5 else 2 if width <= 10 else 3
        }


def test_a_neighbour_does_not_change_a_width():
    for gap in (1, 2, 3, 5):
        wide = np.zeros((60, 150), bool)
        wide[20:34] = True
        both = wide.copy()
        both[33 + gap + 1] = True
        alone, beside = trace(wide, wide | True), trace(both, wide | True)
        inner = wide & (abs(np.arange(150) - 75) < 40)
        assert (local_widths(alone, inner) == local_widths(beside, inner)).all()
        assert set(width_classes(beside, both & ~wide)) == {0}


def test_masks_without_background_or_crack():
    full, empty = np.ones((20, 30), bool), np.zeros((20, 30), bool)
    assert set(width_classes(trace(full, full), full)) == {3}
    assert width_classes(trace(empty, full), empty).tolist() == []
    assert inscribed(full).min() > 11**2
    assert width_scores(np.zeros((3, 4), int))[["recall", "f1"]].isna().all(axis=None)
    for size in ((1, 1), (1, 9), (9, 1), (2, 2)):
        row = GeometryScores(0.5).update(np.ones(size, np.float32), np.ones(size, np.uint8))
        assert row["cldice"] == 1 and isnan(row["nsd"]) and row["recall_>10"] == 1


def test_false_alarms_count_in_their_own_width():
    mask, prediction = np.zeros((2, 60, 100), np.uint8)
    mask[30:44, 20:80] = 1
    prediction[30:44, 20:80] = prediction[5, 10:90] = prediction[52:56, 30:60] = 1
    prediction[44:47, 20:80] = 1  # too thick: part of a wide prediction
    table = width_scores(width_counts(trace_pair(prediction, mask)))
    assert width_counts(trace_pair(prediction, mask))[2].tolist() == [80, 120, 0, 180]
    assert table["recall"][3] == 1 and table["f1"][3] == pytest.approx(2 * 840 / (2 * 840 + 180))
    assert table["f1"][:3].isna().all()


def test_many_images():
    pairs = [random_case(seed) for seed in range(12)]
    pairs.insert(3, (np.zeros((24, 24), np.float32), np.full((24, 24), VOID, np.uint8)))
    pairs.append((np.ones((24, 24), np.float32), np.ones((24, 24), np.uint8)))
    whole, parts = GeometryScores(0.5, 1), [GeometryScores(0.5, 1) for _ in range(3)]
    rows = pd.DataFrame([whole.update(*pair) for pair in pairs])
    for number, pair in enumerate(pairs):
        parts[number % 3].update(*pair)
    result, merged = whole.compute(), parts[2].merge(parts[0]).merge(parts[1]).compute()
    assert merged == pytest.approx(result, nan_ok=True)
    assert parts[2].width_table().equals(whole.width_table())
    for name in SHAPE_SCORES:
        assert result[name] == pytest.approx(rows[name].mean())
    assert (result["num_images"], result["without_boundary"], result["without_centreline"]) == (13, 1, 0)
    counts = sum(width_counts(trace_pair(probability >= 0.5, mask)) for probability, mask in pairs)
    true, found, false = counts
    assert [result[f"recall_{width}"] for width in WIDTHS] == pytest.approx(found / true)
    assert [result[f"f1_{width}"] for width in WIDTHS] == pytest.approx(2 * found / (true + found + false))
    assert all(isinstance(value, (int, float)) for value in result.values())
    assert {key: np.size(value) for key, value in whole.sums.items()} == {
        key: np.size(value) for key, value in GeometryScores(0.5, 1).sums.items()
    }


def test_two_tolerances_share_what_is_traced():
    probability, mask = random_case(1)
    pair = trace_pair(probability >= 0.5, mask)
    for tolerance in (0, 2):
        one, two = GeometryScores(0.5, tolerance), GeometryScores(0.5, tolerance)
        pd.testing.assert_series_equal(pd.Series(one.update(probability, mask)), pd.Series(two.update_pair(pair)))
        assert one.compute() == two.compute()


def test_the_threshold_is_reached_by_its_own_value():
    mask = np.zeros((9, 9), np.uint8)
    mask[4] = 1
    for threshold in (0.05, 0.1, 0.35, 0.7):
        for kind in (np.float32, np.float64):
            probability = np.where(mask == 1, kind(threshold), kind(0))
            assert GeometryScores(threshold).update(probability, mask)["cldice"] == 1
            assert GeometryScores(threshold).update(np.nextafter(probability, kind(0)), mask)["cldice"] == 0


def test_what_is_refused():
    plane, mask = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.uint8)
    scores = GeometryScores(0.5)
    one_line(lambda: scores.update(plane[1:], mask), "probability", "(7, 8)", "(8, 8)")
    one_line(lambda: scores.update(plane + 2, mask), "probability", "2.0", "0..1")
    one_line(lambda: scores.update(plane, mask + 3), "mask", "found value 3")
    one_line(lambda: trace_pair(plane > 1, mask + 3), "mask", "found value 3")
    one_line(lambda: trace_pair((plane > 1)[:, 1:], mask), "prediction", "(8, 7)", "(8, 8)")
    one_line(lambda: GeometryScores(-0.1), "threshold", "-0.1")
    one_line(lambda: GeometryScores(0.5, "two"), "tolerance", "'two'")
    one_line(lambda: scores.merge(GeometryScores(0.4)), "merge", "threshold 0.4", "0.5")
    one_line(lambda: scores.merge(GeometryScores(0.5, 0)), "merge", "tolerance 0", "2.0")
    assert scores.compute()["num_images"] == 0


@pytest.mark.parametrize("size", [(40, 30), (7, 200), (1, 1)])
def test_pictures_tell_what_is_counted(size):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (*size, 3)).astype(np.uint8)
    mask = (generator.random(size) < 0.2).astype(np.uint8)
    mask[:2, :2] = VOID
    prediction = np.roll(mask == 1, 1, 0)
    pair = trace_pair(prediction, mask)
    for kind, lines in (
        ("centreline", (pair.predicted.line, pair.true.line)),
        ("boundary", (pair.predicted.edge, pair.true.edge)),
    ):
        outcome, matches = line_outcomes(*lines, pair, 1), match_pair(pair, 1)[kind]

        def number(name, outcome=outcome):
            return (outcome == OUTCOMES.index(name)).sum()

        assert (number("missed"), number("false alarm")) == (
            matches.true - matches.found,
            matches.predicted - matches.hits,
        )
        assert max(matches.hits, matches.found) <= number("hit") <= matches.hits + matches.found
        assert number("void") == (mask == VOID).sum()
    for figure in (show_geometry(image, prediction, mask, 1), show_widths(image, mask)):
        figure.canvas.draw()
        assert len(figure.legends) == 1 and len(figure.axes) == 2
    one_line(lambda: show_geometry(image, prediction, np.zeros((3, 3), np.uint8)), "mask")


def test_a_photo_is_measured_in_time():
    _, mask = synthesize(7, (384, 544), SyntheticConfig(empty_probability=0.0))
    probability = np.roll(mask, 2, 1).astype(np.float32)
    times = []
    for _ in range(3):
        start = time.process_time()
        GeometryScores(0.5).update(probability, mask)
        times.append(time.process_time() - start)
    assert min(times) < 0.15
