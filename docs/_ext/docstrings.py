"""Turns the docstrings of this package into valid reStructuredText for autodoc.

They are plain text: `code` in single backticks, "name: meaning" for parameters and fields, indented
blocks of code, and the sections Args and Raises, which napoleon reads. Comments beside the fields
of a dataclass are added as the fields' meanings.
"""

import ast
import dataclasses
import inspect
import re
import textwrap

import flax.linen as nn
import source_comments

SECTION = re.compile(r"(Args|Returns|Raises):$", re.M)


def setup(app) -> dict:
    """Connects this extension to Sphinx."""
    app.setup_extension("sphinx.ext.autodoc")  # which has the events
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon's 500
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}


def process(app, what, name, obj, options, lines: list[str]) -> None:
    """Rewrites the lines of a docstring in place."""
    names = parameters(obj)
    blocks = "\n".join(lines).strip("\n").split("\n\n")
    found = [blocks[0] and escape(blocks[0])]
    for block in blocks[1:]:
        if block.startswith("    "):
            found.append(f".. code-block:: python\n\n{block}")
        elif SECTION.match(block):
            found.append(sections(block))
        else:
            found.append(bullets(block, names))
    if inspect.isclass(obj) and dataclasses.is_dataclass(obj):
        found.append(fields(obj))
    lines[:] = [*"\n\n".join(found).split("\n"), ""]


def signature(app, what, name, obj, options, arguments, returns):
    """The signature without what flax adds to a module's, and with functions by their names."""
    if inspect.isclass(obj) and issubclass(obj, nn.Module) and arguments:
        arguments = re.sub(r", parent:.*", ")", arguments)
    if arguments:
        arguments = re.sub(r"<(?:function|class) '?([\w.]+)[^>]*>", r"\1", arguments)
    return arguments, returns


def skip(app, what, name, obj, skipped, options):
    """True for functions that are a field's default, or that flax adds: not a class's own."""
    name = getattr(obj, "__qualname__", "")
    is_own = "." in name and "<locals>" not in name
    return True if what == "class" and inspect.isfunction(obj) and not is_own else None


def parameters(obj) -> set[str]:
    """The names of a function's parameters or a class's fields."""
    try:
        return {*inspect.signature(obj).parameters, *getattr(obj, "__annotations__", ())}
    except (TypeError, ValueError):
        return set()


def bullets(block: str, names: set[str]) -> str:
    """A paragraph with one bullet for each "name: meaning" or "name(...) meaning" in it."""
    text = " ".join(line.strip() for line in block.splitlines())
    marker = re.compile(
        r"(?:^|(?<=[.;] ))((\w+)(?:\([^)]*\))?(?:(?:, | and )\w+)*:|(\w+)\([^)]*\)(?= )) ?")
    found = [match for match in marker.finditer(text) if (match[2] or match[3]) in names]
    if not found:
        return escape(text)
    ends = [match.start() for match in found[1:]] + [len(text)]
    *items, last = [text[match.start():end].strip()
                    for match, end in zip(found, ends, strict=True)]
    last, *rest = re.split(r"(?<=\. )(?=Raises |Returns )", last)  # sentences about the whole
    items = [re.sub(r"^(\w.*?)(?=: | -> | makes | raises )", r"`\1`", item)
             for item in [*items, last]]
    lead = text[: found[0].start()].strip()
    listed = "\n".join(f"* {escape(item.rstrip(';'))}" for item in items)
    return "\n\n".join(filter(None, [escape(lead), listed, *map(escape, rest)]))


def sections(block: str) -> str:
    """The sections Args and Raises, with all escaped but the names that napoleon reads."""
    lines = block.splitlines()
    for number, line in enumerate(lines):
        if SECTION.match(line):
            lines[number] = f"\n{line}"
        else:
            name = re.match(r" +\w+: |", line)[0]
            lines[number] = name + escape(line[len(name):])
    return "\n".join(lines).strip("\n")


def fields(cls) -> str:
    """One bullet for each field of a dataclass that has a comment beside or above it."""
    items = []
    for base in cls.__mro__:
        if not dataclasses.is_dataclass(base) or not base.__module__.startswith("ntm_jax"):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        comments, lines = source_comments.by_line(source), source.splitlines()
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                above, number = [], node.lineno - 1
                while lines[number - 1].lstrip().startswith("#"):
                    above.insert(0, comments[number])
                    number -= 1
                comment = comments.get(node.end_lineno) or " ".join(above)
                if comment:
                    items.append(f"* ``{ast.unparse(node.target)}``: {escape(comment)}")
    return "\n".join(items)


def escape(text: str) -> str:
    """Plain text as reStructuredText, with `code` as literals."""
    pieces = text.split("`")
    for i, piece in enumerate(pieces):
        pieces[i] = f"``{piece}``" if i % 2 else re.sub(r"([\\*|_])", r"\\\1", piece)
    return "".join(pieces)
