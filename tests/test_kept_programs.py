"""Compiled programs are kept for later runs: in the folder asked for, or the user's cache."""

import jax
import pytest

from launch import program


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """kept(folder): where programs are kept for --compilation_cache=folder; HOME is tmp_path."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("HOME", str(tmp_path))

    def keep(folder, environment=None):
        jax.config.update("jax_compilation_cache_dir", environment)
        program._keep_programs(folder)
        return jax.config.jax_compilation_cache_dir

    yield keep
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_default_is_the_users_cache_for_this_number_of_cores(kept, tmp_path, monkeypatch):
    for cores in (1, 2):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)))
        folder = tmp_path / f".cache/ntm_jax/programs/{cores}-cores"
        assert kept(None) == str(folder)
        assert folder.is_dir()


def test_a_flag_and_the_environment_come_first(kept):
    assert kept(None, environment="/elsewhere") == "/elsewhere"
    assert kept("/mine", environment="/elsewhere") == "/mine"
    assert kept("") is None
    assert kept("", environment="/elsewhere") is None
