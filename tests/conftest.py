"""Shared test set-up: the CPU backend with eight virtual devices, so that sharded tests run anywhere.

`JAX_PLATFORMS` in the environment wins: `JAX_PLATFORMS=cuda python -m pytest -m gpu` runs the GPU tests.
"""

import gc
import importlib.metadata
import os
import pathlib

# Before jax is imported; processes that tests start inherit both. Tests compile far more than they compute, so
# the compiler skips its expensive passes and emits one module a program by its older, quicker emitters: half the time
# in all. XLA ends the process at a flag that it does not know, hence the version.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)

MOST_MAPPINGS = 20_000  # Linux allows a process 65,530, and every compiled program takes some


@pytest.fixture(autouse=True)
def _forget_programs():
    """Drop compiled programs before the process runs out of memory mappings, where the compiler would crash."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
