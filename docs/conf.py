# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration. Nothing is fetched, neither while building nor while reading: equations become MathML."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import fulgurite

project = "Fulgurite"
author = "The Fulgurite developers"
copyright = "The Fulgurite developers, Apache-2.0"
version = release = fulgurite.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "measured"]  # what commands have measured, included by pages
html_theme = "furo"
html_title = "Fulgurite"
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

# Docstrings are written with single backticks around code and dollars around equations, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

_INLINE_MATH = re.compile(r"(?<![\\$`\w])\$(?=\S)([^$`]+?)(?<=\S)\$(?![\w$])")
_logger = logging.getLogger(__name__)


def _dollars_to_roles(app, what, name, obj, options, lines):
    text = re.sub(
        r"^( *)\$\$(.+?)\$\$$",
        lambda match: (
            f"{match[1]}.. math::\n\n" + "\n".join(f"{match[1]}   {line.strip()}" for line in match[2].split("\n"))
        ),
        "\n".join(lines),
        flags=re.DOTALL | re.MULTILINE,
    )
    lines[:] = _INLINE_MATH.sub(lambda match: f":math:`{match[1]}`", text).split("\n")


def _mathml(translator, node, display):
    try:
        return tex2mathml(node.astext().replace(r"\dots", r"\ldots"), as_block=display)  # docutils lacks \dots
    except MathError as error:
        _logger.warning("the equation cannot be written as MathML: %s", error, location=node)
        return translator.encode(node.astext())


def _visit_inline(translator, node):
    translator.body.append(_mathml(translator, node, display=False))
    raise nodes.SkipNode


def _visit_display(translator, node):
    translator.body.append(f"<div>{_mathml(translator, node, display=True)}</div>")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_display, None))
    app.connect("autodoc-process-docstring", _dollars_to_roles)
