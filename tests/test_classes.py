"""Several classes from reading to the audit, every reader of them in its true layout, and augmented sets."""

import io
import re
import struct
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import CRACK, one_line, palette, write_folder

from crackseg_nb.core.checks import VOID, CrackSegError
from crackseg_nb.data.audit import audit, overlapping_names
from crackseg_nb.data.splits import Splits, make_splits
from crackseg_nb.sources.artefact import ARTEFACT, unpack
from crackseg_nb.sources.duplicates import same_photos, shrink, unit_vector
from crackseg_nb.sources.folders import source_name
from crackseg_nb.sources.images import ENCODINGS, UNKNOWN, read_mask
from crackseg_nb.sources.published import NEU_SEG, VOC_NAMES
from crackseg_nb.sources.registry import SOURCES, read_source
from crackseg_nb.sources.samples import Classes, Sample, Source, voc_colours

NAMES = ("background", "inclusion", "patches", "scratches")
RANDOM = np.random.default_rng(0)


def random_ids(high=4, void=0.1, size=(40, 60)):
    ids = RANDOM.integers(0, high, size, dtype=np.uint8)
    ids[RANDOM.random(size) < void] = VOID
    return ids


def read_ids(root, **options):
    return read_source("folder", root, **{"class_names": NAMES, **options})


def png_of_few_bits(values, bits):
    "Return a grey PNG of 1, 2 or 4 bits a pixel, which Pillow reads but does not write."

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = b""
    for row in values:
        line = "".join(format(value, f"0{bits}b") for value in row)
        lines += b"\0" + bytes(int(line[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(line), 8))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


# ---- the list of classes


def test_colours_are_those_of_voc():
    published = [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
        (64, 0, 0),
        (192, 0, 0),
        (64, 128, 0),
        (192, 128, 0),
        (64, 0, 128),
        (192, 0, 128),
        (64, 128, 128),
        (192, 128, 128),
        (0, 64, 0),
        (128, 64, 0),
        (0, 192, 0),
        (128, 192, 0),
        (0, 64, 128),
    ]
    assert voc_colours(21) == tuple(published) == Classes(VOC_NAMES).colours
    assert len(set(Classes(tuple(map(str, range(254)))).colours)) == 254


@pytest.mark.parametrize(
    "names",
    [
        "a, b",
        ["a"],
        [],
        ["a", "a"],
        ["a", ""],
        ["a", None],
        [1, 2],
        ("a", "b", "a"),
        3,
        [str(name) for name in range(255)],
    ],
)
def test_odd_names(names):
    one_line(lambda: Classes(names), "class_names: found", "expected")


@pytest.mark.parametrize(
    "colours",
    [[(0, 0, 0)], [(0, 0, 0)] * 2, [(0, 0, 0), (0, 0)], [(0, 0, 0), (0, 0, 256)], ["#000000", "#ffffff"], [1, 2]],
)
def test_odd_colours(colours):
    one_line(lambda: Classes(("a", "b"), colours), "colours: found")


def test_classes_are_values():
    assert Classes(["a", "b", "c"]) == Classes(("a", "b", "c")) and hash(Classes()) == hash(
        Classes(("background", "crack"))
    )
    assert [Classes(NAMES[:count]).num_channels for count in (2, 3, 4)] == [1, 3, 4]


# ---- masks of class ids

IDS = random_ids()
FORMS = {
    "grey": IDS,
    "16 bits": IDS.astype(np.uint16),
    "16 bits with 65535": np.where(IDS == VOID, 65535, IDS).astype(np.uint16),
    "RGB": np.repeat(IDS[..., None], 3, 2),
    "palette": palette(IDS, np.array(voc_colours(256)).ravel().tolist()),
    "palette of misleading colours": palette(IDS, [255, 255, 255, 0, 0, 0, 255, 255, 255, 0, 0, 0] + [0] * 756),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_ids(tmp_path, form):
    source = read_ids(write_folder(tmp_path, [FORMS[form]]))
    assert (source.mask_encoding, source.classes.names) == ("class_ids", NAMES)
    assert (read_mask(source.samples[0].mask, "class_ids") == IDS).all()
    assert "mask value 255 means void" in source.notes


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_greys_of_few_bits_are_not_stretched(tmp_path, bits):
    values = RANDOM.integers(0, min(2**bits, 4), (40, 61), dtype=np.uint8)
    source = read_ids(write_folder(tmp_path, [png_of_few_bits(values, bits)], images=[np.zeros((40, 61, 3), np.uint8)]))
    assert (read_mask(source.samples[0].mask, "class_ids") == values).all()


def test_turned_masks_of_ids(tmp_path):
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(np.rot90(IDS)).save(tmp_path / "a.png", exif=turned)
    assert (read_mask(tmp_path / "a.png", "class_ids") == IDS).all()


@pytest.mark.parametrize("beyond", [[7], [4, 9], [254], [7, VOID]])
def test_an_id_beyond_the_list_names_file_and_id(tmp_path, beyond):
    bad = IDS.copy()
    bad[0, : len(beyond)] = beyond
    found = ", ".join(str(value) for value in beyond if value != VOID)
    one_line(
        lambda: read_ids(write_folder(tmp_path, [IDS, bad])),
        "01.png: found class id",
        found,
        "expected 0 to 3 (background, inclusion, patches, scratches) or 255 for void",
    )


def test_values_beyond_bytes(tmp_path):
    one_line(lambda: read_ids(write_folder(tmp_path, [IDS.astype(np.uint16) * 100])), "00.png: found values such as")


def test_painted_masks_are_refused(tmp_path):
    painted = np.array(voc_colours(256), np.uint8)[IDS]
    one_line(
        lambda: read_ids(write_folder(tmp_path, [painted])),
        "00.png: found colour (",
        "expected class ids as grey values",
    )


def test_smeared_ids_are_refused(tmp_path):
    one_line(
        lambda: read_ids(write_folder(tmp_path, [IDS], mask_names=["00.jpg"])),
        "00.jpg: found a JPEG mask",
        "expected PNG",
    )


def test_cracks_of_0_and_255_are_not_taken_for_void(tmp_path):
    write_folder(tmp_path, [CRACK * 255] * 3)
    for names in (NAMES, NAMES[:2]):
        one_line(lambda names=names: read_ids(tmp_path, class_names=names), "found only 0 and void in all masks")
    source = read_ids(tmp_path, class_names=("wall", "crack"), mask_encoding="0/255")
    assert source.classes.names == ("wall", "crack") and (read_mask(source.samples[0].mask, "0/255") == CRACK).all()
    one_line(
        lambda: read_ids(tmp_path, mask_encoding="0/255"), "mask_encoding: found '0/255' for 4 classes", "class_ids"
    )
    one_line(lambda: read_ids(tmp_path, mask_encoding="ids/255"), "mask_encoding", "expected one of")


def test_ids_without_names_hint_at_them(tmp_path):
    with pytest.raises(CrackSegError, match="class_names"):
        read_source("folder", write_folder(tmp_path, [IDS]))
    with pytest.raises(CrackSegError) as caught:
        read_source("folder", write_folder(tmp_path / "greys", [IDS * 40]))
    assert "class_names" not in str(caught.value)


def test_other_encodings_know_two_classes():
    assert all(
        set(np.unique(table)) <= {0, 1, UNKNOWN, VOID} for name, table in ENCODINGS.items() if name != "class_ids"
    )


@pytest.mark.parametrize("name", [name for name, reader in SOURCES.items() if reader.classes])
def test_a_list_of_another_length(name, tmp_path):
    own = len(SOURCES[name].classes)
    names = [f"class {index}" for index in range(own + 1)]
    one_line(
        lambda: read_source(name, tmp_path, class_names=names), f"found {own + 1} names", repr(name), f"expected {own} "
    )


# ---- the audit


def test_counts_equal_independent_ones(tmp_path):
    masks = [random_ids(1 + index % 4, void=0.02 * index) for index in range(14)] + [np.full((40, 60), VOID, np.uint8)]
    for index in range(0, 12, 4):
        masks[index][3, 3] = 3  # a single pixel of its class
    write_folder(tmp_path, masks)
    splits = make_splits(read_ids(tmp_path))
    report = audit(splits)
    for split, samples in splits:
        masks = [np.array(Image.open(sample.mask)) for sample in samples]
        pixels = np.array([[(mask == label).sum() for label in range(4)] for mask in masks])
        assert report.pixels[split].dtype == np.int64 and (report.pixels[split] == pixels.sum(0)).all()
        assert (report.images[split] == (pixels > 0).sum(0)).all()
        void = sum((mask == VOID).sum() for mask in masks)
        assert report.table.loc[split, "void %"] == pytest.approx(100 * void / (len(masks) * 40 * 60), abs=0.006)
        for label, name in enumerate(NAMES):
            assert report.table.loc[split, f"{name} %"] == pytest.approx(
                100 * pixels[:, label].sum() / pixels.sum(), abs=0.006
            )


def test_two_classes_keep_their_table(tmp_path):
    splits = make_splits(read_source("folder", write_folder(tmp_path, [CRACK] * 4 + [CRACK * 0] * 4)))
    report = audit(splits, near_duplicates=False)
    assert list(report.table.columns) == ["images", "groups", "image size", "crack %", "void %", "without crack"]
    for split, samples in splits:
        shown = sum(int(sample.name) < 4 for sample in samples)
        assert report.images[split].tolist() == [len(samples), shown]
        assert report.pixels[split].tolist() == [len(samples) * 2400 - shown * CRACK.sum(), shown * CRACK.sum()]


def test_a_class_that_never_occurs(tmp_path):
    for split in ("train", "val", "test"):
        write_folder(tmp_path / split, [random_ids(3 if split == "train" else 4) for _ in range(3)])
    report = audit(make_splits(read_ids(tmp_path)), near_duplicates=False)
    lines = [line for line in report.warnings if "class" in line]
    assert lines == ["class scratches never occurs in train: it cannot be learned"] and not report.problems


def test_ids_that_came_after_reading(tmp_path):
    splits = make_splits(read_ids(write_folder(tmp_path, [IDS] * 6)))
    Image.fromarray(IDS + 1).save(splits.val[0].mask)  # void becomes 0
    fresh = replace(splits, facts={})
    one_line(audit(fresh).raise_if_fatal, f"{splits.val[0].mask}: found class id 4, expected 0 to 3")


def test_the_report_of_many_classes_is_narrow(tmp_path):
    report = audit(
        make_splits(read_ids(write_folder(tmp_path, [random_ids(21)] * 6), class_names=VOC_NAMES)),
        near_duplicates=False,
    )
    assert max(len(line) for line in report.report().splitlines()) < 140


# ---- readers


def write_neu_seg(root, count=4):
    for part in ("training", "test"):
        for index in range(count):
            for kind, picture, suffix in (
                ("images", RANDOM.integers(0, 256, (200, 200), dtype=np.uint8), "jpg"),
                ("annotations", random_ids(void=0, size=(200, 200)), "png"),
            ):
                (root / kind / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(root / kind / part / f"{index:06}.{suffix}")
    return root


def test_neu_seg(tmp_path):
    source = read_source("NEU_Seg", write_neu_seg(tmp_path))
    assert (len(source), source.classes, source.mask_encoding) == (8, NEU_SEG, "class_ids")
    assert Counter(sample.split for sample in source.samples) == {"train": 4, "test": 4}
    assert len({sample.name for sample in source.samples}) == 8
    renamed = read_source("NEU_Seg", tmp_path, class_names=["a", "b", "c", "d"]).classes
    assert renamed.names == ("a", "b", "c", "d") and renamed.colours == NEU_SEG.colours
    (tmp_path / "annotations/test/000002.png").unlink()
    one_line(lambda: read_source("NEU_Seg", tmp_path), "no mask for 1 of 4 images (000002)")


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("mirror", [False, True])
def test_turned_copies_of_steel_share_a_group(tmp_path, turn, mirror):
    write_neu_seg(tmp_path)
    plate = np.kron(RANDOM.integers(0, 256, (20, 20)), np.ones((10, 10))).astype(np.uint8)
    Image.fromarray(plate).save(tmp_path / "images/training/000001.jpg", quality=90)
    copy = np.rot90(plate, turn)
    Image.fromarray(copy[:, ::-1] if mirror else copy).save(tmp_path / "images/test/000003.jpg", quality=80)
    source = read_source("NEU_Seg", tmp_path)
    groups = {sample.name: sample.group for sample in source.samples}
    assert groups["test/000003"] == groups["training/000001"] and len(set(groups.values())) == 7
    assert audit(make_splits(source)).overlapping_test_names == ["test/000003"]


def test_same_photos_are_found_along_chains():
    plate = np.kron(RANDOM.integers(0, 256, (20, 20)), np.ones((10, 10))).astype(np.uint8)
    other = np.kron(RANDOM.integers(0, 256, (20, 20)), np.ones((10, 10))).astype(np.uint8)
    pictures = [Image.fromarray(values) for values in (other, plate, np.rot90(plate), other.T, plate[::-1])]
    small = [unit_vector(shrink(picture, 32)).reshape(32, 32) for picture in pictures]
    assert same_photos(small, [shrink(picture, 128) for picture in pictures]) == [0, 1, 1, 0, 1]


def test_photos_linked_by_a_third_are_one(monkeypatch):
    monkeypatch.setattr("crackseg_nb.sources.duplicates.similar", lambda *_: [(0, 3, 1.0), (1, 3, 1.0)])
    monkeypatch.setattr("crackseg_nb.sources.duplicates.same_detail", lambda *_: True)
    assert same_photos([np.zeros((32, 32))] * 4, [None] * 4) == [0, 0, 2, 0]


def write_voc(root, names, lists):
    "Write a VOC year as published: palette masks, and more in its folders than in its lists."
    for folder in (
        "Annotations",
        "JPEGImages",
        "SegmentationClass",
        "SegmentationObject",
        "ImageSets/Segmentation",
        "ImageSets/Main",
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, ids in names.items():
        Image.fromarray(RANDOM.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        if ids is None:
            continue
        for folder in ("SegmentationClass", "SegmentationObject"):
            palette(ids, np.array(voc_colours(256)).ravel().tolist()).save(root / folder / f"{name}.png")
    for name, listed in lists.items():
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("".join(f"{line}\n" for line in listed))
    return root


VOC_IDS = {f"2007_00000{index}": random_ids(21) for index in range(5)} | {"2008_000001": None, "2008_000009": None}
VOC_LISTS = {
    "train": ["2007_000000", "2007_000001", "2007_000002"],
    "val": ["2007_000003"],
    "test": ["2008_000009"],
    "trainval": ["2007_000000", "2007_000001", "2007_000002", "2007_000003"],
}


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc(tmp_path, inside):
    write_voc(tmp_path / inside, VOC_IDS, VOC_LISTS)
    source = read_source("VOC", tmp_path)
    assert {sample.name: sample.split for sample in source.samples} == {
        "2007_000000": "train",
        "2007_000001": "train",
        "2007_000002": "train",
        "2007_000003": "val",
    }
    assert (len(source.classes), source.classes.names[15], source.classes.names[20]) == (21, "person", "tvmonitor")
    assert "skipped 1 test image without a published mask" in source.notes
    for sample in source.samples:
        assert (read_mask(sample.mask, source.mask_encoding) == VOC_IDS[sample.name]).all()
    splits = make_splits(source)
    assert [sample.name for sample in splits.val] == ["2007_000003"] and splits.lengths["test"] == 1
    assert not audit(splits).problems


def test_voc_with_a_published_test_set(tmp_path):
    source = read_source("VOC", write_voc(tmp_path, VOC_IDS, VOC_LISTS | {"test": ["2007_000004"]}))
    assert [sample.name for sample in make_splits(source).test] == ["2007_000004"]


def test_voc_with_one_list_only(tmp_path):
    source = read_source("VOC", write_voc(tmp_path, VOC_IDS, {"trainval": VOC_LISTS["trainval"]}))
    assert {sample.split for sample in source.samples} == {None} and make_splits(source).lengths == {
        "train": 2,
        "val": 1,
        "test": 1,
    }


def test_odd_voc(tmp_path):
    write_voc(tmp_path, VOC_IDS, {"train": ["2007_000000", "2007_000001"], "val": ["2007_000001"]})
    one_line(lambda: read_source("VOC", tmp_path), "found 2007_000001 more than once")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2008_000001\n")
    one_line(lambda: read_source("VOC", tmp_path), "2008_000001.png: no such file")
    for path in (tmp_path / "ImageSets/Segmentation").iterdir():
        path.unlink()
    one_line(lambda: read_source("VOC", tmp_path), "found no ImageSets/Segmentation lists")


# ---- ARTeFACT


def stored(picture, form="PNG"):
    content = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(content, form)
    return {"bytes": content.getvalue(), "path": None}


def works(count, size=(40, 60)):
    "Rows with the columns of the data set's card on the hub."
    return [
        {
            "id": f"work-{index:02}",
            "image": stored(RANDOM.integers(0, 256, (*size, 3), dtype=np.uint8), ("JPEG", "PNG")[index % 2]),
            "annotation": stored(random_ids(16, size=size)),
            "annotation_rgb": stored(np.zeros((*size, 3), np.uint8)),
            "material": ("Canvas", "Paper")[index % 2],
            "content": "Line art",
            "type": "Painting",
            "damage_description": 'a, "b"\nc',
            "llava_description": "",
            "verified_description": "",
        }
        for index in range(count)
    ]


def write_shards(root, rows, count=2):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need the package pyarrow")
    from pyarrow import parquet

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    kinds = {key: picture if isinstance(value, dict) else pyarrow.string() for key, value in rows[0].items()}
    (root / "data").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        table = pyarrow.Table.from_pylist(rows[index::count], schema=pyarrow.schema(list(kinds.items())))
        parquet.write_table(table, root / f"data/train-{index:05}-of-{count:05}.parquet")
    return root


def ids_of(row):
    return np.array(Image.open(io.BytesIO(row["annotation"]["bytes"])))


def test_artefact_from_parquet(tmp_path):
    rows = works(7)
    source = read_source("ARTeFACT", write_shards(tmp_path, rows))
    assert (len(source), source.classes, source.mask_encoding) == (7, ARTEFACT, "class_ids")
    for row, sample in zip(rows, source.samples):
        assert (sample.name, sample.image.read_bytes()) == (row["id"], row["image"]["bytes"])
        assert (read_mask(sample.mask, "class_ids") == ids_of(row)).all()
    assert "material: Canvas 4, Paper 3" in source.notes
    folder = source.samples[0].image.parent
    written = folder.stat().st_mtime_ns
    assert read_source("ARTeFACT", tmp_path) == source and folder.stat().st_mtime_ns == written  # unpacked once
    assert not audit(make_splits(source)).problems
    again = read_source("ARTeFACT", write_shards(tmp_path, works(5)))
    assert len(again) == 5 and again.samples[0].image.parent != folder  # other files


def test_parquet_that_is_cut_or_lacks_a_column(tmp_path):
    write_shards(tmp_path, works(4))
    shard = tmp_path / "data/train-00001-of-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    one_line(lambda: read_source("ARTeFACT", tmp_path), "train-00001-of-00002.parquet: found a damaged parquet file")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    shard.unlink()
    one_line(lambda: read_source("ARTeFACT", tmp_path), "found 1 of 2 parquet files, expected all")
    write_shards(tmp_path, [{key: value for key, value in row.items() if key != "annotation"} for row in works(4)])
    one_line(lambda: read_source("ARTeFACT", tmp_path), "found no column 'annotation'")


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"PAR1")
    one_line(lambda: read_source("ARTeFACT", tmp_path), "pip install pyarrow")


@pytest.mark.parametrize("folders", [("images", "annotations"), ("image", "annotation")])
def test_artefact_from_folders(tmp_path, folders):
    names = [f"{name}.png" for name in ("a", "a_aug1", "b", "b_hflip", "c")]
    write_folder(tmp_path, [random_ids(16) for _ in names], folders=folders, image_names=names, mask_names=names)
    (tmp_path / "annotation_rgb").mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "annotation_rgb/a.png")
    (tmp_path / "metadata.csv").write_text("id,material\na,Wood\nb,Wood\nc,Glass\n")
    source = read_source("ARTeFACT", tmp_path)
    assert [sample.group for sample in source.samples] == [
        "a",
        "a",
        "b",
        "b",
        "c",
    ] and "material: Wood 2, Glass 1" in source.notes
    splits = make_splits(source)
    assert (
        audit(splits).problems == [] and splits.lengths["train"] + splits.lengths["val"] + splits.lengths["test"] == 5
    )


def test_unpacking_leaves_nothing_half_done(tmp_path):
    def broken():
        yield from works(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(broken(), tmp_path / "unpacked")
    assert list(tmp_path.iterdir()) == []
    for row, _message in (
        (
            works(1)[0] | {"annotation": {"bytes": works(1)[0]["annotation"]["bytes"][:10]}},
            "no picture|damaged picture",
        ),
        (works(1)[0] | {"image": {"bytes": b"not a picture"}}, "damaged picture"),
        (works(1)[0] | {"image": None}, "no picture"),
        (works(1)[0] | {"image": {"bytes": None}}, "no picture"),
    ):
        with pytest.raises(CrackSegError, match="work-00"):
            unpack([row], tmp_path / "unpacked")
        assert list(tmp_path.iterdir()) == []


def test_names_stay_inside_the_folder(tmp_path):
    rows = [works(1)[0] | {"id": name} for name in ("../../up", "a/b", ".hidden", "c d")]
    (tmp_path / "in").mkdir()
    unpack(rows, tmp_path / "in/unpacked")
    assert [path.name for path in tmp_path.iterdir()] == ["in"] and len(
        list((tmp_path / "in/unpacked/images").iterdir())
    ) == 4
    renamed = read_source("ARTeFACT", tmp_path / "in/unpacked", class_names=[f"class {index}" for index in range(16)])
    assert len(renamed) == 4 and renamed.classes.colours == ARTEFACT.colours


def test_another_process_may_be_faster(tmp_path):
    (tmp_path / "unpacked/images").mkdir(parents=True)
    assert unpack(works(1), tmp_path / "unpacked") == tmp_path / "unpacked"
    assert [path.name for path in tmp_path.iterdir()] == ["unpacked"] and not list(
        (tmp_path / "unpacked/images").iterdir()
    )


def test_pictures_that_are_too_large_are_stored_smaller(tmp_path, monkeypatch):
    for module in ("artefact", "images"):
        monkeypatch.setattr(f"crackseg_nb.sources.{module}.MAX_PIXELS", 2000)
    rows = works(2, (64, 96))
    unpack(rows, tmp_path / "unpacked")
    source = read_source("ARTeFACT", tmp_path / "unpacked")  # refuses what exceeds MAX_PIXELS, and sizes that differ
    for row, sample in zip(rows, source.samples):
        assert set(np.unique(read_mask(sample.mask, "class_ids"))) <= set(np.unique(ids_of(row)))
        assert Image.open(sample.image).size == (48, 32)


# ---- augmented sets


def augmented(root, endings, count=12, change=None):
    "Write a set in which each photo has a copy for each ending."
    photos = [np.kron(RANDOM.integers(0, 256, (12, 16, 3)), np.ones((6, 6, 1))).astype(np.uint8) for _ in range(count)]
    names = [f"wall{index}{ending}.png" for index in range(count) for ending in endings]
    images = [photo if change is None else change(photo, copy) for photo in photos for copy in range(len(endings))]
    masks = [RANDOM.integers(0, 2, image.shape[:2], dtype=np.uint8) for image in images]
    return write_folder(root, masks, images=images, image_names=names, mask_names=names)


def unlike(photo, copy):
    return RANDOM.integers(0, 256, photo.shape, dtype=np.uint8)


@pytest.mark.parametrize(
    "endings",
    [
        ["", "_aug3"],
        ["-aug_12", "-aug_13"],
        ["", "_flip"],
        ["_hflip", "_vflip"],
        ["", "_rot90"],
        ["", "_rotated"],
        ["", "_bright"],
        ["", "_copy2"],
        ["_original", "_hflip_rot90"],
        [".rf.0a1b2c", ".rf.3d4e5f"],
        ["", " copy"],
        ["", "_Aug1"],
    ],
)
def test_copies_are_told_by_name_and_refused(tmp_path, endings):
    root = augmented(tmp_path, endings, change=unlike)
    with pytest.raises(CrackSegError) as caught:
        audit(make_splits(read_source("folder", root)), near_duplicates=False).raise_if_fatal()
    message = str(caught.value)
    assert "augmented copies in another split" in message and "\n" not in message
    pattern = eval(re.search(r"group_pattern=(.*), or split before", message)[1])
    source = read_source("folder", root, group_pattern=pattern)
    assert len({sample.group for sample in source.samples}) == 12
    assert audit(make_splits(source)).problems == []


@pytest.mark.parametrize("ending", ["_2", "-3", "_tile4", "_crop1", "_aug2021", "_a", "_left"])
def test_other_endings_are_no_copies(tmp_path, ending):
    assert source_name(f"wall{ending}") == f"wall{ending}"
    assert audit(make_splits(read_source("folder", augmented(tmp_path, ["", ending], change=unlike)))).problems == []


@pytest.mark.parametrize("prefixes", [["crack"], ["crack", "sound"]])
def test_numbers_after_a_word_for_the_whole_set_are_no_copies(tmp_path, prefixes):
    names = [f"{prefix}_aug_{index}.png" for prefix in prefixes for index in range(12)]
    source = read_source("folder", write_folder(tmp_path, [CRACK] * len(names), image_names=names, mask_names=names))
    assert audit(make_splits(source)).problems == []


def test_copies_across_a_published_border_are_a_warning(tmp_path):
    for split, ending in (("train", ""), ("test", "_aug1")):
        augmented(tmp_path / split, [ending], change=unlike)
    report = audit(make_splits(read_source("folder", tmp_path)))
    assert report.problems == [] and "12 images with augmented copies cross the published border" in report.warnings[0]
    augmented(tmp_path / "train", ["", "_aug1"], change=unlike)  # from which the validation set is taken here
    one_line(audit(make_splits(read_source("folder", tmp_path))).raise_if_fatal, "augmented copies in another split")


CHANGES = [
    lambda photo, copy: np.rot90(photo, copy).copy(),
    lambda photo, copy: photo[:, ::-1].copy() if copy else photo,
    lambda photo, copy: (photo * (1 - 0.2 * copy) + 20 * copy).astype(np.uint8),
]


@pytest.mark.parametrize("change", CHANGES, ids=["turned", "mirrored", "darker"])
def test_copies_are_told_by_content_and_refused(tmp_path, change):
    root = augmented(tmp_path, ["x1", "x2", "x3"], change=change)
    one_line(
        audit(make_splits(read_source("folder", root))).raise_if_fatal,
        "nearly repeat a training image",
        "augmented set",
        "group_pattern",
    )
    assert audit(make_splits(read_source("folder", root, group_pattern=r"(.*)x\d"))).problems == []


def test_repeats_across_a_published_border_are_warnings(tmp_path):
    photos = [np.kron(RANDOM.integers(0, 256, (12, 16, 3)), np.ones((6, 6, 1))).astype(np.uint8) for _ in range(12)]
    masks = [RANDOM.integers(0, 2, photo.shape[:2], dtype=np.uint8) for photo in photos]
    for split, images in (("train", photos), ("test", [photo[::-1] for photo in photos])):
        write_folder(tmp_path / split, masks, images=images)
    report = audit(make_splits(read_source("folder", tmp_path)))
    assert report.problems == [] and len(report.overlapping_test_names) == 12


def test_a_few_repeats_stay_warnings(tmp_path):
    root = augmented(tmp_path, [""], count=60)
    for copy in (1, 2):
        for kind in ("images", "masks"):
            (root / kind / f"again{copy}.png").write_bytes((root / kind / "wall7.png").read_bytes())
    seen = set()
    for seed in range(8):
        report = audit(make_splits(read_source("folder", root), seed=seed))
        seen.add(sum("nearly repeats" in warning for warning in report.warnings))
        assert report.problems == []
    assert max(seen) > 0


def test_groups_that_were_torn_are_told_once(tmp_path):
    "Not as a group and again as a family of copies."
    source = read_source("folder", augmented(tmp_path, ["", "_aug1"], change=unlike), group_pattern=r"^(.*?)(_aug1)?$")
    splits = make_splits(source)
    report = audit(replace(splits, val=splits.val[1:], train=splits.train + splits.val[:1]))
    assert len(report.problems) == 1 and "group in more than one split" in report.problems[0]


def test_samples_without_folders_are_families_too():
    own = [Sample(name, None, None, name) for index in range(9) for name in (f"site/{index}", f"site/{index}_aug1")]
    from crackseg_nb.data.audit import crossing_families

    found, published = crossing_families(make_splits(Source("own", own)))
    assert found and published == {} and all(len(names) == 2 for names in found.values())


def test_test_images_that_share_a_photo_with_validation_are_named():
    sample = {name: Sample(name, Path(name), Path(name), group) for name, group in zip("abcd", "xyyz")}
    splits = Splits([sample["a"]], [sample["b"]], [sample["c"], sample["d"]])
    assert overlapping_names(splits, []) == ["c"]
