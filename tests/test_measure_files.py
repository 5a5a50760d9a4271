"""From masks on disk to tables, files and the report: scales, frames, formats, errors in one line."""

import contextlib
import io
import json
import logging
import re
import signal
import subprocess
import sys
import warnings

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import project_root, write_yaml
from crackseg_nb.core.machine import this_process
from crackseg_nb.measure.cracks import measure_cracks, show_rose
from crackseg_nb.measure.files import FORMATS, Frame, Measured, crack_outlines, write_coco, write_files
from crackseg_nb.measure.photos import (
    begin_report,
    find_predictions,
    measure_folder,
    measure_photo,
    read_plane,
    short_table,
    show_overview,
    show_widths,
    show_worst,
    worst_cracks,
)
from crackseg_nb.measure.scale import Scale, scale_from_checkerboard, scale_from_marker

rasterio = pytest.importorskip("rasterio")
pyogrio = pytest.importorskip("pyogrio")
shapely = pytest.importorskip("shapely")
ezdxf = pytest.importorskip("ezdxf")


def drawn_line(shape=(60, 100), row=25.0, width=4.0, first=20, last=80):
    rows, columns = np.indices(shape)
    inside = np.clip(columns - first + 1, 0, 1) * np.clip(last - columns + 1, 0, 1)
    return (np.clip(width / 2 - abs(rows - row) + 0.5, 0, 1) * inside).astype(np.float32)


def write_geotiff(path, values, pixel=0.002, mask=None, **more):
    options = dict(height=values.shape[0], width=values.shape[1], count=1, dtype=values.dtype, crs="EPSG:32632") | more
    transform = rasterio.Affine(pixel, 0, 570000, 0, -pixel, 5650000)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(path, "w", driver="GTiff", transform=transform, **options) as file:
            file.write(values, 1)
            if mask is not None:
                file.write_mask(mask)


def test_a_geotiff_brings_scale_frame_and_what_it_covers(tmp_path):
    line = drawn_line()
    covered = np.ones(line.shape, bool)
    covered[:, 90:] = False
    write_geotiff(tmp_path / "deck_mask.tif", (255 * (line >= 0.5)).astype(np.uint8), mask=covered)
    write_geotiff(tmp_path / "deck_probability.tif", np.rint(65535 * line).astype(np.uint16), mask=covered)
    found = measure_folder(tmp_path, formats="geojson,gpkg,dxf", out=tmp_path / "out")
    photo = found.photos.iloc[0]
    # 61 pixels of 2 mm, on the ground and not on the grid (0.9996)
    assert photo.length_mm == pytest.approx(122, rel=0.01) and photo.width_mean_mm == pytest.approx(8, rel=0.01)
    assert photo.area_m2 == pytest.approx(60 * 90 * 4e-6, rel=1e-3) and "georeference" in photo.scale
    for name, layer in (("deck_lines.geojson", None), ("deck_cracks.gpkg", "lines")):
        info, _, shapes, _ = pyogrio.raw.read(tmp_path / "out" / name, layer=layer)
        left, bottom, right, top = shapely.total_bounds(shapely.from_wkb(shapes))
        assert info["crs"] == "EPSG:32632"
        assert abs(np.array([left, right]) - 570000 - np.array([20, 81]) * 0.002).max() < 0.002
        assert abs(np.array([bottom, top]) - 5650000 + 25.5 * 0.002).max() < 0.0003
    drawing = ezdxf.readfile(tmp_path / "out" / "deck_cracks.dxf")
    assert drawing.header["$INSUNITS"] == ezdxf.units.M and not drawing.audit().errors


def test_a_mask_keeps_its_place_beside_a_probability_without_one(tmp_path):
    line = drawn_line()
    mask, soft = (255 * (line >= 0.5)).astype(np.uint8), np.rint(255 * line).astype(np.uint8)
    write_geotiff(tmp_path / "a_mask.tif", mask)
    cv2.imwrite(str(tmp_path / "a_probability.png"), soft)
    found = measure_folder(tmp_path, out=tmp_path / "out")
    assert found.photos.length_mm[0] == pytest.approx(122, rel=0.01)
    assert json.loads((tmp_path / "out" / "a_lines.geojson").read_text())["crs"]["properties"]["name"] == "EPSG:32632"
    (tmp_path / "a_probability.png").unlink()
    write_geotiff(tmp_path / "a_probability.tif", soft, pixel=0.0021)
    with pytest.raises(
        CrackSegError, match="a_probability.tif: found another place on the map, expected that of a_mas"
    ):
        measure_folder(tmp_path, out=False)
    (tmp_path / "a_mask.tif").unlink()
    cv2.imwrite(str(tmp_path / "a_mask.png"), mask)
    assert measure_folder(tmp_path, out=False).photos.length_mm[0] == pytest.approx(128, rel=0.01)


def test_a_geotiff_that_says_too_little_is_told_or_has_no_place(tmp_path):
    mask = (255 * (drawn_line() >= 0.5)).astype(np.uint8)
    options = dict(driver="GTiff", height=60, width=100, count=1, dtype="uint8")
    transform = rasterio.Affine(0.002, 0, 570000, 0, -0.002, 5650000)
    site = 'LOCAL_CS["site",UNIT["metre",1]]'
    for name, more in (
        ("empty", dict(crs="EPSG:32632", transform=transform, nodata=0)),
        ("site", dict(crs=site, transform=transform)),
        ("bare", dict(crs="EPSG:32632")),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(tmp_path / f"{name}_mask.tif", "w", **options, **more) as file:
                file.write(mask, 1)
    with pytest.raises(CrackSegError, match="empty_mask.tif: found that 0, the background, means no data; expected"):
        measure_folder(tmp_path / "empty_mask.tif", out=False)
    with pytest.raises(CrackSegError, match="site_mask.tif: found a CRS without a unit, expected one, or a scale"):
        measure_folder(tmp_path / "site_mask.tif", out=False)
    assert measure_folder(tmp_path / "site_mask.tif", 2.0, out=False).photos.length_mm[0] == pytest.approx(
        122, rel=0.01
    )
    found = measure_folder(tmp_path / "bare_mask.tif", out=tmp_path / "out")
    assert found.photos.scale[0] == "pixels: no scale is known"
    assert "crs" not in json.loads((tmp_path / "out" / "bare_lines.geojson").read_text())


def test_the_mask_decides_what_is_a_crack_and_the_probability_where_its_edges_are(tmp_path):
    line, other = drawn_line(), drawn_line(row=45)
    probability = np.maximum(line, other)
    measured, figures = measure_photo(line >= 0.5, probability)
    assert figures.cracks == 1 and figures.width_mean_px == pytest.approx(4, abs=0.05)
    assert len(measured.outlines) == 1 and measured.outlines[0].outer[:, 0].max() < 30
    # Hysteresis: a weak stretch that the mask joined stays part of its crack.
    weak = line.copy()
    weak[:, 45:50] *= 0.4
    assert measure_photo(None, weak)[1].cracks == 2
    joined, figures = measure_photo(line >= 0.5, weak)
    assert figures.cracks == len(joined.outlines) == 1
    classes = np.where(line >= 0.5, 2, np.where(other >= 0.5, 1, 0)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "wall_mask.png"), classes)
    cv2.imwrite(str(tmp_path / "wall_probability.png"), np.rint(255 * probability).astype(np.uint8))
    alone = measure_folder(tmp_path, class_id=2, out=False).photos
    assert alone.cracks[0] == 1 and alone.width_mean_px[0] == pytest.approx(
        4, abs=0.05
    )  # below a pixel: by probability
    assert measure_folder(tmp_path, out=False).photos.cracks[0] == 2


def test_files_without_a_place_overlay_the_photo(tmp_path):
    line = drawn_line(first=0, last=99)  # leaves the photo on both sides
    measured, _ = measure_photo(None, line, 0.5)
    paths = write_files(measured, tmp_path, list(FORMATS))
    assert len(paths) == 9 and not list(tmp_path.glob(".*"))
    features = json.loads((tmp_path / "photo_outlines.geojson").read_text())["features"]
    ring = np.array(features[0]["geometry"]["coordinates"][0])
    assert abs(ring.min(0) - (0, -28)).max() < 0.6 and abs(ring.max(0) - (100, -23)).max() < 0.6
    assert shapely.Polygon(ring).exterior.is_ccw
    drawing = ezdxf.readfile(tmp_path / "photo_cracks.dxf")
    lines = drawing.modelspace().query("LWPOLYLINE[layer=='CRACK_LINES']")
    places = np.array([place[:2] for place in lines[0]])
    assert abs(np.ptp(places[:, 0]) - 50) < 0.3 and abs(places[:, 1] + 12.75).max() < 0.1  # in millimetres
    labels = json.loads((tmp_path / "photo_labelme.json").read_text())
    assert {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"} <= set(labels)


def test_run_lengths_are_those_of_coco(tmp_path):
    coco_module = pytest.importorskip("pycocotools.coco")
    generator = np.random.default_rng(3)
    for number in range(6):
        mask = cv2.GaussianBlur(generator.random((23, 31)), (0, 0), 1.2) > 0.5
        mask[:, : 2 * (number % 2)] = mask[:, -1:] = number % 2  # runs that go on in the next column
        mask[2:9, 10:17] = True
        mask[4:7, 12:15] = False
        tables = measure_cracks(mask.astype(float))
        measured = Measured(f"m{number}", mask.shape, tables, crack_outlines(mask.astype(float)))
        [path] = write_coco(measured, tmp_path)
        with contextlib.redirect_stdout(io.StringIO()):
            coco = coco_module.COCO(path)
        count, numbers = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        exact = 0
        for annotation in coco.loadAnns(coco.getAnnIds()):
            if isinstance(annotation["segmentation"], dict):
                assert (coco.annToMask(annotation).astype(bool) == (numbers == annotation["id"])).all()
                exact += 1
        assert exact


def test_outlines_are_the_same_in_every_type():
    line = drawn_line(row=25.3)
    for kind, highest in ((np.uint8, 255), (np.uint16, 65535)):
        for values in (line, (line >= 0.5).astype(np.float32)):
            [found] = crack_outlines(np.rint(highest * values).astype(kind), tolerance=0)
            [expected] = crack_outlines(values, tolerance=0)
            assert abs(found.outer - expected.outer).max() < 0.01 and (found.mask == expected.mask).all()


def test_outlines_of_random_masks_are_valid_and_have_their_area():
    generator = np.random.default_rng(1)
    for _ in range(5):
        soft = np.clip(0.5 + 4 * (cv2.GaussianBlur(generator.random((60, 80)), (0, 0), 2) - 0.5), 0, 1)
        total = 0
        for outline in crack_outlines(soft):
            polygon = shapely.Polygon(outline.outer, outline.holes)
            assert shapely.make_valid(polygon).area == pytest.approx(polygon.area, rel=1e-3)
            total += polygon.area
        assert total == pytest.approx((soft >= 0.5).sum(), rel=0.06)


@pytest.mark.parametrize("kind", ["marker", "board"])
def test_scales_of_tilted_markers(kind):
    generator = np.random.default_rng(4)
    family = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50)
    if kind == "marker":
        flat = cv2.copyMakeBorder(
            cv2.aruco.generateImageMarker(family, 5, 400), *4 * [80], cv2.BORDER_CONSTANT, value=255
        )
    else:
        flat = np.pad(255 * ((np.indices((700, 1000)) // 100).sum(0) % 2).astype(np.uint8), 80, constant_values=255)
    for _ in range(4):
        height, width = flat.shape
        corners = np.float32([[0, 0], [width, 0], [width, height], [0, height]])
        moved = corners * 0.5 + generator.uniform(0, 60, (4, 2)).astype(np.float32) + 60
        view = cv2.getPerspectiveTransform(corners, moved)
        photo = cv2.warpPerspective(cv2.GaussianBlur(flat, (0, 0), 1.5), view, (760, 620), borderValue=255)
        size = 40.0  # of the marker, in millimetres; 400 px of the drawing, so that 1 px is 0.1 mm
        scale = scale_from_marker(photo, size) if kind == "marker" else scale_from_checkerboard(photo, 10)
        middle = cv2.perspectiveTransform(np.float32([[[width / 2, height / 2]]]), view)[0, 0]
        step = cv2.perspectiveTransform(np.float64([[middle, middle + (1, 0), middle + (0, 1)]]), np.linalg.inv(view))[
            0
        ]
        truth = 0.1 * abs(np.linalg.det(step[1:] - step[0])) ** 0.5
        assert scale.mm_per_px == pytest.approx(truth, rel=0.02)
        assert scale.error < 0.01


def test_the_report_is_made_by_its_notebook(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    for name, row in (("a", 20.5), ("b", 30.3)):
        cv2.imwrite(str(tmp_path / f"{name}_mask.png"), 255 * (drawn_line(row=row) >= 0.5).astype(np.uint8))
    cells = json.loads((project_root() / "nbs" / "measure_cracks.ipynb").read_text())["cells"]
    variables = {"__name__": "report"}
    with contextlib.redirect_stdout(io.StringIO()) as told:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), variables)
                if "parameters" in cell["metadata"].get("tags", []):
                    variables |= dict(
                        masks=str(tmp_path), mm_per_pixel=0.5, classes="EN 1992-1-1", out=str(tmp_path / "out")
                    )
    plt.close("all")
    assert "0.5 mm/px (given)" in told.getvalue() and (tmp_path / "out" / "photos.csv").is_file()
    cracks = pd.read_csv(tmp_path / "out" / "cracks.csv")
    assert cracks.photo.tolist() == ["a", "b"] and abs(cracks.width_max_mm - 2).max() < 0.3
    assert set(cracks.width_class) == {"beyond X0, XC1"}


def test_bad_input_is_told_in_one_line_before_anything_is_written(tmp_path):
    mask = 255 * (drawn_line() >= 0.5).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a_mask.png"), mask)
    (tmp_path / "b_mask.png").write_bytes((tmp_path / "a_mask.png").read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    cv2.imwrite(str(tmp_path / "empty" / "photo.jpg"), mask)
    write_geotiff(tmp_path / "whole.tif", mask)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "c_mask.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:300])
    (tmp_path / "d").mkdir()
    cv2.imwrite(str(tmp_path / "d" / "d_mask.png"), mask)
    cv2.imwrite(str(tmp_path / "d" / "d_probability.png"), mask[:-1])
    (tmp_path / "e").mkdir()
    for suffix in (".png", ".tif"):
        cv2.imwrite(str(tmp_path / "e" / f"e_mask{suffix}"), mask)
        (tmp_path / "f").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "f" / f"f{suffix}"), mask)
    for place, settings, expected in (
        (tmp_path, dict(mm_per_pixel=0), "mm_per_pixel: found 0, expected a number above 0"),
        (tmp_path, dict(classes=[0.2]), "without a scale"),
        (tmp_path, dict(threshold=2), "threshold: found 2"),
        (tmp_path, dict(formats="shp"), "formats: found 'shp'"),
        (tmp_path / "b_mask.png", {}, "b_mask.png: found a damaged"),
        (tmp_path / "empty", {}, "found no mask, expected files NAME_mask.png"),
        (tmp_path / "c", {}, "c_mask.tif: found a damaged or unreadable image"),
        (tmp_path / "d", {}, r"d_probability.png: found shape \(59, 100\)"),
        (tmp_path / "e", {}, "found beside e_mask.png, expected one mask for each photo"),
        (tmp_path / "f", {}, "f.tif: found beside f.png, expected one mask for each photo"),
    ):
        with pytest.raises(CrackSegError, match=expected) as error:
            measure_folder(place, **settings, out=tmp_path / "out")
        assert "\n" not in str(error.value)
        assert not re.search(r"cracks\.csv", " ".join(path.name for path in tmp_path.rglob("*.csv")))
    assert [found.name for found in find_predictions(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("photos", [["empty"], ["crack", "empty"]])
def test_a_photo_without_a_crack_takes_every_setting(tmp_path, photos):
    "Its tables have no row, and the columns and types of any other."
    for name in photos:
        line = 255 * (drawn_line() >= 0.5).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"{name}_mask.png"), line if name == "crack" else 0 * line)
    settings = dict(mm_per_pixel=0.1, classes="BRE 251", width_error=0.3, min_length_px=5, formats=",".join(FORMATS))
    result = measure_folder(tmp_path, **settings, progress=False)
    assert list(result.photos["cracks"]) == [int(name == "crack") for name in photos]
    assert len(result.cracks) == len(photos) - 1
    assert result.cracks["width_class"].tolist() == ["1 very slight"] * (len(photos) - 1)
    for table in (result.cracks, result.branches, result.points):
        assert {str(kind) for kind in table.filter(regex="_(px|mm)$").dtypes} == {"float64"}
    show_widths(result, "BRE 251")
    for show in (show_overview, show_worst):
        show(result, tmp_path)


@pytest.mark.parametrize("digits", [0, 1])
def test_a_crack_of_one_width_can_be_drawn(tmp_path, digits):
    "Its widths may differ in their last digit, or not at all."
    mask = np.zeros((80, 80), np.uint8)
    mask[40:44] = 255
    cv2.imwrite(str(tmp_path / "a_mask.png"), mask)
    result = measure_folder(tmp_path, out=False)
    noise = digits * np.spacing(4.0) * (np.arange(len(result.points)) % 2)
    even = result._replace(points=result.points.assign(width_px=4 + noise))
    bars = [bar for bar in show_widths(even).axes[0].patches if bar.get_height()]
    assert all(3.9 < bar.get_x() < 4.1 for bar in bars)
    assert sum(bar.get_height() for bar in bars) == pytest.approx(result.photos["length_px"].item(), rel=0.1)


def test_each_photo_is_drawn_with_its_own_scale(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    for name in "abc":
        cv2.imwrite(str(tmp_path / f"{name}_mask.png"), 255 * (drawn_line() >= 0.5).astype(np.uint8))
    result = measure_folder(tmp_path, dict(a=1.0, b=10.0, c=10.0), out=False)
    bars = show_widths(result).axes[0].patches
    drawn = [sum(bar.get_height() for bar in bars if (bar.get_x() > 20) == wide) for wide in (False, True)]
    plt.close("all")
    # 61 px long and 4 px wide; the ends have no width
    assert drawn == pytest.approx([61, 2 * 610], rel=0.04)


def test_the_report_ranks_by_millimetres_and_leaves_no_photo_out(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    mask, wide = (255 * (drawn_line(width=width) >= 0.5).astype(np.uint8) for width in (4, 10))
    cv2.imwrite(str(tmp_path / "a_mask.png"), mask)
    cv2.imwrite(str(tmp_path / "b_mask.png"), wide)
    result = measure_folder(tmp_path, dict(a=10.0, b=1.0), out=False)
    assert worst_cracks(result, 1).index[0] == ("a", 1)
    assert short_table(result).index[0] == "a"
    for draw in (show_overview, show_worst):
        assert draw(result, tmp_path, count=1).axes[0].get_title().startswith("a")
    (tmp_path / "b_mask.png").unlink()
    write_geotiff(tmp_path / "b_mask.tif", wide)
    result = measure_folder(tmp_path, out=False)
    assert result.photos.length_mm.notna().tolist() == [False, True]
    assert not short_table(result).isna().any(axis=None)
    assert not worst_cracks(result)[["length [px]", "largest width [px]"]].isna().any(axis=None)
    assert sum(bar.get_height() for bar in show_widths(result).axes[0].patches) == pytest.approx(2 * 61, rel=0.05)
    for draw in (show_overview, show_worst):
        assert not [axis for axis in draw(result, tmp_path).axes if re.search("nan|mm", axis.get_title())]
    rose = show_rose(result.photos.filter(regex="^length").sum(skipna=False)).axes[0]
    assert sum(bar.get_height() for bar in rose.patches) == pytest.approx(2 * 2 * 61, rel=0.05)
    plt.close("all")


def test_no_mask_measures_zero_cracks_in_silence(tmp_path):
    inside = drawn_line() >= 0.5
    for values in (-inside.astype(np.int16), np.where(inside, np.nan, 0).astype(np.float32)):
        write_geotiff(tmp_path / "a_mask.tif", values)
        with pytest.raises(CrackSegError, match="a_mask.tif: found mask values (-1|nan), expected 0 and one value abo"):
            measure_folder(tmp_path, out=False)
    # Where a file has no data, its values are not looked at.
    covered = np.arange(inside.shape[1]) < 90 + 0 * inside
    write_geotiff(tmp_path / "a_mask.tif", np.where(covered, inside, np.nan).astype(np.float32), mask=covered)
    assert measure_folder(tmp_path, out=False).photos.cracks[0] == 1
    cv2.imwrite(str(tmp_path / "b_mask.png"), 255 * inside.astype(np.uint8))
    with pytest.raises(
        CrackSegError, match="class_id: found 1 for .*b_mask.png, whose one value is 255; expected none"
    ):
        measure_folder(tmp_path / "b_mask.png", class_id=1, out=False)
    assert measure_folder(tmp_path / "b_mask.png", class_id=255, out=False).photos.cracks[0] == 1
    with pytest.raises(CrackSegError, match="min_length_px: found nan"):
        measure_photo(inside, min_length_px=np.nan)
    with pytest.raises(CrackSegError, match="found mask values"):
        measure_photo(cv2.GaussianBlur(255 * inside.astype(np.uint8), (0, 0), 1))
    with pytest.raises(CrackSegError, match="found shape"):
        measure_photo(np.zeros((4, 5, 3), np.uint8))


def test_a_bad_mask_leaves_nothing_of_the_photos_before_it(tmp_path):
    mask = 255 * (drawn_line() >= 0.5).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "a_mask.png"), mask)
    cv2.imwrite(str(tmp_path / "b_mask.png"), mask)
    first = measure_folder(tmp_path).files
    assert all(path.is_file() and path.parent == tmp_path for path in first) and len(first) == 12
    kept = {path: path.read_bytes() for path in first}
    cv2.imwrite(str(tmp_path / "a_mask.png"), mask[::-1])
    mask[0, 0] = 130
    cv2.imwrite(str(tmp_path / "b_mask.png"), mask)
    for out in (tmp_path, tmp_path / "out"):
        with pytest.raises(CrackSegError, match="b_mask.png: found mask values 130, 255"):
            measure_folder(tmp_path, out=out)
    assert not list((tmp_path / "out").iterdir())
    # Results of an earlier measurement stay whole.
    assert {path: path.read_bytes() for path in first} == kept
    assert not list(tmp_path.glob(".*"))


def test_no_scale_is_said_and_a_scale_says_its_source(tmp_path):
    line = drawn_line()
    assert measure_photo(None, line)[1].scale == "pixels: no scale is known"
    told = measure_photo(None, line, Scale(0.2, "a line of 100 mm", 0.004))[1].scale
    assert told == "0.2 mm/px ± 0.4 % (a line of 100 mm)"
    assert Frame().crs is None


def test_a_mask_beyond_the_limit_of_pixels_is_read_all_the_same(tmp_path, monkeypatch):
    values = np.zeros((40, 50), np.uint8)
    values[10:12] = 255
    Image.fromarray(values).save(tmp_path / "a_mask.png")
    monkeypatch.setattr("crackseg_nb.sources.images.MAX_PIXELS", 1000)
    assert (read_plane(tmp_path / "a_mask.png")[0] == values).all()


def test_without_rasterio_no_place_on_the_map_is_lost(tmp_path, monkeypatch):
    write_geotiff(tmp_path / "a_mask.tif", np.full((40, 50), 255, np.uint8))
    Image.fromarray(np.full((40, 50), 255, np.uint8)).save(tmp_path / "b_mask.tif")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(CrackSegError, match="a place on the map, and no package rasterio"):
        read_plane(tmp_path / "a_mask.tif")
    assert read_plane(tmp_path / "b_mask.tif")[0].shape == (40, 50)


def test_what_a_killed_call_left_is_removed_by_the_next(tmp_path):
    cv2.imwrite(str(tmp_path / "a_mask.png"), (255 * (drawn_line() >= 0.5)).astype(np.uint8))
    killed = (
        "import os, signal, sys; from crackseg_nb.measure import photos; "
        "photos._measure_all = lambda *given: os.kill(os.getpid(), signal.SIGKILL); photos.measure_folder(sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", killed, tmp_path], check=False).returncode == -signal.SIGKILL
    assert len([*tmp_path.glob(".measure-*")]) == 1
    (tmp_path / ".measure-another").mkdir()
    write_yaml(tmp_path / ".measure-another" / "writer.yaml", this_process())  # at work
    measure_folder(tmp_path, progress=False)
    assert [path.name for path in tmp_path.glob(".measure-*")] == [".measure-another"]


def test_the_command_shows_the_warnings_of_its_notebook(tmp_path):
    "What the notebook prints is what the command shows."
    write_geotiff(tmp_path / "a_mask.tif", (255 * (drawn_line() >= 0.5)).astype(np.uint8), nodata=255)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        begin_report({"masks": str(tmp_path)})
    assert "a_mask.tif: found 0 and 255 alone, and 255 is declared as no data" in shown.getvalue()
    assert not logging.getLogger("crackseg_nb").handlers


def test_a_mask_whose_cracks_are_declared_as_no_data_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("crackseg_nb"), "propagate", True)
    line = drawn_line() >= 0.5
    void = np.indices(line.shape)[1] >= 90
    for name, mask in {"silent": 255 * line, "proper": np.where(void, 255, line), "outside": 255 + 0 * line}.items():
        write_geotiff(tmp_path / f"{name}_mask.tif", mask.astype(np.uint8), nodata=255)
    found = measure_folder(tmp_path, out=False).photos.set_index("photo")
    assert found.cracks.to_dict() == {"outside": 0, "proper": 1, "silent": 0}
    assert found.length_mm["proper"] == pytest.approx(122, rel=0.01)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'silent_mask.tif'}: found 0 and 255 alone, and 255 is declared as no data, so that no crack is "
        "left; if it means crack, remove that declaration (gdal_edit.py -unsetnodata)"
    ]
