"""The efficiency frontier end to end: its notebook on two small runs, and its tables against the models behind them."""

from dataclasses import dataclass

import pandas as pd
import papermill
import pytest
import torch
from torch import nn

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import project_root
from crackseg_nb.models.registry import MODELS
from crackseg_nb.models.settings import MODEL_SETTINGS
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import run
from crackseg_nb.studies import efficiency
from crackseg_nb.studies.frontier import Frontier, FrontierConfig, take_steps

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(
    data="synthetic",
    synthetic_images=12,
    synthetic_width=(3, 6),
    image_size=32,
    fit="crop",
    epochs=1,
    batch_size=4,
    lr=2e-3,
    amp="off",
    device="cpu",
    checkpoint_every=0,
)


@dataclass
class PlainConfig:
    width: int = 32
    image_size: int = 32
    num_classes: int = 1


@dataclass
class WideConfig(PlainConfig):
    width: int = 48


class Plain(nn.Sequential):
    "Three convolutions: to export a graph of a real family takes torch a minute."

    def __init__(self, config):
        def block(channels):
            return [nn.Conv2d(channels, config.width, 3, padding=1), nn.BatchNorm2d(config.width), nn.ReLU()]

        super().__init__(*block(3), *block(config.width), nn.Conv2d(config.width, 1, 3, padding=1))
        self.weights = {"requested": "false", "loaded": "from scratch"}


@pytest.fixture(scope="module", autouse=True)
def families():
    with pytest.MonkeyPatch.context() as patch:
        for name, config in (("plain", PlainConfig), ("wide", WideConfig)):
            patch.setitem(MODELS, name, (config, Plain))
            patch.setitem(MODEL_SETTINGS, name, config)
        patch.setattr(efficiency, "measure_memory", lambda model, size: 1.0)  # starts a process for each model
        yield


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, families):
    folder = str(tmp_path_factory.mktemp("outputs"))
    for name, model in (("small", "plain"), ("large", "wide")):
        run(configure(**TINY, model=model, run_name=name, outputs=folder))
    return folder


def test_int8_and_pruning_are_scored_and_measured(outputs):
    frontier = Frontier(
        FrontierConfig(
            ("small", "large"), outputs=outputs, name="steps", size=(64, 96), rounds=2, epochs=1, calibration=2
        )
    )
    before = {name: value.clone() for name, value in frontier.student.model.state_dict().items()}
    steps = take_steps(frontier, ("student", "INT8", "pruned, tuned"))
    own = frontier.student.results["test"]
    assert steps.loc["student", "iou"] == own["pooled"]["iou"] and steps.loc["student", "threshold"] == own["threshold"]
    assert (
        steps.loc["INT8", "file_bytes"] < 0.5 * steps.loc["student", "file_bytes"]
    )  # of a network this small, the graph is a large part
    assert steps.loc["pruned, tuned", "file_bytes"] == steps.loc["student", "file_bytes"]
    assert steps.loc["pruned, tuned", "compressed_bytes"] < 0.8 * steps.loc["student", "compressed_bytes"]
    assert steps.loc["pruned, tuned", "zeros"] > 0.4 and steps.loc["student", "zeros"] < 0.01
    assert (steps[["ms_1", "ms_2"]] > 0).all(axis=None)
    for name, value in frontier.student.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert pd.read_csv(frontier.folder / "steps.csv", index_col=0).shape == steps.shape


def test_equal_runs_are_asked_for(outputs):
    for name in ("whole", "whole2"):
        run(configure(**{**TINY, "epochs": 0}, model="plain", train_set="trainval", run_name=name, outputs=outputs))
    with pytest.raises(CrackSegError, match="found whole with other images, splits or evaluation"):
        Frontier(FrontierConfig(("small", "whole"), outputs=outputs))
    with pytest.raises(CrackSegError, match="learned the validation images"):
        Frontier(FrontierConfig(("whole", "whole2"), teacher="whole2", outputs=outputs))


def test_what_several_views_score_has_their_cost(outputs):
    run(configure(**TINY, model="plain", tta="flips", run_name="viewed", outputs=outputs))
    settings = dict(outputs=outputs, size=(64, 96), rounds=1)
    costs = Frontier(FrontierConfig(("small", "viewed"), name="views", **settings)).costs()
    assert costs.loc["viewed", "gflops"] == pytest.approx(4 * costs.loc["small", "gflops"])
    steps = take_steps(Frontier(FrontierConfig(("viewed", "large"), name="viewed_steps", **settings)), ("student",))
    assert steps.loc["student", "gflops"] == pytest.approx(costs.loc["viewed", "gflops"])
    assert steps.loc["student", "iou"] == costs.loc["viewed", "iou"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    deeplab = {
        **TINY,
        "recipe": "deeplab_test",
        "pretrained": "false",
        "aspp_channels": 8,
        "aspp_rates": (1, 3),
        "prior": 0.05,
    }
    for name, model in (("small", "deeplab_optimized"), ("large", "deeplab_original")):
        run(configure(**deeplab, model=model, run_name=name, outputs=str(tmp_path)))
    papermill.execute_notebook(
        project_root() / "nbs" / "efficiency_frontier.ipynb",
        tmp_path / "out.ipynb",
        kernel_name="python3",
        progress_bar=False,
        parameters=dict(runs="small,large", outputs=str(tmp_path), size="64,96", rounds=2, epochs=1, calibration=2),
    )
    steps = pd.read_csv(tmp_path / "efficiency_frontier" / "steps.csv", index_col=0)
    assert len(steps) == 8 and steps["iou"].notna().all()
    assert (
        steps.loc["ensemble", "parameters"] == steps.loc["student", "parameters"] + steps.loc["teacher", "parameters"]
    )
