"""The console script: `ntm-jax train` is python -m ntm_jax.launch.train; `ntm-jax` lists all."""

import ast
import pathlib
import runpy
import sys

from . import program

PROGRAMS = ("train", "evaluate", "sample", "export", "prepare", "compile", "benchmark", "collect",
            "sbi", "truth")


def main():
    """Runs the program that the first argument names; without arguments lists the programs."""
    program.START = "ntm-jax "
    name = sys.argv.pop(1) if sys.argv[1:] else "--help"
    if name in PROGRAMS:
        runpy.run_module(f"{__package__}.{name}", run_name="__main__", alter_sys=True)
    elif name == "--help":
        print("ntm-jax PROGRAM --FLAG=VALUE ...; ntm-jax PROGRAM --help lists its flags.\n")
        for name in PROGRAMS:
            source = pathlib.Path(__file__).with_name(f"{name}.py").read_text()
            about = str(ast.get_docstring(ast.parse(source))).splitlines()[0]
            print(f"{name:<10} {about.partition(': python')[0].rstrip('.')}.")
    else:
        program.fail(f"{name} is not a program: expected one of {', '.join(PROGRAMS)}")
