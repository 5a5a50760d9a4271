"""The efficiency frontier end to end: its notebook on two small runs, and its tables against the models behind them."""

import pandas as pd
import papermill
import pytest
import torch

from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import project_root
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import run
from crackseg_nb.studies.frontier import Frontier, FrontierConfig, take_steps

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(
    recipe="deeplab_test",
    data="synthetic",
    synthetic_images=12,
    synthetic_width=(3, 6),
    image_size=32,
    fit="crop",
    epochs=1,
    batch_size=4,
    lr=2e-3,
    pretrained="false",
    amp="off",
    device="cpu",
    aspp_channels=8,
    aspp_rates=(1, 3),
    prior=0.05,
    checkpoint_every=0,
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("outputs"))
    for name, model in (("small", "deeplab_optimized"), ("large", "deeplab_original")):
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
    run(configure(**{**TINY, "epochs": 0}, train_set="trainval", run_name="whole", outputs=outputs))
    with pytest.raises(CrackSegError, match="found whole with other images, splits or evaluation"):
        Frontier(FrontierConfig(("small", "whole"), outputs=outputs))
    with pytest.raises(CrackSegError, match="learned the validation images"):
        Frontier(FrontierConfig(("whole", "whole2"), teacher="whole2", outputs=twice(outputs)))


def twice(outputs):
    run(configure(**{**TINY, "epochs": 0}, train_set="trainval", run_name="whole2", outputs=outputs))
    return outputs


@pytest.mark.slow
def test_the_notebook_runs(outputs, tmp_path):
    papermill.execute_notebook(
        project_root() / "nbs" / "efficiency_frontier.ipynb",
        tmp_path / "out.ipynb",
        kernel_name="python3",
        progress_bar=False,
        parameters=dict(runs="small,large", outputs=outputs, size="64,96", rounds=2, epochs=1, calibration=2),
    )
    steps = pd.read_csv(f"{outputs}/efficiency_frontier/steps.csv", index_col=0)
    assert len(steps) == 8 and steps["iou"].notna().all()
    assert (
        steps.loc["ensemble", "parameters"] == steps.loc["student", "parameters"] + steps.loc["teacher", "parameters"]
    )
