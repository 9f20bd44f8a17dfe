"""Every command of the documentation parses: its program, flags, settings and experiment exist.

The commands are those of the sh and bash blocks of README.md and of the pages in docs/. Each is
parsed by the program that it names, with the program's own flags; nothing else of it runs. The
lines that docs/faq.md explains are looked up in the code, and README.md's links among the files.
"""

import ast
import errno
import json
import os
import re
import shlex
import subprocess
import sys

from tests.common import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^[ ]*```(?:sh|bash)\n(.*?)^[ ]*```", re.M | re.S)
ASSIGNMENT = re.compile(r"(?<!\S)([A-Z_]\w*)=(\"[^\"]*\"|'[^']*'|[^\s;&|]*)")
LOOP = re.compile(r"\bfor (\w+) in (\w+)")  # its first pass
# A shipped experiment, not a user's own file.
NAMED = re.compile(r"--config=(?:\w*|(?:\./)?experiments/\w+\.py)(?::\S*)?")
PARSER = """
import io, json, os, runpy, sys, warnings
from absl import app
from launch import program  # imported once, since every command below needs both
from ntm_jax.experiments import default

def parse(call, flags_parser):
    app.define_help_flags()
    flags_parser(sys.argv)

app.run = parse
warnings.simplefilter("ignore")
errors = []
for name, *arguments in json.loads(sys.stdin.read()):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 2)
        os.close(reader)
        status, sys.argv = 0, [f"launch.{name}", *arguments]
        try:
            runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(status or 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        line = pipe.read().strip()
    status = os.waitpid(child, 0)[1]
    errors.append(line or (f"status {status}" if status else ""))
print(json.dumps(errors))
"""


def expanded(text: str, variables: dict[str, str]) -> str:
    """Returns a line of shell with the variables that are known replaced by their values."""
    return re.sub(r"\$(\w+)|\$\{(\w+)\}",
                  lambda found: variables.get(found[1] or found[2], found[0]), text)


def simple_commands(block: str):
    """Yields the words of each simple command of a block of shell, variables replaced."""
    variables: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        text = expanded(line, variables)
        variables |= {name: value.strip("\"'") for name, value in ASSIGNMENT.findall(line)}
        variables |= dict(LOOP.findall(line))
        lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def program_calls(words: list[str]) -> list[list[str]]:
    """Returns the calls of programs, [name, *arguments], that a simple command makes."""
    for place, word in enumerate(words):
        if word == "-m" and words[place + 1].removeprefix("ntm_jax.").startswith("launch."):
            return [[words[place + 1].rpartition(".")[2], *words[place + 2 :]]]
        if word.endswith(("launch/tpu_vm.sh", "launch/slurm.sbatch")):
            return [["train", *words[place + (4 if word.endswith("tpu_vm.sh") else 1) :]]]
        if word.startswith("FLAGS=--") and "launch/gke_jobset.yaml" in words:
            return [["train", *shlex.split(word.removeprefix("FLAGS="))]]
    return []


def adapted(arguments: list[str]) -> list[str]:
    """Returns arguments without a user's own modules, and default.py for a user's experiment."""
    kept = [word for word in arguments if not word.startswith("--import=")]
    return [word if not word.startswith("--config=") or NAMED.fullmatch(word)
            else "--config=default" for word in kept]


def commands(text: str) -> list[list[str]]:
    """Returns every call of a program in the sh and bash blocks of a page."""
    found = [call for block in BLOCK.findall(text) for words in simple_commands(block)
             for call in program_calls(words)]
    return [adapted(call) for call in found if "--help" not in call]


def errors(calls: list[list[str]]) -> list[str]:
    """Returns the line with which each call is refused, '' for one that parses."""
    done = subprocess.run([sys.executable, "-c", PARSER], input=json.dumps(calls), cwd=ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WRONG = {
    "trian --workdir=x": "No module named launch.trian",
    "train --config=digits --workdir=x --steps=3": "Unknown command line flag 'steps'",
    "train --config=digits --workdir=x --train.steps=3": "did you mean --config.train.steps?",
    "train --config=digits --workdir=x --config.model.widht=3": "there is no widht",
    "train --config=digit --workdir=x": "expected one of arrays, captions, default, digits",
}


def test_every_command_parses_and_a_wrong_one_does_not():
    pages = {tuple(call): path.relative_to(ROOT) for path in PAGES
             for call in commands(path.read_text())}
    assert len(pages) > 150
    found = errors([*map(list, pages), *(line.split() for line in WRONG)])
    wrong = [f"{path}: launch.{' '.join(call)}: {error}"
             for (call, path), error in zip(pages.items(), found, strict=False) if error]
    assert not wrong, "\n".join(wrong)
    for said, error in zip(WRONG.values(), found[len(pages):], strict=True):
        assert said in error


def test_every_link_of_the_readme_leads_to_a_file():
    readme = (ROOT / "README.md").read_text()
    links = [link or image for link, image in re.findall(
        r"""\]\(([^)#]+)[^)]*\)|src="([^"]+)""", readme)]
    assert len(links) > 20
    assert [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []


def literals() -> str:
    """Returns the text of every string of the code, f-strings without their values."""
    files = [path for room in ("ntm_jax", "launch", "experiments")
             for path in sorted((ROOT / room).rglob("*.py"))]
    return "\n".join(node.value for path in files for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_the_lines_that_the_faq_explains_exist():
    page = (ROOT / "docs/faq.md").read_text()
    lines = re.findall(r"^`([^`\n]+)`\n: ", page, re.M)
    assert len(lines) > 15
    code = literals() + os.strerror(errno.ENOSPC)
    missing = [f"{part!r} of {line}" for line in lines
               for part in re.split(r"\.\.\.|[(:;]", re.sub("^(error|note): ", "", line))
               if part.strip(" )") not in code]
    assert not missing, "\n".join(missing)
