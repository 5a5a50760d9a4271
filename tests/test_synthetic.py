"The synthetic folder under kills, concurrency and foreign files; the same pixels in every process; odd settings."

import dataclasses
import hashlib
import itertools
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from messages import line_of

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml, write_yaml
from crackseg_nb.core.seeds import seed_for
from crackseg_nb.synthetic import cracks as synthetic
from crackseg_nb.synthetic.cracks import MANIFEST, SyntheticConfig, synthesize, write_synthetic
from crackseg_nb.synthetic.drawing import DISTRACTOR_NAMES, LITTER, SURFACES

SIZE = (48, 64)
# The child imports the package from where the parent found it, whatever its working directory is.
PACKAGE_ROOT = str(Path(synthetic.__file__).resolve().parents[2])
WRITE = f"""
import sys; sys.path.insert(0, {PACKAGE_ROOT!r})
from crackseg_nb.synthetic.cracks import write_synthetic
write_synthetic(sys.argv[1], int(sys.argv[2]), {SIZE}, seed=3)
"""


def contents(root):
    "Map each file below `root` to a checksum of its bytes."
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------- images


def test_global_random_state_neither_matters_nor_changes():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = synthesize(11)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    assert all(np.array_equal(*pair) for pair in zip(first, synthesize(11)))


def test_threads_do_not_disturb_each_other():
    expected = [synthesize(seed, SIZE) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: synthesize(seed, SIZE), range(12)))
    for pairs in zip(expected, found):
        assert all(np.array_equal(*pair) for pair in zip(*pairs))


def test_the_number_of_threads_changes_nothing():
    threads, found = cv2.getNumThreads(), []
    for count in (1, 2):
        cv2.setNumThreads(count)
        found.append(synthesize(5, (300, 260)))
    cv2.setNumThreads(threads)
    assert all(np.array_equal(*pair) for pair in zip(*found))


@pytest.mark.parametrize("size", [(32, 32), (33, 200), (200, 33), (360, 360), [64, np.int64(48)]])
def test_any_size(size):
    for seed in range(3):
        image, mask = synthesize(seed, size)
        assert image.shape == (*size, 3) and mask.shape == tuple(size)
        assert image.dtype == mask.dtype == np.uint8 and mask.max() <= 1


@pytest.mark.parametrize("distractor", DISTRACTOR_NAMES)
def test_distractors_alone_are_never_in_the_mask(distractor):
    config = SyntheticConfig(distractors=(distractor,), distractor_probability=1, empty_probability=1)
    clean = SyntheticConfig(distractors=(), empty_probability=1)
    for seed in range(6):
        image, mask = synthesize(seed, SIZE, config)
        assert not mask.any()
        assert not np.array_equal(image, synthesize(seed, SIZE, clean)[0])


def test_cracks_are_darker_than_the_ground_beside_them():
    config = SyntheticConfig(distractors=(), empty_probability=0, shadow_probability=0)
    ratios = []
    for seed in range(30):
        image, mask = synthesize(seed, config=config)
        beside = cv2.dilate(mask, np.ones((13, 13))) - cv2.dilate(mask, np.ones((5, 5)))
        ratios.append(image[mask == 1].mean() / image[beside == 1].mean())
    assert np.median(ratios) < 0.75 and np.quantile(ratios, 0.9) < 0.9


@pytest.mark.parametrize("width", [(1, 1), (12, 12), (30, 40)])
@pytest.mark.parametrize("fraction", [(0.001, 0.001), (0.3, 0.3)])
def test_extreme_settings_end(width, fraction):
    config = SyntheticConfig(crack_width=width, crack_fraction=fraction, empty_probability=0)
    assert any(synthesize(seed, SIZE, config)[1].any() for seed in range(4))


def test_the_empty_share_is_what_was_asked_for():
    for share in (0, 1):
        masks = [
            synthesize(seed, (128, 128), SyntheticConfig(empty_probability=share, distractors=()))[1]
            for seed in range(20)
        ]
        assert np.mean([not mask.any() for mask in masks]) == share


@pytest.mark.parametrize("surface", SURFACES)
def test_one_surface(surface):
    image, _ = synthesize(0, SIZE, SyntheticConfig(surfaces=[surface]))
    assert image.std() > 5


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(surfaces=()), "expected a list of concrete, asphalt"),
        (dict(surfaces=["ice"]), "expected one of concrete, asphalt"),
        (dict(distractors=["leafs"]), "did you mean 'leaf'?"),
        (dict(crack_width=3), "expected two numbers"),
        (dict(crack_width=(0, 3)), "at least 1"),
        (dict(crack_width=(1, float("nan"))), "found nan"),
        (dict(crack_fraction=(0.1, 0.9)), "at most 0.3"),
        (dict(shadow_probability=-0.1), "shadow_probability"),
        (dict(stain_probability="often"), "found 'often'"),
        (dict(empty_probability=True), "found True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(CrackSegError) as error:
        SyntheticConfig(**settings)
    assert message in line_of(error)


@pytest.mark.parametrize("size", [128, (128,), (128, 128, 3), (31, 128), (128, 5000), ("a", 128), (64.5, 64), None])
def test_sizes_that_make_no_sense_are_refused(size):
    with pytest.raises(CrackSegError) as error:
        synthesize(0, size)
    assert line_of(error).startswith("size: found")


# ---------------------------------------------------------------- masks


def test_a_mask_moved_by_a_pixel_lies_on_lighter_ground():
    "In any direction: the mask is neither shifted nor turned against its image."
    config = SyntheticConfig(distractors=(), empty_probability=0, stain_probability=0, shadow_probability=0)
    for seed in range(4):
        image, mask = synthesize(seed, (96, 128), config)
        inner, moves = image.mean(2)[1:-1, 1:-1], itertools.product(range(3), repeat=2)
        grey = {(row, column): inner[mask[row : row + 94, column : column + 126] == 1].mean() for row, column in moves}
        assert min(grey, key=grey.get) == (1, 1)


@pytest.mark.parametrize("name", LITTER)
def test_what_lies_on_a_crack_hides_it_in_the_mask(name, monkeypatch):
    covers = []

    def lay(*args):
        scene, cover = LITTER[name](*args)
        covers.append(cover > 0.5)
        return scene, cover

    monkeypatch.setattr(synthetic, "LITTER", {name: lay})
    bare, littered = (SyntheticConfig(distractors=names, distractor_probability=1) for names in ((), (name,)))
    lost = 0
    for seed in range(4):
        covers.clear()
        whole, seen = (synthesize(seed, (96, 128), config)[1] for config in (bare, littered))
        assert np.array_equal(seen, np.where(np.any(covers, axis=0), 0, whole))
        lost += int((whole != seen).sum())
    assert lost > 0


# ---------------------------------------------------------------- folders


def test_masks_and_images_read_back_as_they_were_made(tmp_path):
    root = write_synthetic(tmp_path / "a", 3, SIZE, seed=9)
    for index in range(3):
        image, mask = synthesize(seed_for(9, "synthetic image", index), SIZE)
        assert np.array_equal(cv2.imread(str(root / f"images/{index:04d}.png"))[..., ::-1], image)
        assert np.array_equal(cv2.imread(str(root / f"masks/{index:04d}.png"), cv2.IMREAD_UNCHANGED), 255 * mask)


def test_a_killed_writing_is_completed_with_the_same_bytes(tmp_path):
    root = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(root), "1000"])
    deadline = time.monotonic() + 60
    while not (root / "masks/0003.png").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not read_yaml(root / MANIFEST)["complete"]
    whole = contents(write_synthetic(tmp_path / "whole", 3, SIZE, seed=3))
    written = contents(root)
    assert all(
        written[name] == whole[name] for name in whole if name != MANIFEST
    )  # the other process made the same bytes
    write_synthetic(root, 3, SIZE, seed=3)  # fewer images: what is beyond them goes
    found = {name: checksum for name, checksum in contents(root).items() if not Path(name).name.startswith(".")}
    assert found == whole and len(found) == 7


def test_two_writers_at_once_give_a_whole_folder(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: write_synthetic(tmp_path / "shared", 12, SIZE, seed=3), range(2)))
    assert contents(tmp_path / "shared") == contents(write_synthetic(tmp_path / "alone", 12, SIZE, seed=3))


def test_an_error_in_the_middle_leaves_an_unfinished_folder(tmp_path, monkeypatch):
    def fail(path, image):
        if path.name == "0002.png":
            raise OSError("disk full")
        original(path, image)

    original = synthetic.write_png
    monkeypatch.setattr(synthetic, "write_png", fail)
    with pytest.raises(OSError, match="disk full"):
        write_synthetic(tmp_path / "a", 4, SIZE)
    monkeypatch.undo()
    assert contents(write_synthetic(tmp_path / "a", 4, SIZE)) == contents(write_synthetic(tmp_path / "b", 4, SIZE))


@pytest.mark.parametrize(
    "change",
    [dict(num_images=3), dict(size=(64, 48)), dict(seed=1), dict(config=SyntheticConfig(empty_probability=0.2))],
)
def test_a_complete_folder_of_other_settings_is_refused_and_untouched(tmp_path, change):
    settings = dict(num_images=2, size=SIZE, seed=0)
    root = write_synthetic(tmp_path / "a", **settings)
    before = contents(root)
    with pytest.raises(CrackSegError) as error:
        write_synthetic(root, **{**settings, **change})
    message = line_of(error)
    assert str(root) in message and "found" in message and "expected" in message and next(iter(change)) in message
    assert contents(root) == before


def test_another_generator_version_is_refused(tmp_path):
    root = write_synthetic(tmp_path / "a", 1, SIZE)
    write_yaml(root / MANIFEST, {**read_yaml(root / MANIFEST), "version": 0})
    with pytest.raises(CrackSegError, match="version 0, expected"):
        write_synthetic(root, 1, SIZE)


@pytest.mark.parametrize("content", ["generator: another", "- 1", "", '!!python/object/apply:os.system ["true"]'])
def test_a_foreign_manifest_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(CrackSegError) as error:
        write_synthetic(tmp_path, 1, SIZE)
    assert MANIFEST in line_of(error)


def test_a_data_set_of_somebody_else_is_never_overwritten(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0000.png").write_bytes(b"precious")
    with pytest.raises(CrackSegError) as error:
        write_synthetic(tmp_path, 1, SIZE)
    assert "found images, masks but no synthetic.yaml" in line_of(error)
    assert (tmp_path / "images/0000.png").read_bytes() == b"precious"


def test_the_progress_bar_changes_nothing(tmp_path, capsys):
    quiet = contents(write_synthetic(tmp_path / "a", 2, SIZE))
    assert capsys.readouterr().err == ""
    assert contents(write_synthetic(tmp_path / "b", 2, SIZE, progress=True)) == quiet
    assert "synthetic images" in capsys.readouterr().err


def test_the_manifest_repeats_every_setting(tmp_path):
    manifest = read_yaml(write_synthetic(tmp_path, 1, SIZE) / MANIFEST)
    assert set(manifest["config"]) == {field.name for field in dataclasses.fields(SyntheticConfig)}
    assert SyntheticConfig(**manifest["config"]) == SyntheticConfig()
