"""A reproducible study of crack and damage segmentation.

What most programs need is here, and loaded when it is first used; this file is written by hand, every other module
is exported from a notebook.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# Large tensors get pages of 2 MiB, which cost the system less time than small ones; torch looks at this once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.2.0"
__all__ = ["compare", "configure", "load_model", "measure_folder", "predict", "run"]

if TYPE_CHECKING:
    from .evidence.comparison import compare
    from .inference.prediction import predict
    from .measure.photos import measure_folder
    from .runs.config import configure
    from .runs.experiment import run
    from .runs.trained_model import load_model

_HOMES = {
    "compare": "evidence.comparison",
    "configure": "runs.config",
    "load_model": "runs.trained_model",
    "measure_folder": "measure.photos",
    "predict": "inference.prediction",
    "run": "runs.experiment",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
