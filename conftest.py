"""What every test run needs: an offline environment, the markers, the order of the files, and nbval's chapters."""

import ast
import gc
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from queue import Empty

import pytest

ROOT = Path(__file__).resolve().parent
PACKAGE = "crackseg_nb"
# The kernels that execute the chapters inherit these. One thread each: two kernels share the cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "TQDM_DISABLE": "1"}
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
# Compiled modules are kept, also where the machine would not: some hundred processes would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests" / "light"), os.environ.get("PYTHONPATH")]))
# The longest first, by measured seconds: begun last, they would keep one worker busy while the other waits.
LONGEST = [
    "test_run.py",
    "test_sweep.py",
    "test_parallel.py",
    "test_dataset.py",
    "test_faults.py",
    "test_encoders.py",
    "test_devices.py",
    "test_classifier_run.py",
    "test_transfer.py",
    "test_inference.py",
    "test_small_models.py",
    "test_evidence.py",
    "test_experiment.py",
    "test_losses.py",
    "test_verify.py",
    "test_swin_classifier.py",
    "test_compression.py",
    "test_resume.py",
    "test_sync.py",
    "test_explain.py",
]

MARKERS = {
    "slow": "runs with --slow alone (make test-all): it takes long, or a quicker test watches over the same",
    "few(n)": "the first n cases run always, the others with --slow (make test-all)",
    "real_data": "reads the real photos; CRACKSEG_DATA names their folder",
    "gpu": "needs CUDA",
    "mount": "mounts a file system of two MiB on a temporary folder, as root; leave it out with -m 'not mount'",
    "slurm": "needs SLURM (sbatch)",
    "browser": "needs a Chromium",
}


# Temporary files of kernels and other child processes: what chapters leave behind would fill a disk.
TEMPORARY = Path(tempfile.mkdtemp(prefix="nb-"))  # short: the paths of sockets have a limit
os.environ["TMPDIR"] = str(TEMPORARY)


def pytest_unconfigure():
    shutil.rmtree(TEMPORARY, ignore_errors=True)


def is_cell(item):
    return type(item).__name__ == "IPyNbCell"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    "Empty the folder of temporary files after each chapter, once its kernel is gone."
    result = yield
    if is_cell(item) and (nextitem is None or nextitem.parent is not item.parent):
        for path in filter(Path.is_dir, TEMPORARY.iterdir()):  # the kernels' socket stays
            shutil.rmtree(path, ignore_errors=True)
    return result


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests and all random cases, too, in new kernels")
    parser.addoption("--all-chapters", action="store_true", help="run unchanged chapters too; where CI is set they run")


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.option.loadscopereorder = False  # xdist would begin with the files of the most tests, not with the longest
    if not config.getoption("--slow"):
        sys.path.insert(0, str(ROOT / "tests"))
        from kernels import fork_kernels

        fork_kernels(TEMPORARY)


def pytest_collection_finish(session):
    "Let garbage collections pass over the million objects that imports and collection left; each would take a second."
    gc.collect()
    gc.freeze()


SLOW_CELL = "# slow: only make test-all runs this cell"


def prepare_cell(item):
    "Make nbval compare the outputs of a cleaned notebook, and leave out what nbdev does not evaluate, and slow cells."
    lines = [line.replace(" ", "") for line in item.cell.source.splitlines()]
    if "#|eval:false" in lines or (SLOW_CELL.replace(" ", "") in lines and not item.config.getoption("--slow")):
        item.options["skip"] = True
    # Cleaning empties the count, which nbval takes for "never executed": it would compare nothing.
    if item.cell.outputs or item.options["check"]:
        item.cell.execution_count = 1


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    cells = [item for item in items if is_cell(item)]
    for cell in cells:
        prepare_cell(cell)
    skip_unchanged(cells, config)
    cases = Counter()
    for item in items:
        if few := item.get_closest_marker("few"):
            cases[item.nodeid.partition("[")[0]] += 1
            if cases[item.nodeid.partition("[")[0]] > few.args[0]:
                item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: make test-all"))


# A chapter that passed is skipped until something changes that it depends on. Its checksum lies in pytest's cache.


def code_of(path):
    "Return a notebook's code cells, or a module's text, as a list of strings."
    if path.suffix == ".py":
        return [path.read_text("utf-8")]
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def stored_outputs(path):
    "Return the stored outputs of a notebook without the pictures, which are not compared."
    outputs = [output for cell in json.loads(path.read_text("utf-8"))["cells"] for output in cell.get("outputs", [])]
    for output in outputs:
        output["data"] = {kind: value for kind, value in output.get("data", {}).items() if "image/" not in kind}
    return outputs


@cache
def imports_of(code, package):
    "Return the modules that `code` may import, in functions too; relative names belong to `package`."
    tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", code, flags=re.M))
    names = re.findall(rf"\b{PACKAGE}(?:\.\w+)+", code)  # the code of other processes, too, which stands in strings
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]  # a name may be a module
    return names


@cache
def named_files(path, root, changed):
    "Return the modules and run notebooks that a file names; `changed` is the time of its last change."
    run_notebooks = [other for other in (root / "nbs").rglob("*.ipynb") if not other.name[0].isdigit()]
    package = ".".join(path.relative_to(root).parent.parts) if path.suffix == ".py" else ""
    found, modules = set(), set()
    for code in code_of(path):
        found |= {other for other in run_notebooks if other.name in code}
        modules |= {name for name in imports_of(code, package) if name.split(".")[0] == PACKAGE}
    for name in modules:
        parts = name.split(".")
        places = [root.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
        files = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
        found |= {file for file in files if file.is_file()}
    return found


def dependencies(notebook, root=ROOT):
    "Return the notebook, all modules that it imports, directly or not, and the notebooks that any of them names."
    found, queue = set(), [notebook]
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            queue += named_files(path, root, path.stat().st_mtime_ns)
    return sorted(found)


def checksum_of_chapter(notebook, root=ROOT):
    "Return a checksum of all that decides whether the chapter passes; None if a cell cannot be read as Python."
    try:
        paths = dependencies(notebook, root)
    except SyntaxError:
        return None
    parts = [platform.python_version(), stored_outputs(notebook)]
    parts += [[path.relative_to(root).as_posix(), code_of(path)] for path in paths]
    parts += [(root / name).read_text("utf-8") for name in ("constraints.txt", "conftest.py")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def record_of(notebook, config):
    "Return the path of the file that holds the checksum with which a chapter passed; None without pytest's cache."
    cache = getattr(config, "cache", None)
    return cache and cache.mkdir("chapters") / notebook.relative_to(ROOT).as_posix().replace("/", "-")


CHECKSUMS, PASSED = {}, {}  # of each notebook: its checksum when tests were collected, and how many cells passed


def skip_unchanged(cells, config):
    "Note the checksums of the chapters of `cells`, and skip those that passed with the same."
    if os.environ.get("CI"):  # nothing is skipped there, and what passed is not remembered
        return
    for notebook in {cell.path for cell in cells}:
        CHECKSUMS[notebook] = checksum_of_chapter(notebook)
    if config.getoption("--all-chapters"):
        return
    for cell in cells:
        record = record_of(cell.path, config)
        if record and record.is_file() and record.read_text() == CHECKSUMS[cell.path]:
            cell.add_marker(pytest.mark.skip(reason="unchanged since it passed; --all-chapters runs it"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if is_cell(item):
        left_out = report.skipped and item.options["skip"]
        if report.failed and (record := record_of(item.path, item.config)):
            record.unlink(missing_ok=True)
        elif call.when == "call" and (report.passed or left_out):
            PASSED[item.path] = PASSED.get(item.path, 0) + 1
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    "After a notebook's last cell, if all have passed, keep the checksum that they passed with."
    result = yield
    if is_cell(item) and PASSED.get(item.path) == len(code_of(item.path)):
        record, checksum = record_of(item.path, item.config), CHECKSUMS.get(item.path)
        if record and checksum:
            new = record.with_name(f"{record.name}.{os.getpid()}")
            new.write_text(checksum)
            new.replace(record)
    return result


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


def let_kernels_end():
    "Let a kernel end by itself while coverage is measured: nbval kills it, and a killed process saves nothing."
    from nbval.kernel import RunningKernel

    def stop(self):
        self.kc.stop_channels()
        self.km.shutdown_kernel(now=False)
        del self.km

    RunningKernel.stop = stop


if "COVERAGE_PROCESS_CONFIG" in os.environ:
    let_kernels_end()
