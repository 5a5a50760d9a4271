"""The model that comes with the package: its weights are whole and small, its results its own, and it finds a crack."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from crackseg_nb import load_model, predict
from crackseg_nb.core.files import project_root, read_yaml, sha256_file
from crackseg_nb.core.run_folder import READY, READY_TERMS, find_run_folder, ready_folder
from crackseg_nb.inference import export
from crackseg_nb.inference.commands import predict_main
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import make_model, prepare
from crackseg_nb.runs.trained_model import open_model
from crackseg_nb.sources.images import normalize, read_image
from crackseg_nb.synthetic.cracks import SyntheticConfig, write_synthetic

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "Photos of other seeds and another size than those that it learned."
    config = SyntheticConfig(crack_width=(3.0, 6.0), empty_probability=0.0, distractors=())
    return write_synthetic(tmp_path_factory.mktemp("drawn"), 4, (160, 224), seed=99, config=config)


def test_it_is_small_and_every_tensor_is_learned():
    files = [path for path in ready_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    trained = open_model(READY)
    assert trained.classes.binary and 0 < trained.threshold < 1 and "validation" in trained.threshold_rule
    assert all(value.isfinite().all() for value in trained.model.state_dict().values())


def test_its_results_are_those_of_the_run_that_tested_its_weights():
    tested = project_root() / "outputs" / "ready-research_long-tested"
    assert (ready_folder() / "final_results.yaml").read_bytes() == (tested / "final_results.yaml").read_bytes()
    (weights,) = (ready_folder() / "checkpoints").glob("*.safetensors")
    assert sha256_file(weights) == read_yaml(tested / "environment.yaml")["weights"]["sha256"]
    trained = read_yaml(project_root() / "outputs" / "ready-research_long" / "final_results.yaml")
    stored = read_yaml(ready_folder() / "final_results.yaml")
    assert stored["test"]["threshold"] == trained["test"]["threshold"]
    assert stored["test"]["pooled"] == pytest.approx(trained["test"]["pooled"], abs=2e-3)  # half precision


def test_it_says_what_it_has_learned(caplog):
    "Its terms name every folder of its training images; the picture of the README is none of them."
    with caplog.at_level("INFO", logger="crackseg_nb"):
        open_model(READY)
    (line,) = [record.getMessage() for record in caplog.records if "has learned" in record.getMessage()]
    learned = {name.split("/")[0] for name in read_yaml(ready_folder() / "splits.yaml")["train"]}
    names = {"uav": "UAVCrack", "tile": "CrackTile", "crack500": "Crack500", "synth": "drawn cracks"}
    assert learned == set(names) and all(name in line for name in names.values())
    images = pd.read_csv(project_root() / "outputs" / "ready-research_long" / "images.csv").set_index("image")
    assert images.loc[sha256_file(project_root() / "nbs" / "images" / "wall.jpg"), "split"] == "test"


def test_a_run_that_begins_with_it_says_its_terms_and_has_its_weights(caplog):
    "By the recipe that is made for this."
    with caplog.at_level("INFO", logger="crackseg_nb"):
        model = make_model(configure(recipe="ready_unet"))
    assert READY_TERMS in caplog.text and str(model.weights["loaded"]) == "fine_tune ready"
    own = open_model(READY).model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_it_finds_drawn_cracks(drawn, tmp_path, capsys):
    "By the command without a model, which says its terms, and by Python: the same files."
    assert predict_main([str(drawn / "images"), "--out", str(tmp_path / "command"), "--quiet"]) == 0
    assert f"\nready: {READY_TERMS}\n" in capsys.readouterr().out
    assert predict("ready", drawn / "images", tmp_path / "python", progress=False)["terms"] == f"ready: {READY_TERMS}"
    found = true = both = 0
    for path in sorted((drawn / "images").iterdir()):
        one, other = (tmp_path / kind / f"{path.stem}_mask.png" for kind in ("command", "python"))
        assert one.read_bytes() == other.read_bytes()
        marked, crack = read_image(one)[..., 0] > 0, read_image(drawn / "masks" / f"{path.stem}.png")[..., 0] > 0
        found, true, both = found + marked.sum(), true + crack.sum(), both + (marked & crack).sum()
    assert both / (found + true - both) > 0.4


def test_another_model_says_no_terms(drawn, tmp_path, capsys):
    "Although the package's model was used before it, in the same process."
    open_model(READY)
    shutil.copytree(ready_folder() / "checkpoints", tmp_path / "own" / "checkpoints")
    for name in ("config.yaml", "final_results.yaml", "status.yaml"):
        shutil.copy(ready_folder() / name, tmp_path / "own")
    photo = next((drawn / "images").iterdir())
    words = [str(photo), "--model", str(tmp_path / "own"), "--out", str(tmp_path / "out"), "--quiet"]
    assert predict_main(words) == 0
    assert READY_TERMS not in capsys.readouterr().out and "terms" not in json.loads(
        (tmp_path / "out" / "manifest.json").read_text()
    )


def test_a_model_of_ones_own_begins_with_it(drawn, tmp_path):
    "The guide to own photos scores it so, whatever the names and the values of the masks."
    begun_with = dict(recipe="ready_unet", epochs=0, tta="none", scales="1", val_scales="1")
    read_as = dict(data="folder", data_dir=str(drawn), mask_encoding="auto", group_pattern="")
    config = configure(**begun_with, **read_as, fractions="0.5,0.25,0.25", outputs=str(tmp_path))
    command = "`crackseg_run -p " + " -p ".join(f"{name} {value}" for name, value in begun_with.items())
    assert command in (project_root() / "docs" / "guides" / "your_photos.md").read_text("utf-8")
    begun = prepare(config)
    assert " 0 missing, 0 unexpected, 0 mismatched" in begun.built.model.weights["report"]
    begun.folder.mark("stopped")


def test_a_plain_wall_has_no_crack():
    wall = np.random.default_rng(0).normal(150, 4, (128, 128, 3)).astype(np.uint8)
    with torch.inference_mode():
        probability = load_model(READY)(normalize(wall)[None]).sigmoid()
    assert (probability > open_model(READY).threshold).float().mean() < 0.002


def test_a_run_of_that_name_goes_before(tmp_path):
    (tmp_path / READY).mkdir()
    (tmp_path / READY / "status.yaml").write_text("state: done\n")
    assert find_run_folder("model", READY, str(tmp_path)).path == tmp_path / READY
    assert find_run_folder("model", READY, str(tmp_path / "other")).path == ready_folder()


def test_its_export_does_not_go_into_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "export_network", lambda network, target, fixed_size: target)
    assert export.export_run(READY) == Path("ready.onnx")
    assert export.export_run(READY, tmp_path / "own.onnx") == tmp_path / "own.onnx"
