"""Sphinx: pages in Markdown, docstrings in Google style, formulas as MathML.

The site loads nothing from outside.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parents[1]))

project = "Espalier"
author = "the authors of Espalier"
copyright = "the authors of Espalier. Apache-2.0"  # the name that Sphinx wants
release = version = "0.1.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
smartquotes = False  # "--data" is an option
source_suffix = {".md": "markdown"}
suppress_warnings = ["myst.header"]  # sections of other files, included, begin at their own depth

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "Espalier"
html_static_path = ["_static"]
html_css_files = ["espalier.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp"
pygments_style = "friendly"
pygments_dark_style = "monokai"


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def _dashes(app: Any, doctree: nodes.document) -> None:
    """Between a parameter and its meaning; in other text two hyphens are an option's."""
    for text in list(doctree.findall(nodes.Text)):
        if text.astext() == " -- ":
            text.parent.replace(text, nodes.Text(" – "))


def _whole_sentences(app: Any, what: str, *rest: Any) -> None:
    """Of a value or a property napoleon takes for a type what stands before a colon in the first line."""
    if what in {"attribute", "data", "property"}:
        rest[-1][:0] = ["..", ""]  # before the docstring's lines: an empty comment, which has no colon


def setup(app: Any) -> None:
    """Formulas need no script: browsers draw MathML."""
    app.connect("autodoc-process-docstring", _whole_sentences, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("doctree-read", _dashes)
