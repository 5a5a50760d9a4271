"""What every test run needs: an offline environment, the markers, and nbval's chapters."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from queue import Empty

import pytest

# The kernels that execute the chapters inherit these. One thread each: two kernels share the cores.
for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}.items():
    os.environ.setdefault(name, value)

MARKERS = {
    "slow": "takes minutes; runs with --slow (make test-all)",
    "real_data": "reads the real photos; CRACKSEG_DATA names their folder",
    "gpu": "needs CUDA",
    "slurm": "needs SLURM (sbatch)",
    "browser": "needs a Chromium",
}


# Where kernels and other child processes keep their temporary files: what chapters leave behind, checkpoints among it, would fill a disk.
TEMPORARY = Path(tempfile.mkdtemp(prefix="nb-"))  # short: the paths of sockets have a limit
os.environ["TMPDIR"] = str(TEMPORARY)


def pytest_unconfigure():
    shutil.rmtree(TEMPORARY, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    "Empty the folder of temporary files after each chapter, once its kernel is gone."
    result = yield
    if type(item).__name__ == "IPyNbCell" and (nextitem is None or nextitem.parent is not item.parent):
        for path in TEMPORARY.iterdir():
            shutil.rmtree(path, ignore_errors=True)
    return result


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def prepare_cell(item):
    "Make nbval compare the outputs of a cleaned notebook, and leave out the cells that nbdev does not evaluate."
    lines = [line.replace(" ", "") for line in item.cell.source.splitlines()]
    if "#|eval:false" in lines:
        item.options["skip"] = True
    # Cleaning empties the count, which nbval takes for "never executed": it would compare nothing.
    if item.cell.outputs or item.options["check"]:
        item.cell.execution_count = 1


def pytest_collection_modifyitems(config, items):
    for item in items:
        if type(item).__name__ == "IPyNbCell":
            prepare_cell(item)
        elif item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: make test-all"))


def notice_dead_kernels():
    "Fail a cell as soon as its kernel has died; nbval by itself waits for the whole cell timeout."
    from nbval.kernel import RunningKernel

    wait = RunningKernel.await_reply

    def await_reply(self, msg_id, timeout=None):
        deadline = time.monotonic() + (timeout or float("inf"))
        while True:
            try:
                return wait(self, msg_id, timeout=min(2, max(deadline - time.monotonic(), 0)))
            except Empty:
                if not self.is_alive():
                    raise RuntimeError("the kernel died while it executed this cell") from None
                if time.monotonic() >= deadline:
                    raise

    RunningKernel.await_reply = await_reply


notice_dead_kernels()
