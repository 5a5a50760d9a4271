"""How often files are opened for reading, by this process and by those that it starts."""

import os
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

HOOK = """
import os, sys
sys.path.insert(0, {tests!r})
from opens import watch
watch({folder!r}, {notes!r})
"""
watched = {}  # folder -> folder of notes
hooks = []  # an audit hook cannot be removed


def note(event, args):
    if event != "open" or not isinstance(args[0], (str, os.PathLike)) or set(args[1] or "r") & set("wax"):
        return
    for folder, notes in watched.items():
        if str(args[0]).startswith(folder):
            with open(os.path.join(notes, str(os.getpid())), "a") as handle:
                handle.write(f"{args[0]}\n")


def watch(folder, notes):
    "Write the name of each file below `folder` that this process opens to read into a file of `notes`."
    if not hooks:
        hooks.append(sys.addaudithook(note))
    watched[folder] = notes


@contextmanager
def counted_opens(folder, place, monkeypatch):
    "Yield a counter that holds, at the end, how often each file below `folder` was opened."
    opened, notes = Counter(), place / "notes"
    (place / "hook").mkdir(parents=True)
    notes.mkdir()
    # Each Python imports the `sitecustomize` it finds: workers and the processes of several devices are watched.
    (place / "hook/sitecustomize.py").write_text(
        HOOK.format(tests=str(Path(__file__).parent), folder=str(folder), notes=str(notes))
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place / "hook"), prepend=os.pathsep)
        watch(str(folder), str(notes))
        try:
            yield opened
        finally:
            del watched[str(folder)]
    opened.update(line for file in notes.iterdir() for line in file.read_text().splitlines())
