"""Faults that are put into a run: each ends as promised, in one line, with nothing lost."""

import errno
import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path

import pandas as pd
import pytest
import resume_jobs
import torch
from jupyter_client.manager import start_new_kernel

from crackseg_nb.core.checks import RESUME_CODE, CrackSegError, Interrupted, Stopped
from crackseg_nb.core.files import read_yaml
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.models import registry
from crackseg_nb.models.settings import MODEL_SETTINGS
from crackseg_nb.runs import experiment as experiment_module
from crackseg_nb.runs import launch
from crackseg_nb.runs import stages as stages_module
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import STEPS, Experiment, prepare, run
from crackseg_nb.training import checkpoint as checkpoint_module
from crackseg_nb.training import trainer as trainer_module
from crackseg_nb.training.checkpoint import checkpoint_names, load_checkpoint
from crackseg_nb.training.diagnosis import load_batch
from crackseg_nb.training.trainer import set_up_model

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 4


@pytest.fixture(scope="module", autouse=True)
def conv_norm(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.MODELS, "conv_norm", (resume_jobs.ConvNormConfig, resume_jobs.ConvNorm))
        patch.setitem(MODEL_SETTINGS, "conv_norm", resume_jobs.ConvNormConfig)
        yield


def settings(outputs, name, **others):
    return {
        **resume_jobs.SETTINGS,
        **resume_jobs.MODELS["conv_norm"],
        "epochs": EPOCHS,
        "checkpoint_every": 1,
        "checkpoint_minutes": 0,
        "outputs": str(outputs),
        "run_name": name,
        **others,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing happened to."
    return run(configure(**settings(tmp_path_factory.mktemp("outputs"), "whole"))).folder


def failing(config):
    "Run and return the message, which has one line; there are no results."
    with pytest.raises(CrackSegError) as caught:
        run(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_equals(whole, folder):
    assert (whole / "history.csv").read_bytes() == (folder / "history.csv").read_bytes()
    for name in ("best", f"epoch_{EPOCHS:04}"):
        first, second = (load_checkpoint(run / "checkpoints", name).model_state for run in (whole, folder))
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
    assert read_yaml(whole / "final_results.yaml")["test"] == read_yaml(folder / "final_results.yaml")["test"]


def resume(outputs, name, **others):
    return run(configure(resume=str(outputs / name), **others)).folder


def at_step(monkeypatch, step, fault):
    "Let `fault(image)` take the place of the training image from the `step`-th forward pass on."
    forward, calls = resume_jobs.ConvNorm.forward, [0]

    def counted(self, image):
        calls[0] += self.training
        return forward(self, fault(image) if self.training and calls[0] > step else image)

    monkeypatch.setattr(resume_jobs.ConvNorm, "forward", counted)


# Memory


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_epoch(tmp_path, monkeypatch, whole):
    def full(image):
        if len(image) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return image

    at_step(monkeypatch, 11, full)  # in the second epoch, in the middle of a window
    folder = run(configure(**settings(tmp_path, "full"))).folder
    rows = pd.read_csv(folder / "performance.csv")
    assert folder.state == "done" and list(rows["micro_batch"]) == [2, 1, 1, 1] and (rows["peak_rss_mib"] > 0).all()
    assert read_yaml(folder / "final_results.yaml")["performance"]["images_at_a_time"] == 1
    state = load_checkpoint(folder / "checkpoints", f"epoch_{EPOCHS:04}").training_state
    assert (
        state["scheduler"]["last_epoch"]
        == 4 * EPOCHS
        == load_checkpoint(whole / "checkpoints", f"epoch_{EPOCHS:04}").training_state["scheduler"]["last_epoch"]
    )
    histories = [pd.read_csv(run / "history.csv") for run in (whole, folder)]
    pd.testing.assert_series_equal(histories[0]["train_loss"][:1], histories[1]["train_loss"][:1])
    assert (folder / "training.log").read_text().count("OUT OF MEMORY") == 1


@pytest.mark.slow
def test_a_single_image_that_does_not_fit_ends_the_run_with_advice(tmp_path, whole):
    def full(image):
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, full)  # in the second batch of a window
        message = failing(configure(**settings(tmp_path, "full")))
    assert "not even a single image fits" in message and "gradient_checkpointing" in message
    folder = RunFolder(tmp_path / "full")
    assert folder.state == "failed" and checkpoint_names(folder / "checkpoints")[-1] == "epoch_0001_step_00002"
    assert_equals(whole, resume(tmp_path, "full"))


def test_a_batch_that_cannot_fit_is_made_smaller_before_training(tmp_path, monkeypatch):
    estimate = experiment_module.estimate_memory
    needed = []

    def small_device(*args):
        needed.append(estimate(*args))
        needed[-1].available = needed[-1].total - 0.6 * needed[-1].activations
        return needed[-1]

    monkeypatch.setattr(experiment_module, "estimate_memory", small_device)
    folder = run(configure(**settings(tmp_path, "small", batch_size=4, epochs=1))).folder
    assert (
        list(pd.read_csv(folder / "performance.csv")["micro_batch"]) == [1]
        and "at a time instead of 4" in (folder / "training.log").read_text()
    )


# Numbers


def test_a_nan_is_diagnosed_and_the_run_goes_on_from_the_last_good_state(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 13, lambda image: image * float("inf"))
        message = failing(configure(**settings(tmp_path, "broken")))
    assert (
        "epoch 2, step 3 of 4" in message
        and "ConvNorm" in message
        and ".png" in message
        and "epoch_0001" in message
        and "resume" in message
    )
    folder = RunFolder(tmp_path / "broken")
    (kept,) = (folder / "diagnosis").iterdir()
    batches, details = load_batch(kept)
    assert kept.name == "epoch_0002_step_00003" and batches and torch.isfinite(batches[0]["image"]).all()
    assert all(Path(file).is_file() for file in details["files"]) and Path(details["files"][0]).name in message
    folder = resume(tmp_path, "broken", lr=1e-4)
    assert folder.state == "done" and read_yaml(folder / "config.yaml")["optim"]["lr"] == 1e-4
    assert (
        read_yaml(folder / "resumes.yaml")[0]["changed"] == {"lr": 1e-4}
        and read_yaml(folder / "final_results.yaml")["performance"]["resumed"] == 1
    )
    assert pd.read_csv(folder / "history.csv")["train_learning_rate"].iloc[-1] < 1e-4


# Disk


def test_a_full_disk_keeps_the_state_before(tmp_path, monkeypatch, whole):
    write = checkpoint_module.atomic_write

    def full(path, *mode):
        if path.name.startswith("epoch_0003"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "atomic_write", full)
        message = failing(configure(**settings(tmp_path, "full")))
    assert "No space left on device" in message and "untouched" in message
    folder = RunFolder(tmp_path / "full")
    assert folder.state == "failed" and checkpoint_names(folder / "checkpoints")[-2] == "epoch_0002"
    assert not [
        path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".") or "epoch_0003" in path.name
    ]
    assert_equals(whole, resume(tmp_path, "full"))


@pytest.mark.mount
def test_a_disk_that_is_really_full(tmp_path, whole):
    "A file system of two MiB, mounted for this test where root may, as in a container, and unmounted after it."
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        source = tmp_path / "elsewhere"
        run(configure(**settings(source, "first", epochs=0)))  # makes the images
        shutil.copytree(source / "synthetic", disk / "synthetic")
        filler = disk / "filler"

        def fill(*_):
            filler.write_bytes(b"0" * (shutil.disk_usage(disk).free - 3000))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("crackseg_nb.runs.experiment.check_writable", lambda *_: None)
            patch.setattr("crackseg_nb.runs.experiment.SPACE_TO_BEGIN", 0)
            patch.setattr(
                "crackseg_nb.training.trainer.begin_epoch",
                lambda trainer, begin=run.__globals__["Trainer"].__init__.__globals__["begin_epoch"]: (
                    begin(trainer),
                    fill() if trainer.epoch == 2 else None,
                ),
            )
            message = failing(configure(**settings(disk, "run")))
        assert "No space left on device" in message
        filler.unlink()
        assert not (disk / "run" / "final_results.yaml").exists()
        assert_equals(whole, resume(disk, "run"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_damaged_newest_state_falls_back_to_the_one_before(tmp_path, whole):
    config = configure(**settings(tmp_path, "torn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crackseg_nb.training.trainer.save_epoch", stop_after(2))
        with pytest.raises(Stopped):
            run(config)
    folder = RunFolder(tmp_path / "torn")
    names = checkpoint_names(folder / "checkpoints")
    assert names[-1] == "epoch_0002"
    (newest,) = (folder / "checkpoints").glob("epoch_0002-*.pt")
    newest.write_bytes(newest.read_bytes()[:-100])
    folder = resume(tmp_path, "torn")
    assert (
        "DAMAGED CHECKPOINT" in (folder / "training.log").read_text()
        and read_yaml(folder / "resumes.yaml")[0]["from"] == "epoch_0001"
    )
    assert_equals(whole, folder)


def stop_after(epoch):
    from crackseg_nb.training.trainer import save_epoch

    def save(trainer, improved):
        save_epoch(trainer, improved)
        if trainer.epoch == epoch:
            raise Stopped("enough")

    return save


# Workers


def test_a_dead_worker_costs_no_step(tmp_path, whole):
    seen = []

    def kill(trainer, window, step=None):
        if trainer.position == (1, 2) and not seen:
            workers = trainer.train_loader._iterator._workers
            seen.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)
            for _ in range(100):
                time.sleep(0.01)
        return original(trainer, window)

    from crackseg_nb.training import trainer as trainer_module

    original = trainer_module.train_window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "train_window", kill)
        message = failing(configure(**settings(tmp_path, "workers", num_workers=2)))
    assert str(seen[0]) in message and "killed by signal 9" in message and "num_workers" in message
    assert not multiprocessing.active_children()
    folder = RunFolder(tmp_path / "workers")
    assert folder.state == "failed" and checkpoint_names(folder / "checkpoints")[-1] == "epoch_0002_step_00002"
    assert_equals(whole, resume(tmp_path, "workers", num_workers=0))


# Signals and time


def interrupting(monkeypatch, place, times=1, number=signal.SIGINT):
    "Let a signal come `times` in the middle of a place: once its function has been called that often."
    module, name, calls = place
    original, count = getattr(module, name), [0]

    def counted(*args, **kwargs):
        count[0] += 1
        for _ in range(times if count[0] == calls else 0):
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)


PLACES = {  # the function that is interrupted and at which call, how often, and what the run then goes on from
    "load_data": ((experiment_module, "audit", 1), 1, "the beginning"),
    "build_model": ((experiment_module, "create_model", 1), 1, "the beginning"),
    "a step": ((trainer_module, "accumulate_window", 6), 1, "epoch_0002_step_00002"),
    "a step, twice": ((trainer_module, "accumulate_window", 6), 2, "epoch_0001"),
    "the first step, twice": ((trainer_module, "accumulate_window", 1), 2, "the beginning"),
    "validation": ((trainer_module, "evaluate", 2), 1, "epoch_0002_step_00004"),
    "writing a state": ((checkpoint_module, "sync_folder", 3), 2, "the beginning"),
    "test": ((stages_module, "evaluate", 1), 1, f"epoch_{EPOCHS:04}"),
    "finish": ((experiment_module, "report_text", 1), 1, f"epoch_{EPOCHS:04}"),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
def test_a_signal_writes_a_state_and_says_how_to_go_on(tmp_path, whole, number):
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, PLACES["a step"][0], number=number)
        with pytest.raises(Stopped, match=f"{number.name}.*-p resume"):
            run(configure(**settings(tmp_path, "asked")))
    folder = RunFolder(tmp_path / "asked")
    assert folder.state == "stopped" and "stopped in epoch 2 after step 2 of 4" in folder.status["reason"]
    assert len(pd.read_csv(folder / "history.csv")) == 1
    if number == signal.SIGUSR1:  # SIGINT and its like are resumed below
        assert_equals(whole, resume(tmp_path, "asked"))


@pytest.mark.few(3)
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_was_interrupted_goes_on_when_it_is_taken_again(tmp_path, whole, place):
    "As in a notebook, whose cell is run again in the same kernel."
    where, times, source = PLACES[place]
    experiment, asked, held = Experiment(configure(**settings(tmp_path, "asked"))), [], []

    def noted(trainer, model):
        held.append(weakref.ref(trainer))
        set_up_model(trainer, model)

    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, where, times)
        patch.setattr(trainer_module, "set_up_model", noted)
        for name in STEPS[1:]:
            try:
                getattr(experiment, name)()
            except (Stopped, Interrupted) as stop:
                asked.append((name, stop))
                assert experiment.folder.state == "stopped" and experiment.folder.status["reason"] == str(stop)
                gc.collect()
                assert name != "train" or held[-1]() is None  # its optimiser would fill the memory of the next
                with pytest.raises(CrackSegError, match="expected"):
                    experiment.finish() if name != "finish" else experiment.test()
                assert experiment.folder.state == "stopped"
                getattr(experiment, name)()
    ((name, stop),) = asked
    line = "\n".join(stop._render_traceback_())
    assert "\n" not in line and "asked" in line and line.endswith(f"run the cell with {name}() again")
    (entry,) = read_yaml(tmp_path / "asked" / "resumes.yaml")
    assert (entry["was"], entry["from"], entry["changed"]) == ("stopped", source, {})
    assert experiment.folder.state == "done"
    assert_equals(whole, experiment.folder)


@pytest.mark.few(1)
@pytest.mark.parametrize("place", ["load_data", "test"])
def test_what_an_interrupt_leaves_is_resumed_elsewhere(tmp_path, whole, place):
    where, times, _ = PLACES[place]
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, where, times)
        with pytest.raises((Stopped, Interrupted)):
            run(configure(**settings(tmp_path, "asked")))
    assert RunFolder(tmp_path / "asked").state == "stopped"
    assert_equals(whole, resume(tmp_path, "asked"))


def test_a_run_that_went_on_elsewhere_is_not_taken_up_again(tmp_path, monkeypatch):
    experiment = prepare(configure(**settings(tmp_path, "asked")))
    with monkeypatch.context() as patch:
        interrupting(patch, PLACES["a step"][0])
        with pytest.raises(Stopped):
            experiment.train()
    done = resume(tmp_path, "asked")
    with pytest.raises(CrackSegError, match="asked: found a run that is done, expected a new Experiment"):
        experiment.train()
    assert done.state == "done"


def test_a_new_run_names_an_interrupted_one_of_the_same_settings(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupting(patch, PLACES["a step"][0])
        with pytest.raises(Stopped):
            run(configure(**settings(tmp_path, "asked")))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "status.yaml").write_text("state: lost")  # is no matter of others
    said = {}
    for name, others in {"again": {}, "other": {"seed": 7}, "named": {"checkpoint_every": 2}}.items():
        experiment = Experiment(configure(**settings(tmp_path, name, **others)))
        said[name] = (experiment.folder / "training.log").read_text()
        experiment.folder.mark("failed")
    line = (
        f"a run of the same settings was stopped: -p resume {tmp_path / 'asked'} goes on with it; this one begins anew"
    )
    assert line in said["again"] and line in said["named"] and "same settings" not in said["other"]
    assert RunFolder(tmp_path / "asked").state == "stopped"


KERNEL = """
import sys, time
sys.path.insert(0, {tests!r})
import resume_jobs
from crackseg_nb.models import registry
from crackseg_nb.models.settings import MODEL_SETTINGS
from crackseg_nb.runs.config import configure
from crackseg_nb.runs.experiment import prepare
registry.MODELS["conv_norm"] = (resume_jobs.ConvNormConfig, resume_jobs.ConvNorm)
MODEL_SETTINGS["conv_norm"] = resume_jobs.ConvNormConfig
forward = resume_jobs.ConvNorm.forward
resume_jobs.ConvNorm.forward = lambda self, image: (time.sleep(0.02), forward(self, image))[1]
resume_jobs.torch.set_num_threads(1)
experiment = prepare(configure(**{settings!r}))
"""


def test_the_interrupt_of_a_kernel_keeps_the_work_and_the_cell_goes_on(tmp_path, whole):
    "Jupyter signals the kernel and its workers, the cell shows one line, and the next execution goes on."
    manager, client = start_new_kernel(kernel_name="python3")

    def execute(code, interrupt_at=None):
        text, errors = [], []

        def hook(message):
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text.append(content["text"])
                if interrupt_at and interrupt_at in content["text"]:
                    manager.interrupt_kernel()
            if kind == "error":
                errors.append(content)

        client.execute_interactive(code, output_hook=hook, timeout=120)
        return "".join(text), errors

    try:
        text, errors = execute(
            KERNEL.format(tests=str(ROOT / "tests"), settings=settings(tmp_path, "kernel", num_workers=1))
        )
        assert not errors, errors
        text, errors = execute("history = experiment.train()", interrupt_at="epoch 1/")
        assert [error["ename"] for error in errors] == ["Stopped"], text
        (line,) = errors[0]["traceback"]
        assert line.startswith("Stopped: stopped in epoch 2") and line.endswith("run the cell with train() again")
        assert RunFolder(tmp_path / "kernel").state == "stopped" and "failed" not in text
        text, errors = execute("history = experiment.train()\nexperiment.test()\nexperiment.finish()")
        assert not errors and "resume: kernel was stopped, goes on from epoch_" in text, text
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert_equals(whole, RunFolder(tmp_path / "kernel"))


def test_the_time_limit_stops_within_a_step_and_ends_with_the_code_to_resume(tmp_path):
    words = [
        word
        for item in {
            **settings(tmp_path, "late"),
            "model": "unet",
            "encoder": "test_resnet",
            "pretrained": "false",
            "time_limit": 1e-4,
        }.items()
        for word in ("-p", *map(str, item))
    ]
    assert launch.main(words) == RESUME_CODE
    folder = RunFolder(tmp_path / "late")
    name = checkpoint_names(folder / "checkpoints")[-1]
    assert (
        folder.state == "stopped"
        and "time limit" in folder.status["reason"]
        and name in ("epoch_0000", "epoch_0001_step_00001")
    )


# What cannot be resumed


def test_other_data_is_refused(tmp_path):
    config = configure(**settings(tmp_path, "torn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crackseg_nb.training.trainer.save_epoch", stop_after(1))
        with pytest.raises(Stopped):
            run(config)
    image = next((tmp_path / "synthetic").rglob("images/*.png"))
    other = next(path for path in image.parent.iterdir() if path != image)
    image.write_bytes(other.read_bytes())
    message = failing(configure(resume=str(tmp_path / "torn")))
    assert message.startswith("data: found images or masks that differ")


def test_a_finished_run_is_not_resumed(whole):
    with pytest.raises(CrackSegError, match="whole is done"):
        configure(resume=str(whole.path))
