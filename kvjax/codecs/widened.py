"""One field layout for layers that share a pool of pages although their codecs store different widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.base import NO_CONTEXT, Codec, Context, Field, Store
from kvjax.types import ModelShape

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Widened(Codec):
    """`inner`, its fields padded along the last axis and cast to those of the widest layer.

    Pages of one pool go to whichever layer needs them, so every page has room for the widest code of a slot: a slot
    of a narrower layer leaves the rest unused, and the bytes that the plan reports include it. No fused kernel
    reads such a store; attention decodes it tile by tile.
    """

    inner: Codec
    wide: tuple[tuple[str, Field], ...]

    @property
    def group(self) -> int:  # type: ignore[override]
        """The inner codec's."""
        return self.inner.group

    @property
    def residual(self) -> int:  # type: ignore[override]
        """The inner codec's."""
        return self.inner.residual

    @property
    def sink(self) -> int:  # type: ignore[override]
        """The inner codec's."""
        return self.inner.sink

    @property
    def scorer(self):  # type: ignore[override]
        """The inner codec's."""
        return self.inner.scorer

    @property
    def block(self) -> int:
        """The inner codec's."""
        return self.inner.block

    def fields(self, head_dim: int, dtype: str) -> dict[str, Field]:
        """The wide ones."""
        return dict(self.wide)

    def constants(self, layer: int, shape: ModelShape) -> dict[str, np.ndarray]:
        """The inner codec's."""
        return self.inner.constants(layer, shape)

    def check(self, shape: ModelShape) -> None:
        """As the inner codec."""
        self.inner.check(shape)

    def encode(self, k: Array, v: Array, ctx: Context = NO_CONTEXT) -> Store:
        """The inner codec's fields, padded with zeros."""
        wide = dict(self.wide)

        def pad(name: str, x: Array) -> Array:
            more = [b - a for a, b in zip(x.shape[x.ndim - len(wide[name].suffix) :], wide[name].suffix)]
            zeros = [(0, 0)] * (x.ndim - len(more)) + [(0, n) for n in more]
            return jnp.pad(x.astype(wide[name].dtype), zeros)

        return {name: pad(name, x) for name, x in self.inner.encode(k, v, ctx).items()}

    def decode(self, store: Store, dtype: str, ctx: Context = NO_CONTEXT) -> tuple[Array, Array]:
        """The inner codec's decoding of its own part."""
        own = self.inner.fields(ctx.head_dim, dtype)

        def cut(name: str, x: Array) -> Array:
            lead = x.ndim - len(own[name].suffix)
            part = (*(slice(None),) * lead, *(slice(0, n) for n in own[name].suffix))
            return x[part].astype(own[name].dtype)

        return self.inner.decode({name: cut(name, store[name]) for name in own}, dtype, ctx)


def widen(codecs: Sequence[Codec], head_dim: int, dtype: str, name: str) -> list[Codec]:
    """Codecs of layers that share a pool, with one set of fields; unchanged where they agree already.

    ValueError, naming the policy `name`, when slots of one layer cannot be stored as those of another.
    """
    fields = [codec.fields(head_dim, dtype) for codec in codecs]
    if all(f == fields[0] for f in fields):
        return list(codecs)

    def layout(found: dict[str, Field]) -> dict[str, tuple]:
        return {n: (f.per, f.before, len(f.suffix)) for n, f in found.items()}

    windows = {(c.group, c.residual, c.sink) for c in codecs}
    if len(windows) > 1 or any(layout(f) != layout(fields[0]) for f in fields):
        raise ValueError(
            f"{name}: layers that compete for entries share one pool, which needs codes of the same structure in every "
            f"layer; {type(codecs[0]).__name__} differs between layers. Use an allocator that decides layer by layer "
            "(adakv, taskkv, the uniform one), or another codec"
        )
    wide = []
    for n, first in fields[0].items():
        every = [f[n] for f in fields]
        suffix = tuple(max(sizes) for sizes in zip(*(f.suffix for f in every)))
        kinds = [jnp.dtype(f.dtype) for f in every]
        kind = max(kinds, key=lambda d: d.itemsize)
        if any(k != kind and not np.can_cast(k, kind, "safe") for k in kinds):
            raise ValueError(
                f"{name}: {n} has dtypes {sorted({k.name for k in kinds})} in layers that share a pool"
            )
        wide.append((n, dataclasses.replace(first, suffix=suffix, dtype=kind.name)))
    return [Widened(c, tuple(wide)) for c in codecs]
