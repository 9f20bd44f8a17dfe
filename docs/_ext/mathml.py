"""Renders formulas as MathML when the site is built: pages need no script and no network.

A formula that latex2mathml does not know is a warning, with which `sphinx-build -W` fails.
"""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

logger = logging.getLogger(__name__)


def setup(app) -> dict:
    """Connects this extension to Sphinx, whose `html_math_renderer` then is "mathml"."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def inline(translator, node) -> None:
    """Writes a formula within a line."""
    translator.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block(translator, node) -> None:
    """Writes a formula on lines of its own."""
    translator.body.append(f'<div class="math">{mathml(node, "block")}</div>\n')
    raise nodes.SkipNode


def mathml(node, display: str) -> str:
    """Returns a math node's formula as an element <math>."""
    latex = node.astext().strip()
    try:
        found = convert(latex, display=display)
    except Exception as error:  # of many kinds
        logger.warning("formula %r: %r", latex, error, location=node)
        return ""
    if "\\" in found:  # a command that is not known stays as it is
        logger.warning("formula %r has an unknown command: %s", latex, found, location=node)
    return found
