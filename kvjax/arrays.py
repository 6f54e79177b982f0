"""Declare an array once; derive its abstract value, its sharding, its initial value and its bytes.

A spec tree is any pytree whose leaves are `ArraySpec`. The cache, and everything else that is allocated, is
described by such a tree first, so that what is reported as bytes is what is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype, logical axis names, fill value and memory ('device' or 'host') of one array. Hashable."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    fill: float = 0
    memory: str = "device"

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def nbytes(self) -> int:
        """Bytes of the array; sub-byte dtypes count their packed size."""
        return math.ceil(math.prod(self.shape) * itembits(self.dtype) / 8)


def itembits(dtype: Any) -> int:
    """Bits per element as stored: 4 for int4/uint4, 2 for int2/uint2, 8 * itemsize otherwise."""
    name = jnp.dtype(dtype).name
    for prefix, bits in (("int4", 4), ("uint4", 4), ("int2", 2), ("uint2", 2)):
        if name == prefix:
            return bits
    return 8 * jnp.dtype(dtype).itemsize


def is_spec(x: Any) -> bool:
    """True for an `ArraySpec` leaf; pass as `is_leaf` to `jax.tree.map`."""
    return isinstance(x, ArraySpec)


def abstract(specs: Any) -> Any:
    """The spec tree as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)), specs, is_leaf=is_spec)


def init(specs: Any) -> Any:
    """Allocate the spec tree, every array filled with its `fill`."""
    return jax.tree.map(lambda s: jnp.full(s.shape, s.fill, jnp.dtype(s.dtype)), specs, is_leaf=is_spec)


def nbytes(tree: Any, memory: str | None = None) -> int:
    """Total bytes of a tree of specs, arrays or ShapeDtypeStructs; with `memory` of the specs that live there only."""
    total = 0
    for leaf in jax.tree.leaves(tree, is_leaf=is_spec):
        if is_spec(leaf):
            total += leaf.nbytes if memory in (None, leaf.memory) else 0
        else:
            total += math.ceil(int(np.prod(leaf.shape, dtype=np.int64)) * itembits(leaf.dtype) / 8)
    return total
