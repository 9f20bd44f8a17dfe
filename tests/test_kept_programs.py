"""Compiled programs are kept for later runs: in the folder asked for, or the user's cache."""

import os

import jax
import pytest

from launch import program


@pytest.mark.parametrize(("flag", "environment", "expected"), [
    (None, None, "~/.cache/ntm_jax/programs/3-cores"), (None, "/elsewhere", "/elsewhere"),
    ("/mine", "/elsewhere", "/mine"), ("", "/elsewhere", None)])
def test_a_flag_comes_before_the_environment(monkeypatch, tmp_path, flag, environment, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", environment)
        program._keep_programs(flag)
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert found == (expected and os.path.expanduser(expected))
