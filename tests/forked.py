"""Starts programs as forks of a process that has imported jax and the rest: 4 s of CPU less each.

What a program imports is the only difference: it has its own arguments, folder, environment,
streams and devices.
"""

import atexit
import concurrent.futures
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import types

import jax

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.imports"])
_OPTIMIZATIONS = "JAX_DISABLE_MOST_OPTIMIZATIONS"
_PACKAGES = ("launch.", "ntm_jax.launch.", "tests.")


def possible(arguments, env: dict, usual: dict) -> bool:
    """Whether `python ARGUMENTS` is a program, in an environment where imports are as `usual`.

    jax and Python read their variables as they start; one of jax's is set later, too.
    """
    names = {name for name in env | usual if name.startswith(("JAX_", "PYTHON"))}
    imports = arguments[0] == "-c" or (
        arguments[0] == "-m" and arguments[1].startswith(_PACKAGES))
    return imports and all(
        env.get(name) == usual.get(name) for name in names - {_OPTIMIZATIONS})


class Program:
    """A running `python ARGUMENTS`: the part of subprocess.Popen that tests need.

    arguments: `-m`, a module and its arguments, or `-c`, a program's text and its arguments.
    """

    def __init__(self, arguments, cwd, env: dict):
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(2)]
        self._process = _CONTEXT.Process(
            target=_run, args=(list(map(str, arguments)), str(cwd), env,
                               *(write for _, write in pipes)))
        self._process.start()
        self.stdout, self.stderr = (
            os.fdopen(os.dup(read.fileno()), encoding="utf-8") for read, _ in pipes)
        for pipe in pipes:
            for end in pipe:
                end.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of stdout and stderr, once the program has ended."""
        pool = concurrent.futures.ThreadPoolExecutor()
        texts = pool.map(_rest, (self.stdout, self.stderr))
        self.wait(timeout)
        return tuple(texts)


def _rest(stream) -> str:
    with stream:
        return stream.read()


def _run(arguments, cwd, env, out, err) -> None:
    """Turns this fork into the program."""
    for stream, number in ((out, 1), (err, 2)):
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(env)
    jax.config.update("jax_disable_most_optimizations", env.get(_OPTIMIZATIONS) == "1")
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    kind, program, *rest = arguments
    sys.argv = ["-c" if kind == "-c" else program, *rest]
    multiprocessing.set_start_method(None, force=True)
    try:
        if kind == "-c":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(program, main.__dict__)
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:  # what a process of multiprocessing leaves out of Python's end
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
