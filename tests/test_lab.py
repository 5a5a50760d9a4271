"""JupyterLab as `make lab` starts it: saving a notebook as it was opened leaves the file as it was."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from traitlets.config.loader import PyFileConfigLoader

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
