"""What every operation shares: the platform traced for, the choice of an implementation, exact products."""

from __future__ import annotations

import math

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def target_platform() -> str:
    """The platform that the current trace is for: "cpu", "gpu" or "tpu".

    An ambient mesh (`jax.set_mesh`) names its device kind, also when its devices are only described, as in
    ahead-of-time compilation for a TPU slice; without one the default backend decides.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kind = device.device_kind.lower()
        return "tpu" if kind.startswith("tpu") else "cpu" if kind == "cpu" else "gpu"
    return jax.default_backend()


def choose_implementation(
    op: str, requested: str | None, unsupported: dict[str, str | None], preference: tuple[str, ...]
) -> str:
    """Resolve `implementation=` of an operation.

    Args:
      op: name of the operation, for messages.
      requested: what the caller asked for; None lets `preference` decide.
      unsupported: for every known implementation why it cannot run on these operands, or None if it can.
      preference: implementations from best to last resort; the first that can run is taken for None.

    Returns: the name of an implementation that can run.

    Raises:
      ValueError: an unknown name, or an explicit one that cannot run; nothing falls back silently.
    """
    if requested is None:
        return next(name for name in preference if unsupported[name] is None)
    if requested not in unsupported:
        raise ValueError(f"{op}: unknown implementation {requested!r}; choose one of {sorted(unsupported)}")
    reason = unsupported[requested]
    if reason is not None:
        usable = [name for name, why in unsupported.items() if why is None]
        raise ValueError(f"{op}: implementation {requested!r} cannot run: {reason}; usable here: {usable}")
    return requested


def split_axes() -> dict[str, int]:
    """Axes of the ambient mesh that XLA splits by itself, with their sizes; axes of size 1 are left out."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
        if size > 1 and kind != jax.sharding.AxisType.Manual
    }


def require_platform(wanted: str) -> str | None:
    """None if a kernel for `wanted` can run in the current trace, else the reason to give for refusing.

    XLA cannot partition a Pallas kernel: under a mesh whose axes it splits by itself a kernel must be called
    inside `jax.shard_map`, and only XLA implementations run outside.
    """
    have = target_platform()
    if have != wanted:
        return f"it needs a {wanted.upper()} and this trace is for {have}"
    split = list(split_axes())
    return f"mesh axes {split} are split by XLA; call it inside jax.shard_map" if split else None


def require_hopper() -> str | None:
    """None if the trace is for a Hopper GPU (compute capability 9.0), else the reason for refusing."""
    reason = require_platform("gpu")
    if reason is None:
        capability = getattr(jax.extend.backend.get_default_device(), "compute_capability", "unknown")
        if capability != "9.0":
            reason = f"it needs a Hopper GPU (compute capability 9.0), this one has {capability}"
    return reason


def dot_precision(dtype: jnp.dtype) -> lax.Precision:
    """Precision of a product: float32 operands stay float32 on GPU and TPU (no TF32, no single bf16 pass)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def check_shape(op: str, name: str, have: tuple[int, ...], want: tuple[int | None, ...]) -> None:
    """Raise ValueError unless shape `have` equals `want`, where None in `want` accepts any size."""
    if len(have) != len(want) or any(w is not None and h != w for h, w in zip(have, want)):
        text = ", ".join("*" if w is None else str(w) for w in want)
        raise ValueError(f"{op}: {name} has shape {tuple(have)}, expected [{text}]")


def check_dtype(op: str, name: str, have: jnp.dtype, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `have` is one of the dtype names in `allowed`."""
    if jnp.dtype(have).name not in allowed:
        raise ValueError(f"{op}: {name} has dtype {jnp.dtype(have).name}; supported: {', '.join(allowed)}")


def check_scale(op: str, scale: float, softcap: float | None) -> None:
    """Raise ValueError unless `scale` is a finite number that is known when tracing, and `softcap` positive or None."""
    try:
        known = math.isfinite(scale)
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"{op}: scale={scale} must be a finite number, such as head_dim ** -0.5")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap={softcap} must be positive, or None for no cap")
