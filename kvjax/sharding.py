"""Logical axis names to mesh axes: one rules table, used for weights, activations and caches alike.

Arrays name their axes ("batch", "kv_heads", "slots", ...). A `Rules` table maps those names to mesh axes. The
library never asks which devices exist: it reads the ambient mesh (`jax.set_mesh`), and without one every
constraint is the identity. Partitioning itself is left to the compiler: top-k over a sharded axis is then an
exact global top-k, and a softmax over sharded slots becomes the log-sum-exp merge of the shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.arrays import is_spec

MESH_AXES = ("data", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class Rules:
    """An ordered table (logical axis, mesh axes). Hashable; axes absent from the table are replicated."""

    table: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("batch", ("data",)),
        ("kv_heads", ("tensor",)),
        ("q_heads", ("tensor",)),
        ("slots", ("sequence",)),
        ("pages", ("data", "sequence", "tensor")),
        ("mlp", ("tensor",)),
        ("vocab", ("tensor",)),
        ("experts", ("tensor",)),
    )

    def spec(self, axes: Sequence[str | None], mesh_axes: Sequence[str]) -> PartitionSpec:
        """PartitionSpec of an array with these logical axes on a mesh that has `mesh_axes`.

        A mesh axis is used once per array: the first logical axis that asks for it gets it.
        """
        table, out = dict(self.table), []
        used: set[str] = set()
        for axis in axes:
            want = tuple(m for m in table.get(axis or "", ()) if m in mesh_axes and m not in used)
            used.update(want)
            out.append(None if not want else want[0] if len(want) == 1 else want)
        return PartitionSpec(*out)


DEFAULT_RULES = Rules()


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules = DEFAULT_RULES) -> jax.Array:
    """Constrain `x` to the sharding its logical axes ask for on the ambient mesh; identity without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, rules.spec(axes, mesh.axis_names))


def shardings(specs: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """A tree of `NamedSharding` for a tree of `ArraySpec`.

    An axis whose size the mesh does not divide is replicated (kv_heads=2 on tensor=8, say).
    """

    def one(s):
        return sharding_of(s.shape, s.axes, mesh, rules)

    return jax.tree.map(one, specs, is_leaf=is_spec)


def sharding_of(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """`NamedSharding` of one array; axes that the mesh does not divide are replicated."""
    spec = []
    for size, part in zip(shape, rules.spec(axes, mesh.axis_names)):
        names = () if part is None else (part,) if isinstance(part, str) else part
        ways = int(np.prod([mesh.shape[n] for n in names], dtype=np.int64))
        spec.append(part if ways > 1 and size % ways == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def to_host(x: jax.Array) -> np.ndarray:
    """All of `x` in host memory, also when other hosts hold parts of it (then every host must make this call)."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def parse_mesh(text: str) -> dict[str, int]:
    """'tensor=2,data=2' -> {'tensor': 2, 'data': 2}. ValueError names an unknown axis or a bad size."""
    sizes: dict[str, int] = {}
    for item in filter(None, (t.strip() for t in text.split(","))):
        name, _, value = item.partition("=")
        if name not in MESH_AXES:
            raise ValueError(f"mesh axis {name!r} is unknown; the axes are {', '.join(MESH_AXES)}")
        if not value.isdigit() or int(value) < 1 or name in sizes:
            raise ValueError(f"mesh entry {item!r} must be AXIS=SIZE with one positive size per axis")
        sizes[name] = int(value)
    return sizes


def make_mesh(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh over the first devices, axes in the order data, sequence, tensor (tensor varies fastest).

    ValueError when there are fewer devices than the product of sizes.
    """
    names = tuple(a for a in MESH_AXES if a in sizes)
    shape = tuple(sizes[a] for a in names)
    need = int(np.prod(shape, dtype=np.int64))
    if need > len(devices):
        raise ValueError(f"mesh {sizes} needs {need} devices, {len(devices)} are present")
    return Mesh(np.asarray(devices[:need]).reshape(shape), names)
