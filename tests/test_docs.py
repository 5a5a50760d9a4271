"""The documentation can be built: every exported object shows its signature and words, every method its signature."""

import importlib
import inspect
from pathlib import Path

import pytest
from nbdev.showdoc import show_doc

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "crackseg_nb").rglob("*.py")
    if not path.name.startswith("_")
)


def exported(module):
    "Yield what a module exports, and the public methods of its classes, by name."
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value):
            continue
        yield name, value
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if not method.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{method}", function


@pytest.mark.parametrize("part", sorted({module.split(".")[1] for module in MODULES}))
def test_show_doc_works_on_every_exported_object(part):
    modules = [importlib.import_module(module) for module in MODULES if module.split(".")[1] == part]
    objects = [(f"{module.__name__}.{name}", value) for module in modules for name, value in exported(module)]
    assert objects
    failed = {}
    for name, value in objects:
        try:
            shown = str(show_doc(value)) if name.count(".") == 3 else str(inspect.signature(value, eval_str=True))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
        else:
            assert shown
    assert not failed
