"""Settings of the site: ``make docs``."""

import json
import re
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import sphinx.ext.autosummary  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402
from sphinx.pycode import ModuleAnalyzer  # noqa: E402

import sevo_optax  # noqa: E402

# "(Eq. 7)" does not end the sentence that a table of functions shows.
sphinx.ext.autosummary.WELL_KNOWN_ABBREVIATIONS += ("Eq.",)

project = "sevo-optax"
author = "The sevo-optax authors"
copyright = author
release = version = sevo_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # the site works without network
]
exclude_patterns = ["**/.ipynb_checkpoints"]
templates_path = ["_templates"]

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # the signature says the types
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs that the notebooks are saved with; `make test` runs them
nb_merge_streams = True

html_theme = "furo"
html_title = "sevo-optax"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "tango"
highlight_language = "none"  # blocks without a language are commands and what they print


# Constants have their docstring behind them, in the module that makes them.
CONSTANTS = {
    "sevo_optax.graph.COOCCURRENCE_SQL": ("sevo_optax.graph._parquet", "COOCCURRENCE_SQL"),
    "sevo_optax.graph.Adjacency": ("sevo_optax._weights", "Adjacency"),
}


def explain_constant(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Gives a constant its own docstring instead of that of its type, and shows SQL as it is."""
    del app, what, options
    if name in CONSTANTS:
        module, constant = CONSTANTS[name]
        lines[:] = ModuleAnalyzer.for_module(module).find_attr_docs()["", constant]
        if isinstance(obj, str):
            lines += [".. code-block:: sql", "", *textwrap.indent(obj, "   ").splitlines(), ""]


def link_within_the_site(app: Sphinx, name: str, source: list[str]) -> None:
    """Notebooks and results lie beside this folder, where GitHub follows links to them, and become pages of it here."""
    del app, name
    source[0] = re.sub(r"(?<=\]\()\.\./(?=(\.\./)?notebooks/\w+\.ipynb)", "", source[0])
    source[0] = re.sub(r"(?<=\]\()\.\./((?:\.\./)?)results/README\.md", r"\1results.md", source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", explain_constant)
    app.connect("source-read", link_within_the_site)


def anchor(heading: str) -> str:
    """A heading's anchor in Jupyter, as this site writes it."""
    return re.sub(r"[^\w-]", "", heading.lower())


def copy_notebooks() -> None:
    """Puts the notebooks among the pages, with anchors as this site writes them."""
    target = HERE / "notebooks"
    target.mkdir(exist_ok=True)
    for path in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                source = "".join(cell["source"])
                cell["source"] = re.sub(r"(?<=\]\(#)[^)]+(?=\))", lambda m: anchor(m[0]), source)
        text = json.dumps(notebook, ensure_ascii=False)
        copy = target / path.name
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:
            copy.write_text(text, encoding="utf-8")


copy_notebooks()
