"""Runs as people handle them: steps out of turn, changed rates, odd images, killed writes. None is wrong in silence."""

import os
import shutil
from functools import cache

import numpy as np
import pytest
import resume_jobs
import torch
from messages import one_line
from PIL import Image
from safetensors.torch import save_file

from crackseg_nb.core import files as files_module
from crackseg_nb.core.checks import Stopped
from crackseg_nb.core.files import read_yaml
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.evidence.scores import open_predictions
from crackseg_nb.models import registry
from crackseg_nb.models.encoders import create_encoder
from crackseg_nb.models.settings import MODEL_SETTINGS
from crackseg_nb.runs import experiment as experiment_module
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import STEPS, Experiment, prepare, run
from crackseg_nb.runs.verify import verify
from crackseg_nb.training import trainer as trainer_module
from crackseg_nb.training.checkpoint import read_manifests, save_checkpoint


@pytest.fixture(scope="module", autouse=True)
def conv_norm(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.MODELS, "conv_norm", (resume_jobs.ConvNormConfig, resume_jobs.ConvNorm))
        patch.setitem(MODEL_SETTINGS, "conv_norm", resume_jobs.ConvNormConfig)
        patch.setattr(experiment_module, "describe_environment", cache(experiment_module.describe_environment))
        yield


def settings(outputs, name, **others):
    return {
        **resume_jobs.SETTINGS,
        **resume_jobs.MODELS["conv_norm"],
        "synthetic_images": 12,
        "epochs": 3,
        "checkpoint_every": 1,
        "checkpoint_minutes": 0,
        "outputs": str(outputs),
        "run_name": name,
        **others,
    }


def photos(root, **sizes):
    "Write a set with a split for each keyword, which lists the sides of its images."
    for split, sides in sizes.items():
        for index, side in enumerate(sides):
            image = np.random.default_rng([index, len(split)]).integers(0, 256, (side, side, 3), dtype=np.uint8)
            mask = np.zeros((side, side), np.uint8)
            mask[side // 2] = 255
            for kind, values in (("images", image), ("masks", mask)):
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / split / kind / f"{split}{index}.png")
    return dict(data="folder", data_dir=str(root), synthetic_images=None)


# ---- steps


def written(folder):
    return {
        path.relative_to(folder.path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.path.rglob("*")
        if path.is_file() and path.name != "training.log"
    }


def test_each_step_is_taken_once_and_in_turn(tmp_path):
    once = run(configure(**settings(tmp_path, "once", epochs=1)))
    again = Experiment(configure(**settings(tmp_path, "again", epochs=1)))
    for number, step in enumerate(STEPS[1:], 1):
        before = written(again.folder)
        for other in STEPS[1:]:
            if other != step:
                one_line(getattr(again, other), other, f"expected {step}()")
        assert again.folder.state == "running" and written(again.folder) == before
        getattr(again, step)()
        assert again.taken == number + 1
    for step in STEPS[1:]:
        one_line(getattr(again, step), "found a run that is done, expected a new Experiment")
    for name in ("history.csv", "predictions/per_image.csv"):
        assert (again.folder / name).read_bytes() == (once.folder / name).read_bytes()
    assert again.results["test"] == once.results["test"]


# ---- a changed rate


def stopping(epoch, step):
    "Let the trainer stop with a state after some steps of an epoch."
    original = trainer_module.pause_if_asked

    def pause(trainer):
        if trainer.position == (epoch, step):
            trainer_module.save_state(trainer)
            raise Stopped("enough")
        original(trainer)

    return pause


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, conv_norm):
    "Two runs that stopped, before the first and the second step of their third epoch, to be copied."
    outputs = tmp_path_factory.mktemp("outputs")
    for step in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_module, "pause_if_asked", stopping(2, step))
            with pytest.raises(Stopped):
                run(configure(**settings(outputs, f"run{step}")))
    return outputs


@pytest.mark.few(1)
@pytest.mark.parametrize("step, lr", [(1, 1e-4), (0, 1e-3), (0, 1e-4), (1, 1e-3)])
def test_the_history_shows_the_rate_that_was_used(tmp_path, monkeypatch, stopped, step, lr):
    shutil.copytree(stopped, tmp_path / "runs")
    used, train = {}, trainer_module.train_window

    def noted(trainer, window):
        used.setdefault(trainer.epoch + 1, trainer.optimizer.param_groups[-1]["lr"])
        return train(trainer, window)

    monkeypatch.setattr(trainer_module, "train_window", noted)
    resumed = prepare(configure(resume=f"run{step}", outputs=str(tmp_path / "runs"), lr=lr))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "write_scalars", lambda writer, row, performance: rows.append(row))
        rows = []
        shown = resumed.train().set_index("epoch")["train_learning_rate"]
    resumed.folder.mark("stopped")
    assert [row["train_learning_rate"] for row in rows] == [shown[row["epoch"]] for row in rows]  # TensorBoard
    assert set(used) == {3} and (shown[3] == pytest.approx(used[3])) == (step == 0 or lr == 1e-4)


def test_a_resumed_run_does_not_need_the_files_that_it_began_with(tmp_path):
    "Those of its first weights and of its class weights; a new run is told of a lost file before it reads its data."
    network = create_encoder("test_resnet", 32)
    files = {"pretrained": tmp_path / "first.safetensors", "class_weights": tmp_path / "weights.json"}
    save_file(network.body.state_dict(), files["pretrained"])
    own = settings(tmp_path, "run", model="unet", encoder="test_resnet", loss="focal", epochs=2)
    weighted = run(configure(**own | dict(class_weights="inverse", epochs=1, run_name="weighted")))
    shutil.copy(weighted.folder / "class_weights.json", files["class_weights"])
    own |= {name: str(path) for name, path in files.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "pause_if_asked", stopping(1, 0))
        with pytest.raises(Stopped):
            run(configure(**own))
    whole = run(configure(**own | {"run_name": "whole"}))
    for path in files.values():
        path.unlink()
    resumed = run(configure(resume=str(tmp_path / "run")))
    assert (resumed.folder / "history.csv").read_bytes() == (whole.folder / "history.csv").read_bytes()
    for name in files:
        one_line(lambda name=name: configure(**own | {name: own[name]}), f"{name}: found no file {own[name]}")
        files[name].touch()


# ---- what would fail after training


@pytest.mark.few(1)
@pytest.mark.parametrize("split", ["val", "test"])
def test_an_image_too_small_for_the_model_is_named_before_training(tmp_path, split):
    sizes = {"train": [40] * 4, "val": [40] * 2, "test": [40] * 2}
    sizes[split] = [40, 20]
    data = photos(tmp_path / "data", **sizes)
    one_line(
        lambda: prepare(configure(**settings(tmp_path, "native", **data))),
        f"{split}1.png: found an image of 20x20, expected at least 32x32",
    )
    prepare(configure(**settings(tmp_path, "resized", **data, eval_fit="resize"))).folder.mark("stopped")


def test_a_run_is_tested_at_another_size_than_it_is_trained_at(tmp_path):
    data = photos(tmp_path / "data", train=[40] * 4, val=[50] * 2, test=[60] * 2)
    finished = run(
        configure(
            **settings(tmp_path, "sizes", **data, image_size=32, eval_fit="resize", eval_size="48,64", preload="true")
        )
    )
    shapes = {split: images[0]["image"].shape[-2:] for split, images in finished.prepared.datasets.items()}
    assert shapes == {"train": (32, 32), "val": (48, 64), "test": (48, 64)}
    assert [images.store is None for images in finished.prepared.datasets.values()] == [False, False, True]
    predictions = open_predictions(finished.folder.path)
    assert predictions.dataset[0]["target"].shape == (48, 64)
    assert verify("sizes", outputs=str(tmp_path)).code == 0


@pytest.mark.parametrize(
    "names, said",
    [
        (("site/p1", "site__p1"), "predictions: found the test images test/site/p1 and test/site__p1"),
        (("a/b__c", "a__b/c"), "predictions: found the test images test/a/b__c and test/a__b/c"),
        (
            ("site" * 30 + "/" + "photo" * 30, "p1"),
            "predictions: found a test image whose prediction would have a name",
        ),
    ],
)
def test_predictions_that_cannot_be_kept_are_found_before_training(tmp_path, names, said):
    data = photos(tmp_path / "data", train=[40] * 3, val=[40], test=[40] * 2)
    for kind in ("images", "masks"):
        folder = tmp_path / "data/test" / kind
        for index, name in enumerate(names):
            (folder / f"{name}.png").parent.mkdir(exist_ok=True)
            (folder / f"test{index}.png").rename(folder / f"{name}.png")
    experiment = Experiment(configure(**settings(tmp_path, "run", **data)))
    one_line(experiment.load_data, said, "expected")


def test_a_long_name_is_kept(tmp_path):
    data = photos(tmp_path / "data", train=[40] * 3, val=[40], test=[40])
    for kind in ("images", "masks"):
        (tmp_path / f"data/test/{kind}/test0.png").rename(tmp_path / f"data/test/{kind}/{'p' * 240}.png")
    done = run(configure(**settings(tmp_path, "run", **data, epochs=0)))
    assert (done.folder / "predictions" / f"test__{'p' * 240}.png").is_file()


# ---- interrupted runs


@pytest.mark.parametrize("kind", RunFolder.SUBFOLDERS)
def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, stopped, kind):
    shutil.copytree(stopped / "run0", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / kind)
    (tmp_path / "run" / kind).touch()
    one_line(lambda: Experiment(configure(resume=str(tmp_path / "run"))), f"run/{kind}: cannot write there")
    assert RunFolder(tmp_path / "run").state == "stopped"


def test_a_status_of_no_state_ends_the_resume_in_one_line(tmp_path, stopped):
    shutil.copytree(stopped / "run0", tmp_path / "run")
    (tmp_path / "run/status.yaml").write_text("stopped\n")
    one_line(lambda: configure(resume=str(tmp_path / "run")), "status.yaml: found 'stopped'")
    (tmp_path / "run/status.yaml").write_text("state: stopped\n")  # as the message asks
    assert configure(resume=str(tmp_path / "run")).train.epochs == 3


def die_while_writing(folder, replaced):
    "Write a state in a process that dies before it moves its next file into place."
    pid = os.fork()
    if pid == 0:
        replace = os.replace

        def counted(*places):
            nonlocal replaced
            if replaced == 0:
                os._exit(9)
            replaced -= 1
            replace(*places)

        files_module.os.replace = counted
        save_checkpoint(folder / "checkpoints", "epoch_0003", {"weight": torch.zeros(1000)}, {"epoch": 3})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_a_killed_write_leaves_nothing_once_the_run_is_resumed(tmp_path, stopped, replaced):
    shutil.copytree(stopped / "run0", tmp_path / "run")
    shutil.copytree(stopped / "synthetic", tmp_path / "synthetic")
    folder = RunFolder(tmp_path / "run")
    die_while_writing(folder, replaced)
    assert len(list((folder / "checkpoints").glob("*epoch_0003*"))) == replaced + 1
    resumed = Experiment(configure(resume=str(folder.path), outputs=str(tmp_path)))
    named = {
        entry["file"] for manifest in read_manifests(folder / "checkpoints")[0] for entry in manifest["files"].values()
    }
    found = {path.name for path in (folder / "checkpoints").iterdir() if path.suffix != ".json"}
    assert found == named and resumed.resume_from == "epoch_0002"
    assert not list(folder.path.rglob(".*"))
    assert read_yaml(folder / "resumes.yaml")[0]["from"] == "epoch_0002"
    resumed.folder.mark("stopped")
