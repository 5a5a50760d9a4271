"""What a release brings: the doors and the types' marker in the package, and a wheel that works without a checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import crackseg_nb

ROOT = Path(__file__).resolve().parents[1]
PLACES = """
from crackseg_nb.core.files import door, outputs_folder, project_root
from crackseg_nb.core.machine import git_state
print(project_root(), door("run_experiment.ipynb"), outputs_folder(), git_state(), sep="\\n")
"""


def doors():
    "Return the names of the notebooks that are run as they stand."
    names = {path.name for path in (ROOT / "nbs").glob("*.ipynb") if not path.name[0].isdigit()}
    return names - {"index.ipynb"}


def run(*words, **settings):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The package as a wheel holds it."
    folder = tmp_path_factory.mktemp("built")
    run("setup.py", "-q", "build_py", "--build-lib", folder, cwd=ROOT)
    return folder


def test_a_wheel_holds_the_modules_the_doors_and_the_marker_of_types(built):
    found = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "crackseg_nb").rglob("*.py")}
    assert "run_experiment.ipynb" in doors()
    others = {"crackseg_nb/py.typed", "crackseg_nb/figures/crackseg.mplstyle"}
    others |= {str(path.relative_to(ROOT)) for path in (ROOT / "crackseg_nb" / "ready").rglob("*") if path.is_file()}
    assert found == modules | {f"crackseg_nb/doors/{name}" for name in doors()} | others


def test_an_installed_package_finds_its_doors_and_writes_into_the_working_directory(built, tmp_path):
    "The repository of the working directory is not that of the package."
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b.invalid", "commit", "-q", "--allow-empty", "-m", "other"],
        cwd=tmp_path,
        check=True,
    )
    printed = run("-c", PLACES, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(built)}).splitlines()
    door = built / "crackseg_nb" / "doors" / "run_experiment.ipynb"
    assert printed == ["None", str(door), str(tmp_path / "outputs"), "{}"]


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    settings = (ROOT / "settings.ini").read_text("utf-8").splitlines()
    assert f"version = {citation['version']}" in settings and citation["version"] == crackseg_nb.__version__
    assert citation["version"] in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.slow
def test_the_wheel_of_an_sdist_works_in_an_empty_environment(tmp_path):
    left_out = {".git", ".venv", "outputs", "data", "build", "dist"}
    shutil.copytree(
        ROOT,
        tmp_path / "project",
        ignore=lambda folder, names: left_out.intersection(names) if Path(folder) == ROOT else ["__pycache__"],
    )
    run("-m", "build", "--no-isolation", cwd=tmp_path / "project")
    (wheel,) = (tmp_path / "project" / "dist").glob("*.whl")
    printed = run(ROOT / ".ci" / "try_wheel.py", wheel, cwd=tmp_path)
    assert printed.count(": works") == 3 and ": done" in printed, printed
