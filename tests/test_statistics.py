"Intervals, paired tests and corrections against scipy, enumeration and slow versions; how often they are right."

import subprocess
import sys
from itertools import chain, combinations, product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.metrics import statistics
from crackseg_nb.metrics.statistics import (
    COUNTS,
    achieved_significance,
    bootstrap,
    compare_all,
    compare_repeats,
    conclude,
    holm,
    paired_bootstrap,
    resampled_means,
    signed_rank,
    spread,
    verdict,
)


def slow_f1(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn)


def random_counts(generator, images):
    return generator.integers(0, 500, (images, 3)) + np.array([20, 0, 0])


def random_groups(generator, images):
    "Return group names of uneven sizes, in mixed order, at least two."
    groups = generator.integers(0, max(2, images // 3), images)
    groups[:2] = 0, 1
    return generator.permutation([f"photo {group}" for group in groups])


def simulated(generator, groups=30, crops=5, photo_scatter=0.08, shift=0.0):
    "Return scores of crops around a true mean of 0.6, and the photo of each."
    photos = np.repeat(np.arange(groups), crops)
    return 0.6 + shift + generator.normal(0, photo_scatter, groups)[photos] + generator.normal(
        0, 0.05, len(photos)
    ), photos


@pytest.mark.parametrize("grouped", [False, True])
def test_resampled_sets_equal_a_loop_over_images(grouped, num_cases):
    for case in range(num_cases // 2):
        generator = np.random.default_rng(case)
        rows = random_counts(generator, int(generator.integers(2, 20)))
        codes = pd.factorize(random_groups(generator, len(rows)))[0] if grouped else np.arange(len(rows))
        drawn = np.random.default_rng(case).integers(codes.max() + 1, size=(20, codes.max() + 1))
        expected = [np.concatenate([rows[codes == group] for group in groups]).mean(0) for groups in drawn]
        np.testing.assert_allclose(resampled_means(rows, codes, 20, seed=case), expected, rtol=1e-12)


def test_parts_of_the_weights_change_nothing(monkeypatch):
    rows = random_counts(np.random.default_rng(0), 17)
    whole = resampled_means(rows, np.arange(17), 101, seed=4)
    monkeypatch.setattr(statistics, "WEIGHTS_AT_ONCE", 100)
    np.testing.assert_array_equal(resampled_means(rows, np.arange(17), 101, seed=4), whole)


def test_all_resampled_sets_of_three_images_are_equally_frequent():
    means = resampled_means(np.array([[0.0], [1.0], [10.0]]), np.arange(3), 54_000)[:, 0]
    expected = pd.Series([sum(drawn) / 3 for drawn in product([0, 1, 10], repeat=3)]).round(9).value_counts() / 27
    found = pd.Series(means).round(9).value_counts() / 54_000
    assert {*found.index} == {*expected.index}
    np.testing.assert_allclose(found.sort_index(), expected.sort_index(), atol=0.006)


def test_intervals_equal_those_of_scipy():
    for case in range(40):
        generator = np.random.default_rng(case)
        rows = random_counts(generator, int(generator.integers(15, 40)))
        tp, fp, fn = rows.T
        for statistic, data, direct in (
            ("pooled_f1", (tp, fp, fn), lambda a, b, c, axis=-1: slow_f1(a.sum(axis), b.sum(axis), c.sum(axis))),
            ("per_image_f1", (slow_f1(tp, fp, fn),), np.mean),
        ):
            expected = stats.bootstrap(
                data, direct, paired=True, vectorized=True, method="percentile", n_resamples=4000, rng=case
            )
            found = bootstrap(rows, statistic, seed=case)
            error = expected.standard_error
            np.testing.assert_allclose([found.low, found.high], expected.confidence_interval, atol=0.2 * error)
            assert np.isclose(found.value, direct(*data))


def test_intervals_of_groups_equal_those_of_scipy():
    for case in range(20):
        generator = np.random.default_rng(case)
        rows = random_counts(generator, 60)
        groups = random_groups(generator, 60)
        sums = pd.DataFrame(rows).groupby(groups).sum().to_numpy()
        expected = stats.bootstrap(
            tuple(sums.T),
            lambda a, b, c, axis=-1: slow_f1(a.sum(axis), b.sum(axis), c.sum(axis)),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=4000,
            rng=case,
        )
        found = bootstrap(rows, "pooled_f1", groups, seed=case)
        assert (found.images, found.groups) == (60, len(sums))
        np.testing.assert_allclose(
            [found.low, found.high], expected.confidence_interval, atol=0.2 * expected.standard_error
        )


def test_intervals_cover_the_truth_as_often_as_they_say(num_cases):
    trials = 2 * num_cases
    generator, inside, naive = np.random.default_rng(0), 0, 0
    for case in range(trials):
        scores, photos = simulated(generator)
        grouped, ungrouped = (
            bootstrap(scores, groups=photos, samples=1000, seed=case),
            bootstrap(scores, samples=1000, seed=case),
        )
        inside, naive = inside + (grouped.low <= 0.6 <= grouped.high), naive + (ungrouped.low <= 0.6 <= ungrouped.high)
    assert abs(inside / trials - 0.94) < 0.6 / trials**0.5
    assert naive / trials < 0.75  # crops taken for independent photos


def test_intervals_of_pooled_scores_cover_too(num_cases):
    trials = 2 * num_cases

    def crops(generator, images):
        pixels, recall, precision = (
            generator.lognormal(6, 1, images),
            generator.beta(6, 2, images),
            generator.beta(5, 2, images),
        )
        tp = pixels * recall
        return np.column_stack([tp, tp / precision - tp, pixels - tp])

    truth, inside = slow_f1(*crops(np.random.default_rng(0), 1_000_000).sum(0)), 0
    for case in range(trials):
        found = bootstrap(crops(np.random.default_rng(case + 1), 60), "pooled_f1", samples=1000, seed=case)
        inside += found.low <= truth <= found.high
    assert abs(inside / trials - 0.935) < 0.7 / trials**0.5


def test_equal_runs_are_told_apart_as_seldom_as_the_level_says(num_cases):
    trials = 2 * num_cases
    generator, bootstrapped, ranked, agreed = np.random.default_rng(1), 0, 0, 0
    for case in range(trials):
        one, photos = simulated(generator)
        other = one + simulated(generator, photo_scatter=0.03)[0] - 0.6
        found = paired_bootstrap(one, other, groups=photos, samples=1000, seed=case)
        bootstrapped, ranked = (
            bootstrapped + (found.p < 0.05),
            ranked + (signed_rank(one, other, groups=photos).p < 0.05),
        )
        agreed += (found.p < 0.05) == (found.low > 0 or found.high < 0)
    assert abs(bootstrapped / trials - 0.06) < 0.6 / trials**0.5 and abs(ranked / trials - 0.05) < 0.6 / trials**0.5
    assert agreed >= trials - 2  # a p at the very level may fall to either side


def test_pairs_resample_the_same_groups():
    generator = np.random.default_rng(2)
    for case in range(20):
        a, b, groups = random_counts(generator, 24), random_counts(generator, 24), random_groups(generator, 24)
        codes = pd.factorize(groups)[0]
        drawn = [slow_f1(*resampled_means(rows, codes, 500, seed=case).T) for rows in (a, b)]
        differences = drawn[0] - drawn[1]
        found = paired_bootstrap(a, b, "pooled_f1", groups, samples=500, seed=case)
        np.testing.assert_allclose([found.low, found.high], np.quantile(differences, [0.025, 0.975]), atol=1e-9)
        expected = 2 * (1 + min((differences <= 0).sum(), (differences >= 0).sum())) / 501
        assert np.isclose(found.p, min(1, max(expected, 0.5 ** (codes.max()))))


def test_order_of_images_and_rounding_change_nothing():
    names = [f"{place}" for place in range(30)]
    a = pd.Series(np.random.default_rng(3).random(30), index=names)
    b, groups = a + 0.1 - 0.1, {name: int(name) // 3 for name in names}
    found = paired_bootstrap(a, b, groups=groups)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert signed_rank(a, b, groups=groups) == signed_rank(a, a) and signed_rank(a, a).p == 1
    assert paired_bootstrap(a, a[::-1], groups=groups) == found
    moved = paired_bootstrap((a + 0.02)[::-1], a, groups=groups)
    assert (moved.value, moved.low, moved.high) == (0.02, 0.02, 0.02) and conclude(moved) == "better"


def slow_wilcoxon(differences):
    "Return p and effect of the signed-rank test by going through all patterns of signs."
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0, 0.0
    sizes = np.abs(differences)
    ranks = np.array([(sizes < size).sum() + ((sizes == size).sum() + 1) / 2 for size in sizes])
    balance = (ranks * np.sign(differences)).sum()
    all_balances = np.array([(ranks * signs).sum() for signs in product([-1, 1], repeat=len(ranks))])
    return (np.abs(all_balances) >= abs(balance) - 1e-9).mean(), balance / ranks.sum()


def test_signed_rank_equals_all_patterns_of_signs(num_cases):
    for case in range(num_cases):
        generator = np.random.default_rng(case)
        images = int(generator.integers(2, 10))
        one, other = (
            generator.integers(0, 12, (2, images)) / 20 if case % 2 else generator.random((2, images))
        )  # with ties and zeros, or without
        found = signed_rank(one, other)
        np.testing.assert_allclose([found.p, found.effect], slow_wilcoxon((one - other).round(9)), atol=1e-9)


def test_signed_rank_takes_the_means_of_groups():
    generator = np.random.default_rng(5)
    one, other, groups = random_counts(generator, 40), random_counts(generator, 40), np.repeat(list("abcdefgh"), 5)
    means = pd.Series(slow_f1(*one.T) - slow_f1(*other.T)).groupby(groups).mean().to_numpy()
    for statistic in ("pooled_f1", "per_image_f1"):
        found = signed_rank(one, other, statistic, groups)
        np.testing.assert_allclose([found.p, found.effect], slow_wilcoxon(means))


def test_holm_equals_the_closure_of_bonferroni(num_cases):
    for case in range(num_cases):
        generator = np.random.default_rng(case)
        p_values = (
            generator.choice([0.001, 0.01, 0.02, 0.04, 0.3, 1], generator.integers(1, 7))
            if case % 2
            else generator.random(generator.integers(1, 7)) ** 3
        )
        numbers = range(len(p_values))
        subsets = [
            list(subset)
            for subset in chain.from_iterable(combinations(numbers, size) for size in range(1, len(p_values) + 1))
        ]
        expected = [
            max(min(1, len(subset) * p_values[subset].min()) for subset in subsets if number in subset)
            for number in numbers
        ]
        np.testing.assert_allclose(holm(p_values), expected)


def test_repeats_are_compared_pair_by_pair_as_scipy_does():
    "Each system ranks the seeds in its own way, so that a score with another partner gives another interval."
    one, other = np.random.default_rng(0).normal(0.5, 0.1, (2, 6))
    found = compare_repeats(pd.DataFrame({"one": one, "other": other})).iloc[0]
    expected = stats.ttest_rel(one, other)
    interval = expected.confidence_interval(0.95)
    assert found[["difference", "p"]].tolist() == pytest.approx([np.mean(one - other), expected.pvalue])
    assert found[["low", "high"]].tolist() == pytest.approx([interval.low, interval.high])


def test_spread_equals_the_t_test(num_cases):
    for case in range(num_cases):
        generator = np.random.default_rng(case)
        one, other = generator.normal(0.7, 0.02, (2, int(generator.integers(2, 8)))) + np.array([[0.02], [0]])
        reference = stats.ttest_rel(one, other)
        found = spread(one - other, level=0.9)
        np.testing.assert_allclose([found.low, found.high], reference.confidence_interval(0.9))
        assert (found.low > 0 or found.high < 0) == (reference.pvalue < 0.1)
        assert (found.lowest, found.highest) == ((one - other).min(), (one - other).max())
    assert "one seed: the spread is unknown" in str(spread([0.7]))


@pytest.mark.parametrize("groups", [2, 4, 5])
def test_few_groups_show_nothing(groups):
    one = np.linspace(0.5, 0.9, 20)
    found = paired_bootstrap(one, one - 0.2, groups=np.arange(20) % groups)
    assert found.p == 2 / 2**groups and conclude(found) == conclude(found, margin=0.5) == "can't tell"
    assert f"20 images in {groups} groups; {groups} are too few" in verdict(found)
    assert conclude(paired_bootstrap(one, one - 0.2, groups=np.arange(20) % 6)) == "better"


def test_images_on_which_runs_agree_are_no_evidence():
    scores = np.random.default_rng(0).random(237)
    for differing in range(1, 8):
        found = paired_bootstrap(scores + 0.1 * (np.arange(237) < differing), scores)
        assert found.p >= 2 / 2**differing
        assert conclude(found) == ("can't tell" if differing < 6 else "better")


def test_significance_is_never_zero():
    assert achieved_significance(np.full(999, 0.3), 100) == achieved_significance(np.full(999, -0.3), 100) == 2 / 1000
    assert achieved_significance(np.array([-1, 1, 1, 1] * 250), 100) == 2 * 251 / 1001
    assert achieved_significance(np.zeros(10), 100) == 1


def test_comparing_all_corrects_both_tests():
    generator = np.random.default_rng(9)
    base = generator.random(40)
    tables = {
        name: pd.DataFrame({"cldice": base + shift + generator.normal(0, 0.02, 40)})
        for name, shift in (("a", 0), ("b", 0.008), ("c", 0.03), ("d", 0.008))
    }
    table = compare_all(tables, "cldice")
    assert len(table) == 6
    for raw, corrected in (("p", "corrected_p"), ("rank_p", "corrected_rank_p")):
        np.testing.assert_allclose(table[corrected], holm(table[raw]))
    pair = table.set_index(["run", "other"]).loc[("a", "c")]
    alone = paired_bootstrap(tables["a"], tables["c"], "cldice")
    assert (pair["difference"], pair["low"], pair["p"]) == (alone.value, alone.low, alone.p)
    assert pair["verdict"].startswith("a is worse than c: difference -0.0")
    lower = compare_all(tables, "cldice", higher=False).set_index(["run", "other"])
    assert lower.loc[("a", "c"), "verdict"].startswith("a is better than c: difference -0.0")
    borderline = table[(table["p"] < 0.05) & (table["corrected_p"] > 0.05)]
    assert len(borderline) and (borderline["result"] == "can't tell").all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda a, b: bootstrap(a[:1], "pooled_f1"), "found 1 image, expected at least 2"),
        (lambda a, b: bootstrap(a, "pooled_f1", ["wall"] * 6), "found all 6 images in one ('wall')"),
        (lambda a, b: bootstrap(a, "poled_f1"), "did you mean 'pooled_f1'"),
        (lambda a, b: bootstrap(a[["tp", "fp"]], "pooled_f1"), "statistic: found 'pooled_f1', expected one of tp, fp"),
        (lambda a, b: bootstrap(a.assign(fn=np.nan), "per_image_iou"), "found nan in 'fn' of image 'u'"),
        (lambda a, b: bootstrap(a.assign(tp=np.inf), "tp"), "found inf in 'tp' of image 'u'"),
        (
            lambda a, b: paired_bootstrap(a, b[1:], "pooled_f1", names=("Unet", "Swin")),
            "found 1 image only in Unet ('u')",
        ),
        (
            lambda a, b: paired_bootstrap(a, b.rename(lambda name: name * 2), "pooled_f1"),
            "found 6 images only in a ('u', 'v', 'w', …)",
        ),
        (lambda a, b: signed_rank(a, b.assign(tp=np.nan), "pooled_f1"), "b: found nan in 'tp' of image 'u'"),
        (lambda a, b: signed_rank(a, b, "pooled_f1", {"u": 1}), "groups: found none for 5 images, such as 'v'"),
        (lambda a, b: compare_all({"a": a}), "runs: found 1, expected at least 2"),
        (lambda a, b: holm([0.1, 1.2]), "p_values: found 1.2"),
    ],
)
def test_mistakes_are_told_in_one_line(call, words):
    generator = np.random.default_rng(0)
    a, b = (pd.DataFrame(random_counts(generator, 6), index=list("uvwxyz"), columns=list(COUNTS)) for _ in range(2))
    with pytest.raises(CrackSegError) as caught:
        call(a, b)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_scores_of_files_and_arrays_need_no_torch():
    "Commands that compare finished runs start in a moment: neither torch nor a drawing library is imported."
    parts = ("scores", "curves", "calibration", "widths", "geometry", "statistics")
    names = [f"crackseg_nb.metrics.{name}" for name in parts] + ["crackseg_nb.training.settings"]
    code = f"import sys, {', '.join(names)}; print(sorted({{'torch', 'matplotlib', 'skimage'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
