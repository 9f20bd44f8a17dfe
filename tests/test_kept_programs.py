"""Compiled programs are kept for later runs: in the folder asked for, or the user's cache."""

import os

import jax
import pytest
from absl import flags

from launch import program


def kept(flag: str | None, environment: str | None) -> str | None:
    """The folder of compiled programs for --compilation_cache and JAX_COMPILATION_CACHE_DIR."""
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", environment)
        program._keep_programs(flag)
        return jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_job_on_accelerators_keeps_them_beside_its_run(monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_integer("num_processes", 2, "", flag_values=values)
    flags.DEFINE_string("workdir", "gs://bucket/run/", "", flag_values=values)
    flags.DEFINE_string("config", "digits", "", flag_values=values)
    values(["program"])
    monkeypatch.setattr(program, "FLAGS", values)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert kept(None, None) == "gs://bucket/run-programs"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert kept(None, None) != "gs://bucket/run-programs"


@pytest.mark.parametrize(("flag", "environment", "expected"), [
    (None, None, "~/.cache/ntm_jax/programs/3-cores"), (None, "/elsewhere", "/elsewhere"),
    ("/mine", "/elsewhere", "/mine"), ("", "/elsewhere", None)])
def test_a_flag_comes_before_the_environment(monkeypatch, tmp_path, flag, environment, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    assert kept(flag, environment) == (expected and os.path.expanduser(expected))
