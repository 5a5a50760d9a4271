"""Runs on two processes: from a configuration as the notebook starts them, and from a launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from opens import counted_opens

from crackseg_nb.core.files import read_yaml
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import run
from crackseg_nb.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
# Nothing random in the model: two processes draw other numbers. The last window of an epoch (6 images, 4 at a step)
# has nothing for the second process.
SETTINGS = dict(
    synthetic_images=12,
    fractions="0.5,0.25,0.25",
    image_size=64,
    epochs=2,
    batch_size=2,
    accumulation=2,
    eval_batch_size=1,
    device="cpu",
    amp="off",
    pretrained="false",
    model="unet",
    encoder="test_resnet",
    lr=0.1,
    optimizer="sgd",
    checkpoint_every=1,
    num_workers=0,
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def alone(outputs, one_thread):
    return run(configure(**SETTINGS, outputs=str(outputs), run_name="alone")).folder


def assert_close(one, other):
    first, second = (load_checkpoint(folder / "checkpoints", "epoch_0002").model_state for folder in (one, other))
    for name, value in first.items():
        torch.testing.assert_close(
            value.float(), second[name].float(), atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    tables = [pd.read_csv(folder / "history.csv") for folder in (one, other)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-3)
    results = [read_yaml(folder / "final_results.yaml") for folder in (one, other)]
    assert results[0]["test"]["num_images"] == results[1]["test"]["num_images"] == 3
    assert abs(results[0]["test"]["pooled"]["iou"] - results[1]["test"]["pooled"]["iou"]) < 0.02


def test_two_processes_equal_one(outputs, alone, tmp_path, monkeypatch):
    "They also share the decoded images of the process that starts them: each file is inspected once and decoded once."
    with counted_opens(outputs / "synthetic", tmp_path, monkeypatch) as opened:
        both = run(configure(**SETTINGS, outputs=str(outputs), run_name="both", devices=2)).folder
    pictures = {name: count for name, count in opened.items() if name.endswith((".jpg", ".png"))}
    assert len(pictures) == 24 and set(pictures.values()) == {2}
    assert both.state == "done" and ") x 2, precision" in (both / "training.log").read_text()
    assert_close(alone, both)


@pytest.mark.slow
def test_a_launcher_trains_one_run(outputs, alone):
    words = [
        word
        for item in {**SETTINGS, "outputs": outputs, "run_name": "launched"}.items()
        for word in ("-p", *map(str, item))
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "crackseg_nb.runs.launch",
        *words,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = RunFolder(outputs / "launched")
    assert (
        folder.state == "done"
        and not (outputs / "launched-2").exists()
        and ") x 2, precision" in (folder / "training.log").read_text()
    )
    assert_close(alone, folder)
