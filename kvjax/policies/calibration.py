"""Calibration files: arrays per layer with the fingerprint of the model they were measured on.

A file is a safetensors file; its metadata holds `fingerprint`, and free-form notes. `launch.calibrate` writes
them; scorers and allocators that need one read it here.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kvjax.types import ModelShape


def fingerprint(shape: ModelShape, weights: str = "") -> str:
    """What identifies a model: its cache shape, and a digest of its weights where one is known (or `shape` has it)."""
    weights = weights or shape.weights
    base = (
        f"layers={shape.layers},q_heads={shape.q_heads},kv_heads={shape.kv_heads},head_dim={shape.head_dim}"
    )
    return f"{base},weights={weights}" if weights else base


def save(path: str, arrays: dict[str, np.ndarray], mark: str, notes: dict[str, Any] | None = None) -> None:
    """Write `arrays` with the model's fingerprint `mark`; `notes` is stored as JSON."""
    meta = {"fingerprint": mark, "notes": json.dumps(notes or {}, sort_keys=True)}
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path, metadata=meta)


def load(path: str, mark: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a calibration file.

    mark: fingerprint of the model in use. The shape part must agree; the digest of the weights must agree when
    both sides have one. ValueError for a missing or unreadable file, and for another model's file.
    """
    if not pathlib.Path(path).is_file():
        raise ValueError(
            f"calibration file {path!r} does not exist; write it with python -m launch.calibrate"
        )
    try:
        with safe_open(path, framework="numpy") as f:
            found = (f.metadata() or {}).get("fingerprint", "")
            arrays = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (a handle, not a dict)
    except SafetensorError as e:
        raise ValueError(f"{path!r} is not a calibration file ({e})") from None
    if mark is not None and not same_model(found, mark):
        raise ValueError(
            f"calibration file {path!r} belongs to another model ({found or 'no fingerprint'}; "
            f"this one is {mark}); calibrate this model with python -m launch.calibrate"
        )
    return arrays


def array(path: str, name: str) -> np.ndarray:
    """One array of a calibration file, whatever model it belongs to; ValueError when it is missing."""
    arrays = load(path)
    if name not in arrays:
        raise ValueError(
            f"calibration file {path!r} has no array {name!r}; it has {', '.join(sorted(arrays))}"
        )
    return arrays[name]


def same_model(a: str, b: str) -> bool:
    """True when two fingerprints agree on every entry that both have, and share the shape entries."""
    x, y = (dict(item.partition("=")[::2] for item in s.split(",") if item) for s in (a, b))
    shape = {"layers", "q_heads", "kv_heads", "head_dim"}
    return shape <= x.keys() & y.keys() and all(x[n] == y[n] for n in x.keys() & y.keys())


def load_layer(path: str, names: tuple[str, ...], layer: int, shape: ModelShape) -> dict[str, np.ndarray]:
    """Entry `layer` of the named arrays (leading axis: layers); ValueError when one is missing."""
    arrays = load(path, fingerprint(shape))
    for name in names:
        if name not in arrays:
            raise ValueError(
                f"calibration file {path!r} has no array {name!r}; it has {', '.join(sorted(arrays))}"
            )
    return {name: arrays[name][layer] for name in names}
