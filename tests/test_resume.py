"""Training processes that are killed at any instant, resumed, and compared with one that never stopped, bit for bit."""

import multiprocessing
import os
import random
import signal
from functools import cache
from pathlib import Path

import pytest
import resume_jobs
import torch

from crackseg_nb.core.files import read_yaml
from crackseg_nb.core.run_folder import RunFolder
from crackseg_nb.training.checkpoint import load_checkpoint

KINDS = ("step", "checkpoint", "evaluation", "time", "in evaluation", "start")


@pytest.fixture(scope="module")
def server():
    "A process that has imported everything and forks one child for each life."
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep
        )  # the server's own imports ignore sys.path
        context.set_forkserver_preload(["resume_jobs"])
        yield context


def one_life(server, *args):
    process = server.Process(target=resume_jobs.live, args=args)
    process.start()
    process.join(180)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def evidence(folder, epochs):
    "Return everything of a run that has to repeat, as bytes or tensors."
    final, best = (load_checkpoint(folder / "checkpoints", name) for name in (f"epoch_{epochs:04}", "best"))
    state = final.training_state
    files = {name: (folder / name).read_bytes() for name in ("history.csv", "predictions/per_image.csv", "splits.yaml")}
    maps = {path.name: path.read_bytes() for path in (folder / "predictions").glob("*.png")}
    results = read_yaml(folder / "final_results.yaml")
    return {
        "files": files,
        "maps": maps,
        "weights": final.model_state,
        "best": best.model_state,
        "rng": state["rng"],
        "optimizer": state["optimizer"],
        "scheduler": state["scheduler"],
        "early stopping": state["best"],
        "test": results["test"],
        "val": results["val"],
        "protocol": results["protocol"],
    }


def assert_equal(one, other, place=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name in one:
            assert_equal(one[name], other[name], f"{place}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{place}[{index}]")
    else:
        assert one == other, place


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    "A function that returns the folder of a run that never stopped, trained once for each model and length."

    @cache
    def trained(model, epochs):
        folder = tmp_path_factory.mktemp(model)
        assert one_life(server, folder, "whole", epochs, model, 0) == 0
        return folder / "whole"

    return trained


def survive(server, whole, tmp_path, model, workers, faults, epochs):
    for fault in faults:
        assert one_life(server, tmp_path, "torn", epochs, model, workers, fault) == -signal.SIGKILL, fault
    folder = RunFolder(tmp_path / "torn")
    assert folder.state == "interrupted" and not (folder / "final_results.yaml").exists()
    assert one_life(server, tmp_path, "torn", epochs, model, workers) == 0
    assert folder.state == "done" and len(read_yaml(folder / "resumes.yaml")) >= len(faults) - 1
    assert_equal(evidence(whole, epochs), evidence(tmp_path / "torn", epochs))


@pytest.mark.few(1)
@pytest.mark.parametrize("model, workers", [("conv_norm", 2), ("hybrid", 0)])  # every pair of them: the slow test
def test_a_run_survives_kills(server, whole, tmp_path, model, workers):
    faults = [("checkpoint", 2), ("step", 1), ("time", workers), ("in evaluation", 1)]
    survive(server, whole(model, 4), tmp_path, model, workers, faults, 4)


@pytest.mark.slow
@pytest.mark.parametrize("workers", (0, 2))
@pytest.mark.parametrize("model", ("hybrid", "conv_norm"))
def test_a_run_survives_twenty_kills(server, whole, tmp_path, model, workers):
    numbers = random.Random(f"{model} {workers}")
    faults = [(KINDS[index % len(KINDS)], numbers.randrange(100)) for index in range(20)]
    numbers.shuffle(faults)
    survive(server, whole(model, 60), tmp_path, model, workers, faults, 60)
