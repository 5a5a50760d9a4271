"""Unchanged chapters are skipped: the checksum that decides it, and the skipping; the order of the files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    "__init__": "",
    "core": "ONE = 1\n",
    "far": "from .core import ONE\n",
    "near": "def one():\n    from crackseg_nb.far import ONE\n\n    return ONE\n",
    "parts/__init__": "",
    "parts/inner": "from .. import core\n",
    "other": "",
}


@pytest.fixture
def plugin(pytestconfig):
    "The conftest.py of the project."
    return pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py"))


@pytest.fixture
def checksum_of(plugin):
    return plugin.checksum_of_chapter


@pytest.fixture
def project(tmp_path):
    "A project with a chapter that imports `near`, which imports `far`, which imports `core`."
    for name, source in MODULES.items():
        path = tmp_path / "crackseg_nb" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    shutil.copy(ROOT / "conftest.py", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "kernels.py", tmp_path / "tests")
    (tmp_path / "constraints.txt").write_text("torch==2\n")
    (tmp_path / "nbs" / "training").mkdir(parents=True)
    write_chapter(tmp_path, "from crackseg_nb.near import one\n\none()")
    write_notebook(tmp_path / "nbs" / "run.ipynb", "import crackseg_nb.other")
    return tmp_path


def write_notebook(path, code, output="1"):
    result = nbformat.v4.new_output("execute_result", {"text/plain": output, "image/png": "aGk="}, execution_count=1)
    cells = [nbformat.v4.new_markdown_cell("# Words"), nbformat.v4.new_code_cell(code, outputs=[result], id="a")]
    cells[0]["id"] = "b"
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def write_chapter(project, *content):
    write_notebook(project / "nbs" / "training" / "01_chapter.ipynb", *content)


CHANGES = {
    "a cell": lambda project: write_chapter(project, "from crackseg_nb.near import one\n\none() + 1"),
    "a stored output": lambda project: write_chapter(project, "from crackseg_nb.near import one\n\none()", "2"),
    "an import": lambda project: (project / "crackseg_nb" / "near.py").write_text("def one():\n    return 1\n"),
    "an import of an import": lambda project: (project / "crackseg_nb" / "far.py").write_text("ONE = 2\n"),
    "an import of that": lambda project: (project / "crackseg_nb" / "core.py").write_text("ONE = 2\n"),
    "the package": lambda project: (project / "crackseg_nb" / "__init__.py").write_text("VERSION = 1\n"),
    "a pin": lambda project: (project / "constraints.txt").write_text("torch==3\n"),
    "the settings of the tests": lambda project: (project / "conftest.py").write_text(""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_may_matter_changes_the_checksum(project, checksum_of, change):
    chapter = project / "nbs" / "training" / "01_chapter.ipynb"
    before = checksum_of(chapter, project)
    assert before and checksum_of(chapter, project) == before
    CHANGES[change](project)
    assert checksum_of(chapter, project) != before


def test_a_change_elsewhere_does_not(project, checksum_of):
    chapter = project / "nbs" / "training" / "01_chapter.ipynb"
    before = checksum_of(chapter, project)
    (project / "crackseg_nb" / "other.py").write_text("changed = True")
    (project / "nbs" / "run.ipynb").unlink()
    notebook = json.loads(chapter.read_text("utf-8"))
    notebook["cells"][0]["source"] = "# Other words"
    notebook["cells"][1]["outputs"][0]["data"]["image/png"] = "aG8="
    chapter.write_text(json.dumps(notebook))
    assert checksum_of(chapter, project) == before


@pytest.mark.parametrize(
    "code, module",
    [
        ("import crackseg_nb.parts.inner", "core"),
        ("from crackseg_nb.parts import inner", "core"),
        ("from crackseg_nb import other", "other"),
        ("program = 'import crackseg_nb.other'", "other"),
        ("%matplotlib inline\nexecute('nbs/run.ipynb')", "other"),
    ],
)
def test_imports_are_found_in_every_form(project, checksum_of, code, module):
    chapter = project / "nbs" / "training" / "01_chapter.ipynb"
    write_chapter(project, code)
    before = checksum_of(chapter, project)
    (project / "crackseg_nb" / f"{module}.py").write_text("changed = True")
    assert checksum_of(chapter, project) != before


def test_a_chapter_that_cannot_be_read_is_never_skipped(project, checksum_of):
    write_chapter(project, "%%bash\nls -l | wc -l; echo done")
    assert checksum_of(project / "nbs" / "training" / "01_chapter.ipynb", project) is None


@pytest.mark.slow
def test_a_chapter_is_skipped_until_it_changes(project):
    def outcome(*options):
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-c", os.devnull, f"--rootdir={project}", "--nbval-lax"]
        clean = {name: value for name, value in os.environ.items() if name != "CI" and "PYTEST" not in name}
        done = subprocess.run(
            [*command, "--nbval-current-env", *options, "nbs/training/01_chapter.ipynb"],
            cwd=project,
            env={**clean, "PYTHONPATH": os.pathsep.join([str(project), clean["PYTHONPATH"]])},
            capture_output=True,
            text=True,
        )
        return done.stdout

    assert "1 passed" in outcome("--all-chapters")
    again = outcome()
    assert "1 skipped" in again and "unchanged since it passed" in again
    (project / "crackseg_nb" / "far.py").write_text("raise ValueError('broken')\n")
    assert "1 failed" in outcome()
    assert not list((project / ".pytest_cache" / "d" / "chapters").iterdir())  # nor is it skipped once it is as before


@pytest.mark.parametrize("option, environment, skipped", [(False, "", True), (True, "", False), (False, "true", False)])
def test_all_chapters_run_where_they_are_asked_for(plugin, project, monkeypatch, option, environment, skipped):
    monkeypatch.setenv("CI", environment)
    chapter, marks = project / "nbs" / "training" / "01_chapter.ipynb", []
    monkeypatch.setattr(plugin, "ROOT", project)
    monkeypatch.setattr(plugin, "checksum_of_chapter", lambda path: "same")
    config = SimpleNamespace(cache=SimpleNamespace(mkdir=lambda name: project), getoption=lambda name: option)
    plugin.record_of(chapter, config).write_text("same")
    plugin.skip_unchanged([SimpleNamespace(path=chapter, add_marker=marks.append)], config)
    assert [mark.name for mark in marks] == ["skip"] * skipped


def test_the_longest_files_exist(plugin):
    assert [name for name in plugin.LONGEST if not (ROOT / "tests" / name).is_file()] == []
