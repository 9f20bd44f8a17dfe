"""core/ is small enough to read in an hour, and imports nothing else of ours."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "ntm_jax" / "core").rglob("*.py"))
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
          tokenize.ENDMARKER)


def docstring_lines(source: str) -> set[int]:
    """The lines of strings that stand as statements, docstrings among them."""
    strings = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)
               and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    return {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}


def code_lines(source: str) -> int:
    """Lines that hold code: not blank, not a comment, not a docstring."""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline)
              if token.type not in LAYOUT]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstring_lines(source))


def imported(source: str) -> set[str]:
    """Full names of the modules and members a file imports; a relative import keeps its dots."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def test_counts_code_only():
    source = ('"""Doc\nstring."""\n\n# comment\nx = f(  # why\n    1,\n)\n\n\n'
              'def f():\n    """Doc."""\n    return """a\nb"""\n')
    assert code_lines(source) == 3 + 1 + 2


def test_core_is_under_1500_lines():
    assert len(FILES) >= 8
    assert sum(code_lines(path.read_text()) for path in FILES) < 1500


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_core_imports_nothing_of_ours_outside_core(path):
    ours = {"ntm_jax", "launch", "experiments", "tests"} | {p.stem for p in ROOT.glob("*.py")}
    names = {name for name in imported(path.read_text()) if name.split(".")[0] in ours
             or name.startswith("..")}
    assert all(name.startswith("ntm_jax.core.") for name in names), names
