"""Shared test set-up: the CPU backend with eight virtual devices, so that sharded tests run anywhere.

`JAX_PLATFORMS` in the environment wins: `JAX_PLATFORMS=cuda python -m pytest -m gpu` runs the GPU tests.
"""

import os

# Before jax is imported; processes that tests start inherit both. Tests compile far more than they compute, so
# the compiler skips its expensive passes: a third less time in all.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
