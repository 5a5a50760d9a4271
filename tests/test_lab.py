"""JupyterLab as `make lab` starts it: saving a notebook as it was opened leaves the file as it was."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from slurm_cluster import wait_for
from traitlets.config.loader import PyFileConfigLoader

from crackseg_nb.core.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
HOOKS = ROOT / ".ci" / "lab" / "jupyter_server_config.py"
BAR = {"output_type": "stream", "name": "stderr", "text": ["epoch 1:   0%|\r", "epoch 1: 100%|\r"]}


def save_in_lab(path, change):
    "Open a notebook, change it as JupyterLab does by itself and with `change`, and save it."
    manager = AsyncLargeFileManager(root_dir=str(path.parent), config=PyFileConfigLoader(str(HOOKS)).load_config())

    async def save():
        content = json.loads(json.dumps((await manager.get(path.name))["content"]))
        content["metadata"] |= {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "version": "3.12.1"},
            "widgets": {"application/vnd.jupyter.widget-state+json": {}},
        }
        for number, cell in enumerate(content["cells"]):
            cell["metadata"] |= {"trusted": True, "scrolled": True}
            if cell["cell_type"] == "code":
                cell["execution_count"] = number
            for output in cell.get("outputs", []):
                output |= {"execution_count": number} if "execution_count" in output else {}
        change(content)
        await manager.save({"type": "notebook", "format": "json", "content": content}, path.name)

    asyncio.run(save())


@pytest.fixture(autouse=True)
def own_files(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path_factory.mktemp("data")))  # where it notes what it trusts


@pytest.mark.parametrize("name", ["run_experiment.ipynb", "index.ipynb", "training/02_losses.ipynb"])
def test_what_is_only_opened_and_saved_stays_as_it_is(tmp_path, name):
    path = tmp_path / Path(name).name
    shutil.copy(ROOT / "nbs" / name, path)

    def executed(content):
        code = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
        code["outputs"] = [BAR, *code["outputs"]]

    save_in_lab(path, executed)
    assert path.read_bytes() == (ROOT / "nbs" / name).read_bytes()


def test_edits_and_outputs_are_saved(tmp_path):
    path = tmp_path / "run_experiment.ipynb"
    shutil.copy(ROOT / "nbs" / path.name, path)
    output = {"output_type": "stream", "name": "stdout", "text": ["epoch 1/1\n"]}

    def edited(content):
        content["cells"][0]["source"] = "# Mine"
        code = next(cell for cell in content["cells"] if cell["cell_type"] == "code")
        code["outputs"] = [output]

    save_in_lab(path, edited)
    saved = json.loads(path.read_text("utf-8"))
    assert saved["cells"][0]["source"] == ["# Mine"] and saved["cells"][2]["metadata"] == {"tags": ["parameters"]}
    assert next(cell for cell in saved["cells"] if cell["cell_type"] == "code")["outputs"] == [output]


# JupyterLab in a browser

TINY = """
data, synthetic_images, image_size, epochs, batch_size = "synthetic", 24, 32, 12, 4
model, encoder, pretrained, device, amp = "deeplab_optimized", None, False, "cpu", "off"
outputs, run_name = {outputs!r}, "lab"
"""
CELLS = """() => {
  const cells = jupyterapp.shell.currentWidget.content.model.cells;
  return Array.from({length: cells.length}, (_, number) => cells.get(number).toJSON());
}"""
RUN_CELL = """async number => {
  jupyterapp.shell.currentWidget.content.activeCellIndex = number;
  await jupyterapp.commands.execute("notebook:run-cell");
}"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the notebooks; in that of a run the parameters ask for a minute of training."
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "nbs", folder / "nbs")
    path = folder / "nbs" / "run_experiment.ipynb"
    notebook = nbformat.read(path, 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += TINY.format(outputs=str(folder / "outputs"))
    nbformat.write(notebook, path)
    return folder


@pytest.fixture(scope="module")
def lab(project):
    "The address of JupyterLab on the copy, with the settings of `make lab`."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = {f"JUPYTERLAB_{name}_DIR": str(project / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    settings = dict(port=port, port_retries=0, root_dir=project, disable_check_xsrf=True)
    server = subprocess.Popen(
        [*command, "--IdentityProvider.token=", *(f"--ServerApp.{name}={value}" for name, value in settings.items())],
        cwd=project,
        env={**os.environ, **folders, "JUPYTER_CONFIG_PATH": str(HOOKS.parent), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"

    def answers():
        with suppress(OSError):
            return urllib.request.urlopen(f"{address}/api", timeout=5)

    wait_for(answers, "JupyterLab", 60)
    yield address
    server.terminate()
    server.wait(30)


@pytest.fixture
def opened(lab, browser):
    "Return a function that opens a notebook and returns the page, once a kernel is ready."
    context = browser.new_context(viewport=dict(width=1400, height=900))

    def open_notebook(name):
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(f"{lab}/lab/tree/nbs/{name}?reset")
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.context?.isReady")
        page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'")
        return page

    yield open_notebook
    context.close()


def errors_in(cells):
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return ["\n".join(output["traceback"]) for output in outputs if output["output_type"] == "error"]


@pytest.mark.slow
@pytest.mark.browser
def test_the_index_is_what_one_sees_first(lab, browser):
    page = browser.new_page()
    page.goto(lab)
    page.wait_for_function(
        "window.jupyterapp?.shell.currentWidget?.context?.path === 'nbs/index.ipynb'", timeout=120_000
    )
    page.close()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("name", ["index", "core/01_checks", "metrics/02_counts", "training/03_optim"])
def test_a_chapter_runs_in_jupyterlab(opened, project, name):
    page = opened(f"{name}.ipynb")
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    cells = page.evaluate(CELLS)
    assert not errors_in(cells)
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]))
    page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    assert not re.search(r'"execution_count": \d', (project / "nbs" / f"{name}.ipynb").read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.browser
def test_a_run_in_jupyterlab_shows_its_curves_is_interrupted_and_goes_on(opened, project):
    page, folder = opened("run_experiment.ipynb"), RunFolder(project / "outputs" / "lab")
    cells = page.evaluate(CELLS)
    training = next(number for number, cell in enumerate(cells) if "experiment.train(" in "".join(cell["source"]))
    for number in range(training):
        page.evaluate(RUN_CELL, number)
    assert not errors_in(page.evaluate(CELLS))
    page.evaluate(f"void ({RUN_CELL})({training})")

    def drawn():
        return [output for output in page.evaluate(CELLS)[training]["outputs"] if "image/png" in output.get("data", {})]

    wait_for(drawn, "the live curves", 120)
    page.locator(".jp-Notebook .jp-RenderedImage img").last.wait_for()
    page.evaluate("jupyterapp.commands.execute('notebook:interrupt-kernel')")
    wait_for(lambda: errors_in(page.evaluate(CELLS)), "the message", 120)
    (message,) = errors_in(page.evaluate(CELLS))
    assert folder.state == "stopped"
    assert message.startswith("Stopped: stopped in epoch") and message.endswith("run the cell with train() again")
    done = len(pd.read_csv(folder / "history.csv"))
    assert done < 12

    page.evaluate(RUN_CELL, training)
    history = pd.read_csv(folder / "history.csv")
    assert not errors_in(page.evaluate(CELLS)) and history["epoch"].tolist() == list(range(1, 13))

    page.evaluate(RUN_CELL, training)  # once more: nothing is trained, and nothing is lost
    (refusal,) = errors_in(page.evaluate(CELLS))
    assert "expected test(), or a new Experiment to begin anew" in refusal
    assert pd.read_csv(folder / "history.csv").equals(history)
    for number in range(training + 1, len(cells)):
        page.evaluate(RUN_CELL, number)
    assert errors_in(page.evaluate(CELLS)) == [refusal] and folder.state == "done"
