"""Whole runs: through papermill from another folder, failing ones, bad input, repetition."""

import gc
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import weakref
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from huggingface_hub import constants

from crackseg_nb.core import files
from crackseg_nb.core.checks import CrackSegError
from crackseg_nb.core.files import read_yaml
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.data.augment import AUGMENTATIONS
from crackseg_nb.data.label_augment import LABEL_AUGMENTATIONS
from crackseg_nb.metrics.counts import BinaryMetrics
from crackseg_nb.metrics.curves import HUNDREDTHS
from crackseg_nb.models.settings import MODEL_SETTINGS
from crackseg_nb.runs import experiment as experiment_module
from crackseg_nb.runs.config import configure, known_parameters
from crackseg_nb.runs.experiment import checkpoint_sizes, prepare, run
from crackseg_nb.runs.results import prediction_path
from crackseg_nb.synthetic.cracks import write_synthetic
from crackseg_nb.training.checkpoint import load_checkpoint
from crackseg_nb.training.settings import LOSS_SETTINGS, OPTIMIZERS, PRECISIONS, SCHEDULERS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "nbs" / "run_experiment.ipynb"
TINY = dict(
    model="unet",
    encoder="test_resnet",
    synthetic_images=12,
    image_size=32,
    epochs=1,
    batch_size=4,
    device="cpu",
    amp="off",
)


def execute(folder, source=NOTEBOOK, **parameters):
    "Run the notebook `source` with `folder` as working directory; return the executed notebook and whether it failed."
    result = folder / "result.ipynb"
    try:
        papermill.execute_notebook(
            source, result, parameters, kernel_name="python3", cwd=folder, progress_bar=False, log_output=False
        )
        failed = False
    except papermill.PapermillExecutionError:
        failed = True
    return json.loads(result.read_text("utf-8")), failed


def only_run(outputs):
    runs = [path.parent for path in Path(outputs).glob("*/status.yaml")]
    assert len(runs) == 1
    return RunFolder(runs[0])


def error_of(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return next(
        f"{output['ename']}: {output['evalue']}"
        for output in outputs
        if output["output_type"] == "error" and output["ename"] != "PapermillError"
    )


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    return run(configure(**TINY, outputs=str(tmp_path_factory.mktemp("outputs")), run_name="tiny", checkpoint_every=1))


# Through papermill


@pytest.mark.slow
def test_the_notebook_runs_from_another_folder(tmp_path):
    notebook, failed = execute(tmp_path, outputs="made", **{**TINY, "model": "swinv2_hybrid", "encoder": "swinv2"})
    assert not failed, error_of(notebook)
    folder = only_run(tmp_path / "made")
    assert folder.state == "done"
    results = read_yaml(folder / "final_results.yaml")
    assert (
        set(results["test"]["pooled"])
        == set(results["test"]["per_image"])
        == {"iou", "f1", "dice", "precision", "recall"}
    )
    for name in (
        "config.yaml",
        "history.csv",
        "performance.csv",
        "training.log",
        "analysis_report.txt",
        "environment.yaml",
        "checkpoints/best.json",
        "predictions/per_image.csv",
        "visualizations/training_curves.png",
        "visualizations/worst_cases.png",
    ):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").iterdir())
    text = "".join("".join(output.get("text", "")) for cell in notebook["cells"] for output in cell.get("outputs", []))
    assert f"Run folder: {Path('made') / folder.run_id}" in text


def test_an_unknown_parameter_stops_before_anything_is_written(tmp_path):
    notebook, failed = execute(tmp_path, outputs="made", encodr="swinv2")
    assert failed and not (tmp_path / "made").exists()
    assert error_of(notebook).startswith(
        "CrackSegError: parameter: found 'encodr'"
    ) and "did you mean 'encoder'?" in error_of(notebook)


def test_a_cell_that_fails_between_two_steps_marks_the_run_failed(tmp_path):
    "And parameters that JupyterLab saved in the notebook itself do not enter in silence."
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    parameters = next(cell for cell in notebook["cells"] if cell["metadata"].get("tags"))
    tried = {"image_size: int = None": "image_size: int = 64", "lr: float = None": "lr: float = 1e-5"}
    text = "".join(parameters["source"])
    for line, edited in tried.items():
        assert text.count(f"\n{line}") == 1
        text = text.replace(line, edited)
    parameters["source"] = text
    cell = next(cell for cell in notebook["cells"] if "show_class_balance(" in "".join(cell["source"]))
    cell["source"] = 'raise RuntimeError("no picture")'
    (tmp_path / "source.ipynb").write_text(json.dumps(notebook))
    executed, failed = execute(tmp_path, tmp_path / "source.ipynb", outputs="made", **TINY)
    assert failed and error_of(executed) == "RuntimeError: no picture"
    text = "".join("".join(output.get("text", "")) for cell in executed["cells"] for output in cell.get("outputs", []))
    assert "parameters set in the notebook itself: lr=1e-05 (papermill takes them too" in text  # -p image_size is there
    folder = only_run(tmp_path / "made")
    assert read_yaml(folder / "config.yaml")["optim"]["lr"] == 1e-5
    assert folder.state == "failed" and "before it was finished" in folder.status["error"]
    assert not (folder / "final_results.yaml").exists()


@pytest.mark.slow
def test_a_process_that_stops_between_two_steps_marks_the_run_failed(tmp_path):
    code = (
        f"from crackseg_nb.runs.config import configure; from crackseg_nb.runs.experiment import Experiment\n"
        f"experiment = Experiment(configure(**{TINY!r}, outputs={str(tmp_path)!r}))\nexperiment.load_data()\nraise "
        "SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120).returncode == 3
    folder = only_run(tmp_path)
    assert folder.state == "failed" and "before it was finished" in folder.status["error"]


def test_a_run_lets_go_of_its_workers_and_of_its_memory(tmp_path):
    experiment = run(configure(**TINY, num_workers=2, outputs=str(tmp_path), run_name="workers"))
    assert not multiprocessing.active_children()
    held = weakref.ref(experiment)
    del experiment
    gc.collect()
    assert held() is None and RunFolder(tmp_path / "workers").state == "done"
    prepare(configure(**TINY, outputs=str(tmp_path), run_name="dropped"))
    gc.collect()
    dropped = RunFolder(tmp_path / "dropped")
    assert dropped.state == "failed" and "let go of the run" in dropped.status["error"]


def test_the_parameters_cell_is_the_whole_manual():
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--help-notebook", str(NOTEBOOK)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    cell = next(
        cell
        for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    )
    lines = [line for line in "".join(cell["source"]).splitlines() if line and not line.startswith("#")]
    assert {line.split(":")[0] for line in lines} == {*known_parameters(), "config", "resume"}
    for line in lines:
        name, comment = line.split(":")[0], line.split("  # ")[1]
        assert f"{name}: " in done.stdout and comment.split(";")[0][:20] in " ".join(done.stdout.split()), name
    comments = {line.split(":")[0]: line.split("  # ")[1] for line in lines}
    choices = dict(loss=LOSS_SETTINGS, model=MODEL_SETTINGS, augmentation={**AUGMENTATIONS, **LABEL_AUGMENTATIONS})
    choices |= dict(optimizer=OPTIMIZERS, scheduler=SCHEDULERS, amp=PRECISIONS)
    for name, known in choices.items():
        assert not {*known} - {*re.findall(r"[\w/]+", comments[name])}, name


# The same again


def weights_of(folder):
    return load_checkpoint(folder / "checkpoints", "best").model_state


def test_a_run_repeats_from_its_config_alone(tiny_run, tmp_path):
    again = run(configure(config=str(tiny_run.folder / "config.yaml"), outputs=str(tmp_path)))
    assert (again.folder / "history.csv").read_bytes() == (tiny_run.folder / "history.csv").read_bytes()
    first, second = weights_of(tiny_run.folder), weights_of(again.folder)
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
    assert again.results["test"] == tiny_run.results["test"]


def test_a_run_says_what_its_checkpoints_take(tiny_run):
    best, state = checkpoint_sizes(tiny_run.built.model, "adamw")
    files = {
        path.name.split("-")[0] + path.suffix: path.stat().st_size
        for path in (tiny_run.folder / "checkpoints").iterdir()
    }
    assert files["best.safetensors"] == pytest.approx(best, rel=0.02)
    # The best weights are those of this state, and are not written twice.
    written = files["epoch_0001.safetensors"] + files["epoch_0001.pt"]
    assert written == pytest.approx(state - best, rel=0.02)
    line = (
        f"(best weights {best / 2**20:.0f}, two states of up to {state / 2**20:.0f}, and a third while it is written)"
    )
    log = (tiny_run.folder / "training.log").read_text()
    assert log.index(line) < log.index("epoch 1/1")
    assert checkpoint_sizes(tiny_run.built.model, "sgd")[1] < state


def test_another_seed_is_another_run(tiny_run, tmp_path):
    other = run(configure(config=str(tiny_run.folder / "config.yaml"), outputs=str(tmp_path), seed=1))
    assert (other.folder / "history.csv").read_bytes() != (tiny_run.folder / "history.csv").read_bytes()


def test_results_equal_the_kept_predictions(tiny_run):
    "Scores at every threshold, and the table of images, are recomputed from the 16-bit maps and the masks on disk."
    folder, metrics, test = tiny_run.folder, BinaryMetrics(HUNDREDTHS), tiny_run.results["test"]
    table = pd.read_csv(folder / "predictions" / "per_image.csv", dtype={"name": str})
    masks = {sample.name: sample.mask for sample in tiny_run.prepared.splits.test}
    for row in table.itertuples():
        mask = cv2.imread(str(masks[row.name]), cv2.IMREAD_GRAYSCALE) > 0
        kept = cv2.imread(str(prediction_path(folder / "predictions", row.name)), cv2.IMREAD_UNCHANGED)
        assert kept.dtype == np.uint16
        metrics.update(torch.tensor(kept / 65535)[None], torch.tensor(mask)[None], [row.index])
        assert int((kept / 65535 >= test["threshold"]).sum()) == row.predicted_pixels
        assert int(mask.sum()) == row.crack_pixels
    for threshold in tiny_run.tested.metrics.thresholds:
        assert metrics.compute(threshold) == tiny_run.tested.metrics.compute(threshold)
    assert metrics.compute(test["threshold"])["pooled"] == pytest.approx(test["pooled"], abs=1e-12)


def test_zero_epochs_evaluate_only(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = run(configure(**{**TINY, "epochs": 0}, pretrained="auto", outputs=str(tmp_path)))
    # What was really loaded is written down, and a repetition asks for just that.
    assert read_yaml(done.folder / "environment.yaml")["weights"] == {"requested": "auto", "loaded": "from scratch"}
    assert read_yaml(done.folder / "config.yaml")["model"]["pretrained"] == "false"
    results = read_yaml(done.folder / "final_results.yaml")
    assert results["protocol"]["epoch"] == 0 and results["protocol"]["epochs_trained"] == 0
    assert done.folder.state == "done" and not (done.folder / "checkpoints" / "best.json").exists()


def test_a_model_is_scored_on_photos_of_ones_own(tiny_run, tmp_path):
    "As the guide says: one image is left for training, fewer than a batch."
    write_synthetic(tmp_path / "mine", 20, (48, 64), seed=5)
    settings = dict(config=str(tiny_run.folder / "config.yaml"), fine_tune=str(tiny_run.folder.path), epochs=0)
    data = dict(data="folder", data_dir=str(tmp_path / "mine"), fractions="0.05,0.25,0.7", outputs=str(tmp_path))
    done = run(configure(**settings, **data))
    assert done.prepared.splits.lengths == {"train": 1, "val": 5, "test": 14}
    protocol = read_yaml(done.folder / "final_results.yaml")["protocol"]
    assert "validation images" in protocol["threshold_rule"] and "none was trained" in protocol["epoch_rule"]


# Bad input: one line, a failed folder, no results


def expect_failure(tmp_path, words, **parameters):
    outputs = tmp_path / "outputs"
    with pytest.raises(CrackSegError) as caught:
        run(configure(**{**TINY, **parameters}, outputs=str(outputs)))
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    for folder in outputs.glob("*/status.yaml"):
        assert RunFolder(folder.parent).state == "failed" and not (folder.parent / "final_results.yaml").exists()
    return message


@pytest.mark.parametrize(
    "parameters, words",
    [
        (dict(recipe="quickstat"), ("recipe", "did you mean 'quickstart'?")),
        (dict(encoder="swinv3"), ("encoder", "did you mean 'swinv2'?")),
        (dict(image_size=0), ("image_size: found 0",)),
        (dict(image_size="large"), ("image_size: found 'large'",)),
        (dict(epochs=-1), ("epochs: found -1",)),
        (dict(fractions="0.9,0.3,0.1"), ("fractions",)),
        (dict(fractions="1,0,0"), ("fractions",)),
        (dict(batch_size=100), ("batch_size: found 100", "batch larger than the data")),
        (dict(synthetic_images=4, fractions="0.98,0.01,0.01", batch_size=9), ("batch_size",)),
        (dict(pretrained="imagenet"), ("pretrained", "no file imagenet")),
        (dict(data="folder"), ("data_dir",)),
        (dict(run_name="../elsewhere"), ("run_name",)),
        (dict(data_dir="photos"), ("data_dir", "synthetic")),
        (dict(loss="ce"), ("loss",)),
        (
            dict(model="swinv2_hybrid", encoder="swinv2", decoder_channels="0,32,16"),
            ("decoder_channels: found 0",),
        ),
        (dict(focal_weight=0, dice_weight=0), ("weights",)),
        (dict(device="gpu"), ("device",)),
    ],
)
def test_a_wrong_value_gets_one_line(tmp_path, parameters, words):
    expect_failure(tmp_path, words, **parameters)


def photos(tmp_path, size=(64, 64)):
    return write_synthetic(tmp_path / "photos", 12, size)


def test_a_failing_run_leaves_its_error_and_no_results(tmp_path):
    broken = photos(tmp_path) / "images" / "0003.png"
    cv2.imwrite(str(broken.with_suffix(".jpg")), cv2.imread(str(broken)))
    broken.unlink()
    broken = broken.with_suffix(".jpg")
    broken.write_bytes(broken.read_bytes()[:600])
    expect_failure(tmp_path, (broken.name,), data="folder", data_dir=str(tmp_path / "photos"))
    folder = only_run(tmp_path / "outputs")
    assert folder.state == "failed" and broken.name in folder.status["error"]


def test_a_folder_without_masks(tmp_path):
    root = photos(tmp_path)
    shutil.rmtree(root / "masks")
    expect_failure(tmp_path, ("masks",), data="folder", data_dir=str(root))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda mask: mask[:32], ("0002.png", "64x32")),
        (lambda mask: np.where(mask > 0, 77, 0).astype(np.uint8), ("0002.png", "77")),
        (lambda mask: np.dstack([mask, np.zeros_like(mask), np.full_like(mask, 40)]), ("0002.png",)),
    ],
)
def test_a_mask_that_does_not_fit(tmp_path, change, words):
    path = photos(tmp_path) / "masks" / "0002.png"
    cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)))
    expect_failure(tmp_path, words, data="folder", data_dir=str(tmp_path / "photos"))


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expect_failure(tmp_path, ("pretrained", "can't be had"), pretrained="true")


def test_a_full_disk_is_found_before_training(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = experiment_module.SPACE_TO_BEGIN + 2**10  # enough for tables and pictures, not for the smallest checkpoint
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage(2**40, 2**40 - free, free))
    monkeypatch.setattr(experiment_module, "fit", lambda *_: pytest.fail("training began"))
    expect_failure(tmp_path, ("MiB free", "checkpoints"))


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "outputs").write_text("a file where a folder should be")
    expect_failure(tmp_path, ("cannot write there",))


# Real photos


@pytest.mark.slow
@pytest.mark.real_data
def test_real_photos_run_through(tmp_path, data_folder):
    done = run(
        configure(
            **{**TINY, "epochs": 0, "image_size": 96},
            data="CrackForest",
            data_dir=str(data_folder / "CrackForest"),
            outputs=str(tmp_path),
        )
    )
    assert done.results["test"]["num_images"] == len(done.prepared.splits.test) == 18


@pytest.mark.slow
@pytest.mark.real_data
def test_the_published_recipe_trains_on_deepcrack(tmp_path, data_folder):
    notebook, failed = execute(
        tmp_path,
        outputs="made",
        recipe="swinv2_hybrid_360",
        data="DeepCrack",
        data_dir=str(data_folder / "DeepCrack"),
        epochs=0,
        pretrained="false",
    )
    assert not failed, error_of(notebook)
    results = read_yaml(only_run(tmp_path / "made") / "final_results.yaml")
    assert results["test"]["num_images"] == 237 and results["test_without_overlap"]["num_images"] == 217
