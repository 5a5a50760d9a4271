"""What people bring as it is: ids that mean void, painted masks, annotation files; each is read by parameters alone."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from test_classes import NAMES, RANDOM, random_ids
from test_sources import CRACK, one_line, palette, write_folder

from crackseg_nb.core.checks import VOID
from crackseg_nb.data.audit import audit, fingerprint
from crackseg_nb.data.dataset import CrackDataset
from crackseg_nb.data.splits import make_splits
from crackseg_nb.data.store import cache_file
from crackseg_nb.runs.config import config_to_dict, configure
from crackseg_nb.runs.experiment import find_source, load_splits
from crackseg_nb.sources.annotations import fill_polygon, fill_runs, unpack_runs
from crackseg_nb.sources.images import read_mask
from crackseg_nb.sources.registry import read_source

STREET = tuple("sky building pole road pavement tree sign fence car pedestrian bicyclist".split())  # CamVid's eleven


def mask_of(source, index=0):
    return read_mask(source.samples[index].mask, source.mask_encoding)


# ---- ids that mean void


@pytest.mark.parametrize("void", [(11,), (11, 30), (11, VOID)])
def test_ids_that_mean_void(tmp_path, void):
    masks = [random_ids(12) for _ in range(4)]
    masks[0][5] = void[-1]
    source = read_source("folder", write_folder(tmp_path, masks), class_names=STREET, ignore_index=void)
    expected = [np.where(np.isin(mask, [*void, VOID]), VOID, mask) for mask in masks]
    assert all((mask_of(source, index) == mask).all() for index, mask in enumerate(expected))
    assert all(f"mask value {value} means void" in source.notes for value in void)
    splits = make_splits(source, seed=1)
    report = audit(splits)
    assert not report.problems
    pixels = sum(report.pixels.values())
    assert (pixels == sum(np.bincount(mask.ravel(), minlength=256) for mask in expected)[:11]).all()
    loaded = CrackDataset(source.samples, source.mask_encoding, progress=False, facts=source.facts)
    assert (loaded.pair(0)[1] == expected[0]).all()


def test_a_void_beside_two_classes(tmp_path):
    mask = np.where(np.arange(60) < 20, 2, CRACK).astype(np.uint8)
    source = read_source("folder", write_folder(tmp_path, [mask, CRACK]), ignore_index=2)
    assert (mask_of(source) == np.where(mask == 2, VOID, mask)).all() and source.classes.binary
    one_line(lambda: read_source("folder", tmp_path), "found mask values 2")
    # 255 is void already; said aloud, it settles what 0 and 255 mean, and nothing but void is no data.
    write_folder(tmp_path / "full", [CRACK * 255] * 2)
    assert read_source("folder", tmp_path / "full").mask_encoding == "0/255"
    one_line(lambda: read_source("folder", tmp_path / "full", ignore_index=255), "found only 0 and void in all masks")
    # Trimaps hold a void beside a crack of 255, which as a class id is void as well.
    trimap = np.where(np.arange(60) < 20, 128, CRACK * 255).astype(np.uint8)
    write_folder(tmp_path / "trimap", [trimap, trimap])
    one_line(lambda: read_source("folder", tmp_path / "trimap", ignore_index=128), "found only 0 and void", "void ...'")
    painted = read_source("folder", tmp_path / "trimap", class_colours="0,0,0; 255,255,255; void 128,128,128")
    assert (mask_of(painted) == np.where(trimap == 128, VOID, CRACK)).all()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (dict(ignore_index=3), ["found 3, which is the id of 'scratches'", "expected ids from 4 to 255"]),
        (dict(ignore_index=(9, 0)), ["found 0, which is the id of 'background'"]),
        (dict(ignore_index=-100), ["found -100, expected ids from 4 to 255"]),
        (dict(ignore_index=256), ["found 256, expected ids from 4 to 255"]),
        (dict(ignore_index=9, class_names=NAMES[:2], mask_encoding="0/255"), ["found 9 with mask_encoding 0/255"]),
        (dict(ignore_index=9, class_names=NAMES[:2], mask_encoding="threshold"), ["mask_encoding threshold"]),
    ],
)
def test_voids_without_a_meaning_are_refused(tmp_path, options, parts):
    root = write_folder(tmp_path, [random_ids(2)])
    one_line(lambda: read_source("folder", root, **{"class_names": NAMES, **options}), "ignore_index: ", *parts)


def test_another_void_is_other_data(tmp_path):
    root = write_folder(tmp_path, [random_ids(12) for _ in range(4)])
    sources = [read_source("folder", root, class_names=STREET, ignore_index=void) for void in (11, (11, 12), (12, 11))]
    prints = [fingerprint(make_splits(source)) for source in sources]
    files = [cache_file(tmp_path, source.samples, source.mask_encoding) for source in sources]
    for found in (prints, files):
        assert found[0] != found[1] == found[2]


def test_a_run_is_told_what_is_void(tmp_path):
    root = write_folder(tmp_path, [random_ids(13) for _ in range(4)])
    given = dict(data="folder", data_dir=str(root), class_names=",".join(STREET), loss="ce")
    config = configure(**given, ignore_index="11,12")
    assert config.data.ignore_index == (11, 12)
    again = configure(**config_to_dict(config))
    for splits in (load_splits(config), load_splits(again)):
        sample = splits.train[0]
        assert set(np.unique(read_mask(sample.mask, splits.mask_encoding))) == {*range(11), VOID}
    one_line(lambda: configure(**given, ignore_index="5"), "ignore_index: found 5, which is the id of 'tree'")
    one_line(lambda: configure(ignore_index="11"), "ignore_index: found 11 with data synthetic")
    one_line(lambda: configure(**given, ignore_index="void"), "ignore_index")


# ---- painted masks

STREET_COLOURS = RANDOM.permutation(64**3)[:12]
STREET_COLOURS = [(int(code >> 12) * 4, int(code >> 6 & 63) * 4 + 1, int(code & 63) * 4) for code in STREET_COLOURS]
NAMED = "; ".join(f"{name} {red},{green},{blue}" for name, (red, green, blue) in zip((*STREET, "void"), STREET_COLOURS))


def painted(ids):
    "Return ids, 255 as the twelfth, painted in STREET_COLOURS."
    return np.array(STREET_COLOURS, np.uint8)[np.where(ids == VOID, 11, ids)]


FORMS = {
    "RGB": painted,
    "RGBA": lambda ids: Image.fromarray(painted(ids)).convert("RGBA"),
    "a palette of another order": lambda ids: palette(
        11 - np.where(ids == VOID, 11, ids), np.array(STREET_COLOURS[::-1], np.uint8).ravel().tolist()
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_painted_masks(tmp_path, form):
    masks = [random_ids(11) for _ in range(4)]
    root = write_folder(tmp_path, [FORMS[form](mask) for mask in masks])
    source = read_source("folder", root, class_colours=NAMED)
    assert source.classes.names == STREET and source.classes.colours == tuple(STREET_COLOURS[:11])
    assert all((mask_of(source, index) == mask).all() for index, mask in enumerate(masks))
    assert source.notes[1:] == ["masks are painted in 12 colours; 4 of them hold void"]
    report = audit(make_splits(source))
    assert not report.problems and sum(report.pixels.values()).sum() == sum((mask != VOID).sum() for mask in masks)


def test_painted_masks_are_turned(tmp_path):
    mask, turned = random_ids(11), Image.Exif()
    turned[274] = 6
    root = write_folder(tmp_path, [mask])
    Image.fromarray(np.rot90(painted(mask))).save(root / "masks/00.png", exif=turned)
    assert (mask_of(read_source("folder", root, class_colours=NAMED)) == mask).all()


def test_an_unknown_colour_names_file_colour_and_count(tmp_path):
    bad = painted(random_ids(11))
    bad[3, 4:9] = 1, 2, 3
    bad[0, 0] = 3, 2, 1
    root = write_folder(tmp_path, [painted(random_ids(11)), bad])
    one_line(
        lambda: read_source("folder", root, class_colours=NAMED),
        "01.png: found 5 pixels of the colour 1,2,3 and 1 of 1 others, expected the 12 of class_colours",
    )
    root = write_folder(tmp_path / "jpeg", [painted(random_ids(11))], mask_names=["00.jpg"])
    one_line(
        lambda: read_source("folder", root, class_colours=NAMED), "00.jpg: found a JPEG mask, which smears colours"
    )


def test_grey_masks_in_three_channels_need_no_colours(tmp_path):
    root = write_folder(tmp_path, [np.repeat(CRACK[..., None] * 255, 3, 2)] * 2)
    assert (mask_of(read_source("folder", root)) == CRACK).all()
    assert (mask_of(read_source("folder", root, class_colours="0,0,0; 255,255,255")) == CRACK).all()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (dict(class_colours="0,0,0; red"), "class_colours: found 'red', expected red, green and blue from 0 to 255"),
        (dict(class_colours="0,0,0; 1,2"), "class_colours: found '1,2'"),
        (dict(class_colours="0,0,0"), "class_colours: found 1 colour"),
        (dict(class_colours="0,0,0; 9,9,9; 0,0,0"), "class_colours: found 0,0,0 more than once"),
        (dict(class_colours="a 0,0,0; a 9,9,9"), "class_names: found 'a' more than once"),
        (dict(class_colours="class_dict.csv"), "class_colours: cannot read class_dict.csv"),
        (dict(class_colours=NAMED, class_names=NAMES), "class_names: found 4 names for the 11 colours"),
        (dict(class_colours=NAMED, ignore_index=12), "ignore_index: found 12 beside class_colours"),
        (dict(class_colours=NAMED, mask_encoding="class_ids"), "mask_encoding: found 'class_ids' beside class_colours"),
    ],
)
def test_colours_that_are_unclear_are_refused(tmp_path, options, part):
    root = write_folder(tmp_path, [painted(random_ids(11))])
    one_line(lambda: read_source("folder", root, **options), part)


def test_a_run_keeps_the_colours_of_a_file(tmp_path):
    masks = [random_ids(11) for _ in range(4)]
    root = write_folder(tmp_path / "photos", [painted(mask) for mask in masks])
    rows = [f"{name},{red},{green},{blue}\n" for name, (red, green, blue) in zip((*STREET, "Void"), STREET_COLOURS)]
    (root / "class_dict.csv").write_text("".join(["name, r, g, b\n", *rows]))
    config = configure(data="folder", data_dir=str(root), class_colours="class_dict.csv", loss="ce")
    (root / "class_dict.csv").unlink()
    config = configure(**config_to_dict(config))
    assert config.data.class_colours == NAMED and config.data.classes.names == STREET and config.data.num_channels == 11
    splits = load_splits(config)
    first = splits.train[0]
    assert (read_mask(first.mask, splits.mask_encoding) == masks[int(first.name)]).all()
    swapped = configure(
        **config_to_dict(config) | {"data": config_to_dict(config)["data"] | dict(class_colours=SWAPPED)}
    )
    assert fingerprint(splits) != fingerprint(load_splits(swapped))
    one_line(lambda: configure(class_colours=NAMED), "class_colours: found sky", "with data synthetic")
    one_line(lambda: configure(class_colors=NAMED), "did you mean 'class_colours'?")


SWAPPED = "; ".join(NAMED.split("; ")[i] for i in (1, 0, *range(2, 12)))


# ---- annotation files


def test_polygons_are_filled_by_the_rule_of_centres():
    random, size = np.random.default_rng(3), (37, 29)
    x, y = np.meshgrid(np.arange(37) + 0.5, np.arange(29) + 0.5)
    for corners in (3, 4, 7, 12):
        for whole in (False, True):  # corners on the grid of pixels, where edges may be level or meet centres' rows
            points = random.uniform(-8, 45, (corners, 2))
            points = points.round() if whole else points
            odd = np.zeros(x.shape, bool)
            for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, 0)):
                with np.errstate(divide="ignore", invalid="ignore"):
                    odd ^= ((y1 > y) != (y2 > y)) & (x >= x1 + (y - y1) * (x2 - x1) / (y2 - y1))
            assert (fill_polygon(size, points) == odd).all()


def test_polygons_agree_with_cocos_library_within_a_pixel():
    coco, random = pytest.importorskip("pycocotools.mask"), np.random.default_rng(4)
    for _ in range(20):
        angles = np.sort(random.uniform(0, 2 * np.pi, 9))
        points = np.stack([30 + 22 * np.cos(angles), 25 + 18 * np.sin(angles)], 1)
        theirs = coco.decode(coco.frPyObjects([points.ravel().tolist()], 50, 60))[..., 0].astype(bool)
        beside = ndimage.binary_dilation(theirs) & ~ndimage.binary_erosion(theirs)
        assert not ((fill_polygon((60, 50), points) != theirs) & ~beside).any()


@pytest.mark.parametrize("fill", [0, 1, 0.5, 0.02])
def test_run_lengths_packed_and_plain(fill):
    mask = np.random.default_rng(5).random((31, 43)) < fill
    mask[8:20, 5:40] |= fill == 0.02  # long runs beside short ones
    changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False)).tolist()
    counts = np.diff([0, *changes, mask.size]).tolist()
    assert (fill_runs((43, 31), {"size": [31, 43], "counts": counts}) == mask).all()
    coco = pytest.importorskip("pycocotools.mask")
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert unpack_runs(packed) == counts
    assert (fill_runs((43, 31), {"size": [31, 43], "counts": packed}) == mask).all()


BOX = [[5.0, 5.0, 25.0, 5.0, 25.0, 15.0, 5.0, 15.0]]
CATEGORIES = [
    {"id": 0, "name": "damage", "supercategory": "none"},  # as Roboflow adds it
    {"id": 9, "name": "spall", "supercategory": "damage"},
    {"id": 4, "name": "crack", "supercategory": "damage"},
    {"id": 5, "name": "Void", "supercategory": "damage"},
]


def annotation(image, category, segmentation, **more):
    return {"id": 1, "image_id": image, "category_id": category, "segmentation": segmentation, **more}


def write_coco(path, images, annotations, categories=CATEGORIES, place="."):
    "Write photos of 60x40 in `place` beside a COCO file, and the file; images are numbered from 1."
    (path.parent / place).mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(images):
        shade = np.random.default_rng(index).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(shade).save(path.parent / place / name)
    entries = [{"id": index, "file_name": name, "width": 60, "height": 40} for index, name in enumerate(images, 1)]
    path.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": categories}))


def test_coco_as_roboflow_exports_it(tmp_path):
    for split, names in {"train": "abcd", "valid": "ef", "test": "g"}.items():
        write_coco(
            tmp_path / split / "_annotations.coco.json",
            [f"{name}.jpg" for name in names],
            [annotation(1, 9, BOX), annotation(1, 4, [[0, 0, 9, 0, 9, 9, 0, 9], [40, 30, 60, 30, 60, 40]])],
        )
    source = read_source("coco", tmp_path)
    assert source.classes.names == ("background", "crack", "spall") and source.mask_encoding == "class_ids"
    splits = make_splits(source)
    assert splits.lengths == {"train": 4, "val": 2, "test": 1} and not audit(splits).problems
    mask = mask_of(source, [sample.name for sample in source.samples].index("train/a"))
    assert (mask[5:9, 5:9] == 1).all() and (mask[9:15, 5:25] == 2).all()  # the later lies on top
    assert (mask == 1).sum() == 81 + 100 and mask[39, 59] == 1  # the triangle has half of 20 x 10
    assert "4 images have no annotation and show background (train/b, train/c, train/d, ...)" in source.notes
    report = audit(splits)
    assert sum(report.pixels.values()).sum() == 7 * 40 * 60
    first = CrackDataset(source.samples, source.mask_encoding, preload="disk", cache=tmp_path / "cache", progress=False)
    assert (first.pair(source.samples.index(splits.train[0]))[1] == mask).all()


def test_coco_in_its_own_layout(tmp_path):
    for split, name in (("train2017", "a.png"), ("val2017", "a.png")):
        write_coco(
            tmp_path / f"annotations/instances_{split}.json", [name], [annotation(1, 4, BOX)], place=f"../{split}"
        )
    (tmp_path / "annotations/captions_train2017.json").write_text(json.dumps({"images": [], "annotations": []}))
    source = read_source("coco", tmp_path)
    assert [(sample.name, sample.split) for sample in source.samples] == [
        ("train2017/a", "train"),
        ("val2017/a", "val"),
    ]
    assert all(mask_of(source, index).sum() == 200 for index in range(2))


def test_coco_crowds_and_void(tmp_path):
    hole = np.zeros((40, 60), bool)
    hole[4:20, 4:40], hole[8:12, 8:12] = True, False
    changes = np.flatnonzero(np.diff(hole.T.ravel(), prepend=False)).tolist()
    runs = {"size": [40, 60], "counts": np.diff([0, *changes, hole.size]).tolist()}
    marks = [annotation(1, 4, runs, iscrowd=1), annotation(1, 5, [[50, 30, 60, 30, 60, 40, 50, 40]])]
    write_coco(tmp_path / "marks.json", ["a.png"], marks, place="images")
    mask = mask_of(read_source("coco", tmp_path, class_names=("wall", "crack", "spall")))
    assert ((mask == 1) == hole).all() and (mask[30:, 50:] == VOID).all() and (mask == VOID).sum() == 100


@pytest.mark.parametrize(
    ("annotations", "options", "part"),
    [
        ([annotation(1, 4, [])], {}, "marks.json (a.png): found annotation 1 with a box and no outline"),
        ([annotation(1, 4, [[1, 2, 3, 4]])], {}, "found a polygon of 4 numbers in annotation 1"),
        (
            [annotation(1, 4, {"size": [4, 4], "counts": [16]})],
            {},
            "marks.json (a.png): found run lengths of 16 pixels",
        ),
        ([annotation(1, 4, [["a"] * 6])], {}, "marks.json (a.png): found a shape that cannot be drawn"),
        ([annotation(1, 4, {"size": [40, 60], "counts": "5o"})], {}, "marks.json (a.png): found a shape that cannot"),
        ([annotation(1, 4, {"size": [40, 60]})], {}, "marks.json (a.png): found run lengths of 0 pixels"),
        ([annotation(1, 77, BOX)], {}, "found the class 'category 77', expected one of class_names"),
        ([annotation(1, 9, BOX)], dict(class_names=("wall", "spal")), "found the class 'spall'"),
        ([annotation(1, 4, BOX)], dict(class_names=("crack", "spall")), "class_names such as background,crack,spall"),
        ([annotation(7, 9, BOX)], {}, "found annotations of image_id 7, expected ids of its images"),
        ([None], {}, "marks.json: found an entry of annotations with image_id none, expected a number or text"),
        ([annotation(1, "9", BOX)], {}, "an entry of annotations with category_id '9', expected a number"),
        ([annotation(1, 9, "outline")], {}, "found annotation 1 without a list of polygons"),
        ([annotation(1, 9, [[float("nan"), 2, 3, 4, 5, 6]])], {}, "found a shape that cannot be drawn"),
        ([annotation(1, 9, BOX)], dict(ignore_index=3), "ignore_index: found 3 with data coco"),
        ([annotation(1, 9, BOX)], dict(class_colours=NAMED), "class_colours: found sky"),
        ([annotation(1, 9, BOX)], dict(mask_encoding="0/255"), "mask_encoding: found '0/255', expected one of"),
    ],
)
def test_coco_files_that_are_refused(tmp_path, annotations, options, part):
    write_coco(tmp_path / "marks.json", ["a.png"], annotations)
    one_line(lambda: read_source("coco", tmp_path, **options), part)


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        (dict(width="60"), "an entry of images with width '60', expected a number"),
        (dict(width=None), "an entry of images with width None"),
        (dict(width=-60), "found the size (-60, 40) for a.png, expected width and height in pixels"),
        (dict(height=float("inf")), "found the size (60, inf)"),
        (dict(file_name=7), "an entry of images with file_name 7, expected text"),
        (dict(id=None), "an entry of images with id None"),
    ],
)
def test_coco_images_that_are_refused(tmp_path, entry, part):
    write_coco(tmp_path / "marks.json", ["a.png"], [annotation(1, 9, BOX)])
    content = json.loads((tmp_path / "marks.json").read_text())
    content["images"][0] |= entry
    (tmp_path / "marks.json").write_text(json.dumps(content))
    one_line(lambda: read_source("coco", tmp_path), "marks.json", part)


def test_images_of_a_coco_file(tmp_path):
    write_coco(tmp_path / "marks.json", ["a.png", "b.png"], [annotation(1, 4, BOX)])
    (tmp_path / "b.png").unlink()
    one_line(lambda: read_source("coco", tmp_path), "found no file for 1 of 2 images that COCO files name (b.png)")
    Image.new("RGB", (50, 40)).save(tmp_path / "b.png")
    one_line(lambda: read_source("coco", tmp_path), "marks.json (b.png): found a mask of 60x40 for an image of 50x40")
    Image.new("RGB", (60, 40)).save(tmp_path / "b.png")
    Image.new("RGB", (60, 40)).save(tmp_path / "c.png")
    assert "left out 1 image that no annotation file names (c.png)" in read_source("coco", tmp_path).notes
    (tmp_path / "more.json").write_text((tmp_path / "marks.json").read_text())
    one_line(lambda: read_source("coco", tmp_path), "more.json (a.png): found it in marks.json as well")


def test_a_corrected_outline_is_other_data(tmp_path):
    prints = []
    for step in (0, 0, 1):
        moved = [[value + step for value in BOX[0]]]
        write_coco(tmp_path / "marks.json", ["a.png", "b.png", "c.png"], [annotation(1, 4, moved)])
        source = read_source("coco", tmp_path)
        prints.append((fingerprint(make_splits(source)), cache_file(tmp_path, source.samples, source.mask_encoding)))
    assert prints[0] == prints[1] and prints[0][0] != prints[2][0] and prints[0][1] != prints[2][1]


def test_a_run_keeps_the_classes_of_annotation_files(tmp_path):
    write_coco(tmp_path / "marks.json", [f"{name}.png" for name in "abcd"], [annotation(1, 4, BOX)])
    config = configure(data="coco", data_dir=str(tmp_path), loss="ce")
    assert config.data.class_names == ("background", "crack", "spall") and config.data.num_channels == 3
    assert load_splits(config).classes == config.data.classes
    (tmp_path / "marks.json").unlink()
    assert configure(**config_to_dict(config)).data.classes == config.data.classes  # without a look at the data
    one_line(lambda: configure(data="coco", data_dir=str(tmp_path), loss="ce"), "found no .json file")
    write_coco(tmp_path / "marks.json", ["a.png"], [], [{"id": 1}])
    one_line(
        lambda: read_source("coco", tmp_path), "marks.json: found an entry of categories with name none, expected text"
    )


def write_labelme(path, shapes, **more):
    "Write a labelme file for the photo of its name, or of `imagePath`; return its content."
    size = dict(imageHeight=40, imageWidth=60)
    content = {"imagePath": f"{path.stem}.jpg", "imageData": None, **size, "shapes": shapes, **more}
    path.write_text(json.dumps(content))
    return content


def test_labelme(tmp_path):
    marks = {
        "a": [("crack", "linestrip", [[0, 10], [60, 10]]), ("spall", "polygon", np.reshape(BOX, (4, 2)).tolist())],
        "b": [("spall", "circle", [[30, 20], [30, 30]]), ("__ignore__", "rectangle", [[9, 9], [1, 1]])],
    }
    for name, shapes in marks.items():
        Image.new("RGB", (60, 40)).save(tmp_path / f"{name}.jpg")
        shapes = [{"label": label, "shape_type": kind, "points": points} for label, kind, points in shapes]
        content = write_labelme(tmp_path / f"{name}.json", shapes)
    one_line(lambda: read_source("labelme", tmp_path), "a.json: found a linestrip (crack), which has no width")
    config = configure(data="labelme", data_dir=str(tmp_path), line_width=4, loss="ce", class_names="wall,spall,crack")
    source = find_source(config)
    line, disc = mask_of(source, 0), mask_of(source, 1)
    assert (line == 1).sum() == 200 and (line[8:12] != 0).all() and (line == 2).sum() == 4 * 60 - 4 * 20
    assert abs((disc == 1).sum() - np.pi * 100) < 8 and (disc[1:9, 1:9] == VOID).all()
    content["shapes"][0]["shape_type"] = "point"
    (tmp_path / "b.json").write_text(json.dumps(content))
    one_line(lambda: find_source(config), "b.json: found a shape of type 'point' (spall), expected polygon, rectangle")


def polygon(**more):
    return {"label": "crack", "shape_type": "polygon", "points": [[5, 5], [25, 5], [25, 15], [5, 15]], **more}


@pytest.mark.parametrize(
    ("shape", "options", "part"),
    [
        (None, {}, "found a shape with label none, expected text"),
        (polygon(label=3), {}, "found a shape with label 3"),
        (polygon(shape_type=[]), {}, "found a shape with shape_type [], expected text"),
        (polygon(points=5), {}, "found a shape with points 5, expected a list"),
        (polygon(points=[[1, 2]]), {}, "found a polygon of 1 point (crack), expected 3 or more"),
        (polygon(points=[["a", 2]] * 3), {}, "found a shape that cannot be drawn"),
        (polygon(shape_type="mask"), {}, "found a shape with mask none, expected text"),
        (polygon(shape_type="mask", mask="bm90IGEgcGljdHVyZQ=="), {}, "its mask: found a damaged or unreadable image"),
        (polygon(), dict(class_names=("crack", "spall")), "class_names such as background,crack,spall"),
        (
            polygon(),
            dict(class_names=("wall", "cracks")),
            "'crack' (did you mean 'cracks'?), expected one of class_names",
        ),
    ],
)
def test_labelme_files_that_are_refused(tmp_path, shape, options, part):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg")
    write_labelme(tmp_path / "a.json", [shape])
    one_line(lambda: read_source("labelme", tmp_path, **options), "a.json", part)


def test_labelme_masks_and_the_image_they_belong_to(tmp_path):
    small = io.BytesIO()
    Image.fromarray(np.full((6, 9), 255, np.uint8)).save(small, "PNG")
    text = base64.b64encode(small.getvalue()).decode()
    for suffix in (".jpg", ".png"):
        Image.new("RGB", (60, 40)).save(tmp_path / f"a{suffix}")
    shapes = [polygon(shape_type="mask", mask=text, points=[corner, [8, 5]]) for corner in ([-4, -2], [57, 20])]
    write_labelme(tmp_path / "a.json", shapes, imagePath="..\\photos\\a.png")
    source = read_source("labelme", tmp_path)
    assert source.samples[0].image.name == "a.png" and "(a.jpg)" in source.notes[0]
    mask = mask_of(source)
    assert mask.sum() == 5 * 4 + 3 * 6 and mask[:4, :5].all() and mask[20:26, 57:].all()


def write_yolo(root, outlines):
    "Write photos of 60 x 40 with YOLO's outlines, by names such as train/a; None: no text file."
    for name, text in outlines.items():
        for folder, suffix in (("images", ".png"), ("labels", ".txt")):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            if suffix == ".png":
                Image.new("RGB", (60, 40)).save(root / folder / f"{name}.png")
            elif text is not None:
                (root / folder / f"{name}.txt").write_text(text)


SQUARE = "0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n"  # 30 x 20 pixels of 60 x 40


def test_yolo(tmp_path):
    write_yolo(tmp_path, {"train/a": SQUARE, "train/b": None, "val/c": SQUARE.replace("0 ", "1 ", 1), "test/d": ""})
    (tmp_path / "data.yaml").write_text("path: /elsewhere\ntrain: ../train/images\nnc: 2\nnames: [crack, spall]\n")
    config = configure(data="yolo", data_dir=str(tmp_path), loss="ce")
    assert config.data.class_names == ("background", "crack", "spall")
    source = find_source(config)
    assert [sample.split for sample in source.samples] == ["test", "train", "train", "val"]
    masks = {sample.name: mask_of(source, number) for number, sample in enumerate(source.samples)}
    assert (masks["images/train/a"] == 1).sum() == 600 and (masks["images/train/a"][10:30, 15:45] == 1).all()
    assert (masks["images/val/c"] == 2).sum() == 600 and not masks["images/train/b"].any()
    assert any("2 images have no outline and show background" in note for note in source.notes)
    swapped = find_source(configure(data="yolo", data_dir=str(tmp_path), loss="ce", class_names="wall,spall,crack"))
    assert (mask_of(swapped, 1) == 2).sum() == 600


@pytest.mark.parametrize("place", ["beside", "Roboflow", "list"])
def test_places_of_yolo_files(tmp_path, place):
    if place == "beside":
        Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text(SQUARE)
        (tmp_path / "classes.txt").write_text("crack\n")
    elif place == "Roboflow":
        write_yolo(tmp_path / "train", {"a": SQUARE})
        (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: ['crack']\n")
    else:
        write_yolo(tmp_path, {"a": SQUARE})
        (tmp_path / "data.yaml").write_text("train: train.txt\nnames: {0: crack}\n")
        (tmp_path / "train.txt").write_text("./images/a.png\n")
    source = read_source("yolo", tmp_path)
    assert mask_of(source).sum() == 600 and source.samples[0].split == (None if place == "beside" else "train")


def test_text_files_beside_images_and_pictures_that_are_no_data(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("images/a", "images/b", "labels"):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{name}.png")
    (tmp_path / "images/a.txt").write_text(SQUARE)
    (tmp_path / "classes.txt").write_text("crack\n")
    source = read_source("yolo", tmp_path)
    assert mask_of(source, 0).sum() == 600 and not mask_of(source, 1).any() and len(source.samples) == 2
    assert "left out 1 image without a text file (labels.png)" in source.notes


def test_a_yolo_file_leads_nowhere_out_of_the_data(tmp_path):
    write_yolo(tmp_path / "data", {"a": SQUARE})
    (tmp_path / "list.txt").write_text(f"{tmp_path}/data/images/a.png\n")
    for place in (tmp_path / "list.txt", "../list.txt"):
        (tmp_path / "data/data.yaml").write_text(f"test: {place}\nnames: [crack]\n")
        assert read_source("yolo", tmp_path / "data").samples[0].split is None


def test_an_export_of_cvat(tmp_path):
    for name in "ab":
        Image.new("RGB", (60, 40)).save(tmp_path / f"{name}.png")
    shapes = (
        '<polygon label="spall" points="15,10;45,10;45,30;15,30" z_order="2"/>'
        '<polyline label="crack" points="0,10;60,10" z_order="0"/>'
    )
    images = "".join(
        f'<image id="{number}" name="{name}.png" width="60" height="40" subset="{subset}">{inside}</image>'
        for number, (name, subset, inside) in enumerate((("a", "Train", shapes), ("b", "Test", "")))
    )
    (tmp_path / "annotations.xml").write_text(f"<annotations>{images}</annotations>")
    one_line(
        lambda: read_source("cvat", tmp_path), "annotations.xml (a.png): found a polyline (crack), which has no width"
    )
    config = configure(data="cvat", data_dir=str(tmp_path), line_width=4, loss="ce", class_names="wall,spall,crack")
    source = find_source(config)
    mask = mask_of(source)
    assert [sample.split for sample in source.samples] == ["train", "test"] and not mask_of(source, 1).any()
    assert (mask == 1).sum() == 600 and (mask == 2).sum() == 4 * 60 - 2 * 30  # the polygon lies in front
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    one_line(lambda: find_source(config), "annotations.xml (a.png): found a mask of 60x40 for an image of 50x40")


# ---- folders by other names


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ({"crack_224_images": "crack_224_masks"}, {None}),  # a set of masonry
        ({"train": "trainannot", "val": "valannot", "test": "testannot"}, {"train", "val", "test"}),  # CamVid
        ({"train": "train_labels", "val": "val_labels"}, {"train", "val"}),  # CamVid with its painted masks
        ({"train_img": "train_lab", "test_img": "test_lab"}, {"train", "test"}),
    ],
)
def test_folders_told_by_the_end_of_their_names(tmp_path, folders, splits):
    for pair in folders.items():
        names = [f"0001TP_{index}_L.png" for index in range(2)] if pair[1].endswith("_labels") else None
        images = names and [name.replace("_L", "") for name in names]
        write_folder(tmp_path, [CRACK * 255] * 2, image_names=images, mask_names=names, folders=pair)
    source = read_source("folder", tmp_path)
    assert len(source) == 2 * len(folders) and {sample.split for sample in source.samples} == splits
    assert all((mask_of(source, index) == CRACK).all() for index in range(len(source)))
    write_folder(tmp_path, [CRACK], folders=("more", "more/of"))
    assert "more/: pictures in it were left out" in read_source("folder", tmp_path).notes


@pytest.mark.parametrize("place", ["", "train", "val"])
def test_folders_that_are_named(tmp_path, place):
    for split in {place, "train" if place else ""}:
        write_folder(tmp_path / split, [CRACK * 255] * 2, folders=("walls 2021", "truth"))
    one_line(lambda: read_source("folder", tmp_path), "found no images of 'folder'")
    source = read_source("folder", tmp_path, image_folder="walls 2021", mask_folder="truth")
    assert len(source) == (4 if place == "val" else 2) and (mask_of(source) == CRACK).all()
    one_line(lambda: read_source("folder", tmp_path, image_folder="truth"), "mask_folder: found none beside 'truth'")
    one_line(
        lambda: read_source("folder", tmp_path, image_folder="walls 2021", mask_folder="thruth"),
        "mask_folder: found no folder 'thruth'",
        "did you mean 'truth'?",
    )
    config = configure(data="folder", data_dir=str(tmp_path), image_folder="walls 2021", mask_folder="truth")
    assert len(find_source(config)) == len(source)


def test_two_mask_folders_for_one_folder_of_images(tmp_path):
    write_folder(tmp_path, [CRACK * 255] * 2, folders=("train", "train_labels"))
    write_folder(tmp_path, [CRACK * 255] * 2, folders=("train", "trainannot"))
    one_line(
        lambda: read_source("folder", tmp_path),
        "found the mask folders train_labels and trainannot for train, expected one, or the parameters image_folder",
    )
    assert len(read_source("folder", tmp_path, image_folder="train", mask_folder="trainannot")) == 2


def test_classes_whose_names_are_numbers(tmp_path):
    root = write_folder(tmp_path, [np.repeat(CRACK[..., None] * 9, 3, 2)] * 2)
    (root / "class_dict.csv").write_text("name,r,g,b\n0,0,0,0\n1,9,9,9\n")
    assert read_source("folder", root, class_colours="class_dict.csv").classes.names == ("0", "1")
    one_line(lambda: read_source("folder", root, class_colours="0,0,0; 9,9,9 7"), "class_colours: found '9,9,9 7'")
