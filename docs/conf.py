"""Sphinx builds the pages of this folder: make docs. Pages load nothing from elsewhere, and a warning ends the build."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import blocks  # noqa: E402
import reference  # noqa: E402

project = "moejax"
release = re.search(r'__version__ = "(.*)"', (ROOT / "moejax/__init__.py").read_text()).group(1)
extensions = ["myst_parser"]
myst_enable_extensions = ["fieldlist"]
myst_heading_anchors = 3
smartquotes = False  # -- is a flag

python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
add_module_names = False

html_theme = "furo"
html_title = f"moejax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_copyright = html_show_sphinx = False
html_favicon = "_static/icon.svg"


def read(app, name, source):
    """Blocks of a page that stand for what is read off the sources."""
    source[0] = reference.expanded(source[0])


def coloured(app, tree):
    """An indented block says no language: it gets that of what is in it."""
    for block in tree.findall(nodes.literal_block):
        if block.get("language") in (None, "default"):
            block["language"] = {"python": "python", "shell": "bash", "json": "json"}.get(
                blocks.kind(block.astext()), "text"
            )


def named(app, tree):
    """A type in a signature is a link to what the module means by it, never to a namesake elsewhere."""
    for node in list(tree.findall(addnodes.pending_xref)):
        if node["refdomain"] == "py" and "py:module" in node:
            full = reference.origin(node["py:module"], node["reftarget"])
            if full is None:
                node.replace_self(nodes.Text(node["reftarget"]))
            else:
                node["reftarget"] = full
    for dash in [text for text in tree.findall(nodes.Text) if text == " -- "]:  # between a parameter and what it is
        dash.parent.replace(dash, nodes.Text(": "))


def setup(app):
    app.connect("source-read", read)
    app.connect("doctree-read", coloured)
    app.connect("doctree-read", named)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
