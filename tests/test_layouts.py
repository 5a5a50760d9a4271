"""What people bring as it is: ids that mean void, painted masks, annotation files; each is read by parameters alone."""

import numpy as np
import pytest
from PIL import Image
from test_classes import NAMES, RANDOM, random_ids
from test_sources import CRACK, one_line, palette, write_folder

from crackseg_nb.core.checks import VOID
from crackseg_nb.data.audit import audit, fingerprint
from crackseg_nb.data.dataset import CrackDataset
from crackseg_nb.data.splits import make_splits
from crackseg_nb.data.store import cache_file
from crackseg_nb.runs.config import config_to_dict, configure
from crackseg_nb.runs.experiment import load_splits
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
    one_line(lambda: read_source("folder", tmp_path / "full", ignore_index=255), "found only 0 and 255 in all masks")


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
        (dict(class_colours="0,0,0"), "class_colours: found 1 colours"),
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
