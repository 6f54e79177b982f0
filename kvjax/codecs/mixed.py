"""Channels of one tensor at two precisions, and a Fourier transform of the channels (VidKV)."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax.codecs.base import NO_CONTEXT, Context, Field, Store
from kvjax.codecs.quantizers import Quantizer, _prefixed, _strip, enter
from kvjax.codecs.wrappers import Wrapper

Array = jax.Array


def real_fft(x: Array) -> Array:
    """[..., d] -> d real numbers: an orthonormal packing of the real Fourier transform (d even)."""
    d = x.shape[-1]
    y = jnp.fft.rfft(x, axis=-1, norm="ortho")
    # Every frequency but the first and the last stands for two conjugate ones: sqrt(2) keeps the length.
    middle = jnp.stack([y.real[..., 1:-1], y.imag[..., 1:-1]], axis=-1) * math.sqrt(2)
    ends = jnp.stack([y.real[..., 0], y.real[..., -1]], axis=-1)
    return jnp.concatenate([ends, middle.reshape(*x.shape[:-1], d - 2)], axis=-1)


def inverse_real_fft(y: Array) -> Array:
    """The inverse of `real_fft`."""
    d = y.shape[-1]
    middle = y[..., 2:].reshape(*y.shape[:-1], d // 2 - 1, 2) / math.sqrt(2)
    spectrum = jnp.concatenate(
        [y[..., :1] + 0j, middle[..., 0] + 1j * middle[..., 1], y[..., 1:2] + 0j], axis=-1
    )
    return jnp.fft.irfft(spectrum, n=d, axis=-1, norm="ortho")


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
