"""Hostile inputs: each is read right, or refused in one line that names the file or parameter; none hangs."""

import base64
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from messages import one_line
from PIL import Image
from test_kinds_of_files import COLOUR, MASK, write_set

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml, write_text
from crackseg_nb.core.run_folder import read_results
from crackseg_nb.inference.photos import check_photo, find_photos
from crackseg_nb.inference.prediction import check_places, kept_record, predict, read_record
from crackseg_nb.measure import photos as measured
from crackseg_nb.runs.command import main as run_main
from crackseg_nb.runs.config import configure
from crackseg_nb.sources.images import read_content, read_image, read_mask
from crackseg_nb.sources.registry import read_source

SQUARE = [5, 5, 25, 5, 25, 25, 5, 25]
WINDOW = np.zeros((64, 80), np.uint8)
WINDOW[30:34, 5:70] = 255


def refused(action):
    "Check that `action` raises a CrackSegError of one line, and return it."
    with pytest.raises(CrackSegError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def packed(values, kind="PNG", **options):
    "Return a picture's file as bytes."
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind, **options)
    return file.getvalue()


def as_tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


# ---- pictures

WHOLE = packed(COLOUR)
PHOTO = packed(COLOUR, "JPEG")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def lying(width, height):
    "Return a PNG whose header promises more than there is."
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def circular():
    "Return a TIFF whose directory says that it is its own successor."
    data = bytearray(as_tiff(COLOUR, photometric="rgb"))
    place = struct.unpack("<I", data[4:8])[0]
    end = place + 2 + 12 * struct.unpack("<H", data[place : place + 2])[0]
    data[end : end + 4] = struct.pack("<I", place)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 500,
        b"<html>404</html>",
        b"PK\3\4" + WHOLE,
        b"\x1f\x8b" + WHOLE,
        b"version https://git-lfs.github.com/spec/v1\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\n",
        lying(0, 40),
        lying(60, 40),
        lying(30000, 2),
        lying(2**31 - 1, 2**31 - 1),
        WHOLE[:-20] + bytes([WHOLE[-20] ^ 255]) + WHOLE[-19:],
        WHOLE[:33] + chunk(b"gAMA", b"\0\0\1\1")[:-1] + b"\0" + WHOLE[33:],
        WHOLE[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 8_000_000)) + WHOLE[33:],
        packed(COLOUR, "JPEG", progressive=True)[:-800],
        PHOTO[:-2],
        as_tiff(np.full((40, 60), np.nan, np.float32)),
        as_tiff(np.full((40, 60), -5, np.int16)),
        packed(COLOUR, "GIF", save_all=True, append_images=[Image.fromarray(COLOUR[::-1].copy())]),
    ],
)
def test_no_picture_is_refused_as_image_and_as_photo(tmp_path, data):
    root = write_set(tmp_path, [COLOUR] * 3, [MASK] * 3)
    (root / "images/p1.png").write_bytes(data)
    assert "p1.png: found" in refused(lambda: read_source("folder", root))


@pytest.mark.parametrize(
    "data",
    [
        packed(COLOUR, "JPEG", progressive=True, quality=95, subsampling=0),
        WHOLE[:33] + chunk(b"tRNS", b"\0\1\0\2\0\3") + WHOLE[33:],
        WHOLE[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(b"junk")) + WHOLE[33:],
        WHOLE + b"junk" * 1000,
        packed(np.dstack([COLOUR, np.zeros((40, 60), np.uint8)])),
        as_tiff(COLOUR, bigtiff=True, photometric="rgb"),
        as_tiff((COLOUR / 255).astype(np.float16), tile=(16, 16), photometric="rgb"),
        as_tiff(np.dstack([COLOUR, COLOUR[..., :2]]), photometric="minisblack", planarconfig="contig"),
        circular(),
    ],
)
def test_odd_pictures_are_read_right(tmp_path, data):
    root = write_set(tmp_path, [COLOUR] * 3, [MASK] * 3)
    (root / "images/p1.png").unlink()
    path = root / f"images/p1.{'tif' if data[:2] == b'II' else 'png'}"
    path.write_bytes(data)
    sample = read_source("folder", root).samples[1]
    assert np.abs(read_image(sample.image, sample.white).astype(int) - COLOUR).mean() < 12
    assert check_photo(path)[:2] == (40, 60)


@pytest.mark.parametrize(
    "mask",
    [
        as_tiff(np.where(MASK, np.nan, 0).astype(np.float32)),
        as_tiff(np.where(MASK, np.inf, 0).astype(np.float32)),
        packed(np.dstack([COLOUR * 0, MASK * 255])),
        packed(np.where(MASK, 254, 1).astype(np.uint8)),
    ],
)
def test_odd_masks_are_refused(tmp_path, mask):
    root = write_set(tmp_path, [COLOUR] * 3, [MASK * 255] * 3)
    (root / "masks/p1.png").unlink()
    (root / ("masks/p1.tif" if mask[:2] == b"II" else "masks/p1.png")).write_bytes(mask)
    assert "masks/p1" in refused(lambda: read_source("folder", root))


# ---- names and places


@pytest.mark.parametrize(
    "name", [b"a\nb", b"a\rb", b"a\tb", b"a\x1b[31mb", b"Stra\xdfe", "a\x85b".encode(), "a\u2028b".encode()]
)
def test_names_that_no_table_can_hold(tmp_path, name):
    root = os.fsencode(write_set(tmp_path, [COLOUR] * 2, [MASK] * 2))
    for kind in (b"images", b"masks"):
        os.rename(b"%s/%s/p0.png" % (root, kind), b"%s/%s/%s.png" % (root, kind, name))
    said = (
        refused(lambda: read_source("folder", tmp_path)),
        refused(lambda: measured.find_predictions(tmp_path / "masks")),
    )
    said += (refused(lambda: check_places(tmp_path / "out", find_photos(str(tmp_path / "images")))),)
    assert all("expected UTF-8 without control characters; rename it" in line and line.isprintable() for line in said)


@pytest.mark.parametrize("name", ["-a", "😀" * 20, "a.", "a ", "=cmd()", "<script>", "%s{0}", "null", "1e5", "123"])
def test_odd_names_are_kept(tmp_path, name):
    root = write_set(tmp_path, [COLOUR] * 2, [MASK] * 2)
    for kind in ("images", "masks"):
        (root / kind / "p0.png").rename(root / kind / f"{name}.png")
    assert name in [sample.name for sample in read_source("folder", root).samples]
    assert name in [photo.stem for photo in find_photos(str(root / "images"))]


def test_names_too_long_for_results_are_refused_before_the_work(tmp_path):
    for path in (tmp_path / f"{'x' * 250}.png", tmp_path / f"{'é' * 120}_mask.png"):
        assert "bytes" in refused(lambda: check_places(tmp_path / "out", [path]))  # noqa: B023
    write_text(tmp_path / f"{'x' * 240}_mask.png", "")
    assert "bytes" in refused(lambda: measured.find_predictions(tmp_path))


def test_what_has_no_end_is_not_read(tmp_path):
    root = write_set(tmp_path, [COLOUR] * 2, [MASK] * 2)
    os.mkfifo(root / "images/q.png")
    os.symlink("/dev/zero", root / "images/r.png")
    os.mkfifo(root / "masks/p9_mask.png")
    (root / "images/s.png").mkdir()
    assert [sample.name for sample in read_source("folder", root).samples] == ["p0", "p1"]
    assert len(find_photos(str(root / "images"))) == len(measured.find_predictions(root / "masks")) == 2
    for name in ("images/q.png", "images/r.png"):
        one_line(lambda: read_content(root / name), f"{name}: found no regular file")  # noqa: B023
    one_line(lambda: measured.find_predictions(root / "masks/p9_mask.png"), "p9_mask.png: found no picture")


@pytest.mark.parametrize("word", ["x" * 300, "~nosuchuser/x", "a\0b"])
def test_paths_that_cannot_be(word):
    for action in (
        lambda: find_photos(word),
        lambda: measured.find_predictions(word),
        lambda: read_source("folder", word),
        lambda: read_yaml(word),
        lambda: configure(config=word),
        lambda: configure(resume=word),
    ):
        refused(action)


def test_a_photo_under_two_spellings_is_one(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(WHOLE)
    same = [str(path), f"{tmp_path}/./a.png", f"{tmp_path}/../{tmp_path.name}/a.png"]
    assert find_photos(same) == [path]
    one_line(lambda: find_photos([]), "images: found none")


def test_who_may_read_a_file_follows_from_the_umask(tmp_path):
    code = "import sys; from crackseg_nb.core.files import write_text; write_text(sys.argv[1], '')"
    for mask, mode in (("077", 0o600), ("002", 0o664)):
        path = tmp_path / mask
        subprocess.run(["sh", "-c", f'umask {mask}; exec "$@"', "sh", sys.executable, "-c", code, path], check=True)
        assert path.stat().st_mode & 0o777 == mode


# ---- annotation files


def coco(root, text=None, **parts):
    "Write three images and a COCO file, of which `parts` replace some, and read them."
    for path in (write_set(root, [COLOUR] * 3, [MASK] * 3) / "masks").iterdir():
        path.unlink()
    about = {
        "images": [dict(id=number, file_name=f"p{number}.png", width=60, height=40) for number in range(3)],
        "annotations": [dict(id=1, image_id=0, category_id=1, segmentation=[SQUARE])],
        "categories": [dict(id=1, name="crack")],
    }
    (root / "a.json").write_text(text or json.dumps(about | parts))
    source = read_source("coco", root)
    return [int((read_mask(sample.mask, source.mask_encoding) == 1).sum()) for sample in source.samples]


def outlined(outline):
    return {"annotations": [dict(id=1, image_id=0, category_id=1, segmentation=outline)]}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (dict(images=[dict(id=1, file_name=f"p{n}.png", width=60, height=40) for n in (0, 1)]), "the id 1 twice"),
        (dict(categories=[dict(id=1, name="crack"), dict(id=1, name="rust")]), "found the id 1 twice among categories"),
        (dict(text='{"images": [], "images": []}'), "'images' stands twice"),
        (dict(text="[" * 200_000), "found a damaged file (maximum recursion depth"),
        (dict(images=[dict(id=0, file_name="a\nb.png", width=60, height=40)]), r"(a\nb.png)"),
        (dict(images=[dict(id=0, file_name="../../../etc/passwd", width=60, height=40)]), "found no file for 1"),
        (dict(images=[dict(id=0, file_name="p0.png", width=1e300, height=40)]), "found 4e+295 million pixels"),
        (dict(categories=[dict(id=1, name="cr\nack")]), "class_names: found"),
        (dict(text="\0" * 99), "found a damaged file"),
        (outlined([[float("nan"), 5, 25, 5, 25, 25]]), "not finite"),
        (outlined(dict(size=[40, 60], counts="o" * 20000)), "cannot be drawn"),
        (outlined(dict(size=None, counts=None)), "cannot be drawn"),
        (outlined(dict(size=[40, 60], counts=[[1, 2], [3, 4]])), "run lengths"),
    ],
)
def test_coco_files_that_say_two_things_or_nothing(tmp_path, parts, said):
    assert said in refused(lambda: coco(tmp_path, **parts))


@pytest.mark.parametrize(
    ("outline", "pixels"),
    [([SQUARE], 400), ([[-5, -5, 25, 5, 25, 25]], 285), (dict(size=[40, 60], counts=[2300, 100]), 100)],
)
def test_coco_outlines_that_are_drawn(tmp_path, outline, pixels):
    assert coco(tmp_path, **outlined(outline)) == [pixels, 0, 0]


def bomb():
    "Return a small PNG that promises 40,000 million pixels."
    data = bytearray(packed(MASK))
    data[16:24] = struct.pack(">II", 200_000, 200_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize("points", [[[float("nan"), 1], [3, 3]], [[float("inf"), 1], [3, 3]], ["ab", "cd"], [1, 2]])
@pytest.mark.parametrize("mask", [WHOLE, bomb(), WHOLE[:-99], b"!!"])
def test_labelme_masks_that_cannot_be_drawn(tmp_path, points, mask):
    points = points if mask is WHOLE else [[1, 2], [3, 3]]
    Image.fromarray(COLOUR).save(tmp_path / "p.png")
    shape = dict(label="crack", shape_type="mask", points=points, mask=base64.b64encode(mask).decode())
    about = dict(imagePath="p.png", imageWidth=60, imageHeight=40, shapes=[shape])
    (tmp_path / "p.json").write_text(json.dumps(about))
    assert "p.json" in refused(lambda: read_source("labelme", tmp_path))


@pytest.mark.parametrize("place", ["labels/p0.txt", "classes.txt", "train.txt"])
def test_a_byte_order_mark_is_no_letter(tmp_path, place):
    root = write_set(tmp_path, [COLOUR] * 2, [MASK] * 2)
    (root / "labels").mkdir()
    files = {f"labels/p{n}.txt": "0 0.1 0.1 0.5 0.1 0.5 0.5\r\n" for n in (0, 1)} | {"classes.txt": "crack\r\n"}
    if place == "train.txt":
        del files["classes.txt"]
        files |= {"train.txt": "images/p0.png\r\nimages/p1.png\r\n", "data.yaml": "names: [crack]\ntrain: train.txt\n"}
    for name, text in files.items():
        (root / name).write_bytes((b"\xef\xbb\xbf" if name == place else b"") + text.encode())
    source = read_source("yolo", root)
    assert source.classes.names == ("background", "crack")
    assert {sample.split for sample in source.samples} == {"train" if place == "train.txt" else None}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0 0,1 0,1 0,5 0,1 0,5 0,5", "line 1"),
        ("0 nan 0.1 0.5 0.1 0.5 0.5", "coordinate of nan"),
        ("\0" * 30, "line 1"),
        ("7 0.1 0.1 0.5 0.1 0.5 0.5", "class 7"),
    ],
)
def test_yolo_lines_that_are_none(tmp_path, line, said):
    root = write_set(tmp_path, [COLOUR], [MASK])
    (root / "labels").mkdir()
    (root / "labels/p0.txt").write_text(line)
    (root / "classes.txt").write_text("crack")
    assert said in refused(lambda: read_source("yolo", root))
    (root / "classes.txt").write_bytes("Riß".encode("latin-1"))
    assert "classes.txt: found no text" in refused(lambda: read_source("yolo", root))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<a>" * 100_000,
        '<?xml version="1.0" encoding="klingon"?><annotations/>',
        '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotations>&b;</annotations>',
        '<annotations><image name="p0.png" width="6²" height="40"><polygon label="a" points="1,1;9,1;9,9"/></image>'
        "</annotations>",
        '<annotations><image name="p0.png" width="60" height="40"><mask label="a" left="nan" top="0" width="9" '
        'height="9" rle="81"/></image></annotations>',
    ],
)
def test_cvat_files_that_are_none(tmp_path, text):
    Image.fromarray(COLOUR).save(tmp_path / "p0.png")
    (tmp_path / "a.xml").write_text(text)
    assert "a.xml" in refused(lambda: read_source("cvat", tmp_path))


# ---- configuration


def configured(folder, text):
    (folder / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return configure(config=str(folder / "c.yaml"))


DEEP = "a: &a [x, x]\n" + "".join(
    f"{own}: &{own} [{', '.join([f'*{before}'] * 9)}]\n" for before, own in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    "text",
    [
        "train: {epochs: 2001-99-99}",
        "train: {epochs: !!int x}",
        "train: {epochs: !!float x}",
        f"train: {{epochs: {'9' * 5000}}}",
        "train: " + "[" * 3000,
        DEEP,
        "run: &a {run_name: *a}",
        "train: {epochs: 1:30}",
        "optim: {lr: 1:30.5}",
        "train: {epochs: 0x10}",
        "train: {epochs: .nan}",
        "train: {epochs: 1e309}",
        "train: {epochs: no}",
        "train: {epochs: [2]}",
        "train: {epochs: 1, epochs: 2}",
        "train: !!python/object:os.system {}",
        "run: {run_name: ../x}",
        'run: {run_name: "\\ud800"}',
        'run: {run_name: "a\\nb"}',
        "train: {epochs: 2}\n---\ntrain: {epochs: 3}",
        "optim: {lr: '0,001'}",
        "run: {seed: 1e20}",
        "\0",
        "",
        "train: {epochs: 2}".encode("utf-16"),
    ],
)
def test_configurations_that_are_refused(tmp_path, text):
    refused(lambda: configured(tmp_path, text))


def test_yaml_is_read_as_it_is_written(tmp_path):
    config = configured(
        tmp_path, "\ufefftrain: {epochs: 010}\r\nrun: {run_name: 0123, seed: 1_000}\r\noptim: {lr: 1e-4}"
    )
    assert (config.train.epochs, config.run.run_name, config.run.seed, config.optim.lr) == (10, "0123", 1000, 1e-4)
    text = "a: [no, on, 12:30, 2001-01-01, 0x1F, ~, true, 1.5, -3, .5, 1.0e-05, '']\n<<: {b: &x [1]}\nc: *x"
    values = ["no", "on", "12:30", "2001-01-01", "0x1F", None, True, 1.5, -3, 0.5, 1e-5, ""]
    (tmp_path / "t.yaml").write_text(text)
    assert read_yaml(tmp_path / "t.yaml") == {"a": values, "b": [1], "c": [1]}


@pytest.mark.parametrize(
    "words",
    [
        ["lr", "0.1", "-p", "lr", "0.2"],
        *[["lr", text] for text in ("0,001", "50%", "0.1,", "'0.1'", "nan", "1e309", "", "-0.0", "[0.1]")],
        *[["epochs", text] for text in ("1.5", "0x10", "true", "")],
        *[[name, "1"] for name in ("LR", "lr=", "learning-rate", "learningRate", "batchSize", "None", "")],
        ["run_name", "\udcff"],
        ["fractions", "0,7,0,15,0,15"],
        ["seed", "9" * 5000],
    ],
)
def test_parameters_that_are_refused(words, capsys):
    assert run_main(["-p", *words]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "found" in said and "expected" in said


def test_a_deleted_working_directory_is_named(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); from crackseg_nb.runs.command import main; sys.exit(main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=gone,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    assert done.returncode == 1 and done.stderr == (
        "working directory: found it deleted, expected one that is there; change to it\n"
    )


def test_a_reader_that_has_read_enough_ends_a_command_without_a_traceback():
    code = (
        "import sys; from crackseg_nb.runs.command import command\n"
        "@command\ndef main(words):\n    [print('line \\xe9') for _ in range(100_000)]\nmain([])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )
    assert process.stdout.readline() == b"line \\xe9\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait()


# ---- prediction and measurement


def test_photos_whose_names_have_dots_keep_a_record_each(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("site.1", "site.2", "other"):
        Image.fromarray(COLOUR).save(tmp_path / f"photos/{name}.png")
    for _ in range(2):  # the second time from the records
        manifest = predict("ready", str(tmp_path / "photos"), tmp_path / "out", device="cpu", progress=False)
        assert sorted(entry["photo"] for entry in manifest["photos"]) == ["other.png", "site.1.png", "site.2.png"]
    (tmp_path / "out/.crackseg/lost.json").write_text('{"key": {')
    one_line(
        lambda: predict("ready", str(tmp_path / "photos/other.png"), tmp_path / "out", device="cpu", progress=False),
        "lost.json: found a damaged record of a photo",
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"key": 1, "entry": 2}', '{"key": {}, "entry": {"files": []}}']
)
def test_damaged_records_are_named_and_their_photos_predicted_again(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert "a.json" in refused(lambda: kept_record(path))
    assert read_record(path, {}, tmp_path) is None


def measure(folder, mask=WINDOW, manifest=None, **settings):
    Image.fromarray(mask).save(folder / "a_mask.png")
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest)
    return measured.measure_folder(folder, progress=False, out=False, **settings)


LOST = [json.dumps({"mask": {"threshold": value}}) for value in (float("nan"), 5, -1, "0.3", True, None)]


@pytest.mark.parametrize("manifest", ["", '{"mask": {"thresh', "[" * 100_000, *LOST])
def test_a_manifest_that_lost_its_threshold_is_not_passed_over(tmp_path, manifest):
    assert "manifest.json" in refused(lambda: measure(tmp_path, manifest=manifest))
    measure(tmp_path, manifest=manifest, threshold=0.5)


@pytest.mark.parametrize(
    ("manifest", "threshold"),
    [(None, 0.5), ("[]", 0.5), ('{"name": "app"}', 0.5), ('{"mask": {"threshold": 0.3}}', 0.3)],
)
def test_thresholds_of_manifests(tmp_path, manifest, threshold):
    if manifest:
        (tmp_path / "manifest.json").write_text(manifest)
    assert measured.chosen_threshold(tmp_path) == threshold


@pytest.mark.parametrize(
    "settings",
    [
        *[dict(mm_per_pixel=value) for value in (0, -1, float("nan"), "0,2", True, {"zzz": 1.0})],
        *[dict(min_length_px=value) for value in (float("nan"), -1, "abc")],
        *[dict(threshold=value) for value in (float("nan"), "x", 1)],
        *[dict(mm_per_pixel=1.0, classes=value) for value in ("nope", [float("nan")], [3, 1], ["", "1"], ["."])],
        dict(class_id=0),
        dict(width_error=float("nan")),
        dict(formats="../x"),
    ],
)
def test_measurements_without_sense_are_refused(tmp_path, settings):
    assert refused(lambda: measure(tmp_path, **settings)).startswith(next(reversed(settings)))


@pytest.mark.parametrize(
    ("mask", "fits"),
    [
        (np.uint8(WINDOW // 3 * 2), True),
        (np.uint8(np.where(WINDOW, np.where(np.arange(80) < 30, 1, 2), 0)), True),
        (np.uint8(np.where(WINDOW, 254, 1)), False),
        (np.uint8(np.where(WINDOW, 1, np.where(np.arange(80) < 30, 255, 0))), False),
        (np.uint8(WINDOW // 255 * np.arange(80) * 3), False),
    ],
)
def test_greys_are_no_cracks(tmp_path, mask, fits):
    if fits:
        assert measure(tmp_path, mask).photos["cracks"][0] == 1
    else:
        assert "a_mask.png: found mask values" in refused(lambda: measure(tmp_path, mask))


@pytest.mark.parametrize("values", [np.full((64, 80), np.nan, np.float32), WINDOW - np.float32(300), np.int16(WINDOW)])
def test_probabilities_that_are_none(values):
    assert refused(lambda: measured.measure_photo(None, values)).startswith("probability: found values")


@pytest.mark.parametrize("name", ["$\\frac$", "$a_$x$", "<b>x", "%", "$5 and $6"])
def test_names_are_shown_as_they_are(tmp_path, name):
    Image.fromarray(WINDOW).save(tmp_path / f"{name}_mask.png")
    result = measured.measure_folder(tmp_path, progress=False, out=False)
    figure = measured.show_overview(result, tmp_path)
    figure.draw_without_rendering()
    assert figure.axes[0].get_title().startswith(f"{name}: 1 piece")
    assert "<b>" not in measured.short_table(result).to_html()


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path):
    Image.fromarray(WINDOW).save(tmp_path / "a_mask.png")
    for place in (tmp_path / "a_mask.png", "/proc/x"):
        assert "cannot write there" in refused(lambda: measured.measure_folder(tmp_path, out=place))  # noqa: B023


@pytest.mark.parametrize("text", ["", "- 1", "test: {iou: 1", "protocol: {split: a}", "test: [1]\nprotocol: {}", "\0"])
def test_results_that_were_cut_are_named(tmp_path, text):
    (tmp_path / "final_results.yaml").write_text(text)
    assert "final_results.yaml: found no" in refused(lambda: read_results(tmp_path))
