"""Print README.md, generated from nbs/index.ipynb.

Relative links of the notebook start at its folder, those of the README at the project's root, so they are rewritten.
A picture has to be a file that a markdown cell shows: the output of a cell has no place in a README.
"""

import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

INDEX = Path(__file__).resolve().parents[1] / "nbs" / "index.ipynb"
FENCED = re.compile(r"(^```.*?^```)", re.M | re.S)
FRONTMATTER = re.compile(r"\A---\n.*?^---\n", re.M | re.S)
HIDDEN = re.compile(r"^#\s*\|\s*(hide|include:\s*false)\s*$", re.M)
NO_ECHO = re.compile(r"^#\s*\|\s*echo:\s*false\s*$", re.M)
DIRECTIVE = re.compile(r"^(#\s*\|.*|# NBVAL_\w+)\n?", re.M)
LINK = re.compile(r"""(\]\(|(?:src|href)=["'])(?![a-z]+:|[#/])([^)"'\s]+)""")


def rewrite_links(text: str) -> str:
    "Make the relative links of a markdown `text` start at the project's root; fenced code stays as it is."

    def from_root(match):
        return match[1] + posixpath.normpath(posixpath.join(INDEX.parent.name, match[2]))

    parts = FENCED.split(text)
    return "".join(part if FENCED.match(part) else LINK.sub(from_root, part) for part in parts)


def only_output(cell):
    "Return a markdown cell with the printed text of a code `cell`."
    printed = "".join(output.get("text", "") for output in cell.outputs)
    return nbformat.v4.new_markdown_cell(f"```text\n{printed.rstrip()}\n```")


def make_readme(index: Path) -> str:
    "Convert the notebook `index` to the text of README.md."
    notebook = nbformat.read(index, as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip() and not HIDDEN.search(cell.source)]
    notebook.cells = [only_output(cell) if NO_ECHO.search(cell.source) else cell for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = rewrite_links(FRONTMATTER.sub("", cell.source))
        else:
            cell.source = DIRECTIVE.sub("", cell.source)
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    if resources["outputs"]:
        sys.exit(f"{index.name}: a cell shows a picture; save it under nbs/images and link it in a markdown cell")
    note = "<!-- Generated from nbs/index.ipynb by `make readme`. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(make_readme(INDEX))
