"""JupyterLab as `make lab` starts it: it opens the index, and cleans what it saves, so that git stays clean.

JupyterLab writes the kernel's versions, counts of executions and widgets into each notebook that it saves.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".ci"))

from clean import take_out_bars  # noqa: E402
from nbdev.clean import clean_nb  # noqa: E402
from nbdev.config import get_config  # noqa: E402


def clean_before_saving(model, **place):
    "Clean a notebook of the project as `make clean-nbs` does; outputs stay."
    if model["type"] != "notebook" or model["content"]["nbformat"] != 4:
        return
    settings = get_config(path=ROOT)
    keys = [settings.get(f"allowed_{kind}metadata_keys").split() for kind in ("", "cell_")]
    take_out_bars(model["content"])
    clean_nb(model["content"], settings.clear_all, *keys, settings.clean_ids)


c.LabApp.default_url = "/lab/tree/nbs/index.ipynb"  # noqa: F821
c.ContentsManager.pre_save_hook = clean_before_saving  # noqa: F821
