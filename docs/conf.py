"""The documentation site: ``make docs`` builds it into docs/_build/html. Warnings are errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
REPOSITORY = "https://github.com/fastclip/fastclip"

project = "fastclip"
author = "fastclip contributors"
copyright = author  # noqa: A001, Sphinx's name
extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design",
]  # fmt: skip
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "fastclip"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [],
}

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!fastclip).*"),  # other projects' names are not looked up
    ("py:mod", r"fastclip\.(torch_ops|monitor\.lines)"),  # not public
]

autodoc_mock_imports = ["accelerate", "lightning", "torchtitan", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say them in words
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
    app.connect("source-read", link_to_repository)


def mathml(tex, display):
    r"""MathML, which browsers draw without a script. Names of arguments (``max\_norm``) are set as words."""

    def as_text(word):
        return rf"\text{{{word[0]}}}".replace(r"\_", "_")

    parts = re.split(r"(\\(?:text|mathrm)\{[^}]*\})", tex)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(?<![\\\w])[a-z]{2,}(?:\\_[a-z]+)*", as_text, parts[i])
    tex = "".join(parts)
    return convert(rf"\begin{{split}}{tex}\end{{split}}" if "&" in tex else tex, display=display)


def inline_math(writer, node):
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def display_math(writer, node):
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def link_to_repository(app, docname, source):
    """Files outside docs/ are linked by relative paths, which GitHub follows; the site links to them on GitHub."""

    def absolute(match):
        target = (DOCS / docname).parent.joinpath(match[1]).resolve()
        if target.is_relative_to(DOCS) or not target.exists():
            return match[0]
        return f"]({REPOSITORY}/blob/main/{target.relative_to(DOCS.parent)}{match[2] or ''})"

    source[0] = re.sub(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)", absolute, source[0])
