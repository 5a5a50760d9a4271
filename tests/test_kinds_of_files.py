"""Pictures and folders of every kind that people have: each is read right, or refused or named in one clear line."""

import os
import random
import unicodedata
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from messages import one_line
from PIL import Image
from test_sources import write_folder

from crackseg_nb.core.checks import VOID, CrackSegError
from crackseg_nb.data.audit import audit
from crackseg_nb.data.splits import make_splits
from crackseg_nb.data.store import cache_file, read_pair
from crackseg_nb.sources.images import image_size, read_image, read_mask
from crackseg_nb.sources.registry import read_source

# Where the pixel of the first row and column lies in a file of each EXIF orientation: a file is stored by the inverse.
STORE = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
GREY = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
GREY[0, 0], GREY[0, 1] = 0, 255
COLOUR = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
COLOUR[0, 0], COLOUR[0, 1] = 0, 255
MASK = np.zeros((40, 60), np.uint8)
MASK[10:13, 5:50] = 1


def with_pillow(path, values, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(values)).save(
        path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {})
    )


def with_tifffile(path, values, orientation, **settings):
    settings |= {} if values.ndim == 2 else {"photometric": "rgb"}
    tifffile.imwrite(path, np.ascontiguousarray(values), extratags=[(274, "H", 1, orientation, True)], **settings)


def planar(path, values, orientation):
    with_tifffile(path, np.moveaxis(values, -1, 0), orientation, planarconfig="separate")


def with_opencv(path, values, orientation):
    "OpenCV writes no orientation; Pillow's chunk of it is put behind the header of the PNG."
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("L", (1, 1)).save(path, exif=exif)
    small, whole = path.read_bytes(), cv2.imencode(".png", np.ascontiguousarray(values[..., ::-1]))[1].tobytes()
    start = small.index(b"eXIf") - 4
    chunk = small[start : start + 12 + int.from_bytes(small[start : start + 4], "big")]
    path.write_bytes(whole[:33] + chunk + whole[33:])


def scaled(values, kind):
    "Return bytes as other values of the same picture."
    factors = {"uint8": 1, "ten": 1023 / 255, "twelve": 4095 / 255, "uint16": 257, "int32": 257, "float16": 1 / 255}
    types = {"ten": "uint16", "twelve": "uint16"}
    factor = factors.get(kind, 1 / 255)
    values = values.astype(np.float64)
    return (np.rint(values * factor) if factor >= 1 else values * factor).astype(types.get(kind, kind))


KINDS = [
    *[
        (with_pillow, suffix, GREY, kind)
        for kind in ("uint8", "ten", "twelve", "uint16")
        for suffix in (".png", ".tif")
    ],
    *[(with_pillow, ".tif", GREY, kind) for kind in ("int32", "float32")],
    *[(with_pillow, suffix, COLOUR, "uint8") for suffix in (".png", ".tif", ".webp")],
    *[(with_opencv, ".png", COLOUR, kind) for kind in ("twelve", "uint16")],
    *[(with_tifffile, ".tiff", GREY, kind) for kind in ("uint16", "float16", "float32", "float64")],
    *[(with_tifffile, ".tiff", COLOUR, kind) for kind in ("uint8", "twelve", "uint16", "float32", "float64")],
    *[(planar, ".tiff", COLOUR, kind) for kind in ("uint16", "float32")],
]


def write_set(root, images, masks, suffix=".png", write=None):
    "Write a folder of pictures and masks; `write(path, values)` writes an image."
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    for index, (image, mask) in enumerate(zip(images, masks)):
        (write or (lambda path, values: Image.fromarray(values).save(path)))(root / f"images/p{index}{suffix}", image)
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(root / f"masks/p{index}.png")
    return root


@pytest.mark.parametrize("orientation", STORE)
@pytest.mark.parametrize(
    "write, suffix, picture, kind", KINDS, ids=[f"{w.__name__}{s}-{p.ndim}d-{k}" for w, s, p, k in KINDS]
)
def test_every_depth_format_and_orientation(tmp_path, write, suffix, picture, kind, orientation):
    stored = STORE[orientation](scaled(picture, kind))
    root = write_set(tmp_path, [stored], [MASK], suffix, lambda path, values: write(path, values, orientation))
    source = read_source("folder", root)
    image, mask = read_pair(source.samples[0], source.mask_encoding)
    expected = picture if picture.ndim == 3 else picture[..., None].repeat(3, 2)
    assert np.abs(image.astype(int) - expected).max() <= 1 and (mask == MASK).all()
    assert any("shown as white" in note for note in source.notes) == (kind != "uint8")


@pytest.mark.parametrize("brightest, white", [(200, 255), (1000, 1023), (4000, 4095), (16000, 16383), (60000, 65535)])
def test_one_white_for_the_set(tmp_path, brightest, white):
    "A dark photo stays darker than a bright one, whatever the camera."
    images = [(GREY.astype(np.float64) / 255 * top).astype(np.uint16) for top in (brightest, brightest / 4)]
    source = read_source("folder", write_set(tmp_path, images, [MASK] * 2))
    assert [sample.white for sample in source.samples] == [white] * 2
    assert f"up to {images[0].max()}: {white} is shown as white" in " ".join(source.notes)
    bright, dark = (read_image(sample.image, sample.white).mean() for sample in source.samples)
    assert bright == pytest.approx(4 * dark, rel=0.05)


@pytest.mark.parametrize("odd", [-1.0, np.nan, np.inf, 1e6])
def test_values_of_no_image_are_refused_with_their_file(tmp_path, odd):
    image = (GREY / 255).astype(np.float32)
    wrong = image.copy()
    wrong[3, 3] = odd
    root = write_set(tmp_path, [image, wrong], [MASK] * 2, ".tif")
    one_line(lambda: read_source("folder", root), "p1.tif: found values from")


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("suffix", [".tif", ".png", ".webp"])
def test_files_of_several_pictures_are_refused(tmp_path, kind, suffix):
    root = write_set(tmp_path, [COLOUR] * 2, [MASK] * 2)
    (root / kind / "p1.png").unlink()
    pages = [Image.fromarray(MASK * value) for value in (0, 255)]
    pages[0].save(root / f"{kind}/p1{suffix}", save_all=True, append_images=pages[1:])
    one_line(lambda: read_source("folder", root), f"p1{suffix}: found 2 pictures in one file")


def test_a_small_copy_in_a_tiff_is_no_second_picture(tmp_path):
    root = write_set(tmp_path, [COLOUR], [MASK], ".tif")
    Image.fromarray(COLOUR).save(
        root / "images/p0.tif", save_all=True, append_images=[Image.fromarray(COLOUR).resize((15, 10))]
    )
    assert len(read_source("folder", root)) == 1


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_class_ids_of_one_bit(tmp_path, suffix):
    ids = MASK.copy()
    ids[:3] = 2
    root = write_set(tmp_path, [COLOUR] * 2, [ids, MASK])
    (root / "masks/p1.png").unlink()
    Image.fromarray(MASK > 0).save(root / f"masks/p1{suffix}")
    source = read_source("folder", root, class_names=["wall", "crack", "rust"])
    assert (read_mask(source.samples[1].mask, "class_ids") == MASK).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("planes", [2, 3])
def test_masks_of_more_than_8_bits(tmp_path, dtype, planes):
    root = write_set(tmp_path, [COLOUR], [MASK])
    (root / "masks/p0.png").unlink()
    values = MASK.astype(dtype)
    with_tifffile(root / "masks/p0.tif", values if planes == 2 else np.dstack([values] * 3), 1)
    source = read_source("folder", root)
    assert (read_mask(source.samples[0].mask, source.mask_encoding) == MASK).all()


@pytest.mark.parametrize("odd, dtype", [(-1, "int16"), (300, "uint16"), (0.5, "float32"), (np.nan, "float32")])
def test_the_value_that_a_mask_cannot_hold_is_named(tmp_path, odd, dtype):
    values = np.full((40, 50), 3, dtype)
    values[7, 9] = odd
    with_tifffile(tmp_path / "mask.tif", values, 1)
    one_line(lambda: read_mask(tmp_path / "mask.tif", "class_ids"), f"found values such as {odd:g} ", "0 to 255")


@pytest.mark.parametrize("names", [(), ("wall", "crack", "rust")])
def test_palettes_that_differ_are_refused(tmp_path, names):
    colours = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 255, 0)}
    masks = []
    for order in ((0, 1, 2), (1, 0, 2)):
        picture = Image.fromarray(np.uint8(order)[MASK], "P")
        picture.putpalette([value for index in np.argsort(order) for value in colours[int(index)]])
        masks.append(picture)
    root = write_set(tmp_path, [COLOUR] * 2, masks)
    one_line(
        lambda: read_source("folder", root, class_names=names), "p1.png: found a palette that differs from that of p0"
    )


def test_masks_of_void_alone_are_named(tmp_path):
    root = write_set(tmp_path, [COLOUR] * 2, [MASK * 2, MASK * VOID])
    source = read_source("folder", root, class_names=["wall", "crack", "rust"])
    assert any("1 mask holds no class but 0, and 255, which is void (p1)" in note for note in source.notes)


def test_masks_of_0_and_255_beside_one_of_all_three_are_named(tmp_path):
    mixed = np.where(np.arange(len(MASK))[:, None] < 3, VOID, MASK)
    source = read_source("folder", write_set(tmp_path, [COLOUR] * 3, [mixed, MASK * VOID, MASK * VOID]))
    assert source.mask_encoding == "ids"
    assert any("2 masks hold no class but 0, and 255, which is void (p1, p2)" in note for note in source.notes)


def test_greys_of_resized_masks_name_what_reads_them(tmp_path):
    grey = Image.fromarray(MASK * 255).resize((30, 20), Image.BILINEAR).resize((60, 40), Image.BILINEAR)
    root = write_set(tmp_path, [COLOUR], [grey])
    one_line(lambda: read_source("folder", root), "found mask values", "mask_encoding threshold")
    assert read_source("folder", root, "threshold").mask_encoding == "threshold"


# ---- folders


@pytest.mark.parametrize(
    "place", ["@eaDir/p0.png/THUMB.jpg", "._p0.png", ".ipynb_checkpoints/p0.png", "#recycle/p0.png"]
)
@pytest.mark.parametrize("kinds", [("images",), ("masks",), ("images", "masks")])
def test_what_the_system_left_is_no_data(tmp_path, place, kinds):
    root = write_set(tmp_path, [COLOUR] * 2, [MASK] * 2)
    for kind in kinds:
        (root / kind / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(COLOUR).save(root / kind / place, "PNG")
    source = read_source("folder", root)
    assert [sample.name for sample in source.samples] == ["p0", "p1"] and source.mask_encoding == "ids"


def test_linked_folders_are_followed_and_circles_are_not(tmp_path):
    root, other = (write_set(tmp_path / name, [COLOUR] * 2, [MASK] * 2) for name in ("here", "there"))
    for kind in ("images", "masks"):
        os.symlink(other / kind, root / kind / "site")
        os.symlink(root / kind, root / kind / "circle")
    assert [sample.name for sample in read_source("folder", root).samples] == ["p0", "p1", "site/p0", "site/p1"]


def test_a_mask_belongs_to_one_image(tmp_path):
    root = write_set(tmp_path, [COLOUR] * 2, [MASK] * 2)
    (root / "images/p0.png").rename(root / "images/p1_label.png")
    (root / "masks/p0.png").rename(root / "masks/p1_label.png")
    (root / "masks/p1.png").unlink()
    one_line(lambda: read_source("folder", root), "no mask for 1 of 2 images (p1)")


def test_names_are_compared_in_one_form_of_unicode(tmp_path):
    root = write_set(tmp_path, [COLOUR], [MASK])
    for kind, form in (("images", "NFD"), ("masks", "NFC")):
        (root / kind / "p0.png").rename(root / kind / unicodedata.normalize(form, "Brücke.png"))
    assert [sample.name for sample in read_source("folder", root).samples] == ["Brücke"]


def test_dev_is_a_split_and_other_folders_are_named(tmp_path):
    for split, count in (("train", 3), ("dev", 1), ("test", 2), ("spare", 1)):
        write_set(tmp_path / split, [COLOUR] * count, [MASK] * count)
    source = read_source("folder", tmp_path)
    assert make_splits(source).lengths == {"train": 3, "val": 1, "test": 2}
    assert "spare/: images and masks in it were left out" in source.notes


@pytest.mark.parametrize("suffix", [".ppm", ".jfif", ".heic", ".jp2", ".gif"])
def test_pictures_of_other_formats_are_named(tmp_path, suffix):
    root = write_set(tmp_path, [COLOUR] * 2, [MASK] * 2)
    (root / "images/p1.png").rename(root / f"images/p1{suffix}")
    assert f"left out 1 {suffix} file in images/" in read_source("folder", root).notes


# ---- what the audit sees


@pytest.mark.parametrize(
    "picture, said",
    [(COLOUR * 0 + 90, "of one grey"), (COLOUR // 25, "nearly black"), (COLOUR // 8 + 214, "mostly white")],
)
def test_pictures_that_show_nothing(tmp_path, picture, said):
    bright = np.where(picture > 215, 255, picture).astype(np.uint8)
    splits = make_splits(read_source("folder", write_set(tmp_path, [COLOUR, COLOUR[::-1], bright], [MASK] * 3)))
    assert any(said in warning and "(p2)" in warning for warning in audit(splits).warnings)


@pytest.mark.parametrize("inverted", [1, 3])
def test_some_masks_inverted(tmp_path, inverted):
    images = np.random.default_rng(2).integers(0, 256, (8, 40, 60, 3), dtype=np.uint8)
    masks = [(1 - MASK if index < inverted else MASK) * 255 for index in range(8)]
    splits = make_splits(read_source("folder", write_set(tmp_path, images, masks)))
    report = audit(splits)
    (line,) = [line for line in report.warnings if f"{inverted} of 8 masks mark more than half" in line]
    assert all(f"p{index}" in line for index in range(inverted))
    tested = [sample.name for sample in splits.test]
    assert any(line.startswith("test: cracks fill") for line in report.warnings) == (int(tested[0][1:]) < inverted)


def test_the_same_image_with_two_masks(tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (6, 40, 60, 3), dtype=np.uint8)
    root = write_set(tmp_path, [*images, images[2], images[3]], [MASK] * 6 + [np.roll(MASK, 9, 0), MASK])
    report = audit(make_splits(read_source("folder", root)), near_duplicates=False)
    assert [line for line in report.warnings if "the same image" in line] == [
        "p2 and p6 show the same image with different masks"
    ] or any("p2" in line and "p6" in line for line in report.warnings)
    assert not any("p3" in line and "p7" in line for line in report.warnings)


def test_other_content_of_the_same_size_and_time_is_other_data(tmp_path):
    root = write_set(tmp_path, [COLOUR] * 3, [MASK] * 3)
    before = audit(make_splits(read_source("folder", root))).fingerprint
    samples = read_source("folder", root).samples
    assert before == audit(make_splits(read_source("folder", root))).fingerprint
    Image.fromarray(MASK[::-1].copy()).save(samples[0].mask)
    assert audit(make_splits(read_source("folder", root))).fingerprint != before
    assert replace(samples[0], white=4095) != samples[0]


# ---- layouts


def move(root, layout):
    "Write three pictures of each split as `layout` names them: {s} the split, {k} images or masks."
    kinds = {"train": 3, "val": 2, "test": 2}
    for split, count in kinds.items():
        for index in range(count):
            for kind, values in (("image", COLOUR), ("mask", MASK)):
                path = root / layout(split, kind, index)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    return kinds


LAYOUTS = {
    "mmseg": lambda s, k, i: f"{ {'image': 'img_dir', 'mask': 'ann_dir'}[k] }/{s}/{i}.png",
    "lab": lambda s, k, i: f"{s}/{ {'image': 'img', 'mask': 'lab'}[k] }/{i}.png",
    "sets": lambda s, k, i: f"{s}_set/{ {'image': 'images', 'mask': 'masks'}[k] }/{i}.png",
    "beside": lambda s, k, i: f"{s}/{i}{ {'image': '.jpg', 'mask': '_mask.png'}[k] }",
    "beside, label": lambda s, k, i: f"{s.upper()}/{i}{ {'image': '.png', 'mask': '-Label.PNG'}[k] }",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_a_published_split(tmp_path, layout):
    expected = move(tmp_path, LAYOUTS[layout])
    source = read_source("folder", tmp_path)
    assert make_splits(source).lengths == expected
    assert all((read_mask(sample.mask, source.mask_encoding) == MASK).all() for sample in source.samples)


@pytest.mark.parametrize("word", ["mask", "label", "gt", "seg", "annotation", "MASK", "segmentation", "labels"])
def test_one_folder_with_images_and_masks(tmp_path, word):
    for index in range(2):
        Image.fromarray(COLOUR).save(tmp_path / f"p{index}.jpg")
        Image.fromarray(MASK).save(tmp_path / f"p{index}_{word}.png")
    assert [sample.name for sample in read_source("folder", tmp_path).samples] == ["p0", "p1"]
    (tmp_path / f"p1_{word}.png").unlink()
    one_line(lambda: read_source("folder", tmp_path), "found no mask for 1 of 2 images (p1)", "a_mask.png")


def test_one_folder_of_another_pattern_lists_what_works(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "p0.jpg")
    Image.fromarray(MASK).save(tmp_path / "p0_painted.png")
    one_line(lambda: read_source("folder", tmp_path), "found no images of 'folder'", "images/ and masks/", "a_mask.png")


@pytest.mark.parametrize("name", ["train.txt", "VAL.csv", "splits.json", "split.csv", "ImageSets/test.txt"])
def test_lists_of_splits_are_named(tmp_path, name):
    root = write_set(tmp_path, [COLOUR] * 3, [MASK] * 3)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("p0\np1\n")
    assert any(
        "lists of names are not read" in note and Path(name).name in note for note in read_source("folder", root).notes
    )


def test_jpeg_masks_without_a_crack_are_black(tmp_path):
    root = write_folder(tmp_path, [np.zeros((40, 60), np.uint8)] * 2, mask_names=["00.jpg", "01.jpg"])
    assert read_source("folder", root).mask_encoding == "threshold"


def test_another_white_is_another_cache(tmp_path):
    "A brighter picture of the set changes what its darker ones look like."
    root = write_folder(tmp_path, [np.zeros((40, 60), np.uint8)] * 2)
    samples = read_source("folder", root).samples
    files = [
        cache_file(tmp_path, [replace(one, white=white) for one in samples], "ids") for white in (1023, 4095, 4095)
    ]
    assert files[0] != files[1] == files[2]


def hurt(data, case, numbers):
    "Return a file that was cut off, or of which bytes, bytes of its beginning, or a stretch were changed."
    data, kind = bytearray(data), case % 4
    if kind == 0:
        return bytes(data[: numbers.randrange(len(data))])
    if kind == 3:
        first = numbers.randrange(len(data))
        data[first : first + numbers.randrange(1, 200)] = b"\xff" * numbers.randrange(40)
    for _ in range(numbers.randrange(1, 8) if kind in (1, 2) else 0):
        data[numbers.randrange(min(80, len(data)) if kind == 2 else len(data))] = numbers.randrange(256)
    return bytes(data)


@pytest.mark.parametrize(
    "stored", ["png", "jpeg", "tiff", "tiff_lzw", "tiff_adobe_deflate", "bmp", "webp", "gif", "ppm"]
)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, stored, num_cases):
    kind, _, compression = stored.partition("_")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    picture.save(tmp_path / "whole", kind, **({"compression": stored} if compression else {}))
    data, numbers = (tmp_path / "whole").read_bytes(), random.Random(5)
    for case in range(num_cases):
        path = tmp_path / f"{case}.{kind}"
        path.write_bytes(hurt(data, case, numbers))
        for read in (read_image, image_size, lambda path: read_mask(path, "threshold")):
            try:
                read(path)
            except CrackSegError as error:
                assert len(str(error).splitlines()) == 1 and path.name in str(error)
