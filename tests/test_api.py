"""The public API: ten lines of documentation that run, names that are loaded late, and nothing half exported."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import crackseg_nb

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")


def documented():
    "Return the Python program in the home page that uses the public API."
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    [program] = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "from crackseg_nb import" in block
    ]
    return program


def test_the_documented_lines_run_an_experiment_and_read_its_results(tmp_path, monkeypatch, capsys):
    program = documented()
    assert len(program.splitlines()) <= 12
    monkeypatch.chdir(tmp_path)  # where outputs/ goes
    monkeypatch.setattr(crackseg_nb, "configure", small, raising=False)
    names = {}
    exec(program, names)
    assert names["first"].folder.state == "done" and names["first"].folder.path.is_relative_to(tmp_path)
    learned = names["first"].trained.model.state_dict()
    assert all(torch.equal(value, learned[name]) for name, value in names["model"].state_dict().items())
    printed = capsys.readouterr().out
    assert "'iou'" in printed and "pooled F1: " in printed


def small(**parameters):
    "Configure as documented, with fewer and smaller images and a small model, into the working directory."
    from crackseg_nb.runs.config import configure

    tiny = dict(model="unet", encoder="test_resnet", synthetic_images=24, image_size=32, batch_size=4, epochs=1)
    return configure(**parameters | tiny | dict(outputs="outputs", device="cpu", amp="off"))


def test_every_public_name_is_found_where_it_lives():
    for name in crackseg_nb.__all__:
        assert getattr(crackseg_nb, name).__module__ == f"crackseg_nb.{crackseg_nb._HOMES[name]}"
        assert name in dir(crackseg_nb)
    with pytest.raises(AttributeError, match="has no attribute 'configur'"):
        crackseg_nb.configur  # noqa: B018


def test_the_names_are_loaded_late():
    code = "import sys, crackseg_nb; dir(crackseg_nb); print(sorted({'torch', 'pandas', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
