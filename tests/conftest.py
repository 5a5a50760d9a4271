"""Fixtures of the tests, and the skips of what this machine cannot run."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import hypothesis
import matplotlib
import pytest
import torch
from process import clean_process
from slurm_cluster import reason_against, slurm_cluster

DATA = os.environ.get("CRACKSEG_DATA")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

# A shell that starts this in the background ignores SIGINT; processes that tests start and interrupt would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

matplotlib.use("Agg")
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


NEEDS = {
    "real_data": (lambda: DATA and Path(DATA).is_dir(), "no real photos: CRACKSEG_DATA names no folder"),
    "gpu": (torch.cuda.is_available, "no CUDA device"),
    "mount": (lambda: os.geteuid() == 0, "only root may mount a file system"),
    "slurm": (lambda: not reason_against(), reason_against()),
    "browser": (lambda: CHROMIUM, "no Chromium"),
}


def pytest_runtest_setup(item):
    for marker, (available, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not available():
            pytest.skip(reason)


@pytest.fixture(scope="session")
def browser():
    "Debian's or Google's Chromium without a window; its tests are marked `browser`."
    api = pytest.importorskip("playwright.sync_api", reason="the extra browser is not installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def data_folder():
    "The folder of the real photos; its tests are marked `real_data`."
    return Path(DATA)


@pytest.fixture(scope="module", autouse=True)
def same_process():
    "Begin each file with the same process, whatever others did before: files run in any order."
    with clean_process():
        yield


@pytest.fixture(scope="module")
def one_thread():
    "Keep thousands of tiny operations from waiting for a second thread on a busy machine."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def tidy(request, tmp_path_factory, same_process):
    "Removes what a file's tests wrote, unless one of them failed: the checkpoints of all tests would fill a disk."
    base, failed = tmp_path_factory.getbasetemp(), request.session.testsfailed
    before = set(base.iterdir())
    yield
    if request.session.testsfailed > failed:
        return
    for path in set(base.iterdir()) - before:
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm_environment():
    "The environment variables of a SLURM of one node that lives as long as the tests."
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with slurm_cluster(folder) as environment:
        yield environment
    shutil.rmtree(folder)


@pytest.fixture
def slurm(slurm_environment, monkeypatch):
    "A SLURM of one node; its tests are marked `slurm`."
    for name, value in slurm_environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder for the runs of a module's tests."
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def begin():
    "A function that returns an experiment with data and model, which goes no further."
    from crackseg_nb.runs.experiment import prepare

    def prepared(config):
        experiment = prepare(config)
        experiment.folder.mark("stopped")
        return experiment

    return prepared


@pytest.fixture(scope="session")
def num_cases(request):
    "How many random cases a property is shown on."
    return 200 if request.config.getoption("--slow") else 40
