"""From flags to a loaded model on its devices: what generate, eval and demo share."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import importlib.util
import os
import pathlib
import sys
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from kvjax.generation import engine
from kvjax.generation.generator import Generator
from kvjax.policies import Policy
from kvjax.sharding import make_mesh, parse_mesh, sharding_of
from models import checkpoint
from models.lm import DecoderLM

DTYPES = ("auto", "float32", "bfloat16")


def define_model_flags(f: flags.FlagValues) -> None:
    """Flags of every command that runs a model."""
    flags.DEFINE_string(
        "model",
        "kvref-22m",
        "embedded model, Hugging Face directory (safetensors), or Orbax directory",
        flag_values=f,
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        DTYPES,
        "of weights and cache; auto: float32 on a CPU, else the checkpoint's",
        flag_values=f,
    )
    flags.DEFINE_integer(
        "chunk", 0, "prefill this many tokens at a time (0: the whole prompt)", flag_values=f
    )
    flags.DEFINE_string(
        "mesh", "", "spread over devices, e.g. tensor=2,data=2 (axes: data, sequence, tensor)", flag_values=f
    )
    flags.DEFINE_integer(
        "cpu_devices",
        0,
        "split the host CPU into this many devices, to try --mesh without others",
        flag_values=f,
    )
    flags.DEFINE_string(
        "distributed",
        "",
        "join the other hosts: 'auto' (TPU pod, Slurm, ...) or HOST:PORT,PROCESSES,ID of the first host and this one",
        flag_values=f,
    )
    flags.DEFINE_integer(
        "memory_limit",
        0,
        "refuse a cache of more bytes than this (0: what the devices have free)",
        flag_values=f,
    )


@dataclasses.dataclass(frozen=True)
class Session:
    """A loaded model and where it runs."""

    model: checkpoint.Model
    lm: DecoderLM
    dtype: str
    mesh: Mesh | None
    chunk: int | None
    memory_limit: int | None

    @property
    def backend(self) -> str:
        """Platform and kind of the devices, e.g. 'cpu' or 'gpu (NVIDIA H200)'."""
        device = jax.devices()[0]
        kind = device.device_kind
        return device.platform if kind == device.platform else f"{device.platform} ({kind})"

    def generator(self, policy: Policy) -> Generator:
        """A generator of this model under `policy`."""
        return Generator(
            self.lm,
            self.model.params,
            policy,
            chunk=self.chunk,
            mesh=self.mesh,
            memory_limit=self.memory_limit,
        )

    def encode(self, text: str) -> list[int]:
        """Token ids without begin-of-text."""
        return self.model.tokenizer.encode(text, bos=False)

    def begin(self) -> list[int]:
        """The token that starts every sequence, if the model has one."""
        bos = self.model.tokenizer.bos_id
        return [] if bos is None else [bos]


def check_model_flags(f: flags.FlagValues) -> dict[str, int]:
    """Mesh sizes; ValueError for flags that contradict each other. Starts no backend, so it comes first."""
    for name in ("chunk", "cpu_devices", "memory_limit"):
        value: Any = f[name].value
        if value < 0:
            raise ValueError(f"--{name} must not be negative, got {value}")
    if f.distributed:
        parse_distributed(f.distributed)
    return parse_mesh(f.mesh)


def open_session(f: flags.FlagValues) -> Session:
    """Start the backend, load the model and place its weights. ValueError for whatever the user can mend."""
    sizes = check_model_flags(f)
    skip_absent_tpu()
    if f.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", f.cpu_devices)
    if f.distributed:
        jax.distributed.initialize(**parse_distributed(f.distributed))
        if jax.process_index() != 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (one process speaks, to the end)
    mesh = make_mesh(sizes, jax.devices()) if sizes else None
    dtype = f.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else None
    place = None if mesh is None else lambda axes, shape: sharding_of(shape, axes, mesh)
    model = checkpoint.load(f.model, dtype, place)
    dtype = dtype or model.config.dtype
    limit = f.memory_limit or free_memory(mesh)
    return Session(
        model, DecoderLM(model.config, dtype, model.fingerprint), dtype, mesh, f.chunk or None, limit
    )


def parse_distributed(text: str) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` from --distributed; ValueError for a malformed one."""
    if text == "auto":
        return {}
    address, *numbers = text.split(",")
    if ":" not in address or len(numbers) != 2 or not all(n.isdigit() for n in numbers):
        raise ValueError(f"--distributed must be auto or HOST:PORT,PROCESSES,ID, got {text!r}")
    processes, index = map(int, numbers)
    if index >= processes:
        raise ValueError(f"--distributed: process {index} of {processes} does not exist; they count from 0")
    return {"coordinator_address": address, "num_processes": processes, "process_id": index}


def skip_absent_tpu() -> None:
    """Keep libtpu, installed to compile ahead of time, from complaining on stderr that the host has no TPU.

    Only where no accelerator of any kind is attached and the platform was left open: the CPU is what remains.
    """
    devices = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia[0-9]*", "/dev/kfd")
    attached = any(glob.glob(pattern) for pattern in devices)
    if (
        jax.config.values["jax_platforms"] is None
        and importlib.util.find_spec("libtpu") is not None
        and not attached
    ):
        jax.config.update("jax_platforms", "cpu")


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The ambient mesh of calls to `kvjax.generation.engine`, or nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def free_memory(mesh: Mesh | None) -> int | None:
    """Bytes that the devices in use have free, together; None where the platform does not tell."""
    used = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    if used[0].platform == "cpu":
        return _free_host_memory()
    stats = [d.memory_stats() for d in used if d.process_index == jax.process_index()]
    if not all(stats):
        return None
    return sum(s["bytes_limit"] - s["bytes_in_use"] for s in stats if s)


def _free_host_memory() -> int | None:
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def compilations() -> int:
    """Programs compiled so far for prefill, extension and decoding."""
    functions: list[Any] = [
        engine.prefill,
        engine.extend,
        engine.begin,
        engine.decode,
        engine.decode_overlapping,
    ]
    return sum(f._cache_size() for f in functions)
