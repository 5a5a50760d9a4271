"""Settings of the site: `make docs` builds it with Sphinx from the notebooks as they are stored, without running them.

The project's root is the source folder, so that links between notebooks, runs and guides are those of the files.
"""

import gc
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
warnings.filterwarnings("ignore", module="fastcore.docscrape")  # sections in docstrings of inherited constructors

import pages  # noqa: E402

from crackseg_nb import __version__  # noqa: E402

project, author, release = "crackseg_nb", "The crackseg_nb authors", __version__
copyright = "2026 onwards, The crackseg_nb authors"
root_doc = "nbs/index"
include_patterns = [
    *("nbs/**.ipynb", "outputs/*/result.ipynb", "outputs/*/*/result.ipynb"),
    *("docs/**.md", "docs/**.ipynb", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"),
]
exclude_patterns = [".*", "**/.*", "_*", "build", "dist", "crackseg_nb", "tests", "data", "docs/_*"]
templates_path = ["_templates"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
]

# Notebooks: outputs as stored, without progress bars
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_ipywidgets_js = {}  # nothing comes from another server
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath", "html_image"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]

# Reference: signatures as written, parameters in a table (pages.describe), single backticks name an object
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
viewcode_follow_imported_members = False
default_role = "py:obj"
add_module_names = False
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "crackseg_nb"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["enlarge.js", "sidebar.js", "results.js"]
html_search_scorer = str(ROOT / "docs" / "_static" / "scorer.js")
html_show_search_summary = False  # it fetches each page found, which no browser allows among files
html_additional_pages = {"index": "redirect.html"}
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "crackseg_nb"},
    "collapse_navigation": True,
    "navigation_depth": 3,
    "show_nav_level": 1,
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
copybutton_exclude = ".linenos, .gp, .go"


def setup(app):
    # Once, before pages are read in processes that are forked from this one: the first imports the package.
    pages.homes()
    pages.makers()
    # Each garbage collection would pass over the million objects of the imports and over whole pages: most of the time.
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    app.extensions["sphinx-mathjax-offline"].parallel_read_safe = True  # it only copies files, at the end
    pages.write_reference()
    app.connect("source-read", pages.prepare)
    app.connect("autodoc-process-docstring", pages.describe)
    app.connect("doctree-read", pages.link_names)
    app.connect("html-page-context", pages.link_code)
    app.connect("html-page-context", pages.list_parameters)
    app.connect("build-finished", pages.write_leads)
    app.connect("build-finished", pages.write_llms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
