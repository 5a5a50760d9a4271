"""Several classes end to end: what a run keeps agrees with the files on disk, and bad input stops in one line."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml
from crackseg_nb.data.class_weights import weights_from_counts
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import make_criterion, run
from crackseg_nb.runs.results import read_prediction
from crackseg_nb.sources.images import read_mask

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("background", "crack", "spalling", "corrosion", "efflorescence")
SMALL = dict(
    recipe="damage_quickstart",
    encoder="mobilenet_v3_small",
    synthetic_images=24,
    image_size=32,
    epochs=1,
    batch_size=4,
    device="cpu",
    amp="off",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(configure(**SMALL, outputs=str(tmp_path_factory.mktemp("outputs")), run_name="several"))


def confusion(pairs):
    matrix = np.zeros((5, 5), np.int64)
    for mask, prediction in pairs:
        np.add.at(matrix, (mask[mask != 255], prediction[mask != 255]), 1)
    return matrix


def test_scores_equal_the_kept_predictions(done):
    classes, folder = done.prepared.splits.classes, done.folder
    pairs = {
        sample.name: (
            read_mask(sample.mask, "class_ids"),
            read_prediction(folder / "predictions", sample.name, classes),
        )
        for sample in done.prepared.splits.test
    }
    matrix = confusion(pairs.values())
    assert (pd.read_csv(folder / "confusion_matrix.csv", index_col=0).to_numpy() == matrix).all()
    scores = read_yaml(folder / "final_results.yaml")["test"]
    true, hits = matrix.sum(1), matrix.diagonal()
    iou = {name: hits[k] / (true[k] + matrix[:, k].sum() - hits[k]) for k, name in enumerate(NAMES) if true[k]}
    assert {
        name: found["iou"] for name, found in scores["per_class"].items() if found["iou"] is not None
    } == pytest.approx(iou)
    assert scores["pooled"]["iou"] == pytest.approx(np.mean(list(iou.values())))
    table = pd.read_csv(folder / "predictions" / "per_image.csv", dtype={"name": str}).set_index("name")
    for name, pair in pairs.items():
        alone = confusion([pair])
        seen = alone.sum(1) > 0
        expected = (alone.diagonal() / (alone.sum(0) + alone.sum(1) - alone.diagonal()).clip(1))[seen].mean()
        assert table.loc[name, "iou"] == pytest.approx(expected)


def test_class_weights_come_from_the_training_images_only(done):
    masks = [read_mask(sample.mask, "class_ids") for sample in done.prepared.splits.train]
    pixels = sum(np.bincount(mask.ravel(), minlength=5) for mask in masks)
    images = sum(np.bincount(mask.ravel(), minlength=5) > 0 for mask in masks).astype(int)
    kept = json.loads((done.folder / "class_weights.json").read_text())
    assert kept["pixels"] == pixels.tolist() and kept["images"] == images.tolist()
    assert kept["weights"] == pytest.approx(weights_from_counts(pixels, images, "inverse_sqrt").tolist())
    assert kept["fingerprint"] == done.prepared.audit.fingerprint
    weights = [
        part.class_weights
        for part in make_criterion(done.config, done.folder).modules()
        if getattr(part, "class_weights", None) is not None
    ]
    assert weights and all(np.allclose(found.numpy(), kept["weights"]) for found in weights)


@pytest.mark.few(1)
@pytest.mark.parametrize("preload", ["false", "disk"])
def test_where_images_are_kept_changes_no_number(done, tmp_path, preload):
    other = run(configure(**SMALL, outputs=str(tmp_path), preload=preload))
    assert (other.folder / "history.csv").read_bytes() == (done.folder / "history.csv").read_bytes()
    assert other.results["test"] == done.results["test"]


@pytest.mark.slow
def test_weights_of_the_same_data_can_be_given_and_of_another_not(done, tmp_path):
    file = done.folder / "class_weights.json"
    again = run(configure(**SMALL, outputs=str(tmp_path), class_weights=str(file)))
    assert (again.folder / "history.csv").read_bytes() == (done.folder / "history.csv").read_bytes()
    with pytest.raises(CrackSegError, match="weights file of another data set") as caught:
        run(configure(**SMALL, outputs=str(tmp_path), class_weights=str(file), seed=7))
    assert "\n" not in str(caught.value)


def write_pairs(folder, ids):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        Image.fromarray(np.resize(np.array(ids, np.uint8), (40, 40))).save(folder / "masks" / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    "ids, names, found",
    [
        ((0, 1, 2, 7), "wall,crack,rust", r"\.png: found class ids? 7, expected 0 to 2 \(wall, crack, rust\)"),
        ((0, 1, 2), "", r"class_names"),
    ],
    ids=["id beyond the list", "no list"],
)
def test_masks_and_class_list_that_do_not_fit(tmp_path, ids, names, found):
    root = write_pairs(tmp_path / "photos", ids)
    settings = dict(SMALL, data="folder", data_dir=str(root), outputs=str(tmp_path / "outputs")) | (
        {"class_names": names} if names else {}
    )
    settings.pop("synthetic_images")
    with pytest.raises(CrackSegError, match=found) as caught:
        run(configure(**settings))
    assert "\n" not in str(caught.value)


def test_a_class_that_never_occurs_neither_crashes_nor_counts(tmp_path):
    root = write_pairs(tmp_path / "photos", (0, 1, 1, 255))
    settings = dict(
        SMALL, data="folder", data_dir=str(root), class_names="wall,crack,rust", outputs=str(tmp_path / "outputs")
    )
    settings.pop("synthetic_images")
    found = run(configure(**settings))
    scores = found.results["test"]
    assert scores["per_class"]["rust"]["iou"] is None and found.prepared.class_weights.weights[2] == 0
    assert scores["pooled"]["iou"] == pytest.approx(
        np.mean([scores["per_class"][name]["iou"] for name in ("wall", "crack")])
    )
    assert any("rust never occurs in train" in warning for warning in found.prepared.audit.warnings)
