"""Compiler settings of the tests, which compile far more than they compute."""

import importlib.metadata
import os

import jax

# These skip the expensive passes: a third less time in all. Processes that tests start inherit them.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# The older, quicker emitters, and one module a program: again a third less. Other versions of XLA, the one inside libtpu
# too, may not know these two and end the process then; so they are gone from the environment once the CPU has started.
CPU_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def start() -> None:
    """Unless the environment names another platform, start the CPU with these flags and eight devices."""
    if os.environ.setdefault("JAX_PLATFORMS", "cpu") != "cpu":
        return
    flags = os.environ.setdefault("XLA_FLAGS", FLAGS)
    if flags == FLAGS and importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] = f"{FLAGS} {CPU_FLAGS}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.devices()
    os.environ["XLA_FLAGS"] = flags
