"""The site: what becomes of a notebook, links that lead somewhere, guides whose tables are those of the runs."""

import importlib
import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import pytest

from crackseg_nb.core.files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
check_links = importlib.import_module("check_links")
pages = importlib.import_module("pages")

GUIDES = sorted((ROOT / "docs" / "guides").glob("*.ipynb"))
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def notebook(*cells):
    new = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\n> blurb"), *cells])
    return nbformat.writes(new)


def code(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


def figure(**metadata):
    return nbformat.v4.new_output("display_data", {"image/png": PNG}, metadata=metadata)


def prepared(*cells, page="nbs/core/01_checks"):
    "Return the cells of a notebook as the site shows them, the title left out."
    return pages.prepare_notebook(notebook(*cells), page)["cells"][1:]


def test_a_notebook_keeps_its_code_without_what_only_tools_read():
    shown = prepared(
        code("#| default_exp core.checks"),
        code("#| hide\nhidden = 1"),
        code("#| export\ndef kept(): pass"),
        code("# NBVAL_CHECK_OUTPUT\nkept()"),
        code("#| echo: false\nprint(1)", nbformat.v4.new_output("stream", text="1\n")),
    )
    assert [cell["source"].strip() for cell in shown[:2]] == ["def kept(): pass", "kept()"]
    assert shown[2]["metadata"]["tags"] == ["remove-input"] and shown[2]["outputs"]
    assert len(shown) == 3


def test_progress_bars_go_and_figures_have_alternative_text():
    bar = nbformat.v4.new_output("display_data", {pages.WIDGET: {}, "text/plain": "epoch 1: 0%"})
    heading = nbformat.v4.new_markdown_cell(
        "## Curves\n\nThe *loss* of [runs](a.md) falls (Lin et al. 2017). It ends low."
    )
    _, own, above, made = prepared(
        heading,
        code("a", bar, figure(**{"image/png": {"alt": "loss falls"}})),
        code("axis.set_title('a run')\naxis.set(xlabel='val_loss')", figure()),
        code("pictures.show_cases(cases, 'Worst images')", figure()),
    )
    assert len(own["outputs"]) == 1
    assert [cell["metadata"]["mystnb"]["image"]["alt"] for cell in (own, above, made)] == [
        "loss falls",
        "Curves. The loss of runs falls (Lin et al. 2017). Words in the figure: a run, val loss.",
        "Curves. A figure with a row of photo, mask, answer and error map per case. Words in the figure: Worst images.",
    ]


def test_every_stored_figure_has_an_alternative_text_that_says_something():
    for path in [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("outputs/*/result.ipynb")]:
        page = path.relative_to(ROOT).with_suffix("").as_posix()
        for cell in pages.prepare_notebook(path.read_text("utf-8"), page)["cells"]:
            shown = [output for output in cell.get("outputs", ()) if pages.PICTURES & output.get("data", {}).keys()]
            text = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            assert not shown or len(text.split()) >= 5, f"{page}: {text!r}"


def test_links_lead_to_pages_and_the_text_stays_of_those_that_cannot():
    text = "[a](02_files.ipynb) [b](../../outputs/quickstart) [c](gone.ipynb) `[d](gone)` <https://x.invalid> [e](https://x.invalid)"
    mended = pages.mend_links(text, "nbs/core/01_checks")
    assert "[a](/nbs/core/02_files.ipynb)" in mended and "[b](/outputs/quickstart/result.ipynb)" in mended
    assert " c " in mended and "[e](https://x.invalid)" in mended
    assert (
        pages.mend_links("[one](run_experiment.ipynb)", "outputs/quickstart/result")
        == "[one](/nbs/run_experiment.ipynb)"
    )


def test_a_page_opens_with_its_command_and_leads_on():
    first = pages.prepare_notebook(notebook(code("#| default_exp core.checks")), "nbs/core/01_checks")["cells"][0]
    assert "jupyter lab nbs/core/01_checks.ipynb" in first["source"] and "crackseg_nb.core.checks.md" in first["source"]
    index = pages.prepare_notebook(notebook(), "nbs/core/index")["cells"][-1]["source"]
    listed = re.findall(r"^/(nbs/core/\d\S+)$", index, re.M)
    assert listed == [page for page in pages.sections()["Core"] if not page.endswith("index")]


def test_parameters_are_described_by_the_comments_beside_them():
    def sample(
        size: int = 3,  # pixels on a side
        *,
        names: tuple[str, ...] = (),
    ) -> float:  # seconds
        "Take a sample."

    lines = ["Take a sample."]
    pages.describe(None, "function", "sample", sample, None, lines)
    table = "\n".join(lines)
    assert "``size``\n     - ``int``\n     - ``3``\n     - pixels on a side" in table
    assert (
        "``tuple[str, ...]``\n     - ``()``" in table
        and "*returns*\n     - ``float``\n     - \n     - seconds" in table
    )


def test_names_in_code_link_to_the_reference():
    span = '<span class="n">{}</span>'.format
    point, equals = '<span class="o">.</span>', '<span class="o">=</span>'
    body = span("choose") + span("unknown") + point + span("choose") + span("choose") + equals
    context = dict(body=body, pathto=lambda page: f"/{page}.html")
    pages.link_code(None, "nbs/core/01_checks", "", context, None)
    target = "/docs/reference/crackseg_nb.core.checks.html#crackseg_nb.core.checks.choose"
    link = f'<a class="name" href="{target}">{span("choose")}</a>'
    assert context["body"] == body.replace(span("choose"), link, 1)
    assert pages.known_names("nbs/training/02_losses")["CrackSegError"] == "crackseg_nb.core.checks.CrackSegError"


def test_a_card_of_the_gallery_says_score_and_protocol():
    card = pages.card(ROOT / "outputs" / "quickstart")
    pooled = read_yaml(ROOT / "outputs" / "quickstart" / "final_results.yaml")["test"]["pooled"]
    assert f"**IoU {pooled['iou']:.3f}, F1 {pooled['f1']:.3f} (pooled)**" in card
    assert "36 test images, threshold 0.45 chosen on 36" in card
    assert ":img-alt: " in card and "\nswinv2_hybrid with swinv2_tiny on synthetic\n" in card
    ablation = pages.card(ROOT / "outputs" / "ablation-deepcrack")
    assert "12 runs, test IoU" in ablation and "no-aspp -0.006 (can't tell)" in ablation
    assert "can't tell the lent encoder from random weights" in pages.card(ROOT / "outputs" / "transfer-deepcrack")
    assert "card} Ablate the hybrid\n" in ablation and "`ablation-deepcrack`: What does each part" in ablation


def write_table(path, *lines):
    path.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.mark.parametrize(
    ("name", "lines", "told"),
    [
        (
            "trials.csv",
            ["state,score", "complete,0.5", "pruned,0.9", "complete,0.6"],
            "3 trials, validation IoU of the best 0.600",
        ),
        (
            "tests.csv",
            ["result", "can't tell", "better", "can't tell"],
            "can't tell in 2 of 3 pairs of runs, better in 1 of 3",
        ),
        (
            "scores.csv",
            ["set,model,iou", "A,one,0.4", "A,two,0.5", "B,one,0.3"],
            "training images of the same set: A 0.500 (two), B 0.300 (one)",
        ),
        (
            "benchmark.csv",
            [
                "part,model,contestant,images_per_second",
                *("contest,unet,trainer,9", "contest,unet,bare,10", "contest,unet,bare,20", "contest,unet,bare,10"),
                "options,unet,trainer,1",
            ],
            "speed of the trainer, the model alone being 1: 0.90 (unet)",
        ),
        (
            "steps.csv",
            ["model,file_bytes,iou", "student,10e6,0.7", "INT8,3e6,0.69"],
            "10.0 MB, IoU 0.700; INT8: 3.0 MB, IoU 0.690",
        ),
        (
            "runs.csv",
            ["run,state,val_iou,test_iou", "lr=1,done,0.4,0.6", "lr=2,done,0.5,0.55", "lr=3,failed,,"],
            "highest validation IoU of 2 runs: lr=2, test IoU 0.550",
        ),
    ],
)
def test_what_a_study_found_comes_from_its_table(tmp_path, name, lines, told):
    write_table(tmp_path / name, *lines)
    assert told in pages.headline(tmp_path)


def test_a_run_opens_with_its_score_and_folds_the_list_of_parameters():
    folded = code("recipe: str = None")
    folded["metadata"]["tags"] = ["parameters"]
    first, shown = pages.prepare_notebook(notebook(folded), "outputs/quickstart/result")["cells"]
    assert "# quickstart\n" in first["source"] and "(pooled)**\n\n36 test images" in first["source"]
    commit = read_yaml(ROOT / "outputs" / "quickstart" / "environment.yaml")["git"]["commit"]
    assert re.search(rf"\*Executed on \d{{4}}-\d\d-\d\d at commit `{commit[:7]}`\.", first["source"])
    assert shown["metadata"]["tags"] == ["parameters", "hide-input"]  # and no introduction of the run notebook
    assert prepared(folded)[0]["metadata"]["tags"] == ["parameters"]
    runs, studies = pages.gallery().split("## Studies")
    assert "grid-item-card} quickstart" in runs.split(":::")[2] and "grid-item-card} Benchmark of encoders" in studies


def test_the_corner_of_a_table_is_no_empty_heading():
    html = "<table><thead><tr><th></th><th>iou</th></tr></thead></table>"
    (cell,) = prepared(code("table", nbformat.v4.new_output("display_data", {"text/html": html})))
    assert cell["outputs"][0]["data"]["text/html"] == html.replace("<th></th>", "<td></td>")


def test_printed_tables_scroll_and_sentences_wrap():
    table = "set    iou\nwalls  0.5\n\n95 % interval: 0.4 to 0.6\n"
    prose = "A sentence, and one more.\nAnother line.\n"
    table, prose = (code("print(text)", nbformat.v4.new_output("stream", text=text)) for text in (table, prose))
    assert [shown["metadata"]["tags"] for shown in prepared(table, prose)] == [["printed-table"], []]


def test_a_default_that_sphinx_replaces_has_no_type():
    replaced = type("DefaultValue", (), {"__module__": "sphinx.ext.autodoc"})
    row = pages.cells("out", {"anno": replaced, "default": "x", "docment": "folder"})
    assert row == ("``out``", "", "``'x'``", "folder")


def test_a_constant_shows_its_value_where_that_is_the_same_in_every_build():
    assert ":value: 255\n" in pages.directive("crackseg_nb.core.checks", "VOID")
    assert " …\n" in pages.directive("crackseg_nb.metrics.counts", "PROTOCOL")
    assert ":value:" not in pages.directive("crackseg_nb.training.losses", "LOSSES")


def test_every_guide_is_listed_and_the_glossary_is_in_order():
    listed = re.findall(
        r"^(\w+)$", (ROOT / "docs" / "guides" / "index.md").read_text("utf-8").split("```{toctree}")[1], re.M
    )
    assert sorted(listed) == sorted(
        path.stem
        for path in (ROOT / "docs" / "guides").iterdir()
        if path.suffix in (".md", ".ipynb") and path.stem != "index"
    )
    glossary = (ROOT / "docs" / "glossary.md").read_text("utf-8").split("```{glossary}")[1]
    terms = re.findall(r"^(\w.*)$", glossary, re.M)
    assert len(terms) >= 40 and terms == sorted(terms, key=str.lower)
    assert {"batch", "ECE", "epoch", "overlay", "U-Net", "views"} < {*terms}
    linked = re.findall(r"\]\(([^)]+)\)", glossary)
    assert linked and all((ROOT / "docs" / link).is_file() for link in linked)


def test_guides_train_with_one_command():
    "The guide to recipes says when papermill is the better one."
    guides = (ROOT / "docs" / "guides").iterdir()
    other = {path.stem for path in guides if "papermill nbs/run_experiment.ipynb" in path.read_text("utf-8")}
    assert other <= {"recipes"}


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_the_tables_of_a_guide_are_those_of_the_runs(path):
    names = {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec("".join(cell["source"]), names)
            stored = "".join("".join(output.get("text", "")) for output in cell["outputs"])
            assert printed.getvalue() == stored, f"run {path.relative_to(ROOT)} again"


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="#here"></a><a href="b.html#there"></a><a href="https://x.invalid"></a></p>'
        '<img src="no.png">'
    )
    (tmp_path / "b.html").write_text('<a href="c.html"></a>')
    broken, elsewhere, count = check_links.broken_links(tmp_path)
    assert broken == ["a.html: b.html#there", "a.html: no.png", "b.html: c.html"] and (elsewhere, count) == (1, 2)


def build(folder, *options):
    pytest.importorskip("pydata_sphinx_theme", reason="the site needs the extra docs")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-j",
        "2",
        "-c",
        "docs",
        "-d",
        folder / "read",
        *options,
        ".",
        folder / "html",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html", done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder, complaints = build(tmp_path_factory.mktemp("site"))
    assert not complaints
    return folder


@pytest.mark.slow
def test_the_site_holds_every_public_name_and_no_broken_link(site):
    from sphinx.util.inventory import InventoryFile

    assert not check_links.broken_links(site)[0]
    anchors = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    found = {name for kind, entries in anchors.items() if kind.startswith("py:") for name in entries}
    wanted = {f"{module}.{name}" for module in pages.chapters() for name in pages.public_names(module)}
    assert not wanted - found
    for page in sum(pages.sections().values(), []):
        assert (site / f"{page}.html").exists()


@pytest.mark.slow
def test_two_builds_are_equal(tmp_path):
    part = "include_patterns=nbs/index.ipynb,nbs/core/*.ipynb,docs/*.md,docs/reference/crackseg_nb.core.*.md"
    first, second = (build(tmp_path / name, "-D", part)[0] for name in "ab")
    files = {path.relative_to(first): path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert files == {path.relative_to(second): path.read_bytes() for path in second.rglob("*") if path.is_file()}


@pytest.fixture
def page(site, browser):
    "A page of the browser that opens the site's files; what its scripts complain of fails the test."
    context = browser.new_context(
        viewport=dict(width=1280, height=900), permissions=["clipboard-read", "clipboard-write"]
    )
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.open = lambda name: page.goto(f"{site.as_uri()}/{name}.html")
    yield page
    context.close()
    assert not errors


def theme_of(page):
    return page.evaluate("document.documentElement.dataset.theme")


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("EpochSampler", "crackseg_nb.data.loaders.EpochSampler"),  # a symbol
        ("accumulation", "TrainConfig.accumulation"),  # a parameter
        ("crack_unet", "crackseg_nb.runs.recipes.CRACK_UNET"),  # a recipe
        ("found no trainable parameter", "nbs/training/03_optim.html"),  # an error
        ("conformal", "measure"),  # a method
    ],
)
def test_the_search_finds_symbols_parameters_recipes_and_errors(page, words, first):
    page.open("nbs/index")
    page.locator(".search-button:visible, .search-button-field:visible").first.click()
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results .search-summary:has-text('found')")
    found = [link.get_attribute("href") for link in page.locator("#search-results li > a").all()]
    assert any(first in link for link in found[:5]), found[:5]
    page.wait_for_selector("#search-results li > p")  # what the page is about


@pytest.mark.slow
@pytest.mark.browser
def test_the_site_is_dark_on_demand_and_stays_so(page):
    page.open("nbs/index")
    page.locator("button.theme-switch-button:visible").click()
    page.get_by_text("Dark", exact=True).locator("visible=true").first.click()
    assert theme_of(page) == "dark"
    page.open("docs/gallery")
    assert theme_of(page) == "dark"


@pytest.mark.slow
@pytest.mark.browser
def test_code_is_copied_and_pictures_open_large(page):
    page.open("nbs/index")
    page.locator("div.highlight:has-text('crackseg_predict')").first.hover()
    page.locator("div.highlight:has-text('crackseg_predict') button.copybtn").first.click()
    page.wait_for_timeout(300)
    assert "crackseg_predict path/to/photos" in page.evaluate("navigator.clipboard.readText()")
    page.open("nbs/figures/02_photos")
    page.locator("div.cell_output img").first.click()
    assert page.locator("dialog.enlarged[open] img").get_attribute("alt")
    page.keyboard.press("Escape")
    assert not page.locator("dialog.enlarged").count()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize(
    "part", sorted(path.name for path in (ROOT / "nbs").iterdir() if (path / "index.ipynb").exists())
)
def test_each_part_leads_to_its_chapters_and_names(page, part):
    page.open(f"nbs/{part}/index")
    page.locator("article a[href^='01_']").first.click()
    assert f"/nbs/{part}/" in page.url
    module = next(module for module in pages.chapters() if module.startswith(f"crackseg_nb.{part}."))
    name = pages.public_names(module)[0]
    page.goto(page.url.partition("/nbs/")[0] + f"/docs/reference/{module}.html#{module}.{name}")
    assert page.locator(f"[id='{module}.{name}']").first.is_visible()


LOOKED_AT = {  # one of each kind of page
    "home": "nbs/index",
    "part": "nbs/training/index",
    "chapter": "nbs/training/03_optim",
    "door": "nbs/run_experiment",
    "gallery": "docs/gallery",
    "run": "outputs/quickstart/result",
    "guide": "docs/guides/ready_model",
    "glossary": "docs/glossary",
    "reference": "docs/reference/crackseg_nb.training.losses",
    "search": "search",
}


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", LOOKED_AT)
def test_no_page_keeps_anybody_out(page, kind, theme):
    "axe finds nothing against WCAG 2.1, levels A and AA."
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="the extra browser is not installed"
    ).Axe()
    page.emulate_media(color_scheme=theme)
    page.open(LOOKED_AT[kind])
    assert theme_of(page) == theme
    found = axe.run(page, options=dict(runOnly=["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"])).response["violations"]
    assert not found, [(one["id"], one["nodes"][0]["html"][:200]) for one in found]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("kind", LOOKED_AT)
def test_a_page_fits_a_phone(page, kind):
    page.set_viewport_size(dict(width=390, height=844))
    page.open(LOOKED_AT[kind])
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
