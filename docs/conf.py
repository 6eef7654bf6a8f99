"""The documentation: Markdown pages, and a reference built from the docstrings. `make docs` builds it."""

import re

from nsphere import __version__

project = "nsphere"
copyright = "the nsphere developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "nsphere"
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "extra_repr"}
default_role = "code"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True


def markdown_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: what reStructuredText would take for markup is escaped outside it."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[-1] = re.sub(r"^(\s*|.*: +)(\w)\.$", r"\1\2\.", parts[-1])  # "head_dim: D." begins no list lettered D
        lines[i] = "".join(p if p.startswith("`") else re.sub(r"([*|_])(?=\W|\w|$)", r"\\\1", p) for p in parts)


def setup(app) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", markdown_docstring, priority=100)  # before napoleon, at 500
