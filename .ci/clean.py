"""Take progress bars out of notebooks: widgets show nothing without a kernel, and text has a line for each state.

nbdev_clean leaves them. `python .ci/clean.py` cleans the notebooks of the project, or those that are named.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def is_bar(output: dict) -> bool:
    "Return whether an output is a progress bar."
    widget = any("widget" in kind for kind in output.get("data", {}))
    return widget or (output.get("name") == "stderr" and "\r" in "".join(output.get("text", "")))


def take_out_bars(notebook: dict) -> None:
    "Take the progress bars out of a notebook."
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if not is_bar(output)]


def clean(path: Path) -> None:
    "Write a notebook without progress bars, if it has any."
    notebook = json.loads(path.read_text("utf-8"))
    before = json.dumps(notebook)
    take_out_bars(notebook)
    if json.dumps(notebook) != before:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    named = [Path(name) for name in sys.argv[1:]]
    for path in named or [*(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "docs").rglob("*.ipynb")]:
        clean(path)
