"""The configuration of the documentation site.

    pip install -e '.[docs]' && sphinx-build -W --keep-going docs docs/_build

The build needs no network. It executes the notebooks that changed since the last build, which takes
minutes; with NTM_JAX_NOTEBOOKS=off it executes none, and their pages lack outputs.
"""

import os
import pathlib
import shutil
import sys
import tomllib

DOCS = pathlib.Path(__file__).parent
shutil.rmtree(DOCS / "notebooks" / "runs", ignore_errors=True)  # what an earlier build trained
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]  # this checkout, whatever is installed

project = "ntm_jax"
author = "The ntm_jax authors"
copyright = f"2026, {author}"
metadata = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
release = version = metadata["version"]

extensions = [
    "docstrings",  # docs/_ext; before napoleon, which then sees valid reStructuredText
    "generated",
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
smartquotes = False
exclude_patterns = ["_build", "_ext", "_figures", "jupyter_execute", "notebooks/runs"]

myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = os.environ.get("NTM_JAX_NOTEBOOKS", "cache")
nb_execution_cache_path = str(DOCS / "_build" / ".jupyter_cache")
nb_execution_timeout = 900  # seconds for a cell
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # a module's setup() has none of its own
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

html_theme = "furo"  # light and dark
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = "_static/logo.svg"
html_title = f"ntm_jax {version}"
html_show_sphinx = False
html_copy_source = html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"
