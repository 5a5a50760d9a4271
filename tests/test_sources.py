"""Bad input to the readers and splits, odd mask formats, and the real data sets where they are at hand."""

import os
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from messages import one_line
from PIL import Image
from scipy.io import savemat

from crackseg_nb.core.checks import how_many
from crackseg_nb.data.audit import audit, crossing_groups, fingerprint
from crackseg_nb.data.splits import make_splits, pick_groups
from crackseg_nb.sources.images import ENCODINGS, read_image, read_mask
from crackseg_nb.sources.registry import SOURCES, read_source
from crackseg_nb.sources.samples import Sample, Source

DATA = Path(os.environ.get("CRACKSEG_DATA") or "CRACKSEG_DATA")  # no such folder: its tests skip
CRACK = np.zeros((40, 60), np.uint8)
CRACK[18:22, 5:50] = 1


def write_folder(root, masks, images=None, image_names=None, mask_names=None, folders=("images", "masks")):
    "Write a folder source; masks are arrays, Pillow images or bytes."
    for kind in folders:
        (root / kind).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index, mask in enumerate(masks):
        image = images[index] if images else random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        for content, folder, name in (
            (image, folders[0], image_names[index] if image_names else f"{index:02}.png"),
            (mask, folders[1], mask_names[index] if mask_names else f"{index:02}.png"),
        ):
            path = root / folder / name
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path)
    return root


def read_folder(root, **options):
    return read_source("folder", root, **options)


# ---- names and folders


def test_unknown_source_offers_the_nearest():
    one_line(lambda: read_source("DeepCrak", "."), "did you mean 'DeepCrack'?")


@pytest.mark.parametrize("name", list(SOURCES))
@pytest.mark.parametrize("data_dir", [None, "", "/nowhere/at/all", __file__])
def test_missing_folder_names_path_and_layout(name, data_dir, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    found = "can't be fetched (no network)" if SOURCES[name].fetch and not data_dir else repr(data_dir)
    one_line(lambda: read_source(name, data_dir), "data_dir", found, SOURCES[name].layout)


@pytest.mark.parametrize("name", list(SOURCES))
def test_empty_folder(name, tmp_path):
    one_line(lambda: read_source(name, tmp_path), str(tmp_path), "expected")


def test_folder_without_masks(tmp_path):
    (tmp_path / "images").mkdir()
    one_line(lambda: read_folder(tmp_path), "no folder of masks")
    (tmp_path / "masks").mkdir()
    one_line(lambda: read_folder(tmp_path), "found no images")
    Image.fromarray(CRACK).save(tmp_path / "images/a.png")
    one_line(lambda: read_folder(tmp_path), "found no masks")


def test_image_without_mask_is_counted_and_named(tmp_path):
    write_folder(tmp_path, [CRACK] * 6)
    for index in range(5):
        (tmp_path / f"masks/{index:02}.png").unlink()
    one_line(lambda: read_folder(tmp_path), "no mask for 5 of 6 images (00, 01, 02, ...)")


@pytest.mark.parametrize(
    "folders", [("img", "label"), ("Images", "Annotations"), ("imgs", "gt"), ("image", "groundTruth")]
)
def test_synonyms_of_folder_names(tmp_path, folders):
    assert len(read_folder(write_folder(tmp_path, [CRACK] * 2, folders=folders))) == 2


@pytest.mark.parametrize("ending", ["", "_mask", "_label", "-gt", "_GT"])
def test_masks_pair_by_stem_and_ending(tmp_path, ending):
    write_folder(
        tmp_path,
        [CRACK] * 3,
        image_names=["a.jpg", "b.JPG", "c.png"],
        mask_names=[f"{stem}{ending}.png" for stem in "abc"],
    )
    source = read_folder(tmp_path)
    assert [sample.name for sample in source.samples] == ["a", "b", "c"]
    assert all(sample.mask.stem == sample.name + ending for sample in source.samples)


def test_two_images_of_one_name(tmp_path):
    write_folder(tmp_path, [CRACK] * 2, image_names=["a.jpg", "a.png"], mask_names=["a.png", "b.png"])
    one_line(lambda: read_folder(tmp_path), "second file of this name")


def test_two_masks_for_one_image(tmp_path):
    write_folder(tmp_path, [CRACK] * 2, image_names=["a.jpg", "b.jpg"], mask_names=["a_mask.png", "a_gt.png"])
    one_line(lambda: read_folder(tmp_path), "found 2 masks")


def test_hidden_files_and_surplus_masks_are_skipped(tmp_path):
    write_folder(tmp_path, [CRACK] * 3)
    (tmp_path / "images/02.png").unlink()
    (tmp_path / "images/._00.png").write_bytes(b"x")
    (tmp_path / "images/.ipynb_checkpoints").mkdir()
    (tmp_path / "images/.ipynb_checkpoints/00-checkpoint.png").write_bytes(b"x")
    (tmp_path / "images/Thumbs.db").write_bytes(b"x")
    source = read_folder(tmp_path)
    assert len(source) == 2 and source.notes[0] == "skipped 1 mask without an image (02)"


@pytest.mark.parametrize("inside", [True, False])
def test_split_folders_are_the_published_split(tmp_path, inside):
    for split in ("training", "test"):
        folders = (f"images/{split}", f"masks/{split}") if inside else (f"{split}/images", f"{split}/masks")
        write_folder(tmp_path, [CRACK] * 4, folders=folders)
    source = read_folder(tmp_path)
    assert len({sample.name for sample in source.samples}) == 8
    splits = make_splits(source)
    assert splits.lengths == {"train": 3, "val": 1, "test": 4}
    assert all(sample.split == "test" for sample in splits.test)


def test_group_pattern(tmp_path):
    write_folder(
        tmp_path,
        [CRACK] * 4,
        image_names=[f"{photo}-{crop}.png" for photo in "ab" for crop in "12"],
        mask_names=[f"{photo}-{crop}.png" for photo in "ab" for crop in "12"],
    )
    assert [sample.group for sample in read_folder(tmp_path, group_pattern=r"(.*)-\d").samples] == ["a", "a", "b", "b"]
    one_line(lambda: read_folder(tmp_path, group_pattern="["), "group_pattern", "expected a regular expression")
    one_line(lambda: read_folder(tmp_path, group_pattern=7), "group_pattern")
    one_line(lambda: read_folder(tmp_path, group_pattern="x(y)"), "fits no name")


# ---- mask formats


def palette(index, colours):
    picture = Image.fromarray(index).convert("P")
    picture.putdata(index.ravel().tolist())
    picture.putpalette(colours)
    return picture


VOIDED = CRACK.copy()
VOIDED[30:] = 255
FORMATS = {
    "0/1": ([CRACK, CRACK * 0], "ids"),
    "0/255": ([CRACK * 255, CRACK * 0], "0/255"),
    "ids and void": ([CRACK, VOIDED], "ids"),
    "1-bit": ([Image.fromarray(CRACK * 255).convert("1")] * 2, "0/255"),
    "palette of ids": ([palette(CRACK, [0, 0, 0, 128, 0, 0])] * 2, "ids"),
    "palette with void": ([palette(VOIDED, [0, 0, 0, 128, 0, 0] + [9] * 759 + [224, 224, 192])] * 2, "ids"),
    "black and white palette": ([palette(1 - CRACK, [255, 255, 255, 0, 0, 0])] * 2, "0/255"),
    "RGB": ([np.repeat(CRACK[..., None] * 255, 3, 2)] * 2, "0/255"),
    "RGBA": ([np.dstack([CRACK * 255] * 3 + [CRACK * 0 + 255])] * 2, "0/255"),
    "RGB of ids": ([np.repeat(CRACK[..., None], 3, 2)] * 2, "ids"),
    "16 bits": ([CRACK.astype(np.uint16) * 65535] * 2, "0/255"),
    "16 bits of ids": ([CRACK.astype(np.uint16)] * 2, "ids"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_mask_formats(tmp_path, name):
    masks, encoding = FORMATS[name]
    source = read_folder(write_folder(tmp_path, masks))
    assert source.mask_encoding == encoding
    found = read_mask(source.samples[0].mask, source.mask_encoding)
    assert found.dtype == np.uint8 and (found[:30] == CRACK[:30]).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_jpeg_masks_are_cut_at_128(tmp_path, suffix):
    "Also where a JPEG carries the suffix of a PNG."
    write_folder(tmp_path, [CRACK * 255] * 2, mask_names=[f"{index:02}.jpg" for index in range(2)])
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_suffix(suffix))
    source = read_folder(tmp_path)
    assert source.mask_encoding == "threshold" and any("128" in note for note in source.notes)
    assert (read_mask(source.samples[0].mask, "threshold") == CRACK).all()


@pytest.mark.parametrize(
    ("encoding", "values", "expected"),
    [
        ("ids", [0, 1, 255], [0, 1, 255]),
        ("0/255", [0, 255], [0, 1]),
        ("threshold", [0, 127, 128, 255], [0, 0, 1, 1]),
        ("class_ids", [0, 1, 2, 253, 255], [0, 1, 2, 253, 255]),
    ],
)
def test_each_value_of_an_encoding_has_its_class(tmp_path, encoding, values, expected):
    Image.fromarray(np.array([values], np.uint8)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", encoding).tolist() == [expected]


def test_jpeg_of_class_ids_is_refused(tmp_path):
    one_line(
        lambda: read_folder(write_folder(tmp_path, [CRACK] * 2, mask_names=["00.jpg", "01.jpg"])),
        "JPEG masks",
        "expected",
    )


def test_255_is_void_where_another_mask_holds_ids(tmp_path):
    source = read_folder(write_folder(tmp_path, [VOIDED, CRACK * 255]))
    assert set(np.unique(read_mask(source.samples[1].mask, source.mask_encoding))) == {0, 255}
    assert "mask value 255 means void" in source.notes


def test_two_encodings_in_one_source_are_refused(tmp_path):
    one_line(lambda: read_folder(write_folder(tmp_path, [CRACK, CRACK * 255])), "01.png", "could mean crack or void")
    assert read_folder(tmp_path, mask_encoding="ids").mask_encoding == "ids"
    one_line(lambda: read_folder(tmp_path, mask_encoding="0/255"), "00.png: found mask values 1")
    one_line(lambda: read_folder(tmp_path, mask_encoding="0-255"), "mask_encoding", "did you mean '0/255'?")


def test_unexpected_values_name_the_file(tmp_path):
    one_line(
        lambda: read_folder(write_folder(tmp_path, [CRACK, CRACK * 3, CRACK * 9])),
        "01.png: found mask values 3, expected 0 and 1",
    )


def test_colours_are_refused(tmp_path):
    red = np.zeros((40, 60, 3), np.uint8)
    red[CRACK > 0] = (255, 0, 0)
    one_line(lambda: read_folder(write_folder(tmp_path, [red])), "00.png: found colour (255, 0, 0)", "expected")


def test_mask_in_the_alpha_channel_is_refused(tmp_path):
    one_line(lambda: read_folder(write_folder(tmp_path, [np.dstack([CRACK * 0] * 3 + [CRACK * 255])])), "transparency")


def test_size_mismatch_names_both(tmp_path):
    one_line(
        lambda: read_folder(write_folder(tmp_path, [CRACK, CRACK[:-1]])),
        "01.png: found a mask of 60x39 for an image of 60x40",
    )


# ---- damaged and dangerous files


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_damaged_mask(tmp_path, suffix, keep):
    write_folder(tmp_path, [CRACK * 255] * 3, mask_names=[f"{index:02}{suffix}" for index in range(3)])
    path = tmp_path / f"masks/01{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    one_line(lambda: read_folder(tmp_path), f"01{suffix}: found a damaged or unreadable image")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_truncated_image_is_found_before_training(tmp_path, suffix):
    write_folder(tmp_path, [CRACK] * 6, image_names=[f"{index:02}{suffix}" for index in range(6)])
    path = tmp_path / f"images/03{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    one_line(lambda: read_image(path), f"03{suffix}: found a damaged")
    one_line(lambda: audit(make_splits(read_folder(tmp_path))).raise_if_fatal(), f"03{suffix}: found a damaged")


@pytest.mark.parametrize("size", [(9000, 9000), (14_000, 14_000)])
def test_decompression_bomb(tmp_path, size, recwarn):
    Image.new("1", size).save(tmp_path / "bomb.png")
    one_line(lambda: read_image(tmp_path / "bomb.png"), "pixels, expected at most 80 million")
    assert not recwarn.list


def test_noise_is_no_image(tmp_path):
    random = np.random.default_rng(0)
    for head in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"BM"):
        (tmp_path / "noise.png").write_bytes(head + random.bytes(3000))
        one_line(lambda: read_image(tmp_path / "noise.png"), "noise.png: found a damaged")
        one_line(lambda: read_mask(tmp_path / "noise.png", "ids"), "noise.png: found a damaged")


def test_matlab_files(tmp_path):
    for folder in ("image", "groundTruth"):
        (tmp_path / folder).mkdir()
    Image.fromarray(CRACK).save(tmp_path / "image/001.jpg")
    path = tmp_path / "groundTruth/001.mat"
    path.write_bytes(b"not a matlab file")
    one_line(lambda: read_source("CrackForest", tmp_path), "001.mat: found no readable ground truth")
    savemat(path, {"groundTruth": {"Segmentation": CRACK + 5}})
    one_line(lambda: read_source("CrackForest", tmp_path), "001.mat: found mask values 5, 6, expected 1, 2, 3 and 4")
    savemat(path, {"groundTruth": {"Segmentation": CRACK[:5] + 1}})
    one_line(lambda: read_source("CrackForest", tmp_path), "001.mat: found a mask of 60x5")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once_and_checked_against_the_mask(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(
        tmp_path / "images/a.jpg", exif=exif
    )
    upright = CRACK if orientation < 5 else CRACK.T
    Image.fromarray(upright).save(tmp_path / "masks/a.png")
    source = read_folder(tmp_path)
    assert (
        read_image(source.samples[0].image).shape[:2] == read_mask(source.samples[0].mask, "ids").shape == upright.shape
    )
    if orientation >= 5:
        Image.fromarray(CRACK).save(tmp_path / "masks/a.png")
        one_line(lambda: read_folder(tmp_path), "EXIF orientation")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    grey = Image.fromarray(np.arange(240, dtype=np.uint8).reshape(12, 20))
    picture = (
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        if mode == "I;16"
        else grey.convert("RGB").convert(mode)
    )
    picture.save(tmp_path / "image.tif")
    found = read_image(tmp_path / "image.tif")
    assert found.shape == (12, 20, 3) and found.dtype == np.uint8
    if mode not in ("1", "P"):
        assert np.abs(found.astype(int) - np.asarray(grey)[..., None]).max() <= 2


# ---- splits


def samples_of(sizes):
    return [
        Sample(f"{group}-{crop}", Path("a"), Path("b"), f"g{group}")
        for group, size in enumerate(sizes)
        for crop in range(size)
    ]


@pytest.mark.parametrize(
    "sizes", [[1] * 40, [3] * 15, [20, 18, 1, 2, 3, 9, 5, 5], [50, 1, 1], [1, 1, 1], [7] * 3, list(range(1, 30))]
)
@pytest.mark.parametrize("seed", [0, 42])
def test_groups_stay_whole_and_nothing_is_lost(sizes, seed):
    samples = samples_of(sizes)
    splits = make_splits(Source("s", samples), seed=seed)
    assert sorted(sample.name for _, part in splits for sample in part) == sorted(sample.name for sample in samples)
    assert crossing_groups(splits) == ({}, {}) and all(splits.lengths.values())
    shuffled = list(np.random.default_rng(1).permutation(np.array(samples, dtype=object)))
    assert make_splits(Source("s", shuffled), seed=seed) == splits


@pytest.mark.parametrize("seed", range(20))
def test_picked_groups_are_as_close_as_can_be(seed):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 9, size=8).tolist()
    target = int(random.integers(1, sum(sizes)))
    every = [sum(size for bit, size in enumerate(sizes) if choice >> bit & 1) for choice in range(1, 2**8)]
    assert abs(sum(sizes[index] for index in pick_groups(sizes, target)) - target) == min(
        abs(total - target) for total in every
    )


def picked_by_bits(sizes, target, leave):
    "Choose as `pick_groups` does, with the reachable sums in the bits of one number for each prefix."
    limit, reachable = target + max(sizes), [1]
    for size in sizes:
        reachable.append((reachable[-1] | reachable[-1] << size) & (2 << limit) - 1)
    sums = [total for total in range(1, limit + 1) if reachable[-1] >> total & 1]
    best, picked = min(sums, key=lambda total: (abs(total - target), total)), []
    for index in reversed(range(len(sizes))):
        if best >= sizes[index] and reachable[index] >> (best - sizes[index]) & 1:
            picked.append(index)
            best -= sizes[index]
    while len(sizes) - len(picked) < leave:
        picked.remove(min(picked, key=lambda index: sizes[index]))
    return picked


def test_the_choice_of_groups_is_the_one_of_earlier_runs():
    random = np.random.default_rng(0)
    for _ in range(300):
        sizes = random.integers(1, random.integers(2, 30), size=random.integers(3, 25)).tolist()
        target, leave = int(random.integers(1, sum(sizes) + 10)), int(random.integers(0, 3))
        assert pick_groups(sizes, target, leave) == picked_by_bits(sizes, target, leave)


@pytest.mark.parametrize(
    "fractions",
    [
        (0.7, 0.7, 0.7),
        (0.5, 0.2, 0.2),
        (1, 0, 0),
        (0.7, 0.3),
        0.7,
        "0.7",
        None,
        (0.7, "x", 0.1),
        (0.7, float("nan"), 0.15),
        (True, 0.1, 0.1),
        (1.2, -0.1, -0.1),
    ],
)
def test_wrong_fractions(fractions):
    one_line(lambda: make_splits(Source("s", samples_of([1] * 20)), fractions), "fractions: found")


def test_split_larger_than_the_data():
    one_line(
        lambda: make_splits(Source("s", samples_of([1] * 20)), (1.5, 0.15, 0.15)),
        "180 % of the data, larger than the data",
    )


@pytest.mark.parametrize("sizes", [[1], [5, 5], [1, 1]])
def test_empty_split_says_what_is_there_and_what_is_needed(sizes):
    one_line(
        lambda: make_splits(Source("s", samples_of(sizes))),
        f"found {how_many(sum(sizes), 'image')} in {how_many(len(sizes), 'group')}",
        "at least 3 groups",
        "split would be empty",
    )


def test_published_splits_are_kept():
    samples = [
        replace(sample, split=("train", "val", "test")[index % 3]) for index, sample in enumerate(samples_of([1] * 30))
    ]
    splits = make_splits(Source("s", samples))
    assert all(sample.split == split for split, part in splits for sample in part)
    only_train = make_splits(Source("s", [replace(sample, split="train") for sample in samples]))
    assert only_train.lengths == {"train": 22, "val": 4, "test": 4}
    one_line(
        lambda: make_splits(Source("s", [replace(sample, split="test") for sample in samples])), "none for training"
    )


def test_fingerprint_ignores_the_place_and_sees_every_byte(tmp_path):
    one = make_splits(read_folder(write_folder(tmp_path / "one", [CRACK] * 6)))
    other = make_splits(read_folder(write_folder(tmp_path / "other", [CRACK] * 6)))
    assert fingerprint(one) == fingerprint(other) == audit(one).fingerprint
    with open(other.test[0].mask, "ab") as handle:
        handle.write(b"\0")
    assert fingerprint(one) != fingerprint(replace(other, facts={}))
    moved = replace(one, val=one.val + one.train[:1], train=one.train[1:])
    assert fingerprint(moved) != fingerprint(one)


def test_sample_in_two_splits_is_fatal(tmp_path):
    splits = make_splits(read_folder(write_folder(tmp_path, [CRACK] * 6)))
    one_line(audit(replace(splits, test=splits.test + splits.train[:1])).raise_if_fatal, "more than once")


def test_near_duplicate_in_another_orientation(tmp_path):
    random = np.random.default_rng(0)
    photos = [random.integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1) for _ in range(12)]
    photos[7] = np.rot90(photos[3]).copy()
    masks = [np.zeros(photo.shape[:2], np.uint8) for photo in photos]
    source = read_folder(write_folder(tmp_path, masks, images=photos))
    for seed in range(20):
        splits = make_splits(source, seed=seed)
        home = {sample.name: split for split, part in splits for sample in part}
        pairs = [{pair.name, pair.other} for pair in audit(splits).near_duplicates]
        assert pairs == ([{"03", "07"}] if home["03"] != home["07"] else [])


# ---- real data


def real(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"real data: {DATA / name} is absent (set CRACKSEG_DATA to the folder that holds {name}/)")
    return read_source(name, DATA / name)


def test_real_deepcrack():
    source = real("DeepCrack")
    splits = make_splits(source)
    assert (len(source), source.mask_encoding) == (537, "0/255")
    assert splits.lengths == {"train": 247, "val": 53, "test": 237}
    started = time.process_time()  # of all threads, and of this process alone: others may use the machine
    report = audit(splits)
    assert time.process_time() - started < 20
    assert report.problems == []
    assert [(pair.name, pair.other, round(pair.correlation, 3)) for pair in report.near_duplicates] == [
        ("test/11216", "train/11158", 0.998)
    ]
    assert sorted(crossing_groups(splits)[1]) == ["11142", "11289", "IMG_6536"]
    overlapping = report.overlapping_test_names
    assert len(overlapping) == 20 and "test/11142-1" in overlapping and "test/11216" in overlapping
    assert report.table.loc["test", "crack %"] == pytest.approx(4.33, abs=0.02)


def test_real_crackforest():
    source = real("CrackForest")
    assert len(source) == 118 and re.match("skipped 4 images without a label", source.notes[0])
    assert set(np.unique(read_mask(source.samples[0].mask, source.mask_encoding))) == {0, 1}
    report = audit(make_splits(source))
    assert report.problems == [] and report.table["images"].tolist() == [82, 18, 18]


@pytest.mark.slow
def test_real_unified360():
    source = real("unified360")
    splits = make_splits(source)
    assert len(source) == 600 and source.mask_encoding == "0/255"
    assert 100 < len({sample.group for sample in source.samples}) < 160
    assert splits.lengths == {"train": 420, "val": 90, "test": 90}
    report = audit(splits)
    assert report.problems == [] and report.near_duplicates == []


@pytest.mark.slow
def test_real_neu_seg():
    source = real("NEU_Seg")
    assert (len(source), len(source.classes), source.mask_encoding) == (1600, 4, "class_ids")
    splits = make_splits(source)
    assert splits.lengths == {"train": 988, "val": 212, "test": 400}
    report = audit(splits)
    assert report.problems == [] and not any("never occurs" in warning for warning in report.warnings)
    assert sum(counts.sum() for counts in report.pixels.values()) == 1600 * 200 * 200
    # turned copies of training images are in the published test set, and none in the validation set that was made here
    assert {pair.split for pair in report.near_duplicates} == {"test"}
    assert len(report.overlapping_test_names) == 279
    one_line(
        audit(make_splits(read_source("folder", DATA / "NEU_Seg", class_names=source.classes.names))).raise_if_fatal,
        "of 212 validation and test images that nearly repeat a training image",
        "looks like an augmented set",
    )


def test_every_encoding_is_explained():
    assert all(len(table) == 256 for table in ENCODINGS.values())
