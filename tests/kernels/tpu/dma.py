"""Count the bytes a Pallas TPU call moves: walk its grid and evaluate its index maps, as the pipeline does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from unittest import mock

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl


@dataclasses.dataclass
class Call:
    """One captured `pallas_call`: its grid and the operands it was given."""

    grid_spec: object
    out_shape: list
    cost: pl.CostEstimate
    operands: tuple

    def traffic(self) -> tuple[int, int]:
        """(bytes read, bytes written): a block moves when its index differs from the step before."""
        scalars = [np.asarray(x) for x in self.operands[: self.grid_spec.num_scalar_prefetch]]
        arrays = self.operands[self.grid_spec.num_scalar_prefetch :]
        read = self._walk(self.grid_spec.in_specs, arrays, scalars)
        return read, self._walk(self.grid_spec.out_specs, self.out_shape, scalars)

    def _walk(self, specs, arrays, scalars) -> int:
        specs = specs if isinstance(specs, list | tuple) else [specs]
        total = 0
        for spec, array in zip(specs, arrays, strict=True):
            last = None
            for step in itertools.product(*(range(n) for n in self.grid_spec.grid)):
                index = tuple(int(i) for i in spec.index_map(*step, *scalars))
                if index != last:
                    total += self._block_bytes(spec.block_shape, index, array)
                    last = index
        return total

    @staticmethod
    def _block_bytes(block, index, array) -> int:
        """Bytes of a block, cut off at the end of the array."""
        sizes = [min(b, n - i * b) for b, i, n in zip(block, index, array.shape, strict=True)]
        assert all(s > 0 for s in sizes), f"block {index} lies outside {array.shape}"
        return math.prod(sizes) * jnp.dtype(array.dtype).itemsize


def capture(module, fn, *args, **kwargs) -> list[Call]:
    """Run `fn` with `module.pl.pallas_call` replaced by one that records the call and returns zeros."""
    calls = []

    def record(kernel, *, grid_spec, out_shape, cost_estimate, **_):
        shapes = out_shape if isinstance(out_shape, list | tuple) else [out_shape]

        def call(*operands):
            calls.append(Call(grid_spec, shapes, cost_estimate, operands))
            zeros = [jnp.zeros(s.shape, s.dtype) for s in shapes]
            return zeros if isinstance(out_shape, list | tuple) else zeros[0]

        return call

    with mock.patch.object(module.pl, "pallas_call", record):
        fn(*args, **kwargs)
    return calls
