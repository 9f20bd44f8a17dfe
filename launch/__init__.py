"""The programs, python -m launch.NAME, python -m ntm_jax.launch.NAME or ntm-jax NAME; launchers."""
