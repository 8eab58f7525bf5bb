"""How Sphinx makes the site; `make docs` builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import stepladder

ROOT = Path(__file__).parents[1]

project = "stepladder"
version = release = stepladder.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

# What a link to a heading is made of, as GitHub makes it.
myst_heading_anchors = 3
myst_enable_extensions = ["substitution"]
myst_substitutions = {
    "results": "\n".join(
        f"- [{path.name}](../bench/results/{path.name})" for path in sorted(ROOT.glob("bench/results/*.csv"))
    )
}
# Pages here of what lies outside of docs/, and is linked from pages as GitHub needs it.
PAGES = {
    ROOT / "CONTRIBUTING": "contributing",
    ROOT / "CHANGELOG": "changelog",
    ROOT / "README": "index",
    ROOT / "bench" / "results": "results",
}

# Names in backticks that are documented become links, others code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_type_aliases = {"Params": "Params"}
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"stepladder {version}"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def to_pages(app: Sphinx, document: nodes.document) -> None:
    """Lead links that leave docs/ to the page that shows the same here."""
    for link in document.findall(addnodes.pending_xref):
        page = PAGES.get(Path(app.srcdir, str(link["reftarget"]).removesuffix(".md")).resolve())
        if page is not None:
            link["refdomain"], link["reftarget"] = "doc", page
            link.setdefault("reftargetid", None)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect what stands above."""
    app.connect("doctree-read", to_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
