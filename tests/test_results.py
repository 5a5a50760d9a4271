"""Which threshold, which images and which digits stand in a run's results."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from crackseg_nb.metrics.counts import BinaryMetrics
from crackseg_nb.runs.results import read_prediction, read_training, save_prediction, split_scores
from crackseg_nb.runs.stages import Tested, image_scores
from crackseg_nb.studies.pretraining import LENT, SCRATCH, compare_arms, tell


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


def test_the_scores_of_an_image_stand_beside_its_name():
    table = image_scores(TEST, 0.5, SAMPLES).set_index("name")
    assert table["iou"].to_dict() == pytest.approx({"a": 1 / 2, "b": 2 / 3, "c": 0.0})


def test_a_probability_is_kept_to_the_nearest_level(tmp_path):
    answer = np.linspace(0, 1, 1001, dtype=np.float32)[None]
    save_prediction(tmp_path, "one", answer)
    assert np.abs(read_prediction(tmp_path, "one") - answer).max() <= 0.5 / 255 + 1e-6


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
