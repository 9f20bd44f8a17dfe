"""The structure that design keeps: floors, rooms, lengths, and names that stay in one place.

Each test lists its offenders.
"""

import ast
import collections
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "ntm_jax"
FLOORS = (  # from the ground up; a file imports from its own room and from lower floors
    {"errors", "host_memory", "workers"},
    {"registry"},
    {"files", "progress"},
    {"typed"},
    {"core"},
    {"backbones", "data", "decoders"},
    {"runtime"},
    {"sampling"},
    {"evaluation"},
    {"export"},
    {"training"},
    {"analysis"},
    {"api"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
OBJECTIVES = {"end_to_end", "pairwise", "flow_matching", "denoiser"}
MAY_COMPARE_OBJECTIVES = {"training/objectives.py"}
FILES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = sorted((ROOT / "launch").glob("*.py")) + sorted((ROOT / "experiments").glob("*.py"))


def module(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}
TREES = {path: ast.parse(path.read_text()) for path in FILES + PROGRAMS}


def imported_modules(path: pathlib.Path, nested: bool = True) -> set[str]:
    """The modules of this package that a file imports; without `nested` those at its top level."""
    nodes = ast.walk(TREES[path]) if nested else TREES[path].body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return {name for name in found if name in MODULES and name != module(path)}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "api"


def test_nothing_imports_upward():
    offenders = [
        f"{module(path)} imports {other}"
        for path in FILES
        for other in imported_modules(path)
        if FLOOR[room(other)] > FLOOR[room(module(path))]
        or (FLOOR[room(other)] == FLOOR[room(module(path))]
        and room(other) != room(module(path)))
    ]
    assert offenders == []


def test_no_import_circle():
    graph = {
        module(path): imported_modules(path) for path in FILES if path != PACKAGE / "__init__.py"
    }
    done, circles = set(), []

    def visit(name, trail):
        if name in trail:
            circles.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    assert circles == []


def test_no_room_has_more_than_ten_files():
    counts = collections.Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > 10} == {}


def functions():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_no_function_is_longer_than_60_lines():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_no_function_has_more_than_eight_parameters():
    def count(node):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        return len(names) - (names[:1] in (["self"], ["cls"]))

    counts = {name: count(node) for name, node in functions()}
    assert {name: number for name, number in counts.items() if number > 8} == {}


def is_docstring(node, parents) -> bool:
    return isinstance(parents.get(node), ast.Expr)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_objective_names_are_compared_in_one_place(path):
    if str(path.relative_to(PACKAGE)) in MAY_COMPARE_OBJECTIVES:
        return
    offenders = []
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Compare):
            texts = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
            attributes = {a.attr for a in ast.walk(node) if isinstance(a, ast.Attribute)}
            if "objective" in attributes or texts & OBJECTIVES - {"denoiser"}:
                offenders.append(f"line {node.lineno}")
    assert offenders == []


@pytest.mark.parametrize("path", FILES + PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_are_at_most_100_columns(path):
    lines = path.read_text().splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


def test_every_module_says_what_it_is_for():
    missing = [
        str(path)
        for path, tree in TREES.items()
        if path.stat().st_size and not ast.get_docstring(tree)
    ]
    assert missing == []
