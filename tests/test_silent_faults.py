"""Faults that would leave a number that looks right: each test turns red for one changed line."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_evidence import outputs  # noqa: F401 - a fixture
from test_trainer import train
from torch import nn

from crackseg_nb.core.checks import CrackSegError, check_number
from crackseg_nb.core.run_folder import create_run_folder
from crackseg_nb.evidence import scores
from crackseg_nb.evidence.protocols import begin_protocols
from crackseg_nb.evidence.report import begin_comparison
from crackseg_nb.inference.networks import Facts, Network, Turned
from crackseg_nb.measure.scale import Scale, flatten
from crackseg_nb.metrics.counts import BinaryMetrics
from crackseg_nb.metrics.statistics import corrected
from crackseg_nb.models.kernels import DepthwiseConv2d, DepthwiseConv2dSame
from crackseg_nb.models.registry import create_model
from crackseg_nb.runs import stages
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import keep_best, load_splits, make_datasets
from crackseg_nb.runs.sweep import Sweep
from crackseg_nb.sources.samples import Classes
from crackseg_nb.studies.ablation import AblationConfig, sweeps_of
from crackseg_nb.studies.across_data import begin_across
from crackseg_nb.studies.frontier import Frontier, FrontierConfig
from crackseg_nb.studies.race import ratios
from crackseg_nb.studies.scales import begin_scales
from crackseg_nb.studies.search import Search
from crackseg_nb.studies.training_speed import Benchmark, BenchmarkConfig
from crackseg_nb.synthetic.cracks import GENERATOR_VERSION, SyntheticConfig, synthesize
from crackseg_nb.training.checkpoint import latest_checkpoint, load_checkpoint
from crackseg_nb.training.trainer import restore, save_state

VOID = 255


def test_what_is_tested_are_the_weights_of_the_best_epoch(tmp_path):
    trainer, seen = train(tmp_path, (0.6, 0.2, 0.1))
    assert not torch.equal(trainer.model.state_dict()["head.weight"], seen[0][0]["head.weight"])
    trained = keep_best(trainer, pd.DataFrame(trainer.history), 1.0)
    assert trained.epoch == 1
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, seen[0][0][name]), name


def test_a_resumed_training_goes_on_with_the_micro_batch_that_fitted(tmp_path):
    trainer, _ = train(tmp_path / "first", (0.1, 0.2))
    trainer.micro_batch, trainer.saved_at = 1, None
    save_state(trainer)
    again, _ = train(tmp_path / "again", (0.1, 0.2))
    assert again.micro_batch != 1
    folder = trainer.folder / "checkpoints"
    restore(again, load_checkpoint(folder, latest_checkpoint(folder)))
    assert again.micro_batch == 1


def test_scores_stand_beside_the_names_of_their_images_where_one_is_void():
    metrics, target = BinaryMetrics(), torch.zeros(3, 4, 4, dtype=torch.long)
    target[0, 0], target[1], target[2] = 1, VOID, 1
    metrics.update(torch.full((3, 4, 4), 0.9), target, [0, 1, 2])
    table = stages.image_scores(metrics, 0.5, [SimpleNamespace(name=name) for name in "abc"])
    assert list(table["name"]) == ["a", "c"] and list(table["iou"]) == [0.25, 1.0]


def test_the_zoom_of_a_run_reaches_its_training_images(tmp_path):
    config = configure(synthetic_images=6, zoom=(0.5, 4), fractions=(0.4, 0.3, 0.3), outputs=str(tmp_path))
    datasets = make_datasets(config, load_splits(config))
    assert datasets["train"].augmentation.recipe.scales == (0.5, 4.0) and datasets["val"].augmentation is None


def test_models_of_the_study_have_the_quick_depthwise_gradients():
    for name, settings in {"unet": {"encoder": "efficientnet_lite0"}, "deeplab_optimized": {}}.items():
        kinds = {type(part) for part in create_model(name, pretrained="false", **settings).modules()}
        assert kinds & {DepthwiseConv2d, DepthwiseConv2dSame}, name


def counted(levels):
    "Return counts in which one large image and several small ones prefer other thresholds."
    metrics = BinaryMetrics()
    for index, (size, crack, ground) in enumerate(levels):
        target = torch.zeros(1, size, size, dtype=torch.long)
        target[:, : size // 2] = 1
        metrics.update(torch.where(target > 0, crack, ground).float(), target, [index])
    return metrics


@pytest.mark.parametrize("criterion", ["pooled_f1", "per_image_iou"])
def test_the_threshold_is_chosen_by_the_criterion_that_was_asked_for(monkeypatch, criterion):
    val = counted([(64, 0.9, 0.6), *[(4, 0.4, 0.2)] * 6])
    best = {name: val.best_threshold(name) for name in ("pooled_f1", "per_image_iou")}
    assert best["pooled_f1"] > 0.6 > best["per_image_iou"]
    monkeypatch.setattr(stages, "evaluate", lambda *_, metrics, **__: (counted([(4, 0.9, 0.1)]), None))
    config = configure(recipe="quickstart", threshold_criterion=criterion, device="cpu")
    splits = SimpleNamespace(classes=Classes(("background", "crack")), test=[SimpleNamespace(name="a")])
    tested = stages.score_model(nn.Identity(), config, splits, {"val": None, "test": None}, None, val)
    assert tested.threshold == best[criterion]


def test_the_evidence_counts_all_images_in_their_order(outputs, monkeypatch):  # noqa: F811
    predictions = scores.open_predictions("first", str(outputs))
    whole = scores.measure(predictions)
    monkeypatch.setattr(scores, "AT_ONCE", 2)
    parts = scores.measure(predictions)
    assert len(predictions) > 4
    pd.testing.assert_frame_equal(parts.per_image, whole.per_image)
    assert pd.json_normalize(parts.scores).round(9).equals(pd.json_normalize(whole.scores).round(9))


def test_calibration_looks_near_the_threshold_of_the_run():
    assert scores.metrics_for(0.3)["calibration"].threshold == 0.3


class Pointwise(Network):
    "Predict each pixel from itself; sides are multiples of 4."

    facts = Facts("pointwise", "0" * 64, multiple=4)

    def probabilities(self, images):
        assert images.shape[2] % 4 == images.shape[3] % 4 == 0
        return images[:, :1]


def test_an_average_over_poses_stays_where_the_image_is_where_sides_are_padded():
    image = np.random.default_rng(0).random((1, 3, 6, 9), np.float32)
    np.testing.assert_allclose(Turned(Pointwise(), "all").probabilities(image), image[:, :1], atol=1e-6)


def test_limits_belong_to_what_is_allowed():
    assert [check_number("share", value, float, 0, 1) for value in (0, 1)] == [0, 1]
    for value in (-1e-9, 1 + 1e-9):
        with pytest.raises(CrackSegError, match="share: found"):
            check_number("share", value, float, 0, 1)


def test_several_rivals_are_corrected_for_being_several():
    chance = np.random.default_rng(0)
    speeds = {
        name: mean + chance.normal(0, 1, 6) for name, mean in {"trainer": 50, "a": 48.6, "b": 48.9, "c": 50}.items()
    }
    rows = [(name, number, speed) for name, own in speeds.items() for number, speed in enumerate(own)]
    table = pd.DataFrame(rows, columns=["contestant", "round", "images_per_second"])
    alone = {name: ratios(table[table["contestant"].isin(["trainer", name])])["corrected_p"].iloc[0] for name in "abc"}
    found = ratios(table)["corrected_p"]
    assert found.tolist() == pytest.approx(corrected([alone[name] for name in found.index]))
    assert found.max() <= 1 and (found >= pd.Series(alone)[found.index]).all() and (found > pd.Series(alone)).any()


def test_a_photo_from_straight_above_is_flat_already():
    image = np.random.default_rng(0).integers(0, 255, (20, 30), np.uint8)
    flat, scale = flatten(image, Scale(1.0, "a marker", plane=np.eye(3)))
    assert np.array_equal(flat, image) and scale.mm_per_px == 1


def test_the_same_seed_draws_the_same_masks():
    "Whoever changes this digest raises the version: folders that were drawn before are then drawn anew."
    thin = SyntheticConfig(crack_width=(1.0, 3.0))
    drawn = [synthesize(seed, (96, 96), thin)[1] for seed in range(8)]
    digest = hashlib.sha256(np.stack(drawn).tobytes()).hexdigest()[:12]
    assert (GENERATOR_VERSION, digest) == (1, "a69620e07d85")


STUDIES = {
    "ablation": lambda place: sweeps_of(AblationConfig(**place)),
    "across_data": lambda place: begin_across(dict(sets="walls=nowhere", **place)),
    "benchmark": lambda place: Benchmark(BenchmarkConfig(models=("unet",), **place)),
    "comparison": lambda place: begin_comparison(dict(runs="nothing", **place)),
    "frontier": lambda place: Frontier(FrontierConfig(("nothing", "none"), **place)),
    "protocols": lambda place: begin_protocols(dict(runs="nothing", **place)),
    "scales": lambda place: begin_scales(dict(run="nothing", **place)),
    "search": lambda place: Search(space="lr=1e-4..1e-2:log", **place),
    "sweep": lambda place: Sweep(grid="seed=1,2", **place),
}


@pytest.mark.parametrize("study", STUDIES)
def test_no_study_writes_into_the_folder_of_a_run(tmp_path, study):
    create_run_folder(tmp_path, "mine")
    with pytest.raises(CrackSegError, match="^name: found the folder of run mine in .*, expected another name$"):
        STUDIES[study](dict(name="mine", outputs=str(tmp_path)))
