"Synthetic damage: what its masks promise, determinism, odd settings, and the folder it is written to."

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from messages import line_of

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml, write_yaml
from crackseg_nb.core.seeds import seed_for
from crackseg_nb.synthetic import cracks as synthetic
from crackseg_nb.synthetic.cracks import MANIFEST, synthesize, write_synthetic
from crackseg_nb.synthetic.damage import (
    DAMAGE_CLASSES,
    DAMAGE_IDS,
    DamageConfig,
    paint_spalling,
    run_down,
    synthesize_damage,
    write_damage,
)
from crackseg_nb.synthetic.drawing import DISTRACTOR_NAMES

SIZE = (48, 64)
KINDS = [name for name in DAMAGE_CLASSES if name != "background"]


def only(*kinds, **options):
    "Settings in which every image shows `kinds` and no other damage, and nothing lies on the ground."
    return DamageConfig(
        **{f"{kind}_probability": float(kind in kinds) for kind in KINDS}, **{"distractors": (), **options}
    )


def contents(root):
    "Map each file below `root` to a checksum of its bytes."
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------- images


def test_the_image_is_a_function_of_the_seed():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    expected = [synthesize_damage(seed, SIZE) for seed in range(12)]
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: synthesize_damage(seed, SIZE), range(12)))
    for pairs in zip(expected, found):
        assert all(np.array_equal(*pair) for pair in zip(*pairs))
    assert len({image.tobytes() for image, _ in expected}) == 12


def test_the_number_of_threads_changes_nothing():
    threads, found = cv2.getNumThreads(), []
    for count in (1, 2):
        cv2.setNumThreads(count)
        found.append(synthesize_damage(11, (300, 260), only(*KINDS)))
    cv2.setNumThreads(threads)
    assert all(np.array_equal(*pair) for pair in zip(*found))


@pytest.mark.parametrize("size", [(32, 32), (33, 200), (200, 33), (300, 300), [64, np.int64(48)]])
def test_any_size(size):
    for seed in range(4):
        image, ids = synthesize_damage(seed, size, only(*KINDS))
        assert image.shape == (*size, 3) and ids.shape == tuple(size)
        assert image.dtype == ids.dtype == np.uint8 and ids.max() < len(DAMAGE_CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_alone_is_the_only_one_in_the_mask(kind):
    for seed in range(10):
        assert set(np.unique(synthesize_damage(seed, config=only(kind))[1])) == {0, DAMAGE_IDS[kind]}


@pytest.mark.parametrize("kind", ["spalling", "corrosion", "efflorescence"])
def test_the_share_is_what_was_asked_for(kind):
    for limits in ((0.04, 0.06), (0.3, 0.4)):
        for seed in range(10):
            share = (synthesize_damage(seed, config=only(kind, **{f"{kind}_fraction": limits}))[1] > 0).mean()
            # Opening takes specks away from a spall.
            assert limits[0] * (0.8 if kind == "spalling" else 0.99) <= share <= limits[1] + 0.001


@pytest.mark.slow
def test_a_probability_is_the_share_of_images():
    config = DamageConfig(
        **{f"{kind}_probability": share for kind, share in zip(KINDS, (0.2, 0.4, 0.6, 0.8))}, distractors=()
    )
    # Small areas, or one kind would hide another.
    config = dataclasses.replace(config, **{f"{kind}_fraction": (0.02, 0.02) for kind in KINDS})
    shown = np.mean([np.isin(range(1, 5), synthesize_damage(seed, (64, 64), config)[1]) for seed in range(150)], axis=0)
    assert np.abs(shown - (0.2, 0.4, 0.6, 0.8)).max() < 0.12


@pytest.mark.parametrize("fraction", [(0.001, 0.001), (0.5, 0.5)])
@pytest.mark.parametrize("width", [(1, 1), (30, 40)])
def test_extreme_settings_end(fraction, width):
    config = only(*KINDS, crack_width=width, **{f"{kind}_fraction": fraction for kind in KINDS})
    for size in ((32, 32), (64, 48)):
        for seed in range(3):
            assert synthesize_damage(seed, size, config)[0].std() > 0


@pytest.mark.slow
def test_every_class_occurs_in_sets_of_24_images_and_cracks_are_rarest():
    pixels = np.array([np.bincount(synthesize_damage(seed)[1].ravel(), minlength=5) for seed in range(1000, 1072)])
    sets = pixels.reshape(3, 24, 5).sum(1)
    assert (sets > 0).all()
    share = pixels.sum(0) / pixels.sum()
    assert 0.7 < share[0] < 0.9 and share.argmin() == DAMAGE_IDS["crack"] and 0.01 < share[1] < 0.04


# ---------------------------------------------------------------- the mask and what is visible


def test_later_paint_hides_earlier():
    hidden = dict.fromkeys(KINDS, 0)
    for seed in range(15):
        alone = {kind: synthesize_damage(seed, config=only(kind))[1] > 0 for kind in KINDS}
        alone["efflorescence"] = (
            synthesize_damage(seed, config=only("efflorescence", "crack"))[1] == DAMAGE_IDS["efflorescence"]
        )
        ids = synthesize_damage(seed, config=only(*KINDS))[1]
        uncovered, bar = np.ones_like(ids, bool), alone["spalling"] & (ids == DAMAGE_IDS["corrosion"])
        for kind in ("spalling", "crack", "corrosion", "efflorescence"):  # from the top down
            seen = alone[kind] & uncovered & ~bar
            assert (ids[seen] == DAMAGE_IDS[kind]).all()
            hidden[kind] += int((alone[kind] & ~seen).sum())
            uncovered &= ~alone[kind]
        assert (ids[uncovered] == 0).all() and bar.any()
    assert min(hidden.values()) > 0  # each kind was covered somewhere, spalling by its bar


def test_a_bar_lies_bare_only_where_spalling_and_corrosion_occur():
    for seed in range(10):
        spall = synthesize_damage(seed, config=only("spalling"))[1] > 0
        ids = synthesize_damage(seed, config=only("spalling", "corrosion"))[1]
        bar = spall & (ids == DAMAGE_IDS["corrosion"])
        assert 0 < bar.sum() < 0.7 * spall.sum() and set(np.unique(ids[spall])) == {2, 3}
        edge = spall & (cv2.erode(spall.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=1) == 0)
        assert not (bar & edge).any()  # it does not stick out


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_changes_where_the_mask_says(kind):
    for seed in range(8):
        image, ids = synthesize_damage(seed, config=only(kind))
        change = np.abs(image.astype(int) - synthesize_damage(seed, config=only())[0]).max(-1)
        near = cv2.dilate(ids, np.ones((5, 5), np.uint8)) > 0
        # Salt on pale concrete is the faintest, and leaves a damp margin.
        assert (change[ids > 0] > 4).mean() > 0.75 and (change[~near] > 12).mean() < 0.02


@pytest.mark.parametrize("distractor", DISTRACTOR_NAMES)
def test_distractors_are_background(distractor):
    for seed in range(4):
        clean, ids = synthesize_damage(seed, SIZE, only())
        found, mask = synthesize_damage(seed, SIZE, only(distractors=(distractor,), distractor_probability=1))
        assert not ids.any() and not mask.any() and not np.array_equal(clean, found)


def test_litter_hides_damage_and_marks_do_not():
    lost = 0
    for seed in range(6):
        bare = synthesize_damage(seed, config=only(*KINDS))[1]
        marks = dict(distractors=("joint", "sealant", "scratch", "marking", "tyre"), distractor_probability=1)
        assert np.array_equal(synthesize_damage(seed, config=only(*KINDS, **marks))[1], bare)
        image, ids = synthesize_damage(
            seed, config=only(*KINDS, distractors=("leaf", "wire"), distractor_probability=1)
        )
        covered = ids != bare
        assert (ids[covered] == 0).all()
        lost += int(covered.sum())
    assert lost > 500


def test_stains_are_dark_and_without_hue():
    for seed in range(30):
        stained, clean = (
            synthesize_damage(seed, config=only(stain_probability=share, shadow_probability=0))[0].mean((0, 1))
            for share in (1, 0)
        )
        assert abs((stained[0] / stained[2]) / (clean[0] / clean[2]) - 1) < 0.02 and stained.mean() < clean.mean()


def test_stains_of_the_crack_images_may_be_rusty():
    # The generator of cracks draws its stains as ever: one in four is of rust, which is no crack.
    config = dict(distractors=(), empty_probability=1, shadow_probability=0)
    ratios = []
    for seed in range(30):
        stained, clean = (
            synthesize(seed, config=synthetic.SyntheticConfig(stain_probability=share, **config))[0].mean((0, 1))
            for share in (1, 0)
        )
        ratios.append((stained[0] / stained[2]) / (clean[0] / clean[2]))
    assert 0.1 < np.mean(np.array(ratios) > 1.02) < 0.5


def test_a_spall_is_a_hollow_that_is_lit_from_above():
    mask, ground = np.zeros((64, 64), np.uint8), np.full((64, 64, 3), 0.6, np.float32)
    mask[16:48, 12:52] = 1
    images = np.mean([paint_spalling(ground, mask, np.random.default_rng(seed)).mean(-1) for seed in range(20)], axis=0)
    top, floor, bottom = images[17:20, 16:48].mean(), images[26:40, 16:48].mean(), images[45:47, 16:48].mean()
    assert top < 0.7 * floor and bottom > 1.1 * floor  # the upper rim throws a shadow, the lower one faces the light
    assert 0.65 * 0.6 < floor < 0.6 and np.allclose(images[:11], 0.6)


def test_what_runs_down_never_runs_up_and_never_grows():
    source = np.zeros((40, 30), np.float32)
    source[15, 10:20] = 1
    short, long = (run_down(source, np.random.default_rng(3), reach) for reach in (3, 30))
    for field in (short, long):
        assert not field[:15].any() and field.max() == 1 and (np.diff(field[15:].sum(1)) <= 0).all()
    assert long.sum() > 2 * short.sum()


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(crack_probability=1.5), "crack_probability: found 1.5"),
        (dict(spalling_probability="often"), "found 'often'"),
        (dict(corrosion_probability=True), "found True"),
        (dict(shadow_probability=-1), "shadow_probability"),
        (dict(crack_fraction=(0, 0.1)), "at least 0.001"),
        (dict(efflorescence_fraction=(0.1, 0.9)), "at most 0.5"),
        (dict(corrosion_fraction=0.1), "expected two numbers"),
        (dict(spalling_fraction=(0.2, 0.1)), "smaller number first"),
        (dict(crack_width=(0, 3)), "at least 1"),
        (dict(distractors=["leafs"]), "did you mean 'leaf'?"),
        (dict(distractors="leaf"), "expected a list"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(CrackSegError) as error:
        DamageConfig(**settings)
    assert message in line_of(error)


@pytest.mark.parametrize("size", [128, (128,), (31, 128), (128, 5000), None])
def test_sizes_that_make_no_sense_are_refused(size, tmp_path):
    for call in (lambda: synthesize_damage(0, size), lambda: write_damage(tmp_path / "a", 1, size)):
        with pytest.raises(CrackSegError) as error:
            call()
        assert line_of(error).startswith("size: found")
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- folders


def test_images_and_ids_read_back_as_they_were_made(tmp_path):
    root = write_damage(tmp_path / "a", 3, SIZE, seed=9)
    assert sorted(path.name for path in root.iterdir()) == ["annotations", "images", MANIFEST]
    for index in range(3):
        image, ids = synthesize_damage(seed_for(9, "damage image", index), SIZE)
        assert np.array_equal(cv2.imread(str(root / f"images/{index:04d}.png"))[..., ::-1], image)
        found = cv2.imread(str(root / f"annotations/{index:04d}.png"), cv2.IMREAD_UNCHANGED)
        assert found.dtype == np.uint8 and np.array_equal(found, ids)  # plain grey: one channel


def test_an_interrupted_writing_is_completed_with_the_same_bytes(tmp_path, monkeypatch):
    def fail(path, image):
        if path.name == "0002.png":
            raise OSError("disk full")
        original(path, image)

    original = synthetic.write_png
    monkeypatch.setattr(synthetic, "write_png", fail)
    with pytest.raises(OSError, match="disk full"):
        write_damage(tmp_path / "a", 4, SIZE)
    monkeypatch.undo()
    assert read_yaml(tmp_path / "a" / MANIFEST)["complete"] is False
    assert contents(write_damage(tmp_path / "a", 4, SIZE)) == contents(write_damage(tmp_path / "b", 4, SIZE))


def test_what_another_size_left_behind_goes(tmp_path):
    root = write_damage(tmp_path / "a", 5, SIZE)
    write_yaml(root / MANIFEST, {**read_yaml(root / MANIFEST), "complete": False})
    assert contents(write_damage(root, 2, SIZE)) == contents(write_damage(tmp_path / "b", 2, SIZE))


def test_a_complete_folder_is_used_as_it_is_and_one_that_lost_a_file_is_not(tmp_path):
    root = write_damage(tmp_path, 2, SIZE)
    before, times = contents(root), {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_damage(root, 2, SIZE)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times
    (root / "annotations/0001.png").unlink()
    assert contents(write_damage(root, 2, SIZE)) == before


@pytest.mark.parametrize(
    "change", [dict(num_images=3), dict(size=(64, 48)), dict(seed=1), dict(config=DamageConfig(crack_width=(1, 3)))]
)
def test_a_complete_folder_of_other_settings_is_refused_and_untouched(tmp_path, change):
    settings = dict(num_images=2, size=SIZE, seed=0)
    root = write_damage(tmp_path / "a", **settings)
    before = contents(root)
    with pytest.raises(CrackSegError) as error:
        write_damage(root, **{**settings, **change})
    assert str(root) in line_of(error) and next(iter(change)) in line_of(error)
    assert contents(root) == before


@pytest.mark.parametrize("first, second", [(write_synthetic, write_damage), (write_damage, write_synthetic)])
def test_folders_of_cracks_and_of_damage_are_not_mixed_up(tmp_path, first, second):
    root = first(tmp_path / "a", 1, SIZE)
    before = contents(root)
    for complete in (True, False):
        write_yaml(root / MANIFEST, {**read_yaml(root / MANIFEST), "complete": complete})
        with pytest.raises(CrackSegError) as error:
            second(root, 1, SIZE)
        assert "expected one with generator" in line_of(error)
    assert contents(root).keys() == before.keys()


def test_the_manifest_repeats_every_setting(tmp_path):
    config = DamageConfig(spalling_fraction=(0.1, 0.2), distractors=("leaf",))
    manifest = read_yaml(write_damage(tmp_path, 1, SIZE, config=config) / MANIFEST)
    assert DamageConfig(**manifest["config"]) == config and manifest["generator"] == "crackseg_nb.data.damage"


def test_the_progress_bar_changes_nothing(tmp_path, capsys):
    quiet = contents(write_damage(tmp_path / "a", 2, SIZE))
    assert capsys.readouterr().err == ""
    assert contents(write_damage(tmp_path / "b", 2, SIZE, progress=True)) == quiet
    assert "synthetic images" in capsys.readouterr().err
