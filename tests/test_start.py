"""What starts slowly is loaded where it is needed: files are read and written, and images drawn, without torch."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIGHT_PARTS = ("core", "synthetic", "sources")
SLOW = ("torch", "torchvision", "albumentations", "timm", "matplotlib", "pandas", "scipy", "skimage")
WITH_TENSORS = {"core/03_machine", "core/04_seeds", "core/06_tensors", "sources/02_images"}  # chapters of these parts
AT_MOST = 0.3  # seconds for the bare package

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for part in LIGHT_PARTS
    for path in (ROOT / "crackseg_nb" / part).glob("*.py")
    if path.name != "__init__.py"
)
CHAPTERS = sorted(path for part in LIGHT_PARTS for path in (ROOT / "nbs" / part).glob("[0-9]*.ipynb"))
REPORT = f"import sys; print(*(name for name in {SLOW} if name in sys.modules))"


def loaded_by(code):
    "Return which of SLOW a fresh interpreter has loaded after `code`."
    done = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def imports_in(path):
    "Return all import statements at the top level of a chapter's cells, demos included."
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    tree = ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.M))
    return "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))


def test_modules_load_nothing_that_starts_slowly():
    "One interpreter imports one after the other, so that the first to load something is the one that is named."
    code = f"""
import importlib, sys
for module in {MODULES}:
    importlib.import_module(module)
    slow = [name for name in {SLOW} if name in sys.modules]
    assert not slow, f"{{module}} loads {{slow}}"
"""
    assert len(MODULES) > 15
    assert loaded_by(code) == []


def test_chapters_without_tensors_load_no_torch():
    light = [path for path in CHAPTERS if f"{path.parent.name}/{path.stem}" not in WITH_TENSORS]
    assert len(light) == len(CHAPTERS) - len(WITH_TENSORS)
    assert not {"torch", "torchvision"} & {*loaded_by("\n".join(map(imports_in, light)))}


def test_the_package_itself_loads_at_once():
    "The seconds are those of the import alone, in the interpreter that does it: the machine may be busy."
    assert loaded_by("import crackseg_nb") == []
    code = "import time; start = time.process_time(); import crackseg_nb; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < AT_MOST


@pytest.mark.parametrize(("given", "found"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_large_tensors_ask_for_large_pages_unless_the_user_says_otherwise(given, found):
    code = "import os, crackseg_nb; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    own = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=own | given, capture_output=True, text=True)
    assert done.stdout.strip() == found


def test_models_load_without_the_compiler():
    "torch._dynamo takes seconds; timm and torchvision only ask it for two functions while they are loaded."
    code = """
import sys, crackseg_nb.models.registry, crackseg_nb.inference.models, crackseg_nb.training.weights
assert "torch._dynamo" not in sys.modules and "torchvision" in sys.modules and "timm" in sys.modules
"""
    loaded_by(code)


@pytest.mark.slow
def test_the_compiler_works_all_the_same():
    code = """
import sys, crackseg_nb.models.registry
import torch
from torchvision.ops import roi_align
pooled = roi_align(torch.ones(1, 1, 8, 8), [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], 2)
assert pooled.unique().tolist() == [1.0]
assert sys.modules["torchvision.ops.roi_align"].is_compile_supported("cpu")
import torch._dynamo.utils
assert torch._dynamo.utils.__file__
from timm.models.naflexvit import NaFlexRopeIterator
class Ended:
    _depth_idx = depth = 1
try:
    NaFlexRopeIterator.__next__(Ended())  # hidden from the compiler
except StopIteration:
    pass
def doubled(x):
    return 2 * x
assert torch.compile(doubled, backend="eager")(torch.ones(2)).tolist() == [2, 2]
"""
    loaded_by(code)


@pytest.mark.slow
def test_who_has_loaded_the_compiler_keeps_it():
    code = """
import sys, torch._dynamo, torch._dynamo.utils
before = sys.modules["torch._dynamo"], sys.modules["torch._dynamo.utils"]
import crackseg_nb.models.registry
assert before == (sys.modules["torch._dynamo"], sys.modules["torch._dynamo.utils"])
"""
    loaded_by(code)


def test_running_a_notebook_builds_no_grammar_of_addresses(tmp_path):
    "The optional check takes jsonschema two seconds; whoever wants it afterwards still gets it."
    (tmp_path / "rfc3987_syntax.py").write_text("print('loaded')\ndef is_valid_syntax(*_): ...\n")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from contextlib import suppress
from pathlib import Path
from crackseg_nb.runs.notebook import execute_notebook
with suppress(BaseException):
    execute_notebook(Path("no.ipynb"), Path({str(tmp_path)!r}) / "out.ipynb", dict(), None, 0)
assert "papermill" in sys.modules and "rfc3987_syntax" not in sys.modules
"""
    assert "loaded" not in loaded_by(code)


def test_full_collections_leave_alone_what_libraries_load():
    "By default there are a handful while torch and timm load; each looks at a million objects that stay."
    code = """
import gc
before = gc.get_stats()[2]["collections"]
import crackseg_nb.runs.experiment
print(gc.get_stats()[2]["collections"] - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1
