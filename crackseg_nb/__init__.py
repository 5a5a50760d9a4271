"""A reproducible study of crack and damage segmentation.

What most programs need is here, and loaded when it is first used; this file is written by hand, every other module
is exported from a notebook.
"""

import gc
import os
import sys
from functools import wraps
from importlib import import_module
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

# Large tensors get pages of 2 MiB, which cost the system less time than small ones; torch looks at this once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Photos of many sizes leave a GPU's memory in pieces that nothing fits into; segments that grow leave none.
if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# torch, timm and what comes with them are a million objects that stay. Each full collection looks at all of them, and
# by default there are several while they load: together a second. Young objects are collected as often as before.
_young, _middle, _full = gc.get_threshold()
if _full:
    gc.set_threshold(_young, _middle, max(_full, 1000))


class _TimmWithoutCompiler:
    """Loads timm, and torchvision with it, without torch._dynamo, which takes two to three seconds.

    Both only ask it for two functions while they are loaded: these load it when they are called.
    """

    def find_spec(self, name: str, path=None, target=None):
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and not {"torch._dynamo", "torchvision"} & {*sys.modules}:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda timm: _beside_stand_ins(load, timm)
        return spec


def _beside_stand_ins(load, timm: ModuleType) -> None:
    def disable(function, recursive=True, **settings):
        @wraps(function)
        def hidden(*args, **words):
            return import_module("torch._dynamo").disable(function, recursive, **settings)(*args, **words)

        return hidden

    def is_compile_supported(device_type):
        return import_module("torch._dynamo.utils").is_compile_supported(device_type)

    stand_ins = {name: ModuleType(name) for name in ("torch._dynamo", "torch._dynamo.utils")}
    stand_ins["torch._dynamo"].disable = disable
    stand_ins["torch._dynamo.utils"].is_compile_supported = is_compile_supported
    sys.modules.update(stand_ins)
    try:
        load(timm)
    finally:
        for name in stand_ins:
            del sys.modules[name]


sys.meta_path.insert(0, _TimmWithoutCompiler())

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
