"""Saving and restoring caches with Orbax: arrays as they are stored, with a version, a checksum and an owner."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from kvjax import arrays
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache

VERSION = 1
_HEADER = "kvjax_cache.json"


def _header(plan: Plan, model: str) -> dict[str, Any]:
    """What must agree before the arrays mean anything."""
    codecs = [repr(lp.policy.codec) for lp in plan.layers]
    return {
        "version": VERSION,
        "model": model,
        "shape": repr(dataclasses.astuple(plan.shape)[:-1]),  # without the weights, which `model` names
        "codecs": hashlib.sha256("\n".join(codecs).encode()).hexdigest(),
        "codec": codecs[0],
        "layout": [plan.batch, plan.prompt, plan.reserve, plan.page_size],
    }


def _leaves(cache: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(cache, is_leaf=arrays.is_spec)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def _bytes(x: np.ndarray) -> np.ndarray:
    """The array's bytes: what is stored, so that fp8 and other extension types survive any version of numpy."""
    return np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)


def _checksum(stored: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(stored):
        digest.update(name.encode())
        digest.update(stored[name].tobytes())
    return digest.hexdigest()


def save(path: str | pathlib.Path, plan: Plan, cache: KVCache, model: str = "") -> None:
    """Write a cache. path: a directory that does not exist yet. model: fingerprint of the weights.

    ValueError when the directory exists, the cache is not the plan's, or its pages are on disk.
    """
    if plan.on_disk:
        raise ValueError(
            f"{plan.policy.name}: the pages of this cache are in files of their own and are not saved"
        )
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists; a saved cache is never overwritten")
    stored = {name: _bytes(np.asarray(x)) for name, x in _leaves(cache).items()}
    if stored.keys() != _leaves(plan.specs()).keys():
        raise ValueError("this cache does not belong to this plan: their arrays differ")
    # An empty array has no bytes to store; its spec says all there is.
    full = {name: x for name, x in stored.items() if x.size}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "arrays", {str(i): full[n] for i, n in enumerate(sorted(full))})
    header = {**_header(plan, model), "checksum": _checksum(full)}
    (path / _HEADER).write_text(json.dumps(header, indent=1))


def restore(path: str | pathlib.Path, plan: Plan, model: str = "") -> KVCache:
    """Read a cache that `save` wrote with the same plan and model.

    ValueError names what differs: the version, the model, the codec or the layout; or a damaged file.
    """
    path = pathlib.Path(path).absolute()
    try:
        found = json.loads((path / _HEADER).read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} holds no saved cache ({type(e).__name__})") from None
    want = _header(plan, model)
    for name, text in (
        ("version", "was written by format version {0}, this is {1}"),
        ("model", "belongs to another model ({0!r}; this one is {1!r})"),
        ("shape", "belongs to a model of another shape ({0}; this one is {1})"),
        ("codecs", "was stored by another codec ({2}; this one is {3})"),
        ("layout", "has another layout (batch, prompt, reserve, page size {0}; this one has {1})"),
    ):
        if found.get(name) != want[name]:
            why = text.format(found.get(name), want[name], found.get("codec"), want["codec"])
            raise ValueError(f"the cache in {path} {why}")
    specs = _leaves(plan.specs())
    full = {name: spec for name, spec in specs.items() if spec.nbytes}
    target = {str(i): jax.ShapeDtypeStruct((full[n].nbytes,), np.uint8) for i, n in enumerate(sorted(full))}
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(path / "arrays", target)
    stored = {n: np.asarray(read[str(i)]) for i, n in enumerate(sorted(full))}
    if _checksum(stored) != found.get("checksum"):
        raise ValueError(f"the cache in {path} is damaged: its checksum does not match")

    def build(key: Any, spec: arrays.ArraySpec) -> jax.Array:
        name = jax.tree_util.keystr(key)
        flat = stored.get(name, np.zeros(0, np.uint8))
        return jax.numpy.asarray(
            np.frombuffer(flat.tobytes(), jax.numpy.dtype(spec.dtype)).reshape(spec.shape)
        )

    return jax.tree_util.tree_map_with_path(build, plan.specs(), is_leaf=arrays.is_spec)


def check_finite(plan: Plan, cache: KVCache) -> None:
    """ValueError naming the first layer and KV head whose stored keys or values hold NaN or infinity.

    Runs on the host; call it where a damaged cache must not be served or saved.
    """
    for i, layer in enumerate(cache.layers):
        pool = cache.pools[plan.layers[i].pool]
        for name, x in {**pool.store, **_residual(layer)}.items():
            values = np.asarray(x)
            if not jax.numpy.issubdtype(values.dtype, jax.numpy.floating):
                continue
            bad = np.argwhere(~np.isfinite(values.astype(np.float32)))
            if len(bad):
                head = f"head {bad[0][1]}" if layer.table is None or name in _residual(layer) else "a page"
                raise ValueError(f"layer {i}, {head}: the stored {name} holds a value that is not finite")


def _residual(layer: Any) -> dict[str, jax.Array]:
    if layer.residual is None:
        return {}
    return {"residual k": layer.residual.k, "residual v": layer.residual.v}
