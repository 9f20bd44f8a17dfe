"""The programs, python -m launch.NAME or python -m ntm_jax.launch.NAME, and the launchers."""
