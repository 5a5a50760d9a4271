"""Print the last line of text that an executed notebook shows."""

import sys

import nbformat

lines = []
for cell in nbformat.read(sys.argv[1], as_version=4).cells:
    for output in cell.get("outputs", []):
        lines += (output.get("text") or output.get("data", {}).get("text/plain", "")).rstrip().splitlines()
print(lines[-1] if lines else "")
