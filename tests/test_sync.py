"""The package equals the notebooks, the notebooks are clean, and the chapters keep the rules of CONTRIBUTING.md."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "crackseg_nb"
NOTEBOOKS = [
    path
    for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)
]
GUIDES = "docs/guides"
CHAPTERS = [path for path in NOTEBOOKS if path.name[0].isdigit()]
EXPORT = re.compile(r"^#\s*\|\s*exports?i?\b", re.M)
DEFAULT_EXPORT = re.compile(r"^#\s*\|\s*default_exp\s+(\S+)", re.M)
MACHINE_PATH = re.compile(r"(?<![\w.+/-])(?:/(?:home|mnt|private|root|tmp|Users|var|work)/\w|[A-Z]:\\\w)")

# The parts of the house in reading order; a part imports from itself and from those above it only.
PARTS = (
    "core",
    "synthetic",
    "sources",
    "data",
    "models",
    "figures",
    "metrics",
    "training",
    "runs",
    "evidence",
    "inference",
    "measure",
    "studies",
)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: f"{path.parent.name}/{path.stem}")


def code_cells(path):
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]


def exported_sources(path):
    return [source for cell in code_cells(path) if EXPORT.search(source := "".join(cell["source"]))]


def module_of(path):
    "Return the name of the module that the chapter `path` exports, without the package's name."
    return next(
        (match[1] for cell in code_cells(path) if (match := DEFAULT_EXPORT.search("".join(cell["source"])))), None
    )


def place_of(path):
    "Return the place of a chapter in the reading order, (number of its part, number in the part)."
    return PARTS.index(path.parent.name), int(path.name.split("_", 1)[0])


def texts_of(path):
    "Yield every text of a notebook, cells and outputs; pictures left out."
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        yield "".join(cell["source"])
        for output in cell.get("outputs", []):
            yield from ("".join(output[key]) for key in ("text", "traceback") if key in output)
            yield from ("".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def files_below(root):
    "Map the notebooks and modules below `root` to their bytes; hidden folders such as checkpoints left out."
    notebooks = [*(root / "nbs").rglob("*.ipynb"), *(root / GUIDES).rglob("*.ipynb")]
    paths = [path.relative_to(root) for path in [*notebooks, *(root / PACKAGE).rglob("*.py")]]
    return {
        str(path): (root / path).read_bytes() for path in paths if not any(part.startswith(".") for part in path.parts)
    }


def run_nbdev(module, command, folder, **settings):
    done = subprocess.run(
        [sys.executable, "-c", f"from nbdev.{module} import {command}; {command}(**{settings})"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_cleaning_and_exporting_change_nothing(tmp_path):
    copy = tmp_path / "project"
    for name in ("nbs", GUIDES):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(".*"))
    for name in ("settings.ini", "README.md", "ruff.toml"):
        shutil.copy(ROOT / name, copy)
    # The package is exported from nothing, so that a module without a notebook shows as a difference. The public names
    # are written by hand: nbdev changes nothing but the version among them.
    (copy / PACKAGE).mkdir()
    shutil.copy(ROOT / PACKAGE / "__init__.py", copy / PACKAGE)
    subprocess.run([sys.executable, ROOT / ".ci" / "clean.py", *copy.rglob("*.ipynb")], check=True)
    run_nbdev("clean", "nbdev_clean", copy)
    run_nbdev("clean", "nbdev_clean", copy, fname=GUIDES)
    run_nbdev("doclinks", "nbdev_export", copy)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", PACKAGE], cwd=copy, check=True)
    committed, fresh = files_below(ROOT), files_below(copy)
    differing = sorted(name for name in committed.keys() | fresh.keys() if committed.get(name) != fresh.get(name))
    assert not differing, "run `make chapters`; a module without a notebook is to be deleted. Differing: " + ", ".join(
        differing
    )


def test_a_module_has_one_notebook():
    notebooks = defaultdict(list)
    for path in NOTEBOOKS:
        notebooks[module_of(path)].append(path.name)
    notebooks.pop(None, None)
    shared = {module: names for module, names in notebooks.items() if len(names) > 1}
    assert not shared, f"modules with more than one notebook: {shared}"
    packages = {module for module in notebooks if any(other.startswith(module + ".") for other in notebooks)}
    assert not packages, f"modules that are packages too: {packages}"


@every_chapter
def test_a_chapter_is_named_after_its_module(path):
    assert re.fullmatch(r"\d\d_[a-z_0-9]+", path.stem), (
        f"{path.name}: two digits, `_` and the module's name; no letters"
    )
    assert f"{path.parent.name}.{path.stem.split('_', 1)[1]}" == module_of(path)


def test_doors_and_parts():
    "What lies directly in nbs/ is run or is the home page; what exports lies in the folder of its part."
    folders = {path.parent.name for path in CHAPTERS}
    assert folders <= set(PARTS), f"folders that are no part: {folders - set(PARTS)}"
    exporting = [path.name for path in (ROOT / "nbs").glob("*.ipynb") if module_of(path)]
    assert not exporting, f"doors that export: {exporting}"
    places = [place_of(path) for path in CHAPTERS]
    assert len(set(places)) == len(places), "two chapters of a part share a number"


@every_chapter
def test_a_chapter_imports_earlier_chapters_only(path):
    places = {module_of(chapter): place_of(chapter) for chapter in CHAPTERS}
    for source in exported_sources(path):
        for module in imported_modules(source):
            assert module in places, f"{path.name} imports {PACKAGE}.{module}, which no chapter exports"
            assert places[module] < place_of(path), (
                f"{path.name} imports {PACKAGE}.{module}, which is no earlier chapter"
            )


def imported_modules(source):
    "Return the modules of the package, without its name, that a cell imports, in functions too."
    code = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            names += [f"{PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return {name.removeprefix(PACKAGE + ".") for name in names if name.startswith(PACKAGE + ".")}


@every_notebook
def test_a_notebook_names_no_path_of_a_machine(path):
    found = [
        text[max(match.start() - 30, 0) : match.end() + 30]
        for text in texts_of(path)
        for match in MACHINE_PATH.finditer(text)
    ]
    assert not found, f"{path.name}: {found}"


@every_notebook
def test_a_notebook_shows_no_failed_cell(path):
    errors = [
        output["ename"] for cell in code_cells(path) for output in cell["outputs"] if output["output_type"] == "error"
    ]
    assert not errors, f"{path.name}: {errors}"


def test_the_sidebar_holds_every_notebook_in_reading_order():
    "Doors first, then the parts: the index of a part, then its chapters by number."
    sections = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text("utf-8"))["website"]["sidebar"]["contents"]
    listed = [Path(entry) for section in sections for entry in section["contents"]]
    doors = {Path(path.name) for path in NOTEBOOKS if path.parent == ROOT / "nbs"}
    assert listed[0] == Path("index.ipynb") and set(listed[: len(doors)]) == doors
    chapters = [path.relative_to(ROOT / "nbs") for path in NOTEBOOKS if path.parent != ROOT / "nbs"]
    chapters.sort(key=lambda path: (PARTS.index(path.parent.name), path.stem != "index", path.name))
    assert listed[len(doors) :] == chapters
    assert [section["section"].lower() for section in sections[1:]] == list(dict.fromkeys(map(folder_of, chapters)))


def folder_of(path):
    return path.parent.name


@pytest.mark.parametrize("part", PARTS)
def test_the_index_of_a_part_leads_to_its_chapters(part):
    index = ROOT / "nbs" / part / "index.ipynb"
    linked = set(re.findall(r"\]\((\d\d_\w+\.ipynb)\)", "\n".join(texts_of(index))))
    assert linked == {path.name for path in CHAPTERS if path.parent == index.parent}


def test_the_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"\b(?:nbs|tests|docs|crackseg_nb|\.ci)/[\w/.]+\.(?:ipynb|py|yml|md)\b", text))
    invented = {"nbs/sources/NN_name.ipynb"}
    assert len(named) > 8 and not [name for name in named - invented if not (ROOT / name).exists()]


def test_readme_is_generated_from_the_index():
    if not (ROOT / "nbs" / "index.ipynb").exists():
        pytest.skip("nbs/index.ipynb does not exist")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "readme.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "README.md").read_text("utf-8") == done.stdout, "run `make readme`"


LINK = re.compile(r"""(?:\]\(|(?:src|href)=["'])(?![a-z]+:|[#/])([^)"'\s#]+)""")
TEXTS = [*ROOT.glob("*.md"), *(path for kind in ("md", "ipynb") for path in (ROOT / "docs").glob(f"*/*.{kind}"))]
TEXTS = [path for path in TEXTS if path.parent.name != "reference"]


@pytest.mark.parametrize("path", [*TEXTS, *NOTEBOOKS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_lead_to_files(path):
    "The site leaves out a link that leads nowhere, and so cannot tell of it."
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(
            "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"
        )
    targets = LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert not [target for target in targets if not (path.parent / target).exists()]


def test_readme_links_lead_to_files_that_are_kept():
    targets = LINK.findall((ROOT / "README.md").read_text("utf-8"))
    if not (ROOT / ".git").exists():
        return
    kept = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    )  # outputs/ is ignored
    assert not [
        target
        for target in targets
        if not any(name == target or name.startswith(target.rstrip("/") + "/") for name in kept)
    ]


@every_notebook
def test_the_first_markdown_cell_holds_title_and_blurb_alone(path):
    "The site takes title and description from this cell and drops whatever else stands in it."
    cells = json.loads(path.read_text("utf-8"))["cells"]
    first = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", first), (
        f"{path.name}: the first markdown cell is to hold `# title` and `> blurb`; found {first!r}"
    )


def test_types_hold():
    "What the signatures promise is kept, at the level that ty.toml sets."
    checked = subprocess.run(
        [sys.executable, "-m", "ty", "check", "--python", sys.prefix], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout[-3000:]


def test_layout_and_lint_find_nothing():
    "Notebooks, package and tests are laid out by `ruff format` and pass `ruff check`."
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, f"run `make format`:\n{done.stdout[-3000:]}{done.stderr[-1000:]}"
