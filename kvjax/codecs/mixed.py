"""Channels of one tensor at two precisions, and a Fourier transform of the channels (VidKV)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.base import NO_CONTEXT, Context, Field, Store
from kvjax.codecs.quantizers import Quantizer, _prefixed, _strip, enter
from kvjax.codecs.wrappers import Wrapper

Array = jax.Array


@functools.cache
def fourier_matrix(d: int) -> np.ndarray:
    """f32 [d, d], orthogonal, d even: column 0 and 1 are the lowest and the highest frequency, then cos and -sin of each.

    Every frequency but those two stands for two conjugate ones: sqrt(2) keeps the length. A product with it is what an
    accelerator does fastest for head_dim channels, and the compiler can partition it, unlike `jnp.fft`.
    """
    angle = 2 * np.pi * np.outer(np.arange(d), np.arange(1, d // 2)) / d
    middle = np.sqrt(2) * np.stack([np.cos(angle), -np.sin(angle)], axis=-1).reshape(d, d - 2)
    ends = np.stack([np.ones(d), (-1.0) ** np.arange(d)], axis=-1)
    return (np.concatenate([ends, middle], axis=-1) / np.sqrt(d)).astype(np.float32)


def real_fft(x: Array) -> Array:
    """[..., d] -> d real numbers: an orthonormal packing of the real Fourier transform (d even)."""
    return jnp.matmul(x, fourier_matrix(x.shape[-1]), precision=jax.lax.Precision.HIGHEST)


def inverse_real_fft(y: Array) -> Array:
    """The inverse of `real_fft`."""
    return jnp.matmul(y, fourier_matrix(y.shape[-1]).T, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Fourier(Wrapper):
    """The real Fourier transform along the channels, then the inner quantizer."""

    inner: Quantizer

    def fields(self, dim: int) -> dict[str, Field]:
        """The inner quantizer's."""
        if dim % 2:
            raise ValueError(f"a real Fourier transform of {dim} channels needs an even number")
        return self.inner.fields(dim)

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """Transform, then encode."""
        return self.inner.encode(real_fft(x), ctx)

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """Decode, then transform back."""
        return inverse_real_fft(self.inner.decode(store, dim, ctx))


@dataclasses.dataclass(frozen=True)
class SplitChannels(Quantizer):
    """The `share` of channels with the largest range within `tokens` tokens by `wide`, the others by `narrow`.

    `order` (uint8) lists the channels, wide ones first, for every head and `tokens` tokens.
    """

    wide: Quantizer
    narrow: Quantizer
    share: float
    tokens: int = 32

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Tokens encoded together."""
        return math.lcm(self.tokens, self.wide.unit, self.narrow.unit)

    def _count(self, dim: int) -> int:
        # Both parts in steps of 8 channels, so that codes of one bit fill bytes.
        return min(round(self.share * dim / 8) * 8, dim)

    def fields(self, dim: int) -> dict[str, Field]:
        """Both parts' fields and the order."""
        if dim > 256:
            raise ValueError(f"channel indices are bytes, head_dim={dim} is over 256")
        out = {"order": Field((dim,), "uint8", per=self.tokens)}
        for prefix, part, n in self._parts(dim):
            out |= _prefixed(prefix, part.fields(n))
        return out

    def _parts(self, dim: int) -> list[tuple[str, Quantizer, int]]:
        n = self._count(dim)
        return [(p, q, c) for p, q, c in (("wide_", self.wide, n), ("narrow_", self.narrow, dim - n)) if c]

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        b, h, n, d = x.shape
        y = x.reshape(b, h, n // self.tokens, self.tokens, d)
        order = jnp.argsort(-(y.max(3) - y.min(3)), axis=-1)
        count = self._count(d)
        # Inside a part the channels keep their order, which is what a Fourier transform sees.
        order = jnp.concatenate([jnp.sort(order[..., :count], -1), jnp.sort(order[..., count:], -1)], axis=-1)
        store: Store = {"order": order.astype(jnp.uint8)}
        y = jnp.take_along_axis(y, order[..., None, :], axis=-1).reshape(x.shape)
        at = 0
        for prefix, part, c in self._parts(d):
            store |= _prefixed(prefix, part.encode(y[..., at : at + c], enter(ctx, prefix)))
            at += c
        return store

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        parts = [
            part.decode(_strip(prefix, store), c, enter(ctx, prefix)) for prefix, part, c in self._parts(dim)
        ]
        y = jnp.concatenate(parts, axis=-1)
        b, h, n, d = y.shape
        back = jnp.argsort(store["order"].astype(jnp.int32), axis=-1)
        y = y.reshape(b, h, n // self.tokens, self.tokens, d)
        return jnp.take_along_axis(y, back[..., None, :], axis=-1).reshape(b, h, n, d)
