"""What the site adds to the notebooks: their processing, navigation, the gallery, the reference, and llms.txt."""

import ast
import base64
import csv
import inspect
import json
import posixpath
import re
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import median

import pandas as pd
import yaml
from execnb.nbio import dict2nb
from fastcore.docments import docments
from nbdev import processors
from nbdev.process import NBProcessor

from crackseg_nb.studies.pretraining import arms, tell

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
FENCED_BLOCK = re.compile(r"(^```.*?^```)", re.M | re.S)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?![a-z]+:|#)([^)\s]+)\)")
IMPORT = re.compile(r"^from (crackseg_nb[\w.]*) import (\([^)]*\)|.*)$", re.M)
# A name in highlighted Python that is neither an attribute nor the left side of an assignment or a keyword.
CODE_NAME = re.compile(r'(?<!<span class="o">\.</span>)<span class="n">(\w+)</span>(?!<span class="o">=</span>)')
DEFAULT_EXPORT = re.compile(r"^#\s*\|\s*default_exp\s+(\S+)", re.M)
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = {"image/png", "image/jpeg", "image/svg+xml"}
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
BLURB = "A reproducible study of crack and damage segmentation, written as notebooks."
HOME = (
    "Guides <docs/guides/index>",
    "Notebooks <docs/notebooks>",
    "Runs <docs/gallery>",
    "Reference <docs/reference/index>",
    "Glossary <docs/glossary>",
    "CHANGELOG",
    "CONTRIBUTING",
    "SECURITY",
    "CODE_OF_CONDUCT",
)
PROCESSORS = [
    processors.populate_language,
    processors.strip_ansi,
    processors.hide_line,
    processors.filter_stream_,
    processors.hide_,
    processors.clean_magics,
]


@cache
def sections() -> dict[str, list[str]]:
    "Return the notebooks of each section of nbs/sidebar.yml, in reading order, as names of pages."
    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text("utf-8"))
    return {
        section["section"]: ["nbs/" + name.removesuffix(".ipynb") for name in section["contents"]]
        for section in sidebar["website"]["sidebar"]["contents"]
    }


def read_notebook(page: str) -> dict:
    "Return the notebook behind a page."
    return json.loads((ROOT / f"{page}.ipynb").read_text("utf-8"))


@cache
def chapters() -> dict[str, str]:
    "Map the modules of the package to the pages of their chapters, in reading order."
    found = {}
    for page in sum(sections().values(), []):
        match = DEFAULT_EXPORT.search("\n".join("".join(cell["source"]) for cell in read_notebook(page)["cells"]))
        if match:
            found[f"crackseg_nb.{match[1]}"] = page
    return found


def public_names(module: str) -> list[str]:
    "Return the names that `module` exports for everyone."
    return [name for name in import_module(module).__all__ if not name.startswith("_")]


def toctree(*entries: str, hidden: bool = True, depth: int = 1) -> str:
    "Return a table of contents as MyST text; an entry is a page, or `title <page>`."
    rooted = [re.sub(r"(^|<)(?=[^<>]+>?$)", r"\1/", entry) for entry in entries]
    options = [":hidden:"] if hidden else [f":maxdepth: {depth}", ":titlesonly:"]
    return "\n".join(["```{toctree}", *options, "", *rooted, "```"])


# Notebooks


def mend_links(text: str, page: str) -> str:
    """Lead the relative links of a markdown `text` to pages and files of the site.

    A folder becomes its notebook. A run's notebook was written in nbs/, so its links start there. The text alone stays
    of a link that leads nowhere any more, as in records that name old chapters.
    """

    def lead(match):
        target, _, anchor = match[2].partition("#")
        for start in (posixpath.dirname(page), "nbs"):
            path = posixpath.normpath(posixpath.join(start, target))
            for found in (path, f"{path}/result.ipynb", f"{path}/index.ipynb"):
                if (ROOT / found).is_file():
                    return f"[{match[1]}](/{found}{anchor and '#' + anchor})"
        return match[1]

    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in FENCED_BLOCK.split(text))


@cache
def makers() -> dict[str, str]:
    "Map the package's functions that show a figure, of which only one has the name, to what they return."
    found = {}
    for path in sorted((ROOT / "crackseg_nb").rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("show_") and ast.get_docstring(node):
                first = ast.get_docstring(node).partition("\n")[0]
                first = re.sub(r"^(Return|Show|Draw) |; (?:None|any|meant) .*|`|\.$", "", first)
                found.setdefault(node.name, []).append(first)
    found = {name: texts[0] for name, texts in found.items() if len(texts) == 1}
    return found | {"LiveCurves": found["show_history"]}


def plain_sentence(text: str) -> str:
    "Return the first sentence of a markdown `text`, or more if it is short, without headings and marks."
    text = re.sub(r"^(#+ .*|>|\W*\$\$.*)$", "", text, flags=re.M)
    text = re.sub(r"[`*]|!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    first, *rest = re.split(r"(?<!et al)[.!?:] ", " ".join(text.split()) + " ")
    return (f"{first}. {rest[0][:1].upper()}{rest[0][1:]}" if len(first.split()) < 5 and any(rest) else first).strip()


def drawn_words(source: str) -> list[str]:
    "Return the titles, labels and names that the Python `source` writes into its figures."
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:  # a line of IPython
        return []
    found = []
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = [word.value for word in call.keywords if word.arg in ("title", "suptitle", "label", "xlabel", "ylabel")]
        given += call.args if name.startswith(("show_", "set_", "suptitle")) else []
        found += [word.value for word in given if isinstance(word, ast.Constant) and isinstance(word.value, str)]
    return list(dict.fromkeys(found))


def figure_text(output: dict, source: str, heading: str, prose: str) -> str:
    """Return the alternative text of a stored figure.

    It is the figure's own; or the title of its section, what the function of the package that draws it returns or else
    the sentence above it, and the words in it.
    """
    own = next(
        (kind["alt"] for kind in output.get("metadata", {}).values() if isinstance(kind, dict) and "alt" in kind), ""
    )
    if own:
        return own
    used = [name for name in re.findall(r"\w+(?=\()", source) if name in makers()]
    drawn = makers()[used[-1]] if used else plain_sentence(prose)
    words = ", ".join(drawn_words(source)).replace("_", " ")
    parts = [re.sub(r"[`*]", "", heading), drawn, words and f"Words in the figure: {words}"]
    return ". ".join(part[:1].upper() + part[1:] for part in parts if part).replace("?.", "?") + "."


def is_table(output: dict) -> bool:
    "Return whether an output is printed text in columns, which broken lines would mix up."
    data = output.get("data", {})
    text = output.get("text") or ("" if "text/html" in data else data.get("text/plain", ""))
    lines = [line for line in "".join(text).splitlines() if line.strip()]
    return sum("  " in line.strip() for line in lines) > len(lines) / 2


def prepare_code(cell: dict, heading: str, prose: str, folded: bool) -> None:
    "Remove from a code `cell` what only tools read; describe its figures; fold a run's list of all parameters."
    tags = cell["metadata"].get("tags", [])
    if "echo:" in cell["directives_"] or "input:" in cell["directives_"]:
        tags = [*tags, "remove-input"]
    elif folded and "parameters" in tags:
        tags = [*tags, "hide-input"]
    cell["source"] = re.sub(r"^# NBVAL_\w+.*\n?", "", cell["source"], flags=re.M)
    cell["outputs"] = [output for output in cell["outputs"] if WIDGET not in output.get("data", {})]
    for output in cell["outputs"]:
        if "text/html" in output.get("data", {}):  # the corner of a table heads nothing
            html = "".join(output["data"]["text/html"])
            output["data"]["text/html"] = re.sub(r"<th>\s*</th>", "<td></td>", html)
    if any(map(is_table, cell["outputs"])):
        tags = [*tags, "printed-table"]
    cell["metadata"] = {"tags": tags}
    if "hide-input" in tags:
        cell["metadata"]["mystnb"] = {"code_prompt_show": "Show all parameters and their meaning"}
    figures = [output for output in cell["outputs"] if PICTURES & output.get("data", {}).keys()]
    if figures:  # one text serves all figures of a cell
        cell["metadata"]["mystnb"] = {"image": {"alt": figure_text(figures[0], cell["source"], heading, prose)}}


def prepare_notebook(text: str, page: str) -> dict:
    "Process a notebook as nbdev does for its site, but keep the code; add commands, links and navigation."
    module = DEFAULT_EXPORT.search("\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]))
    processor = NBProcessor(nb=dict2nb(json.loads(text)), procs=PROCESSORS, process=True)
    notebook = processor.nb
    heading = prose = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose = cell.source
            cell.source = mend_links(cell.source, page)
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.M) or [heading])[-1]
        elif cell.cell_type == "code":
            prepare_code(cell, heading, prose, folded=page.startswith("outputs/"))
    cells = [
        {key: value for key, value in cell.items() if not key.endswith("_")}
        for cell in notebook.cells
        if cell.cell_type != "code" or cell.outputs or re.sub(r"^#\s*\|.*", "", cell.source, flags=re.M).strip()
    ]
    first = next(cell for cell in cells if cell["cell_type"] == "markdown")
    title, _, rest = first["source"].partition("\n")
    if page.startswith("outputs/"):
        title, folder = f"# {page.removeprefix('outputs/').removesuffix('/result')}", (ROOT / page).parent
        if (folder / "final_results.yaml").exists():  # what follows until the parameters introduces the run notebook
            start = next(number for number, cell in enumerate(cells) if cell["cell_type"] == "code")
            cells[:start], rest = [first], ""
        rest = f"{rest}\n\n{headline(folder)}\n\n{executed(folder)}"
    opening = f"*In JupyterLab:* `.venv/bin/jupyter lab {page}.ipynb`"
    if module:
        opening += f" · *Reference:* [`crackseg_nb.{module[1]}`](/docs/reference/crackseg_nb.{module[1]}.md)"
    first["source"] = "\n".join([title, rest, "", opening] if page != "nbs/index" else [title, rest])
    trees = navigation(page)
    if trees:
        cells.append({"cell_type": "markdown", "metadata": {}, "source": trees})
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python", "pygments_lexer": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def navigation(page: str) -> str:
    "Return the tables of contents that a page gets: the home page, indexes of parts, and runs of a study."
    if page == "nbs/index":
        return toctree(*HOME)
    if page.startswith("nbs/") and page.endswith("/index"):
        return toctree(*[name for name in sections()[page.split("/")[1].capitalize()] if name != page])
    runs = sorted((ROOT / page).parent.glob("*/result.ipynb")) if page.startswith("outputs/") else []
    return toctree(*[str(path.relative_to(ROOT).with_suffix("")) for path in runs]) if runs else ""


def prepare(app, page: str, source: list[str]) -> None:
    "Replace the text of a page by what the site shows of it."
    if (ROOT / f"{page}.ipynb").exists():
        source[0] = json.dumps(prepare_notebook(source[0], page))
        return
    parts = dict(doors=sections()["Start here"][1:], parts=[names[0] for name, names in sections().items()][1:])
    text = mend_links(source[0], page)
    for name, names in parts.items():
        text = text.replace(f"<!-- {name} -->", toctree(*names, hidden=False, depth=2))
    source[0] = text.replace("<!-- runs -->", gallery()) if "<!-- runs -->" in text else text


def link_names(app, tree) -> None:
    "Link names of the package that a notebook's or a guide's text quotes."
    from docutils import nodes  # here, so that the rest is tested where Sphinx is not installed
    from sphinx.addnodes import pending_xref

    if app.env.docname.startswith(("docs/reference", "outputs/")):
        return
    for literal in list(tree.findall(nodes.literal)):
        full = homes().get(literal.astext().removesuffix("()"))
        if full and not isinstance(literal.parent, nodes.reference | pending_xref):
            link = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=full, refdoc=app.env.docname, refexplicit=True
            )
            literal.replace_self(link)
            link += literal


def known_names(page: str) -> dict[str, str]:
    "Map the names that a notebook imports from the package or exports into it to their full names."
    text = "\n".join("".join(cell["source"]) for cell in read_notebook(page)["cells"] if cell["cell_type"] == "code")
    module = DEFAULT_EXPORT.search(text)
    home = f"crackseg_nb.{module[1]}" if module else ""
    known = {name: f"{home}.{name}" for name in public_names(home)} if home else {}
    for home, names in IMPORT.findall(text):
        if home in chapters():
            known |= {name: f"{home}.{name}" for name in re.findall(r"\w+", names) if name in public_names(home)}
    return known


def link_code(app, page: str, template: str, context: dict, tree) -> None:
    "Link the names of the package in a notebook's code to the reference."
    if not (ROOT / f"{page}.ipynb").exists():
        return
    known = known_names(page)

    def link(match):
        if match[1] not in known:
            return match[0]
        module = known[match[1]].rpartition(".")[0]
        target = context["pathto"](f"docs/reference/{module}")
        return f'<a class="name" href="{target}#{known[match[1]]}">{match[0]}</a>'

    context["body"] = CODE_NAME.sub(link, context["body"])


SIGNATURE_LINES = re.compile(r'(<span class="sig-paren">\(</span>\s*)<dl>\n(.*?)</dl>', re.S)


def list_parameters(app, page: str, template: str, context: dict, tree) -> None:
    "Let a signature of several lines be a list: a list of definitions without terms means nothing to a screen reader."

    def as_list(match):
        return f"{match[1]}<ul>\n{match[2].replace('<dd>', '<li>').replace('</dd>', '</li>')}</ul>"

    if "body" in context:
        context["body"] = SIGNATURE_LINES.sub(as_list, context["body"])


@cache
def homes() -> dict[str, str]:
    "Map each public name of the package that only one module has to its full name."
    found = {}
    for module in chapters():
        for name in public_names(module):
            found.setdefault(name, []).append(f"{module}.{name}")
    return {name: full[0] for name, full in found.items() if len(full) == 1}


# Gallery


def scores(results: dict) -> str:
    "Return the headline of a run: its pooled test scores."
    pooled = results["test"]["pooled"]
    if "accuracy" in pooled:
        return f"top-1 {pooled['accuracy']:.3f}, top-5 {pooled['top5_accuracy']:.3f}"
    mean = "mean " if "per_class" in results["test"] else ""
    return f"{mean}IoU {pooled['iou']:.3f}, {mean}F1 {pooled['f1']:.3f} (pooled)"


def protocol(results: dict) -> str:
    "Return in one sentence how a run was scored."
    rule, test = results["protocol"], results["test"]
    threshold = (
        f"threshold {test['threshold']:.2f} chosen on {rule['split']['val']} validation images, "
        if "threshold" in test
        else ""
    )
    trained = f"epoch {rule['epoch']} of {rule['epochs_trained']}" if rule["epochs_trained"] else "tested only"
    return f"{test['num_images']} test images, {threshold}{trained}, weights {results['model']['weights']}"


def rows(path: Path) -> list[dict]:
    "Return the lines of a table as dictionaries."
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def of_ablation(effects: list[dict]) -> str:
    arms = ", ".join(f"{row['arm']} {float(row['difference']):+.3f} ({row['told']})" for row in effects)
    return f"IoU against the whole hybrid, mean of {effects[0]['seeds']} seeds: {arms}"


def of_data_sets(scores: list[dict]) -> str:
    "Name the best model of each data set, which may have learned its training images."
    best = {}
    for row in scores:
        best[row["set"]] = max(best.get(row["set"], row), row, key=lambda row: float(row["iou"]))
    return "highest IoU, by a model that may have learned training images of the same set: " + ", ".join(
        f"{name} {float(row['iou']):.3f} ({row['model']})" for name, row in best.items()
    )


def of_comparison(tests: list[dict]) -> str:
    told = Counter(row["result"] for row in tests)
    return ", ".join(f"{result} in {count} of {len(tests)} pairs of runs" for result, count in told.items())


def of_compression(steps: list[dict]) -> str:
    "Compare the smallest file with the model that was compressed."
    first, least = steps[0], min(steps, key=lambda row: float(row["file_bytes"]))
    sizes = [f"{float(row['file_bytes']) / 1e6:.1f} MB, IoU {float(row['iou']):.3f}" for row in (first, least)]
    return f"{sizes[0]}; {least['model']}: {sizes[1]}"


def of_encoders(differences: list[dict]) -> str:
    first = differences[0]
    return f"{first['encoder']} is {float(first['difference']):.3f} IoU ahead of {first['other']}: {first['verdict']}"


def of_protocols(protocols: list[dict]) -> str:
    least, most = (pick(protocols, key=lambda row: float(row["f1_points"])) for pick in (min, max))
    ends = [f"{float(row['f1_points']):+.1f} points ({row['protocol']})" for row in (least, most)]
    return f"F1 of the same predictions moves by {ends[0]} to {ends[1]}"


def of_search(trials: list[dict]) -> str:
    best = max(float(row["score"]) for row in trials if row["state"] == "complete")
    return f"{len(trials)} trials, validation IoU of the best {best:.3f}"


def of_sweep(runs: list[dict]) -> str:
    "Return what pretraining gives, where runs differ in their first weights; else the run that validation prefers."
    if "encoder_weights" not in runs[0]:
        done = [row for row in runs if row["state"] == "done"]
        best = max(done, key=lambda row: float(row["val_iou"]))
        return f"highest validation IoU of {len(done)} runs: {best['run']}, test IoU {float(best['test_iou']):.3f}"
    told = tell(arms(pd.DataFrame(runs).astype({"seed": int, "val_iou": float, "test_iou": float})))
    return told.removesuffix(".")


def of_race(rounds: list[dict]) -> str:
    "Compare the trainer with the bare model, by the medians of their rounds."
    speeds = {}
    for row in rounds:
        if row["part"] == "contest" and row["contestant"] in ("trainer", "bare"):
            speeds.setdefault(row["model"], {}).setdefault(row["contestant"], []).append(
                float(row["images_per_second"])
            )
    shares = {model: median(found["trainer"]) / median(found["bare"]) for model, found in speeds.items()}
    parts = ", ".join(f"{share:.2f} ({model})" for model, share in shares.items())
    others = [part for part in dict.fromkeys(row["part"] for row in rounds) if part != "contest"]
    return f"speed of the trainer, the model alone being 1: {parts}" + f"; also {', '.join(others)}" * bool(others)


FINDINGS = {  # the table of a study, and what is said of it
    "effects.csv": of_ablation,
    "steps.csv": of_compression,
    "tests.csv": of_comparison,
    "differences.csv": of_encoders,
    "protocols.csv": of_protocols,
    "trials.csv": of_search,
    "benchmark.csv": of_race,
    "scores.csv": of_data_sets,
    "runs.csv": of_sweep,
}


def headline(folder: Path) -> str:
    "Return what the run or the study in `folder` found, from its files, with its protocol."
    if (folder / "final_results.yaml").exists():
        results = yaml.safe_load((folder / "final_results.yaml").read_text("utf-8"))
        return f"**{scores(results)}**\n\n{protocol(results)}"
    runs = [yaml.safe_load(path.read_text("utf-8")) for path in sorted(folder.rglob("final_results.yaml"))]
    found = [results["test"]["pooled"]["iou"] for results in runs]
    told = next(
        (f"**Found**: {say(rows(folder / name))}" for name, say in FINDINGS.items() if (folder / name).exists()), ""
    )
    span = f"{min(found):.3f}" + f" to {max(found):.3f}" * (len(found) > 1) if found else ""
    tested = f"{len(found)} run{'s' * (len(found) > 1)}, test IoU {span}" if found else ""
    return "\n\n".join(part for part in (told, tested) if part)


def what_was_trained(folder: Path) -> str:
    "Return model, encoder and data of a run."
    config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    model, data = config["model"], config["data"]
    name = model["model"] + (f" with {model['encoder']}" if model.get("encoder") else "")
    source = data["data"] if data["data"] != "folder" else f"the folder {Path(data['data_dir']).name}"
    return f"{name} on {source}"


def executed(folder: Path) -> str:
    "Return when the run in `folder` was executed, and of which day its code is."
    facts = {}
    for name in ("status", "environment"):
        path = folder / f"{name}.yaml"
        facts |= yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}
    day = f" on {facts['time'][:10]}" if "time" in facts else ""
    commit = (facts.get("git") or {}).get("commit")
    place = f" at commit `{commit[:7]}`" if commit else ""
    return f"*Executed{day}{place}. The code is that of its day: names may have changed since.*"


def first_figure(page: str) -> Path | None:
    "Return the first figure of a notebook as a file, for studies that leave no picture; None without one."
    outputs = [output for cell in read_notebook(page)["cells"] for output in cell.get("outputs", [])]
    found = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    if not found:
        return None
    path = ROOT / "docs" / "_gallery" / f"{page.split('/')[1]}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(base64.b64decode("".join(found[0])))
    return path


def card(folder: Path) -> str:
    "Return the card of the run or study in `folder` for the gallery."
    page = f"outputs/{folder.name}/result"
    opening = "".join(read_notebook(page)["cells"][0]["source"])
    blurb, study = re.search(r"> (.+)", opening), not (folder / "final_results.yaml").exists()
    lines = [f":::{{grid-item-card}} {opening.splitlines()[0].strip('# ') if study else folder.name}"]
    lines += [f":link: /{page}", ":link-type: doc"]
    pictures = [folder / "visualizations" / "best_cases.png", *sorted(folder.glob("*.png"))]
    picture = next((path for path in pictures if path.exists()), None) or first_figure(page)
    if picture:
        lines += [
            f":img-top: /{picture.relative_to(ROOT)}",
            f":img-alt: {picture.stem.replace('_', ' ')} of {folder.name}",
        ]
    lines += ["", f"`{folder.name}`: {blurb[1]}" if study and blurb else what_was_trained(folder), "", headline(folder)]
    return "\n".join([*lines, ":::"])


def gallery() -> str:
    "Return the grids of the runs and of the studies that are kept in outputs/, the quickstart first."
    folders = [path.parent for path in (ROOT / "outputs").glob("*/result.ipynb")]
    folders = sorted(folders, key=lambda folder: (folder.name != "quickstart", folder.name))
    runs = [folder for folder in folders if (folder / "final_results.yaml").exists()]
    studies = [folder for folder in folders if folder not in runs]
    lines = []
    for title, found in {"Single runs": runs, "Studies": studies}.items():
        lines += [f"## {title}", "", "::::{grid} 1 2 2 3", ":gutter: 3", "", *map(card, found), "::::", ""]
    return "\n".join([*lines, toctree(*[f"outputs/{folder.name}/result" for folder in runs + studies])])


# Reference


def write_if_new(path: Path, text: str) -> None:
    "Write `text` to `path` unless it is there, so that an unchanged page is not read anew."
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")


def directive(module: str, name: str) -> str:
    "Return what documents a public name of `module`; a short value is shown."
    value = getattr(import_module(module), name)
    if isinstance(value, type):
        return f".. autoclass:: {name}\n   :members:\n   :undoc-members:"
    if callable(value):
        return f".. autofunction:: {name}"
    shown = repr(value) if isinstance(value, str | int | float | tuple | dict) else "<"
    if "<" in shown:  # an address in memory, which changes from build to build
        return f".. py:data:: {name}\n"
    return f".. py:data:: {name}\n   :value: {shown if len(shown) <= 160 else shown[:158] + ' …'}\n"


def write_reference() -> None:
    "Write a page for each module, and their index by parts."
    index = ["# Reference", "", "What each module exports, in reading order."]
    wanted = {REFERENCE / "index.md", REFERENCE / "crackseg_nb.md"}
    for part, names in sections().items():
        modules = [module for module, page in chapters().items() if page in names]
        if modules:
            index += ["", f"## {part}", "", toctree(*[f"docs/reference/{module}" for module in modules], hidden=False)]
        for module in modules:
            page = f"# {module.removeprefix('crackseg_nb.')}\n\nChapter: {{doc}}`/{chapters()[module]}`\n\n"
            names = "\n\n".join(directive(module, name) for name in public_names(module))
            page += f"```{{eval-rst}}\n.. automodule:: {module}\n   :no-members:\n\n"
            page += f".. currentmodule:: {module}\n\n{names}\n```\n"
            wanted.add(REFERENCE / f"{module}.md")
            write_if_new(REFERENCE / f"{module}.md", page)
    index[3:3] = ["", toctree("docs/reference/crackseg_nb", hidden=False)]
    public = "```{eval-rst}\n.. automodule:: crackseg_nb\n   :no-members:\n\n```"
    names = "\n".join(f"- `{name}`" for name in import_module("crackseg_nb").__all__)
    write_if_new(REFERENCE / "crackseg_nb.md", f"# crackseg_nb\n\n{public}\n\n{names}\n")
    write_if_new(REFERENCE / "index.md", "\n".join(index) + "\n")
    for path in set(REFERENCE.glob("*.md")) - wanted:
        path.unlink()


def plain(value) -> str:
    "Return an annotation or a default as one reads it; no address in memory."
    text = inspect.formatannotation(value) if not isinstance(value, str | int | float | tuple) else repr(value)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def describe(app, what: str, name: str, target, options, lines: list[str]) -> None:
    "Add the table of parameters, read from the comments beside them, to a docstring."
    if lines and lines[0].startswith("Alias for field number"):  # of a named tuple; says nothing
        lines.clear()
    lines[:] = [re.sub(r"(?<![\\`])([*|])", r"\\\1", line) if "`" not in line else line for line in lines]
    if what not in ("class", "function", "method"):
        return
    try:
        found = docments(target, full=True)
    except (TypeError, ValueError, OSError, SyntaxError):  # no source of its own to read comments from
        return
    rows = [
        (name, entry)
        for name, entry in found.items()
        if name not in ("self", "cls") and (name != "return" or entry["anno"] not in (None, inspect.Parameter.empty))
    ]
    if not rows or rows[0][0] == "args":
        return
    lines += ["", ".. list-table::", "   :header-rows: 1", "   :class: parameters", ""]
    table = [("Parameter", "Type", "Default", "Meaning"), *(cells(*row) for row in rows)]
    filled = [number for number in range(4) if any(row[number] for row in table[1:])]
    for row in [[row[number] for number in filled] for row in table]:
        lines += ["   * - " + row[0], *("     - " + cell for cell in row[1:])]
    lines.append("")


def cells(name: str, entry: dict) -> tuple[str, str, str, str]:
    "Return the cells of a parameter's row."
    kind, default = entry["anno"], entry["default"]
    if isinstance(kind, type) and kind.__module__.startswith("sphinx."):  # what Sphinx puts in a default's place
        kind = None
    return (
        f"``{name}``" if name != "return" else "*returns*",
        "" if kind is inspect.Parameter.empty or kind is None else f"``{plain(kind)}``",
        "" if default is inspect.Parameter.empty or name == "return" else f"``{plain(default)}``",
        (entry["docment"] or "").replace("*", r"\*").replace("|", r"\|").replace("\n", " "),
    )


# Search and llms.txt


def write_leads(app, error) -> None:
    "Write for results.js what each page is about: its first quotation or else its first paragraph."
    if error or app.builder.format != "html":
        return
    from docutils import nodes

    leads = {}
    for page in sorted(app.env.all_docs):
        tree = app.env.get_doctree(page)
        paragraphs = [node.astext() for node in tree.findall(nodes.paragraph)]
        paragraphs = [text for text in paragraphs if not text.startswith("Chapter: ")]  # of the reference
        quoted = [node.astext() for node in tree.findall(nodes.block_quote)]
        leads[page] = " ".join("".join((quoted + paragraphs)[:1]).split())[:240]
    text = json.dumps(leads, ensure_ascii=False, indent=0)
    Path(app.outdir, "_static", "leads.js").write_text(f"const LEADS = {text};\n", "utf-8")


def write_llms(app, error) -> None:
    "Write llms.txt: every page with its title, in reading order."
    if error or app.builder.format != "html":
        return
    env = app.env
    lines = ["# crackseg_nb", "", f"> {BLURB}", ""]
    for page in order(env, app.config.root_doc):
        lines.append(f"- [{env.titles[page].astext()}]({page}.html)")
    Path(app.outdir, "llms.txt").write_text("\n".join(lines) + "\n", "utf-8")


def order(env, page: str):
    "Yield `page` and what its tables of contents hold, as one reads it."
    yield page
    for child in env.toctree_includes.get(page, []):
        yield from order(env, child)
