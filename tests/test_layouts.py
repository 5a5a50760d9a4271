"""What people bring as it is: ids that mean void, painted masks, annotation files; each is read by parameters alone."""

import numpy as np
import pytest
from test_classes import NAMES, random_ids
from test_sources import CRACK, one_line, write_folder

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
