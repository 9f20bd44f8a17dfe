"""Maps launch/ and experiments/ into the package; the metadata are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["ntm_jax", "ntm_jax.*"]),
        "ntm_jax.experiments",
        "ntm_jax.launch",
    ],
    package_dir={"ntm_jax.experiments": "experiments", "ntm_jax.launch": "launch"},
    package_data={"ntm_jax": ["py.typed"], "ntm_jax.launch": ["*.sbatch", "*.sh", "*.yaml"]},
)
