"""The evidence of a run: it belongs to the run's images, equals its scores, is fast and small on real images."""

import shutil
import subprocess
import sys
from itertools import product

import cv2
import numpy as np
import pandas as pd
import papermill
import pytest
from committed import committed
from messages import one_line
from PIL import Image

from crackseg_nb.core.files import project_root, read_yaml, write_yaml
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.evidence.comparison import compare, system_of
from crackseg_nb.evidence.protocols import Protocol, begin_protocols, count, precision_table, score
from crackseg_nb.evidence.report import finish_comparison
from crackseg_nb.evidence.scores import evidence_of, measure, open_predictions, read_evidence
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import load_splits, run
from crackseg_nb.runs.notebook import write_page
from crackseg_nb.runs.results import prediction_path, save_prediction
from crackseg_nb.synthetic.cracks import write_synthetic

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = dict(
    recipe="deeplab_test",
    data="synthetic",
    synthetic_images=40,
    synthetic_width=(3, 6),
    image_size=48,
    fit="crop",
    eval_fit="native",
    epochs=6,
    batch_size=4,
    lr=5e-3,
    prior=0.05,
    pretrained="false",
    device="cpu",
    amp="off",
    fractions="0.6,0.15,0.25",
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    for name, seed in (("first", 1), ("second", 1)):
        run(
            configure(
                **SMALL | (dict(lr=3e-3) if name == "second" else {}), seed=seed, outputs=str(folder), run_name=name
            )
        )
    return folder


@pytest.fixture
def copied(outputs, tmp_path):
    "The first run, in a place of its own."
    for name in ("first", "synthetic"):
        shutil.copytree(outputs / name, tmp_path / name)
    shutil.rmtree(tmp_path / "first" / "evidence", ignore_errors=True)
    return tmp_path


def test_scores_are_those_of_the_run(outputs):
    found, results = evidence_of("first", str(outputs)), read_yaml(outputs / "first" / "final_results.yaml")
    own = pd.read_csv(outputs / "first" / "predictions" / "per_image.csv", dtype={"name": str}).set_index("name")
    assert found.per_image.index.tolist() == own.index.tolist()
    assert (found.per_image["tp"] + found.per_image["fn"]).tolist() == own["crack_pixels"].tolist()
    for kind in ("pooled", "per_image"):
        for name in ("iou", "f1", "precision", "recall"):
            assert found.scores[kind][name] == pytest.approx(results["test"][kind][name], abs=1e-12)
    for name in ("precision", "recall", "f1"):  # eight bits move a pixel here and there
        assert found.scores["curves 0 px"][name] == pytest.approx(results["test"]["pooled"][name], abs=0.02)
    assert found.scores["curves 0 px"]["ods_f1"] >= found.scores["pooled"]["f1"] - 1e-3
    assert found.scores["curves 2 px"]["ods_f1"] >= found.scores["curves 0 px"]["ods_f1"]
    assert found.scores["pooled"]["f1"] > 0.2


def test_the_number_of_threads_changes_no_digit(outputs):
    predictions = open_predictions("first", str(outputs))
    one, three = measure(predictions, workers=1), measure(predictions, workers=3)
    assert one.scores == three.scores
    pd.testing.assert_frame_equal(one.per_image, three.per_image)


def test_what_was_kept_is_not_measured_again(copied):
    first = evidence_of("first", str(copied))
    shutil.rmtree(copied / "first" / "predictions")
    again = evidence_of("first", str(copied))
    assert again.scores == first.scores
    pd.testing.assert_frame_equal(again.per_image, first.per_image, check_dtype=False)
    for name in first.tables:
        pd.testing.assert_frame_equal(again.tables[name], first.tables[name])


def test_other_images_are_refused(copied):
    [mask, *_] = sorted((copied / "synthetic").rglob("masks/*.png"))
    values = np.array(Image.open(mask))
    values[:2] = values.max() - values[:2]
    Image.fromarray(values).save(mask)
    one_line(lambda: evidence_of("first", str(copied)), "found images or masks that differ from those of first")
    assert not (copied / "first" / "evidence").exists()


def test_a_prediction_of_another_size_is_refused(copied):
    predictions = open_predictions("first", str(copied))
    save_prediction(copied / "first" / "predictions", predictions.names[0], np.zeros((20, 20), np.float32))
    one_line(lambda: evidence_of("first", str(copied)), "found size (20, 20), expected that of its mask, (48, 48)")
    assert not (copied / "first" / "evidence").exists()


def test_images_called_na_and_images_of_void(tmp_path):
    "An image that is all void counts nowhere; the names of others may read like missing numbers."
    walls = write_synthetic(tmp_path / "walls", 12, (48, 48), seed=1)
    for name, kind in product(("NA", "null", "nan", "None", "NULL", "n-a"), ("images", "masks")):
        first = sorted((walls / kind).glob("0*"))[0]
        first.rename(first.with_stem(name))
    for path in (walls / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.uint8(mask > 0)).save(path)
    config = configure(
        **SMALL | dict(data="folder", data_dir=str(walls), mask_encoding="ids", epochs=0, fractions="0.1,0.1,0.8"),
        outputs=str(tmp_path),
        run_name="named",
    )
    names = [sample.name for sample in load_splits(config).test]
    assert len({"NA", "null", "nan", "None", "NULL"} & {*names}) > 2
    blank = names[0]
    Image.fromarray(np.full((48, 48), 255, np.uint8)).save(walls / "masks" / f"{blank}.png")
    results = run(config).results["test"]
    found = evidence_of("named", str(tmp_path))
    assert found.per_image.index.tolist() == names[1:] and found.protocol["images"] == len(names)
    assert read_evidence(tmp_path / "named" / "evidence").scores == found.scores
    for kind in ("pooled", "per_image"):
        assert found.scores[kind]["f1"] == pytest.approx(results[kind]["f1"], abs=1e-12)
    assert len(compare(["named"], outputs=str(tmp_path)).systems) == 1
    counted = count(open_predictions("named", str(tmp_path)))
    assert score(counted, Protocol("", average="images"))["f1"] == pytest.approx(results["per_image"]["f1"], abs=1e-12)


@pytest.mark.parametrize("state", ["running", "failed", "stopped"])
def test_unfinished_runs_have_none(copied, state):
    path = copied / "first" / "status.yaml"
    write_yaml(path, read_yaml(path) | {"state": state, "pid": 1})
    one_line(lambda: evidence_of("first", str(copied)), "expected a run that is done")


def test_runs_with_several_classes_are_refused(tmp_path):
    several = run(
        configure(
            recipe="damage_quickstart",
            encoder="mobilenet_v3_small",
            synthetic_images=12,
            image_size=32,
            epochs=1,
            batch_size=4,
            device="cpu",
            amp="off",
            outputs=str(tmp_path),
            run_name="several",
        )
    )
    one_line(
        lambda: evidence_of(several.folder.run_id, str(tmp_path)),
        "several knows labels or several classes",
        "cracks and background",
    )


@pytest.mark.parametrize("name", ["per_image.csv", "sums.npz"])
def test_evidence_that_was_changed_is_not_believed(copied, name):
    evidence_of("first", str(copied))
    path = copied / "first" / "evidence" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    one_line(lambda: evidence_of("first", str(copied)), name, "was changed after it was written")


def test_another_photo_under_the_same_mask_is_another_image(outputs, copied):
    evidence_of("first", str(outputs))
    evidence_of("second", str(outputs))
    shutil.copytree(outputs / "second", copied / "second")
    path = copied / "second" / "evidence"
    evidence = read_evidence(path)
    evidence.per_image.iloc[0, evidence.per_image.columns.get_loc("photo")] = "another"
    evidence.save(path)
    found = compare(["first", "second"], outputs=str(copied))
    assert list(found.systems) == ["first"] and found.left_out["reason"].iloc[0].startswith(
        "other photos, or another size: 1 of"
    )


def test_a_run_from_before_a_setting_existed_is_another_seed_of_the_same_system(outputs, copied):
    "A setting at its default may be missing; one that is not makes another system, and so does one that differs."
    first = RunFolder(outputs / "first")
    own, _ = system_of(first)
    path = copied / "first" / "config.yaml"
    for change, same in [
        (lambda settings: settings["data"].pop("ignore_index"), True),
        (lambda settings: settings["loss"].update(class_weights=None), True),
        (lambda settings: settings["run"].update(seed=7), True),
        (lambda settings: settings["optim"].update(weight_decay=0.5), False),
        (lambda settings: settings["optim"].pop("lr"), False),
    ]:
        settings = read_yaml(outputs / "first" / "config.yaml")
        change(settings)
        write_yaml(path, settings)
        assert (system_of(RunFolder(copied / "first"))[0] == own) == same


@pytest.fixture
def begin(outputs, tmp_path):
    "Return a function that copies the first run as one of another seed that began with weights."
    evidence_of("first", str(outputs))

    def begin(name, seed, weights="", **data):
        shutil.copytree(outputs / "first", tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
        settings = read_yaml(outputs / "first" / "config.yaml")
        settings["run"]["seed"], settings["model"]["fine_tune"] = seed, str(weights)
        settings["data"].update(data)
        write_yaml(tmp_path / name / "config.yaml", settings)
        return system_of(RunFolder(tmp_path / name), str(tmp_path))

    return begin


def test_seeds_of_two_stages_are_one_system(begin, tmp_path):
    "Also where the first stage's weights are gone."
    first, second, third = (begin(f"stage-{seed}", seed) for seed in (1, 2, 3))
    assert first[0] == second[0] == third[0] and first[1] == (1,)
    system, seeds = begin("fine-1", 1, tmp_path / "stage-1")
    assert system != first[0] and seeds == (1, 1)
    assert begin("fine-2", 2, "stage-2") == (system, (2, 2))
    assert begin("mixed", 1, tmp_path / "stage-3" / "checkpoints") == (system, (1, 3))
    assert begin("again", 1, tmp_path / "stage-1" / "checkpoints" / "best-0a1b2c3d.safetensors") == (system, (1, 1))
    found = compare(["fine-1", "fine-2", "mixed", "again"], outputs=str(tmp_path))
    assert [len(one.entries) for one in found.systems.values()] == [3]
    assert found.left_out["run"].tolist() == ["again"] and "a repetition" in found.left_out["reason"].iloc[0]


def test_other_first_weights_are_another_system(begin, tmp_path):
    begin("stage", 1)
    begin("elsewhere", 1, data_dir="other/photos")
    whole = {
        begin("own", 1, "stage")[0],
        begin("last", 1, tmp_path / "stage" / "checkpoints" / "epoch_0006-0a1b2c3d.safetensors")[0],
        begin("other", 1, "elsewhere")[0],
        begin("third", 1, "own")[0],
        begin("file", 1, "weights.safetensors")[0],
        begin("file-2", 1, "weights-2.safetensors")[0],
    }
    assert len(whole) == 6


def test_runs_that_name_each_other_have_systems(begin, tmp_path):
    "A run may be trained again, under its name, from one that began with it."
    begin("one", 1, "other")
    begin("other", 2, "one")
    begin("itself", 1, "itself")
    assert [system_of(RunFolder(tmp_path / name), str(tmp_path))[1] for name in ("one", "other", "itself")] == [
        (1, 2),
        (2, 1),
        (1,),
    ]


def test_committed_seeds_of_two_stages_are_one_system():
    runs = [
        RunFolder(project_root() / path.parent) for path in committed("outputs/deepcrack-unet_mixed-views*/config.yaml")
    ]
    if len(runs) < 2:
        pytest.skip("fewer than two committed runs of this kind")
    assert len({system_of(folder)[0] for folder in runs}) == 1


def test_a_run_of_another_version_is_left_out_of_a_comparison(outputs, copied):
    shutil.copytree(outputs / "second", copied / "second")
    path = copied / "second" / "config.yaml"
    settings = read_yaml(path)
    settings["optim"]["momentum_of_tomorrow"] = 1
    write_yaml(path, settings)
    found = compare(["first", "second"], outputs=str(copied))
    assert list(found.systems) == ["first"] and "momentum_of_tomorrow" in found.left_out["reason"].iloc[0]


def test_runs_of_two_sweeps_that_share_a_name_are_told_apart(outputs, tmp_path):
    for run_name in ("first", "second"):
        evidence_of(run_name, str(outputs))
        shutil.copytree(outputs / run_name, tmp_path / f"sweep-{run_name}" / "seed1")
    shutil.copytree(outputs / "synthetic", tmp_path / "synthetic")
    runs = ["sweep-first/seed1", "sweep-second/seed1"]
    finish_comparison(compare(runs, outputs=str(tmp_path)), tmp_path / "both")
    assert pd.read_csv(tmp_path / "both" / "training.csv")["run"].tolist() == runs
    assert len([*(tmp_path / "both").glob("pair-*.png")]) == 1
    counted, _ = begin_protocols(dict(runs=",".join(runs), outputs=str(tmp_path)))
    assert precision_table(counted).columns.tolist() == runs


def test_a_run_that_trained_no_epoch_is_reported(tmp_path):
    run(configure(**SMALL | dict(epochs=0), outputs=str(tmp_path), run_name="untrained"))
    finish_comparison(compare(["untrained"], outputs=str(tmp_path)), tmp_path / "alone")
    [row] = pd.read_csv(tmp_path / "alone" / "training.csv").to_dict("records")
    assert row["epochs"] == 0 and np.isnan(row["images/s"]) and row["losses"] == "No epoch was trained."


def test_interrupted_writing_leaves_no_evidence(copied, monkeypatch):
    monkeypatch.setattr(
        "crackseg_nb.evidence.scores.write_yaml", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        evidence_of("first", str(copied))
    monkeypatch.undo()
    assert (
        evidence_of("first", str(copied)).run_id == "first"
        and read_evidence(copied / "first" / "evidence").run_id == "first"
    )


def test_committed_runs_are_compared_without_their_images():
    "What is committed in outputs/ is enough for the committed comparison."
    runs = [project_root() / path.parent.parent for path in committed("outputs/*/evidence/scores.yaml")]
    if len(runs) < 2:
        pytest.skip("fewer than two committed runs with evidence")
    found = compare([str(path) for path in runs])
    assert len(found.systems) + len(found.left_out) == len(runs)
    for name, _system in found.systems.items():
        results = read_yaml(project_root() / "outputs" / name / "final_results.yaml")
        assert found.scores.loc[name, "pooled F1"] == pytest.approx(results["test"]["pooled"]["f1"], abs=1e-9)


@pytest.mark.slow
def test_the_notebook_runs(outputs, tmp_path):
    papermill.execute_notebook(
        project_root() / "nbs" / "compare_experiments.ipynb",
        tmp_path / "out.ipynb",
        kernel_name="python3",
        progress_bar=False,
        parameters=dict(runs="first,second", outputs=str(outputs), name="both"),
    )
    page = write_page(tmp_path / "out.ipynb").read_text("utf-8")
    assert page.count("<img") == 6 and not [word for word in ('src="http', "<script", "<link") if word in page]
    assert "begin_comparison" not in page
    assert "These runs are on synthetic." in page and "SCSegamba" not in page  # DeepCrack's figures mean nothing here
    assert len(pd.read_csv(outputs / "both" / "tests.csv")) == 1


MEASURE = """
import sys, time
from pathlib import Path
from crackseg_nb.evidence.scores import measure, open_predictions
predictions = open_predictions('run', sys.argv[1])
start = time.perf_counter()
found = measure(predictions, workers=2)
# Not ru_maxrss, which begins with the parent's.
peak = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM:'))
print(len(found.per_image), time.perf_counter() - start, int(peak.split()[1]) / 1024)
"""


@pytest.mark.real_data
@pytest.mark.slow
def test_all_metrics_of_the_real_test_images_take_a_minute(data_folder, tmp_path):
    "99 thresholds, 0 and 2 px, two threads; a run whose answers are the blurred truth with noise."
    experiment = run(
        configure(
            recipe="deeplab_test",
            data="DeepCrack",
            data_dir=str(data_folder / "DeepCrack"),
            image_size=64,
            fit="crop",
            eval_fit="native",
            epochs=0,
            pretrained="false",
            device="cpu",
            amp="off",
            preload="false",
            outputs=str(tmp_path),
            run_name="run",
        )
    )
    noise = np.random.default_rng(0)
    for sample in experiment.prepared.splits.test:
        mask = experiment.prepared.datasets["test"].pair(experiment.prepared.splits.test.index(sample))[1]
        smooth = cv2.GaussianBlur(noise.normal(0, 6, mask.shape).astype(np.float32), (0, 0), 4)
        save_prediction(
            experiment.folder / "predictions",
            sample.name,
            1 / (1 + np.exp(-6 * (cv2.GaussianBlur((mask == 1).astype(np.float32), (0, 0), 1.5) - 0.5) - smooth)),
        )
        assert prediction_path(experiment.folder / "predictions", sample.name).is_file()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, cwd=project_root()
    )
    assert done.returncode == 0, done.stderr
    images, seconds, mebibytes = map(float, done.stdout.split())
    assert images == 237 and seconds < 60 and mebibytes < 1024, done.stdout
