"""Quantizers that round to a table of levels, or to few mantissa bits."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs import packing, vector
from kvjax.codecs.base import NO_CONTEXT, Context, Field, Store
from kvjax.codecs.quantizers import META, Affine, Quantizer
from kvjax.types import ModelShape

Array = jax.Array


@functools.cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """Levels with the least mean squared error for a standard Gaussian, ascending (Lloyd 1982, Max 1960)."""
    x = np.linspace(-6, 6, 24001)
    weight = np.exp(-x * x / 2)
    levels = np.linspace(-2, 2, 2**bits) if bits > 1 else np.array([-0.8, 0.8])
    for _ in range(400):
        owner = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
        mass = np.bincount(owner, weight, minlength=len(levels))
        levels = np.bincount(owner, weight * x, minlength=len(levels)) / mass
    levels = (levels - levels[::-1]) / 2  # exactly symmetric
    return tuple(float(v) for v in levels)


def nearest(x: Array, levels: Array) -> Array:
    """Index int32 of the nearest of the ascending `levels` [..., n_levels], which broadcast against x."""
    middle = (levels[..., 1:] + levels[..., :-1]) / 2
    return jnp.sum(x[..., None] > middle, axis=-1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Gaussian(Quantizer):
    """x' = n * level / sqrt(dim): the norm n of a token (float16) and Lloyd-Max levels of x * sqrt(dim) / n.

    For rotated vectors, whose coordinates are nearly N(0, n^2 / dim). bits may end in .5: the first half of the
    channels then has one bit more. renormalise: n is chosen so that x' has the projection <x, x'> = |x'|^2.
    Unit mean squared error .363, .117, .0345, .0095 at 1 to 4 bits.
    """

    bits: float = 3
    renormalise: bool = True

    def _parts(self, dim: int) -> list[tuple[slice, int]]:
        low = math.floor(self.bits)
        if self.bits == low:
            return [(slice(0, dim), low)]
        if self.bits != low + 0.5:
            raise ValueError(f"bits must be whole or end in .5, got {self.bits}")
        return [(slice(0, dim // 2), low + 1), (slice(dim // 2, dim), low)]

    def fields(self, dim: int) -> dict[str, Field]:
        """codes0 (and codes1), and the norm."""
        out = {"norm": Field((), META)}
        for i, (part, bits) in enumerate(self._parts(dim)):
            out[f"codes{i}"] = Field((packing.packed_bytes(part.stop - part.start, bits),), "uint8")
        return out

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        dim = x.shape[-1]
        norm = jnp.sqrt(jnp.sum(x * x, axis=-1))
        y = x * (math.sqrt(dim) / jnp.where(norm > 0, norm, 1.0))[..., None]
        out, level = {}, []
        for i, (part, bits) in enumerate(self._parts(dim)):
            table = jnp.asarray(lloyd_max(bits), jnp.float32)
            codes = nearest(y[..., part], table)
            out[f"codes{i}"] = packing.pack(codes, bits)
            level.append(table[codes])
        if self.renormalise:
            c = jnp.concatenate(level, axis=-1)
            norm = norm * jnp.sum(y * c, axis=-1) / jnp.sum(c * c, axis=-1)
        return {**out, "norm": jnp.minimum(norm, float(jnp.finfo(META).max)).astype(META)}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        level = []
        for i, (part, bits) in enumerate(self._parts(dim)):
            codes = packing.unpack(store[f"codes{i}"], bits, part.stop - part.start)
            level.append(jnp.asarray(lloyd_max(bits), jnp.float32)[codes])
        scale = store["norm"].astype(jnp.float32)[..., None] / math.sqrt(dim)
        return jnp.concatenate(level, axis=-1) * scale


@dataclasses.dataclass(frozen=True)
class Table(Quantizer):
    """x' = level * r + z: levels in [-1, 1] (nuq, KVQuant), centre z and half range r per group, both float16.

    axis and group as in `Affine`; axis 'static': calibrated z and r per channel (constants `centre` and `half`),
    nothing stored. levels: ascending; the constant `levels` [kv_heads, 2^bits] replaces them.
    """

    bits: int = 3
    group: int = 0
    axis: str = "token"
    levels: tuple[float, ...] = ()
    calibration: str = ""  # file with levels, and for 'static' with centre and half

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Tokens encoded together."""
        return self.group if self.axis == "channel" else 1

    def _affine(self) -> Affine:
        return Affine(self.bits, self.group, "token" if self.axis == "static" else self.axis)

    def fields(self, dim: int) -> dict[str, Field]:
        """codes, and unless static scale (r) and zero (z)."""
        out = self._affine().fields(dim)
        return {"codes": out["codes"]} if self.axis == "static" else out

    def constants(self, layer: int, shape: ModelShape, side: str) -> dict[str, np.ndarray]:
        """levels [kv_heads, 2^bits], and for 'static' centre and half [kv_heads, dim]."""
        if not self.calibration:
            return {}
        found = vector.open_file(self.calibration, shape)
        names = {"levels": f"levels{self.bits}"}
        if self.axis == "static":
            names |= {"centre": "centre", "half": "half"}
        try:
            return {n: found[f"{side}.{layer}.{stored}"] for n, stored in names.items()}
        except KeyError as e:
            raise ValueError(
                f"{self.calibration!r} has no levels for {self.bits} bits ({e.args[0]})"
            ) from None

    def _levels(self, ctx: Context) -> Array:
        if "levels" in ctx.const:
            return ctx.const["levels"][:, None, None]  # [kv_heads, slots, channels, levels]
        gaussian = np.asarray(lloyd_max(self.bits))
        return jnp.asarray(self.levels or gaussian / gaussian.max(), jnp.float32)

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        if self.axis == "static":
            z, r, store = ctx.const["centre"][:, None], ctx.const["half"][:, None], {}
        else:
            y, axis = self._affine()._split(x)
            low, high = y.min(axis, keepdims=True), y.max(axis, keepdims=True)
            z, r = ((low + high) / 2).astype(META), ((high - low) / 2).astype(META)
            store = {"scale": jnp.squeeze(r, axis), "zero": jnp.squeeze(z, axis)}
            r, z = (self._spread(s.astype(jnp.float32), x) for s in (store["scale"], store["zero"]))
            r = jnp.where(r > 0, r, 1.0)  # a constant group is its centre, whatever the level
        codes = nearest((x - z) / r, self._levels(ctx))
        return {"codes": packing.pack(codes, self.bits), **store}

    def _spread(self, s: Array, x: Array) -> Array:
        """One number per group -> one per element of x."""
        y, axis = self._affine()._split(x)
        return jnp.broadcast_to(jnp.expand_dims(s, axis), y.shape).reshape(x.shape)

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        codes = packing.unpack(store["codes"], self.bits, dim)
        levels = self._levels(ctx)
        if levels.ndim == 1:
            x = levels[codes]
        else:
            flat = jnp.broadcast_to(levels[:, 0, 0], (*codes.shape[:2], levels.shape[-1]))
            x = jax.vmap(jax.vmap(lambda table, c: table[c]))(flat, codes)
        if self.axis == "static":
            return x * ctx.const["half"][:, None] + ctx.const["centre"][:, None]
        r, z = (self._spread(store[n].astype(jnp.float32), x) for n in ("scale", "zero"))
        return x * r + z


@dataclasses.dataclass(frozen=True)
class BlockFloat(Quantizer):
    """Block floating point: `bits`-bit signed mantissas and one 8-bit power of two per `block` channels.

    e = floor(log2 max|x|), s = 2^(e - bits + 2), x' = clip(round(x / s), -m, m) * s with m = 2^(bits-1) - 1.
    |x - x'| <= s / 2 wherever |x| <= (m + 1/2) s.
    """

    bits: int = 4
    block: int = 32

    def fields(self, dim: int) -> dict[str, Field]:
        """codes and exponents."""
        if not 2 <= self.bits <= 8:
            raise ValueError(f"block floating point has mantissas of 2 to 8 bits, got {self.bits}")
        if self.block < 1 or dim % self.block:
            raise ValueError(f"block floating point: head_dim={dim} is not whole blocks of {self.block}")
        code = Field((packing.packed_bytes(dim, self.bits),), "uint8")
        return {"codes": code, "exponent": Field((dim // self.block,), "int8")}

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        top = 2 ** (self.bits - 1) - 1
        y = x.reshape(*x.shape[:-1], -1, self.block)
        peak = jnp.abs(y).max(-1)
        # frexp: peak = m * 2^e with m in [0.5, 1), so that floor(log2 peak) = e - 1, exactly.
        exponent = jnp.where(peak > 0, jnp.frexp(peak)[1] - 1, -100)
        exponent = jnp.clip(exponent - self.bits + 2, -100, 100)
        codes = jnp.clip(jnp.round(y * jnp.exp2(-exponent.astype(jnp.float32))[..., None]), -top, top) + top
        packed = packing.pack(codes.reshape(x.shape).astype(jnp.int32), self.bits)
        return {"codes": packed, "exponent": exponent.astype(jnp.int8)}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        codes = packing.unpack(store["codes"], self.bits, dim) - (2 ** (self.bits - 1) - 1)
        scale = jnp.exp2(store["exponent"].astype(jnp.float32))
        y = codes.reshape(*codes.shape[:-1], -1, self.block).astype(jnp.float32) * scale[..., None]
        return y.reshape(codes.shape)


@dataclasses.dataclass(frozen=True)
class Sign(Quantizer):
    """One or 1.58 bits per channel over groups of tokens: x' = a * code, code in {-1, 1} or {-1, 0, 1}.

    Ternary: code 0 where |x| <= 0.5 mean|x|, and a = mean|x| over the others; binary: a = mean|x|. Ternary codes
    are packed five to a byte (1.6 bits).
    """

    ternary: bool = False
    group: int = 32

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Tokens encoded together."""
        return self.group

    def fields(self, dim: int) -> dict[str, Field]:
        """codes and scale."""
        code = -(-dim // 5) if self.ternary else packing.packed_bytes(dim, 1)
        return {"codes": Field((code,), "uint8"), "scale": Field((dim,), META, per=self.group)}

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        b, h, n, d = x.shape
        y = x.reshape(b, h, n // self.group, self.group, d)
        mean = jnp.abs(y).mean(3, keepdims=True)
        if self.ternary:
            big = jnp.abs(y) > 0.5 * mean
            codes = jnp.where(big, jnp.sign(y), 0.0)
            count = jnp.maximum(big.sum(3, keepdims=True), 1)
            scale = jnp.where(big, jnp.abs(y), 0.0).sum(3, keepdims=True) / count
            trits = jnp.pad(codes.reshape(x.shape).astype(jnp.int32) + 1, ((0, 0),) * 3 + ((0, -d % 5),))
            packed = (trits.reshape(b, h, n, -1, 5) * 3 ** jnp.arange(5)).sum(-1).astype(jnp.uint8)
        else:
            scale = mean
            packed = packing.pack((x > 0).astype(jnp.int32), 1)
        return {"codes": packed, "scale": jnp.squeeze(scale, 3).astype(META)}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        if self.ternary:
            trits = store["codes"].astype(jnp.int32)[..., None] // 3 ** jnp.arange(5) % 3
            codes = trits.reshape(*trits.shape[:-2], -1)[..., :dim] - 1
        else:
            codes = 2 * packing.unpack(store["codes"], 1, dim) - 1
        scale = jnp.repeat(store["scale"].astype(jnp.float32), self.group, axis=2)
        return codes.astype(jnp.float32) * scale
