"""Which threshold, which images and which digits stand in a run's results."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from crackseg_nb.data.splits import make_splits
from crackseg_nb.metrics.counts import BinaryMetrics, ClassMetrics
from crackseg_nb.metrics.curves import HUNDREDTHS
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import make_datasets
from crackseg_nb.runs.results import (
    prediction_bits,
    prediction_path,
    read_prediction,
    read_training,
    save_prediction,
    score_lines,
    split_scores,
)
from crackseg_nb.runs.stages import Tested, image_scores
from crackseg_nb.sources.registry import read_source
from crackseg_nb.studies.pretraining import LENT, SCRATCH, compare_arms, tell
from crackseg_nb.synthetic.cracks import write_synthetic


def metrics(*rows):
    "Return the metrics of images of four pixels, the first two crack, in another order than their numbers."
    found = BinaryMetrics()
    for index in reversed(range(len(rows))):
        found.update(torch.tensor([[rows[index]]]), torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([index]))
    return found


TEST = metrics([0.9, 0.4, 0.1, 0.1], [0.9, 0.9, 0.9, 0.4], [0.1, 0.1, 0.9, 0.9])
SAMPLES = [SimpleNamespace(name=name) for name in "abc"]


def scores_of(threshold=0.3, overlapping=(), val=True):
    val_metrics = metrics([0.4, 0.4, 0.1, 0.1]) if val else None
    tested = Tested(TEST, val_metrics, threshold, image_scores(TEST, threshold, SAMPLES), seconds=1.0)
    return split_scores(tested, list(overlapping))


def test_training_images_alone_are_augmented(tmp_path):
    source = read_source("folder", write_synthetic(tmp_path / "cracks", 8, (40, 40), seed=1))
    config = configure(augmentation="crack", image_size=32, preload="false", device="cpu", outputs=str(tmp_path))
    for split, dataset in make_datasets(config, make_splits(source)).items():
        same = torch.equal(dataset[0, 0]["image"], dataset[1, 0]["image"])  # in two epochs
        assert same == (split != "train"), split
        assert split == "train" or np.array_equal(dataset[0]["target"], dataset.pair(0)[1])


def test_each_split_is_scored_at_its_threshold():
    found = scores_of()
    for part, threshold, iou in (("test", 0.3, 4 / 10), ("test_at_0.5", 0.5, 3 / 9), ("val", 0.3, 1.0)):
        assert found[part]["threshold"] == threshold
        assert found[part]["pooled"]["iou"] == pytest.approx(iou)
    assert list(found) == ["test", "test_at_0.5", "val"]
    assert list(scores_of(0.5, val=False)) == ["test"]


def test_test_images_that_overlap_are_left_out_by_their_name():
    found = scores_of(overlapping="b")
    assert found["overlapping_test_images"] == ["b"]
    assert found["test_without_overlap"]["num_images"] == 2
    assert found["test_without_overlap"]["pooled"]["iou"] == pytest.approx(2 / 6)
    assert found["test_without_overlap"]["threshold"] == 0.3
    assert "test_without_overlap" not in scores_of(overlapping="abc")


def test_test_images_of_nothing_but_background_have_a_report():
    found, plain = ClassMetrics(["background", "hole", "rust"]), torch.zeros(1, 4, 4, dtype=torch.int64)
    found.update(plain, plain, torch.tensor([0]))
    lines = score_lines({"test": found.compute(), "protocol": {"epoch": 1}})
    assert [line.split()[0] for line in lines[1:]] == ["pooled", "per_image", "background", "hole", "rust"]


def test_the_scores_of_an_image_stand_beside_its_name():
    table = image_scores(TEST, 0.5, SAMPLES).set_index("name")
    assert table["iou"].to_dict() == pytest.approx({"a": 1 / 2, "b": 2 / 3, "c": 0.0})


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_scores_at_all_99_thresholds_are_those_of_the_kept_map(tmp_path, kind):
    "Read by `read_prediction` or as value / 65535; also where pixels lie on a threshold or beside it."
    generator = np.random.default_rng(0)
    on = np.array(HUNDREDTHS, kind)
    answer = np.concatenate(
        [
            on.repeat(5),
            np.nextafter(on, kind(0)),
            np.nextafter(on, kind(1)),
            generator.beta(0.05, 0.1, 9801).astype(kind),
            generator.uniform(0.2999, 0.3001, 9801).astype(kind),
            [0, 1] * 49 + [0],
        ]
    ).astype(kind)
    answer = generator.permutation(answer).reshape(99, -1)
    mask = torch.tensor(generator.integers(0, 2, answer.shape))[None]
    save_prediction(tmp_path, "one", answer)
    with Image.open(prediction_path(tmp_path, "one")) as picture:
        plain = np.asarray(picture) / 65535
    curves = []
    for probability in (answer, read_prediction(tmp_path, "one"), plain):
        metrics = BinaryMetrics(HUNDREDTHS)
        metrics.update(torch.tensor(probability)[None], mask)
        curves.append(metrics.curve())
    pd.testing.assert_frame_equal(curves[0], curves[1], check_exact=True)
    pd.testing.assert_frame_equal(curves[0], curves[2], check_exact=True)


def test_a_probability_is_kept_to_the_nearest_level(tmp_path):
    answer = np.linspace(0, 1, 100001, dtype=np.float32)[None]
    save_prediction(tmp_path, "one", answer)
    found = read_prediction(tmp_path, "one")
    middle = (answer >= 0.01) & (answer <= 0.99)
    assert np.abs(found - answer)[middle].max() <= 1 / 65535 and np.abs(found - answer).max() <= 4e-5
    assert found[0, 0] == 0 and found[0, -1] == 1
    small = np.geomspace(1e-7, 0.009, 1000, dtype=np.float32)[None]
    save_prediction(tmp_path, "two", small)
    assert np.abs(read_prediction(tmp_path, "two") / small - 1).max() < 0.06


def test_a_map_of_8_bits_is_read(tmp_path):
    answer = np.linspace(0, 1, 1001, dtype=np.float32)[None]
    Image.fromarray(np.round(answer * 255).astype(np.uint8)).save(prediction_path(tmp_path, "old"))
    assert np.abs(read_prediction(tmp_path, "old") - answer).max() <= 0.5 / 255 + 1e-6
    assert prediction_bits(tmp_path, "old") == 8


@pytest.mark.parametrize(("best", "told"), [(17, False), (18, False), (19, True), (20, True)])
def test_more_epochs_are_advised_where_the_best_is_in_the_last_tenth(best, told):
    scores = np.where(np.arange(1, 21) == best, 0.5, 0.1)
    history = pd.DataFrame({"val_iou": scores, "val_loss": 0.3, "train_loss": 0.3})
    assert ("more epochs may help" in " ".join(read_training(history))) == told


def test_a_transfer_is_told_by_the_paired_t_test_over_seeds():
    def pairs(lent, scratch):
        return pd.DataFrame({f"test_iou, {LENT}": lent, f"test_iou, {SCRATCH}": scratch})

    close = tell(pairs((0.50, 0.60, 0.55), (0.52, 0.53, 0.56)))
    assert "can't tell the lent encoder from random weights" in close and "ahead on 1 of 3 seeds" in close
    clear = compare_arms(pairs((0.80, 0.81, 0.79), (0.50, 0.52, 0.49))).iloc[0]
    assert (clear["result"], clear["rule"]) == ("better", "paired t-test over seeds, Holm's correction")
