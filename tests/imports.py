"""Imports what the programs import, in the process that forked.py forks. No device is opened."""

import gc
import os
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"

# ruff: noqa: F401
import flax.linen
import grain.python
import matplotlib.pyplot
import ml_collections
import optax
import orbax.checkpoint
import scipy.ndimage
import sklearn.datasets
import sklearn.svm
import tensorboardX

import ntm_jax.api
import ntm_jax.evaluation.evaluate
import ntm_jax.sampling.generate
import ntm_jax.training.loop
import ntm_jax.training.pictures

warnings.filterwarnings("ignore", "os.fork")  # jax's threads start with its devices
gc.freeze()  # what is imported is never garbage: collecting it takes 5 % of a program's time
gc.set_threshold(50_000)
