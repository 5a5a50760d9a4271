"Class weights against counts by hand, their properties, files that cannot be trusted, and what a run may ask for."

import json
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import line_of

from crackseg_nb.core.checks import VOID, CrackSegError
from crackseg_nb.data.class_weights import WEIGHTINGS, ClassWeights, resolve_class_weights, weights_from_counts

NAMES = ("background", "crack", "spalling", "corrosion")
FINGERPRINT, OTHER = "ab" * 32, "cd" * 32
FORMULAS = WEIGHTINGS[1:]


@st.composite
def counts(draw, absent=True):
    "Pixels and images of two to six classes, at least one of which occurs."
    images = draw(st.lists(st.integers(0 if absent else 1, 500), min_size=2, max_size=6).filter(any))
    pixels = [draw(st.integers(number, 10**7 * number)) for number in images]
    return np.array(pixels), np.array(images)


# ---------------------------------------------------------------- formulas


def by_hand(masks, num_classes, method, beta):
    "Weights in exact fractions where that can be, from masks pixel by pixel."
    pixels, images = [0] * num_classes, [0] * num_classes
    for mask in masks:
        shown = set()
        for value in mask.ravel().tolist():
            if value == VOID:
                continue
            pixels[value] += 1
            shown.add(value)
        for value in shown:
            images[value] += 1
    total, raw = sum(pixels), {}
    for index in range(num_classes):
        if not pixels[index]:
            continue
        if method == "inverse":
            raw[index] = Fraction(total, pixels[index])
        if method == "inverse_sqrt":
            raw[index] = (total / pixels[index]) ** 0.5
        if method == "effective":
            raw[index] = 1 / sum(Fraction(beta) ** power for power in range(images[index]))  # the geometric sum
    mean = sum(raw.values()) / len(raw)
    return pixels, images, [float(raw[index] / mean) if index in raw else 0.0 for index in range(num_classes)]


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("seed", range(4))
def test_weights_equal_a_computation_by_hand(method, seed):
    generator, num_classes = np.random.default_rng(seed), 5
    odds = np.array([0.7, 0.02, 0.2, 0, 0.08])  # class 3 never occurs
    masks = [generator.choice(num_classes, (12, 9), p=odds).astype(np.uint8) for _ in range(9)]
    for mask in masks:
        mask[generator.random(mask.shape) < 0.2] = VOID
    pixels, images, expected = by_hand(masks, num_classes, method, 0.9)
    assert sum(pixels) < 9 * 108 and pixels[3] == images[3] == 0  # there is void, and an absent class
    found = weights_from_counts(pixels, images, method, beta=0.9)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(counts(), st.sampled_from(FORMULAS))
def test_the_mean_over_the_classes_that_occur_is_one(found, method):
    pixels, images = found
    weights = weights_from_counts(pixels, images, method)
    assert (
        np.isclose(weights[pixels > 0].mean(), 1) and not weights[pixels == 0].any() and (weights[pixels > 0] > 0).all()
    )


@given(counts(), st.sampled_from(["inverse", "inverse_sqrt"]), st.integers(2, 1000))
def test_the_size_of_the_data_set_is_irrelevant_to_inverse_weights(found, method, factor):
    pixels, images = found
    np.testing.assert_allclose(
        weights_from_counts(factor * pixels, images, method), weights_from_counts(pixels, images, method), rtol=1e-9
    )


@given(counts(absent=False), st.sampled_from(FORMULAS))
def test_the_rarer_class_never_gets_the_smaller_weight(found, method):
    weights, seen = weights_from_counts(*found, method), found[1] if method == "effective" else found[0]
    for one in range(len(seen)):
        for other in range(len(seen)):
            if seen[one] < seen[other]:
                assert weights[one] >= weights[other] * (1 - 1e-12)


@given(counts(absent=False))
def test_the_ratio_of_inverse_is_the_square_of_that_of_inverse_sqrt(found):
    inverse, root = (weights_from_counts(*found, method) for method in ("inverse", "inverse_sqrt"))
    np.testing.assert_allclose(inverse / inverse[0], (root / root[0]) ** 2, rtol=1e-9)


def test_nothing_is_clipped():
    weights = weights_from_counts([10**9, 10], [100, 1], "inverse")
    assert np.isclose(weights[1] / weights[0], 10**8)


def test_effective_numbers_of_images_and_of_pixels():
    pixels, images = [10**6, 10**4, 10**3], [200, 30, 5]
    assert np.ptp(weights_from_counts(pixels, images, "effective")) > 1
    assert np.ptp(weights_from_counts(pixels, pixels, "effective")) < 1e-4  # saturated
    np.testing.assert_allclose(weights_from_counts(pixels, images, "effective", beta=0), 1)


def test_none_weighs_all_alike():
    assert weights_from_counts([5, 0, 1], [1, 0, 1], "none").tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "pixels, images, message",
    [
        ([1, 2], [1], "images: found 1 class, expected 2"),
        ([0, 0], [0, 0], "pixels: found none in any class"),
        ([-1, 2], [1, 1], "pixels: found [-1, 2]"),
        ([1.5, 2], [1, 1], "pixels: found [1.5, 2.0]"),
        ([[1, 2]], [1, 1], "expected a whole number from 0 for each class"),
        ([5, 2], [1, 0], "found class 1 with 2 pixels in 0 images"),
        ([5, 0], [1, 1], "found class 1 with 0 pixels in 1 image"),
        ([5, 2], [1, 3], "found class 1 with 2 pixels in 3 images"),
    ],
)
def test_counts_that_no_data_set_can_have_are_refused(pixels, images, message):
    with pytest.raises(CrackSegError) as error:
        weights_from_counts(pixels, images, "inverse")
    assert message in line_of(error)


@pytest.mark.parametrize(
    "beta, message", [(1, "found 1.0"), (-0.1, "found -0.1"), (float("nan"), "found nan"), ("x", "found 'x'")]
)
def test_a_beta_that_makes_no_sense_is_refused(beta, message):
    with pytest.raises(CrackSegError) as error:
        weights_from_counts([5, 2], [1, 1], "effective", beta)
    assert line_of(error).startswith("beta: " + message)


# ---------------------------------------------------------------- files

PIXELS, IMAGES = np.array([90001, 700, 1300, 0]), np.array([31, 7, 12, 0])


def some_weights(method="effective", beta=0.97):
    return resolve_class_weights(method, PIXELS, IMAGES, NAMES, FINGERPRINT, beta)


def load(path, names=NAMES, fingerprint=FINGERPRINT):
    return ClassWeights.load(path, names, fingerprint)


@given(counts(), st.sampled_from(FORMULAS), st.floats(0, 0.999999))
def test_a_file_gives_back_every_bit(tmp_path_factory, found, method, beta):
    path, names = (
        tmp_path_factory.getbasetemp() / "class_weights.json",
        tuple(f"kind {index}" for index in range(len(found[0]))),
    )
    weights = resolve_class_weights(method, *found, names, FINGERPRINT, beta)
    weights.save(path)
    again = load(path, names)
    for name in ("weights", "pixels", "images"):
        assert (
            getattr(again, name).tolist() == getattr(weights, name).tolist()
            and getattr(again, name).dtype == getattr(weights, name).dtype
        )
    assert (again.method, again.class_names, again.fingerprint, again.beta) == (method, names, FINGERPRINT, beta)


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "class_weights.json"
    some_weights().save(path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        some_weights("inverse").save(path)
    assert path.read_text() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_missing_file_a_folder_and_a_name_too_long_are_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path, tmp_path / ("x" * 300 + ".json")):
        with pytest.raises(CrackSegError) as error:
            load(path)
        assert str(path) in line_of(error) and "expected class weights as JSON" in line_of(error)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "found no readable JSON"),
        (b'{"method": ', "found no readable JSON"),
        (b"\xff\xfe", "found no readable JSON"),
        (b"[" * 100000, "found no readable JSON"),
        (b"[1, 2]", "found list, expected an object with method"),
        (b"null", "found NoneType"),
        (b'{"weight": [1]}', "did you mean 'weights'?"),
        (b'{"method": "inverse"}', "found no 'class_names'"),
    ],
)
def test_content_that_is_no_class_weights_is_refused(tmp_path, content, message):
    path = tmp_path / "class_weights.json"
    path.write_bytes(content)
    with pytest.raises(CrackSegError) as error:
        load(path)
    assert str(path) in line_of(error) and message in line_of(error)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("weights", [1, 2, 3], "found 3 numbers, expected 4"),
        ("weights", "heavy", "found 'heavy', expected 4, one for each of background"),
        ("weights", [1, 2, 3, None], "weights of 'corrosion': found None"),
        ("weights", [1, 2, 3, True], "weights of 'corrosion': found True"),
        ("weights", [1, 2, -3, 0], "weights of 'spalling': found -3"),
        ("weights", [1, float("nan"), 3, 0], "weights of 'crack': found nan"),
        ("weights", [float("inf"), 1, 3, 0], "weights of 'background': found inf"),
        ("weights", [10**400, 1, 3, 0], "weights of 'background': found inf"),
        ("weights", [0, 0, 0, 1], "0 for each class that occurs"),
        ("pixels", [1.5, 1, 1, 0], "pixels of 'background': found 1.5, expected a whole number"),
        ("pixels", [0, 0, 0, 0], "found none in any class"),
        ("images", [1, 1, 1], "found 3 numbers, expected 4"),
        ("images", [1, 1, 1, 1], "found class 3 with 0 pixels in 1 image"),
        ("method", "invers", "did you mean 'inverse'?"),
        ("method", ["inverse"], "method: found"),
        ("beta", 1, "beta: found 1.0"),
        ("beta", "0.9", "beta: found '0.9'"),
        (
            "class_names",
            list(NAMES[:3]),
            "found a class list of another length (3), expected 4: background, crack, spalling, corrosion",
        ),
        ("class_names", "crack", "found a class list of another length ('crack')"),
        ("class_names", ["background", "spalling", "crack", "corrosion"], "found class 'spalling', expected 'crack'"),
        (
            "fingerprint",
            OTHER,
            f"found a weights file of another data set (fingerprint '{OTHER[:12]}'), expected '{FINGERPRINT[:12]}'",
        ),
        ("fingerprint", 7, "found a weights file of another data set"),
    ],
)
def test_a_file_with_one_wrong_value_is_refused(tmp_path, key, value, message):
    path = tmp_path / "class_weights.json"
    some_weights().save(path)
    content = json.loads(path.read_text())
    assert key in content
    path.write_text(json.dumps({**content, key: value}))
    with pytest.raises(CrackSegError) as error:
        load(path)
    assert line_of(error).startswith(f"{path}: ") and message in line_of(error)


def test_a_file_for_other_classes_is_refused_before_its_data_set_is(tmp_path):
    path = tmp_path / "class_weights.json"
    some_weights().save(path)
    with pytest.raises(CrackSegError) as error:
        load(path, NAMES[:2], OTHER)
    assert "class list of another length (4), expected 2: background, crack" in line_of(error)


# ---------------------------------------------------------------- what a run asks for


def resolve(choice):
    return resolve_class_weights(choice, PIXELS, IMAGES, NAMES, FINGERPRINT)


def test_none_gives_none():
    assert resolve("none") is None


@pytest.mark.parametrize("method", FORMULAS)
def test_a_formula_by_name(method):
    found = resolve(method)
    assert found.weights.tolist() == weights_from_counts(PIXELS, IMAGES, method).tolist()
    assert (found.method, found.class_names, found.fingerprint) == (method, NAMES, FINGERPRINT)


def test_beta_is_passed_on():
    assert some_weights(beta=0.5).weights.tolist() == weights_from_counts(PIXELS, IMAGES, "effective", 0.5).tolist()
    assert "beta 0.5" in some_weights(beta=0.5).describe()


@pytest.mark.parametrize("choice", ["1,2.5,3e1,0", " 1, 2.5 ,30 , 0 "])
def test_numbers_are_taken_as_they_are(choice, tmp_path):
    found = resolve(choice)
    assert found.method == "given" and found.weights.tolist() == [1, 2.5, 30, 0]
    found.save(tmp_path / "given.json")
    assert resolve(str(tmp_path / "given.json")).weights.tolist() == [1, 2.5, 30, 0]


def test_numbers_for_many_classes_are_no_file_name():
    names = tuple(f"kind {index}" for index in range(80))
    assert len(resolve_class_weights(",".join(["0.123456"] * 80), [9] * 80, [1] * 80, names, "").weights) == 80


def test_a_file_by_its_path(tmp_path):
    some_weights().save(tmp_path / "my weights, old.json")
    assert resolve(str(tmp_path / "my weights, old.json")).weights.tolist() == some_weights().weights.tolist()
    with pytest.raises(CrackSegError) as error:
        resolve_class_weights(str(tmp_path / "my weights, old.json"), PIXELS, IMAGES, NAMES, OTHER)
    assert OTHER[:12] in line_of(error) and FINGERPRINT[:12] in line_of(error)


@pytest.mark.parametrize(
    "choice, message",
    [
        ("1,5", "class_weights: found 2 numbers, expected 4, one for each of background, crack, spalling, corrosion"),
        ("3", "class_weights: found 1 number, expected 4"),
        ("1,1,1,-1", "class_weights of 'corrosion': found -1.0"),
        ("1,nan,1,1", "class_weights of 'crack': found nan"),
        ("0,0,0,1", "0 for each class that occurs"),
        ("1,x,1,1", "class_weights: found '1,x,1,1', expected one of none, inverse_sqrt"),
        ("1,,1,1", "found '1,,1,1'"),
        ("inverse-sqrt", "did you mean 'inverse_sqrt'?"),
        ("Effective", "did you mean 'effective'?"),
        ("given", "class_weights: found 'given'"),
        ("a .json file", "class_weights: found 'a .json file'"),
        ("a number for each class", "class_weights: found 'a number for each class'"),
        ("", "class_weights: found ''"),
        ("gone.json", "gone.json: cannot be read"),
        (None, "found 'None' (did you mean 'none'?)"),
    ],
)
def test_a_choice_that_there_is_not_is_refused(choice, message):
    with pytest.raises(CrackSegError) as error:
        resolve(choice)
    assert message in line_of(error)


def test_names_and_counts_of_different_lengths_are_refused():
    for names in (NAMES[:3], (*NAMES, "algae")):
        with pytest.raises(CrackSegError) as error:
            resolve_class_weights("inverse", PIXELS, IMAGES, names, FINGERPRINT)
        assert line_of(error) == f"class_names: found {len(names)}, expected 4 as in the counts"


# ---------------------------------------------------------------- what is shown


def test_the_table_and_the_description_show_the_range_and_who_is_absent():
    found = resolve("inverse")
    table = found.table()
    assert isinstance(table, pd.DataFrame) and list(table.columns) == ["class", "pixels", "share %", "images", "weight"]
    assert table["share %"].sum() == pytest.approx(100, abs=0.01) and table["pixels"].tolist() == PIXELS.tolist()
    assert table["weight"].tolist() == found.weights.tolist() and table["images"].tolist() == IMAGES.tolist()
    lines = found.describe().splitlines()
    assert len(lines) == len(NAMES) + 1 and all(line.startswith(name) for line, name in zip(lines, NAMES))
    assert "weight 0 (in no training image" in lines[3]
    present = found.weights[:3]
    ratio = present.max() / present.min()
    assert (
        f"lowest {present.min():.4g} (background), highest {present.max():.4g} (crack), ratio {ratio:.3g}" in lines[-1]
    )
    assert "ratio inf" in resolve("1,0,2,1").describe()  # a class that occurs and weighs nothing
