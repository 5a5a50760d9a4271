"""Measured cracks: widths below the pixel with their intervals, lengths of lines, reference widths of real cracks."""

import csv

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.measure.cracks import center_line, measure_cracks, trace_paths
from crackseg_nb.measure.widths import (
    blurred_box,
    draw_bar,
    fit_profiles,
    grey_widths,
    probability_widths,
    relative_error,
    widen,
)


def supersampled_bar(size, width, degrees, offset, factor=16):
    "Return a bar drawn apart from `draw_bar`: the mean of `factor` x `factor` points in each pixel."
    fine = (np.arange(size * factor) + 0.5) / factor - 0.5 - (size - 1) / 2
    angle = np.deg2rad(degrees)
    inside = abs(fine[:, None] * np.cos(angle) + fine * np.sin(angle) - offset) <= width / 2
    return inside.reshape(size, factor, size, factor).mean((1, 3))


def test_the_drawn_bar_equals_a_supersampled_one():
    for width, degrees, offset in ((1, 0, 0.3), (3.4, 30, -0.2), (7, 100, 0.45), (2, 45, 0)):
        drawn = draw_bar(25, width, degrees, offset)[0]
        assert abs(drawn - supersampled_bar(25, width, degrees, offset)).max() < 0.04
        blurred = gaussian_filter(draw_bar(41, width, degrees, offset)[0], 1.2)[10:-10, 10:-10]
        assert abs(blurred - draw_bar(41, width, degrees, offset, 1.2)[0][10:-10, 10:-10]).max() < 0.01


@pytest.mark.parametrize("blur", [0, 1, 2])
def test_widths_of_bars_at_all_angles(blur):
    generator, errors, contained = np.random.default_rng(blur), [], []
    for width in (1, 2.5, 6, 15):
        for degrees in np.arange(24) * 15 + 3.5:
            offset = generator.uniform(-0.5, 0.5)
            _, points, normals = draw_bar(49, width, degrees, offset)
            drawn = supersampled_bar(49, width, degrees, offset, 6)
            drawn = gaussian_filter(drawn, blur) if blur else drawn
            middle = slice(len(points) // 2 - 4, len(points) // 2 + 5)
            found = probability_widths(drawn.clip(0, 1), points[middle], normals[middle])
            errors.append(found.width_px - width)
            contained.append((found.low_px <= width) & (width <= found.high_px))
            assert abs(found.offset_px).max() < 0.2
    errors = np.array(errors).reshape(4, -1)
    assert abs(errors.mean(1)).max() < 0.05 and abs(errors).mean(1).max() < 0.15
    assert np.mean(contained) > 0.95


@pytest.mark.parametrize("noise", [0.03, 0.05])
def test_intervals_of_noisy_maps_contain_the_width_as_often_as_they_say(noise):
    generator, contained, lengths = np.random.default_rng(1), [], []
    for number in range(60):
        width = generator.uniform(1, 12)
        drawn, points, normals = draw_bar(
            49, width, 6.5 * number, generator.uniform(-0.5, 0.5), generator.uniform(0, 2)
        )
        middle = slice(len(points) // 2 - 6, len(points) // 2 + 7)
        noisy = (drawn + generator.normal(0, noise, drawn.shape)).clip(0, 1)
        found = probability_widths(noisy, points[middle], normals[middle])
        contained.append((found.low_px <= width) & (width <= found.high_px))
        lengths.append(found.high_px - found.low_px)
    assert 0.90 <= np.mean(contained) <= 0.99
    assert np.median(lengths) < 0.7


def simulated(width, blur, count, black=None, seed=0, noise=2.0):
    "Return what is fitted to profiles whose pixels are integrated numerically."
    generator = np.random.default_rng(seed)
    fine = (np.arange(41 * 64) + 0.5) / 64 - 20.5
    profiles = []
    for middle in generator.uniform(-0.5, 0.5, count):
        box = (abs(fine - middle) <= width / 2).astype(float)
        box = gaussian_filter(box, blur * 64, mode="constant", truncate=5) if blur else box
        profiles.append(120 * (1 - 0.8 * box.reshape(41, 64).mean(1)))
    profiles = np.array(profiles)
    return fit_profiles(profiles + generator.normal(0, noise, profiles.shape), black=black)


@pytest.mark.few(1)
@pytest.mark.parametrize("black", [None, 24.0])
def test_grey_intervals_contain_the_width_as_often_as_they_say(black):
    contained = []
    for blur in (0, 1, 2):
        for width in (0.5, 2, 8):
            found = simulated(width, blur, 15, black, round(10 * width + blur))
            contained.append((found.low_px <= width) & (width <= found.high_px))
            error = found.width_px - width
            # Without the grey value of the inside, width and depth are told apart well above the blur only.
            if width >= (blur if black else max(5 * blur, 3)):
                assert abs(error.mean()) < 0.05 and abs(error).mean() < 0.15, (width, blur)
    assert 0.90 <= np.mean(contained) <= 0.99


def test_a_width_below_the_blur_is_said_to_be_unknown():
    found = simulated(1, 2, 20)
    assert (found.high_px - found.low_px).median() > 2
    assert (found.low_px > 0.4).mean() > 0.9  # no more light than all of it can be missing


def test_scaled_grey_values_have_the_same_width():
    profile = blurred_box(np.arange(-15.0, 16), np.array([[120, 0.8, 0.2, 4, 0.9]]))[0]
    profile = profile + np.random.default_rng(0).normal(0, 1, profile.shape)
    whole, small = fit_profiles(profile), fit_profiles(profile / 255)
    for name in ("width_px", "low_px", "high_px", "offset_px", "blur_px", "depth"):
        assert abs(whole[name] - small[name]).max() < 2e-3, name
    mirrored = fit_profiles(profile[:, ::-1])
    assert abs(whole.width_px - mirrored.width_px)[0] < 1e-3 and abs(whole.offset_px + mirrored.offset_px)[0] < 1e-3


def test_a_finer_step_changes_no_width():
    parameters = np.array([[120, 0.8, 0.2, 4, 0.9]])
    found = fit_profiles(blurred_box(np.arange(-15, 15.1, 0.5), parameters)[0], step=0.5)
    assert abs(found.width_px[0] - 4) < 0.01 and abs(found.offset_px[0] - 0.2) < 0.01


def test_widths_where_cracks_leave_the_image():
    drawn, points, normals = draw_bar(61, 5, 60)
    found = probability_widths(drawn, points, normals)
    known = found.width_px.notna()
    assert not known.iloc[0] and not known.iloc[-1] and known.mean() > 0.8
    assert abs(found.width_px[known] - 5).max() < 0.15
    grey = grey_widths(120 - 100 * drawn, points, normals)
    assert abs(grey.width_px[5:-5] - 5).max() < 0.2


def slanted(size, length, width, degrees, shift=0.2):
    rows, columns = np.indices((size, size)) - (size - 1) / 2 - shift
    angle = np.deg2rad(degrees)
    along, across = columns * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - columns * np.sin(angle)
    return np.clip(width / 2 - abs(across) + 0.5, 0, 1) * np.clip(length / 2 - abs(along) + 0.5, 0, 1)


MASKS = [(bool, 1), (float, 1), (np.int8, 1), (np.int64, 1)]
MASKS += [(kind, value) for kind in (np.uint8, np.uint16) for value in (1, np.iinfo(kind).max)]


@pytest.mark.parametrize(("kind", "value"), MASKS)
def test_a_mask_measures_the_same_in_every_type(kind, value):
    mask = slanted(61, 40, 5, 20, 0.2) >= 0.5
    found = measure_cracks(mask.astype(kind) * kind(value)).cracks
    pd.testing.assert_frame_equal(found, measure_cracks(mask).cracks)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(np.int32, 255), (np.int64, 255), (np.int8, -1), (np.uint8, 2), (np.uint16, 255), (np.uint32, 255), (float, 255)],
)
def test_whole_numbers_that_could_mean_anything_are_refused(kind, value):
    with pytest.raises(CrackSegError, match="^probability: found .*, expected [^\n]*$"):
        measure_cracks((slanted(61, 40, 5, 20, 0.2) >= 0.5).astype(kind) * kind(value))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_lengths_of_lines_at_all_angles(hard):
    for width in (2, 5):
        for degrees in np.arange(12) * 15 + 4:
            drawn = slanted(121, 100, width, degrees)
            cracks, branches, _ = measure_cracks((drawn >= 0.5).astype(float) if hard else drawn)
            assert len(cracks) == len(branches) == 1
            assert abs(cracks.length_px[0] - 100) < (1.5 if hard else 1), (width, degrees)
            assert abs(cracks.width_mean_px[0] - width) < (0.3 if hard else 0.1), (width, degrees)
            assert abs((cracks.orientation_deg[0] - degrees + 90) % 180 - 90) < 1
            assert abs(cracks.tortuosity[0] - 1) < 0.01


def test_a_pixel_at_the_threshold_belongs_to_the_crack():
    probability = np.zeros((40, 60))
    probability[20:23, 5:55] = 0.3
    assert [len(measure_cracks(probability, threshold)[0]) for threshold in (0.29, 0.3, 0.31)] == [1, 1, 0]
    assert measure_cracks(probability, 0.3)[0].loc[0, "area_px2"] == 150


def test_turned_and_mirrored_masks_have_the_same_figures():
    drawn = np.maximum(slanted(91, 70, 4, 20), slanted(91, 30, 3, 110, 8))
    names = ["length_px", "width_mean_px", "width_max_px", "tortuosity", "area_px2", "branches"]
    plain = measure_cracks(drawn)[0][names]
    for other in (drawn[::-1], drawn[:, ::-1], drawn.T):
        # Thinning depends on the direction, by a pixel or so.
        assert np.allclose(measure_cracks(other)[0][names], plain, rtol=0.02)


def test_a_rough_edge_grows_no_branch():
    generator, mask = np.random.default_rng(5), np.zeros((50, 140), bool)
    for column in range(10, 130):
        mask[20 - generator.integers(0, 3) : 31 + generator.integers(0, 3), column] = True
    assert len(trace_paths(center_line(mask))) == 1


def test_scale_and_its_errors():
    drawn = slanted(61, 40, 3, 10)
    plain, scaled = measure_cracks(drawn)[0], measure_cracks(drawn, mm_per_px=0.25)[0]
    assert not plain.columns.str.contains("_mm").any()
    assert scaled.length_mm[0] == pytest.approx(plain.length_px[0] / 4)
    assert scaled.area_mm2[0] == pytest.approx(plain.area_px2[0] / 16)
    for scale in (0, -1, float("nan")):
        with pytest.raises(CrackSegError, match="mm_per_px: found .*, expected a number above 0") as error:
            measure_cracks(drawn, mm_per_px=scale)
        assert "\n" not in str(error.value)


def read_profiles(folder):
    "Return the reference widths in pixels and the grey profiles, NaN beyond their ends."
    widths, profiles = [], []
    for path in sorted(folder.glob("*.csv")):
        head, values, _, *rest = csv.reader(path.read_text().splitlines())
        widths.append(float(values[[name.strip() for name in head].index("width_px")]))
        profiles.append([float(value) for row in rest for value in row if value.strip()])
    table = np.full((len(profiles), max(map(len, profiles))), np.nan)
    for row, profile in zip(table, profiles):
        row[: len(profile)] = profile
    return np.array(widths), table


def contained(table, readings):
    "Return the share of readings that lie within the intervals of a table."
    return ((table.low_px <= readings) & (readings <= table.high_px)).mean()


@pytest.mark.real_data
def test_reference_widths(data_folder):
    "Cracks read on a ruler: the grey value of their inside is taken from the other structure, and from no width."
    data = {name: read_profiles(data_folder / "CrackWidths" / name) for name in ("BridgeB", "Indoors")}
    errors, found, shares = {}, {}, {}
    for name, other in (("BridgeB", "Indoors"), ("Indoors", "BridgeB")):
        black = np.quantile(np.nanmin(data[other][1][:, 10:22], axis=1), 0.25)
        found[name] = fit_profiles(data[name][1], black=black)
        errors[name] = abs(found[name].width_px.to_numpy() - data[name][0])
    for name, other in (("BridgeB", "Indoors"), ("Indoors", "BridgeB")):
        error = relative_error(found[other].width_px, data[other][0])
        shares[name] = [contained(table, data[name][0]) for table in (found[name], widen(found[name], error))]
        assert 0.365 < error < 0.385
    pooled = np.concatenate(list(errors.values()))
    assert len(pooled) == 190 and np.isfinite(pooled).all()  # each profile is answered
    means = [values.mean() for values in (pooled, errors["Indoors"], errors["BridgeB"])]
    assert means == pytest.approx([0.35, 0.32, 0.41], abs=0.005)  # as the chapter on widths says
    assert np.median(errors["BridgeB"]) < 0.21
    assert np.sort(errors["BridgeB"])[-2:].sum() / errors["BridgeB"].sum() == pytest.approx(0.2, abs=0.01)
    assert shares["BridgeB"] == pytest.approx([0.69, 0.98], abs=0.005)
    assert shares["Indoors"] == pytest.approx([0.35, 0.93], abs=0.005)


def test_a_crack_across_the_image_is_as_long_as_the_image():
    "To the outer edges of the first and the last pixel."
    assert abs(measure_cracks(slanted(61, 200, 3, 0))[0].length_px[0] - 61) < 0.3


def test_junctions_lose_no_length():
    for width in (2, 5):
        for degrees in (4, 37, 80):
            first, stem = slanted(121, 100, width, degrees), slanted(121, 100, width, degrees + 70)
            rows, columns = np.indices((121, 121)) - 60.2
            angle = np.deg2rad(degrees)
            tee = np.maximum(first, stem * (rows * np.cos(angle) - columns * np.sin(angle) > 0))
            for drawn, number, length in ((np.maximum(first, stem), 4, 200), (tee, 3, 150)):
                cracks, branches, points = measure_cracks(drawn)
                assert cracks.branches[0] == len(branches) == number
                assert abs(cracks.length_px[0] - length) < 1
                ends = points.groupby("branch")[["row", "column"]].agg(["first", "last"]).to_numpy()
                ends = ends[:, [0, 2, 1, 3]].reshape(-1, 2)
                # All branches end on one point.
                meeting = [place for place in ends if (abs(ends - place).max(1) < 1e-9).sum() == number]
                assert len(meeting) == number and abs(np.array(meeting) - 60.2).max() < 1


def test_a_pinhole_makes_no_loop_and_a_hole_does():
    drawn = slanted(61, 50, 7, 0, 0)
    drawn[30, 30:32] = 0
    assert measure_cracks(drawn).cracks.branches[0] == 1
    drawn[29:32, 26:36] = 0
    assert measure_cracks(drawn).cracks.branches[0] == 4


def test_a_crack_measures_the_same_in_a_large_image_and_in_8_or_16_bit():
    small = np.maximum(slanted(91, 70, 4, 20), slanted(91, 60, 3, 110))
    large = np.zeros((700, 900), np.float32)
    large[300:391, 500:591] = small
    # A neighbour and its profiles are other parts of the image.
    large[100:191, 100:191] = slanted(91, 70, 6, 45)
    first, second = measure_cracks(small).cracks, measure_cracks(large).cracks.iloc[1:].reset_index(drop=True)
    moved = [name for name in first if name.endswith(("_row", "_column"))]
    assert np.allclose(first.drop(columns=["crack", *moved]), second.drop(columns=["crack", *moved]), atol=1e-3)
    assert np.allclose(second[moved] - first[moved], [[300, 500] * (len(moved) // 2)], atol=1e-3)
    for kind, highest in ((np.uint8, 255), (np.uint16, 65535)):
        found = measure_cracks(np.rint(small * highest).astype(kind)).cracks
        assert abs(found.length_px[0] - first.length_px[0]) < 0.1
        assert abs(found.width_mean_px[0] - first.width_mean_px[0]) < 0.02
