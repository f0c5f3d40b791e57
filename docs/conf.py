"""Sphinx, for those who want HTML: `pip install ".[docs]"`, then `sphinx-build -W docs docs/_build`.

The pages are plain Markdown and read as they are. Added here is the table of contents, and left out the links to what
lies outside this folder.
"""

import re
from typing import Any

project = "pfde"
author = "the pfde developers"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["_build"]
myst_heading_anchors = 4
html_theme = "alabaster"

PAGES = (
    "methods",
    "odes",
    "compressed_history",
    "schedules",
    "memory",
    "coming_from",
    "extending",
    "promises",
    "adjoint",
    "architecture",
    "releasing",
)


def prepare(app: Any, name: str, source: list[str]) -> None:
    """Append a hidden table of contents to the index: a directive in the page itself would show on a code host."""
    source[0] = re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", source[0])
    if name == root_doc:
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(PAGES) + "\n```\n"


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", prepare)
