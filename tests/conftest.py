"""Shared test set-up: the CPU backend with eight virtual devices, so that sharded tests run anywhere.

`JAX_PLATFORMS` in the environment wins: `JAX_PLATFORMS=cuda python -m pytest -m gpu` runs the GPU tests.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; processes started by tests inherit it

import jax

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
