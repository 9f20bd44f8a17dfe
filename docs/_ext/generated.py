"""Writes the reference pages that repeat the source: settings, experiments, flags.

Sphinx calls `write` before it reads the pages. One function makes one page, as Markdown.
"""

import importlib
import pathlib
import re
import subprocess
import sys
import typing
from collections.abc import Iterable
from xml.etree import ElementTree

DOCS = pathlib.Path(__file__).parents[1]
ROOT = DOCS.parent
SHARED = {"__init__", "console", "default", "mistakes", "program"}  # in experiments/ and launch/


# Assignments, paths, names with underscores or two dots, flags.
CODE = re.compile(r"\w[_=:\[]\S|[A-Z]\w*/|\w\.(py|json)|[a-z]\.[a-z_]+\.\w|^--\w")


def setup(app) -> dict:
    """Connects this extension to Sphinx."""
    app.connect("builder-inited", lambda _: write())
    return {"parallel_read_safe": True}


def write() -> None:
    """Writes all pages, those that changed."""
    for name, page in (("settings", settings_page), ("experiments", experiments_page),
                       ("flags", flags_page)):
        path, text = DOCS / "reference" / f"{name}.md", page()
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def settings_page() -> str:
    """Every setting, made from its declaration."""
    from ntm_jax import typed
    from ntm_jax.runtime import config

    kind = config.config_class()
    kinds = typing.get_type_hints(kind)
    parts = [
        "# Settings",
        "Every setting of an experiment, its default and its meaning. Each is a flag of the "
        "programs, `--config.SECTION.KEY=VALUE`; in Python it is `**{\"SECTION.KEY\": value}` of "
        "[`ntm_jax.experiment`](api.md#the-package). [Experiments](experiments.md) lists what each "
        "experiment changes.",
        "```sh\npython -m launch.train --config=digits --config.train.steps=4000 \\\n"
        "  '--config.trajectory.t_min_range=(0.02,0.05)' --workdir=runs/longer\n```",
        "A switch is written `--config.model.scan` or `--noconfig.model.scan`, and a tuple in "
        "quotes. Unknown settings, other types and values out of range end the program with one "
        "line that names what was expected. [Data sources and text encoders](sources.md) has the "
        "values of `data.source` and `data.text_encoder`.",
    ]
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for name, _, field in typed.settings(kind):
        meaning = prose(field.metadata["setting"].documentation)
        sections.setdefault(name.rpartition(".")[0], []).append(
            (f"`{name}`", f"`{field.default!r}`", meaning))
    for section, rows in sections.items():
        title = f"`{section}`" if section else "Top level"
        about = kinds[section].__doc__ if section else "Settings outside the sections."
        parts += [f"## {title}", docstring(about), table(("setting", "default", "meaning"), rows)]
    return page(parts)


def experiments_page() -> str:
    """Every shipped experiment: its docstring, its variants and what it changes."""
    from ntm_jax.experiments import default
    from ntm_jax.runtime import config

    parts = [
        "# Experiments",
        "The experiments that come with the package, their variants and the settings that they "
        "change. `--config=NAME` or `--config=NAME:VARIANT` starts one; `--config` also takes a "
        "file of your own. Every experiment has the variant `:smoke`: four steps of a tiny model, "
        "with data that need no download, within a minute on one CPU core. `:VARIANT,smoke` is "
        "that of another variant. An experiment that starts from a run needs one of the same "
        "smoke size.",
        "```sh\npython -m launch.train --config=digits --workdir=runs/digits\n```",
    ]
    rows, details = [], []
    defaults = config.flatten(default.get_config().to_dict())
    for name in stems("experiments"):
        module = importlib.import_module(f"ntm_jax.experiments.{name}")
        values = config.flatten(module.get_config().to_dict())
        variants = [*module.get_config.variants[1:], "smoke"]
        listed = ", ".join(f"`:{variant}`" for variant in variants)
        rows.append((f"[`{name}`](#{name})", prose(module.__doc__.splitlines()[0])))
        changed = [(f"`{key}`", shown(value)) for key, value in values.items()
                   if value != defaults[key]]
        details += [f"## `{name}`", docstring(module.__doc__), f"Variants: {listed}.",
                    table(("setting", "value"), changed)]
    return page([*parts, table(("experiment", "what it trains"), rows), *details])


def flags_page() -> str:
    """Every program of launch/ with its docstring and its flags, as --help prints them."""
    parts = [
        "# Programs and flags",
        "Every program and its flags. `--help` of a program prints the same. An installed package "
        "runs them as `ntm-jax NAME` or `python -m ntm_jax.launch.NAME`, a checkout also as "
        "`python -m launch.NAME`.",
        "Programs with `--config` also take every [setting](settings.md) as a flag. Each program "
        "exits with status 0 when it is done, with 2 and one line for a mistake in flags, settings "
        "or files, with 75 for a fault of the machines that a restart may mend, and with 130 when "
        "it is interrupted. An interrupted `train` saves and exits with `--stop_status`, 0 by "
        "default; an interrupted `prepare` exits with 1.",
    ]
    for name in stems("launch"):
        done = subprocess.run([sys.executable, "-m", f"launch.{name}", "--helpxml"], cwd=ROOT,
                              capture_output=True, text=True, check=True)
        tree = ElementTree.fromstring(done.stdout)
        rows = [flag_row(flag) for flag in tree.iter("flag") if flag.findtext("key")]
        parts += [f"## `{name}`", docstring(tree.findtext("usage")),
                  table(("flag", "default", "meaning"), rows)]
    return page(parts)


def flag_row(flag: ElementTree.Element) -> tuple[str, str, str]:
    """A row (name, default, meaning) of Markdown."""
    default = flag.findtext("default") or ""
    meaning = prose(" ".join(flag.findtext("meaning").split()).rstrip(".") + ".")
    choices = ", ".join(f"`{choice.text}`" for choice in flag.iter("enum_value"))
    meaning += f" One of {choices}." if choices else ""
    shown_default = "" if default in ("", "[]") else shown(default)
    return f"`--{flag.findtext('name')}`", shown_default, meaning


def stems(folder: str) -> list[str]:
    """The names of the experiments or programs in a folder."""
    return sorted({path.stem for path in (ROOT / folder).glob("*.py")} - SHARED)


def shown(value) -> str:
    """A value as code; long text is cut."""
    text = value if isinstance(value, str) else repr(value)
    text = "chosen for the data" if value is None else text
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"`{text}`" if text and value is not None else text or '`""`'


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[re.sub(r"(?<!\\)\|", r"\|", cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def page(parts: list[str]) -> str:
    """The text of a page."""
    return "\n\n".join(parts) + "\n"


def docstring(text: str) -> str:
    """A docstring as Markdown; indented paragraphs are commands."""
    blocks = []
    for block in text.strip().split("\n\n"):
        indented = block.startswith("    ")
        lines = [line.removeprefix("    ") for line in block.splitlines()]
        blocks.append("```sh\n" + "\n".join(lines) + "\n```" if indented else prose(block))
    return "\n\n".join(blocks)


def prose(text: str) -> str:
    """Plain text as Markdown: what looks like code becomes code, and the rest is escaped."""
    pieces = text.split("`")  # odd ones are code already
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"\S+", _word, pieces[i])
    return "".join(f"`{piece}`" if i % 2 else piece for i, piece in enumerate(pieces))


def _word(match: re.Match) -> str:
    before, word, after = re.fullmatch(r"([(\"']*)(.*?)([.,;:)\"']*)", match[0]).groups()
    if CODE.search(word) and "{" not in word:
        return f"{before}`{word}`{after}"
    return re.sub(r"([\\*_\[\]<|$])", r"\\\1", match[0])
