"""Shared test set-up: the CPU backend with eight virtual devices, so that sharded tests run anywhere.

`JAX_PLATFORMS` in the environment wins: `JAX_PLATFORMS=cuda python -m pytest -m gpu` runs the GPU tests.
"""

import gc
import pathlib

import jax
import pytest

from tests import compiler

compiler.start()

MOST_MAPPINGS = (
    6_000  # Linux allows a process 65,530; every compiled program takes some, and half a megabyte each
)


@pytest.fixture(autouse=True)
def _forget_programs():
    """Drop compiled programs before the process runs out of memory mappings, where the compiler would crash."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
