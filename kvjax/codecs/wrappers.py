"""Quantizers around quantizers: rotations, channel scales, outliers, low-rank and sign residuals, tiers."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax.codecs import packing, transforms
from kvjax.codecs.base import NO_CONTEXT, Context, Field, Store
from kvjax.codecs.quantizers import META, Quantizer, _prefixed, _strip, enter

Array = jax.Array


class Wrapper(Quantizer):
    """A quantizer that does something around `inner`."""

    inner: Quantizer

    @property
    def unit(self) -> int:  # type: ignore[override]
        """As the inner quantizer."""
        return self.inner.unit

    def for_layer(self, layer, shape, side):
        """With the inner quantizer of that layer."""
        return dataclasses.replace(self, inner=self.inner.for_layer(layer, shape, side))  # type: ignore[type-var]

    def constants(self, layer, shape, side):
        """The inner quantizer's."""
        return self.inner.constants(layer, shape, side)


@dataclasses.dataclass(frozen=True)
class Rotated(Wrapper):
    """An orthogonal map of the channels first: Hadamard with random signs, or a uniformly random rotation."""

    inner: Quantizer
    kind: str = "hadamard"
    seed: int = 0

    def _matrix(self, dim: int):
        make = {"hadamard": transforms.hadamard_matrix, "haar": transforms.haar_matrix}
        if self.kind not in make:
            raise ValueError(f"rotation must be one of {', '.join(make)}, got {self.kind!r}")
        return make[self.kind](dim, self.seed)

    def fields(self, dim: int) -> dict[str, Field]:
        """The inner quantizer's."""
        self._matrix(dim)
        return self.inner.fields(dim)

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """Rotate, then encode."""
        return self.inner.encode(transforms.turn(x, self._matrix(x.shape[-1])), ctx)

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """Decode, then rotate back."""
        return transforms.turn(self.inner.decode(store, dim, ctx), self._matrix(dim), inverse=True)


@dataclasses.dataclass(frozen=True)
class ChannelScaled(Wrapper):
    """Divide every channel by a_c = sqrt(max_t |x_tc|) over `tokens` tokens first (ZipCache); a_c is float16."""

    inner: Quantizer
    tokens: int = 128

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Tokens encoded together."""
        return math.lcm(self.tokens, self.inner.unit)

    def fields(self, dim: int) -> dict[str, Field]:
        """The inner quantizer's and a."""
        return {**self.inner.fields(dim), "a": Field((dim,), META, per=self.tokens)}

    def _spread(self, a: Array) -> Array:
        return jnp.repeat(a.astype(jnp.float32), self.tokens, axis=2)

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class; a channel of zeros has a_c = 1."""
        b, h, n, d = x.shape
        a = jnp.sqrt(jnp.abs(x).reshape(b, h, n // self.tokens, self.tokens, d).max(3)).astype(META)
        a = jnp.where(a > 0, a, jnp.ones((), META))
        return {**self.inner.encode(x / self._spread(a), ctx), "a": a}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        return self.inner.decode(store, dim, ctx) * self._spread(store["a"])


@dataclasses.dataclass(frozen=True)
class Outliers(Wrapper):
    """The `count` largest and smallest entries of every vector are kept exactly (float16), beside dense codes.

    axis 'token': vectors are tokens. axis 'channel': a channel over `tokens` tokens. Outliers are replaced before
    the dense codes by the mean of the vector's other entries, so that they do not stretch its range.
    """

    inner: Quantizer
    count: int = 1
    axis: str = "token"
    tokens: int = 64

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Tokens encoded together."""
        return math.lcm(self.inner.unit, self.tokens if self.axis == "channel" else 1)

    def fields(self, dim: int) -> dict[str, Field]:
        """The inner quantizer's, values and indices of the outliers."""
        length = dim if self.axis == "token" else self.tokens
        if not 0 < 2 * self.count < length or length > 256:
            raise ValueError(
                f"2 x {self.count} outliers of {length} entries: at least one a side must be kept, fewer than all, "
                "of at most 256"
            )
        if self.axis == "token":
            place: dict = dict(suffix=(2 * self.count,))
        else:
            place = dict(suffix=(dim, 2 * self.count), per=self.tokens)
        new = {"out": Field(dtype=META, **place), "at": Field(dtype="uint8", **place)}
        return {**_prefixed("dense_", self.inner.fields(dim)), **new}

    def _vectors(self, x: Array) -> Array:
        """[batch, kv_heads, slots, dim] -> vectors on the last axis."""
        if self.axis == "token":
            return x
        b, h, n, d = x.shape
        return jnp.swapaxes(x.reshape(b, h, n // self.tokens, self.tokens, d), -1, -2)

    def _back(self, y: Array, shape: tuple[int, ...]) -> Array:
        return y if self.axis == "token" else jnp.swapaxes(y, -1, -2).reshape(shape)

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        y = self._vectors(x)
        # Of equal entries the first is the smallest and the last the largest, so that the two sets are disjoint.
        low = jax.lax.top_k(-y, self.count)[1]
        high = y.shape[-1] - 1 - jax.lax.top_k(jnp.flip(y, -1), self.count)[1]
        at = jnp.concatenate([low, high], axis=-1)
        values = jnp.take_along_axis(y, at, axis=-1)
        inliers = y.shape[-1] - 2 * self.count
        mean = (y.sum(-1, keepdims=True) - values.sum(-1, keepdims=True)) / inliers
        dense = self._back(_put(y, at, jnp.broadcast_to(mean, values.shape)), x.shape)
        store = _prefixed("dense_", self.inner.encode(dense, enter(ctx, "dense_")))
        return {**store, "out": values.astype(META), "at": at.astype(jnp.uint8)}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        dense = self.inner.decode(_strip("dense_", store), dim, enter(ctx, "dense_"))
        y = self._vectors(dense)
        return self._back(
            _put(y, store["at"].astype(jnp.int32), store["out"].astype(jnp.float32)), dense.shape
        )

    def constants(self, layer, shape, side):
        """The inner quantizer's."""
        return _prefixed("dense_", self.inner.constants(layer, shape, side))


def _put(y: Array, at: Array, values: Array) -> Array:
    """y with `values` at indices `at` of the last axis."""
    return jnp.put_along_axis(y, at, values, axis=-1, inplace=False)


@dataclasses.dataclass(frozen=True)
class LowRank(Wrapper):
    """The error of the inner quantizer over `tokens` tokens, approximated by A B^T of rank r per head (GEAR).

    Power iteration from a fixed random start: q = E p, p = E^T q, with p and q orthonormalised in the last loop.
    A [tokens, r] and B [head_dim, r] are float16.
    """

    inner: Quantizer
    rank: int = 2
    tokens: int = 64
    loops: int = 3

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Tokens encoded together."""
        return math.lcm(self.inner.unit, self.tokens)

    def fields(self, dim: int) -> dict[str, Field]:
        """The inner quantizer's, a and b."""
        if not 1 <= self.rank <= min(dim, self.tokens):
            raise ValueError(
                f"rank={self.rank} of a {self.tokens} x {dim} error must be 1 to {min(dim, self.tokens)}"
            )
        new = {"a": Field((self.rank,), META), "b": Field((dim, self.rank), META, per=self.tokens)}
        return {**_prefixed("dense_", self.inner.fields(dim)), **new}

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        inner = enter(ctx, "dense_")
        store = self.inner.encode(x, inner)
        b, h, n, d = x.shape
        error = (x - self.inner.decode(store, d, inner)).reshape(b, h, n // self.tokens, self.tokens, d)
        p = jax.random.normal(jax.random.key(0), (d, self.rank)) / math.sqrt(d)
        p = jnp.broadcast_to(p, (*error.shape[:3], d, self.rank))
        for _ in range(self.loops):
            p = jnp.linalg.qr(p)[0]
            q = error @ p
            q = jnp.linalg.qr(q)[0]
            p = jnp.swapaxes(error, -1, -2) @ q
        store = _prefixed("dense_", store)
        return {**store, "a": q.reshape(b, h, n, self.rank).astype(META), "b": p.astype(META)}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        dense = self.inner.decode(_strip("dense_", store), dim, enter(ctx, "dense_"))
        b, h, n = dense.shape[:3]
        a = store["a"].astype(jnp.float32).reshape(b, h, n // self.tokens, self.tokens, self.rank)
        low = a @ jnp.swapaxes(store["b"].astype(jnp.float32), -1, -2)
        return dense + low.reshape(dense.shape)

    def constants(self, layer, shape, side):
        """The inner quantizer's."""
        return _prefixed("dense_", self.inner.constants(layer, shape, side))


@dataclasses.dataclass(frozen=True)
class SignResidual(Wrapper):
    """One more bit per channel: signs of a random projection S of the error r (QJL), and its norm (float16).

    x' = inner + |r| sqrt(pi/2) / dim * S^T sign(S r): an unbiased estimate of every dot product with x.
    """

    inner: Quantizer
    seed: int = 1

    def fields(self, dim: int) -> dict[str, Field]:
        """The inner quantizer's, signs and the norm."""
        new = {"signs": Field((packing.packed_bytes(dim, 1),), "uint8"), "gamma": Field((), META)}
        return {**self.inner.fields(dim), **new}

    def _projection(self, dim: int) -> Array:
        return jax.random.normal(jax.random.key(self.seed), (dim, dim))

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        store = self.inner.encode(x, ctx)
        error = x - self.inner.decode(store, x.shape[-1], ctx)
        signs = transforms.turn(error, self._projection(x.shape[-1]).T) > 0
        gamma = jnp.sqrt(jnp.sum(error * error, axis=-1)).astype(META)
        return {**store, "signs": packing.pack(signs.astype(jnp.int32), 1), "gamma": gamma}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        signs = 2.0 * packing.unpack(store["signs"], 1, dim).astype(jnp.float32) - 1.0
        gamma = store["gamma"].astype(jnp.float32)[..., None] * (math.sqrt(math.pi / 2) / dim)
        return self.inner.decode(store, dim, ctx) + gamma * transforms.turn(signs, self._projection(dim))


@dataclasses.dataclass(frozen=True)
class Tiers(Quantizer):
    """Tokens ranked by saliency within segments of `segment` tokens; each tier has its own quantizer.

    tiers: (tokens of a segment, quantizer) from the most to the least salient; the counts sum to `segment`. Without
    a saliency the newest tokens rank first. `order` (uint8) says which slot each stored token belongs to.
    """

    tiers: tuple[tuple[int, Quantizer], ...]
    segment: int = 64

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Tokens encoded together."""
        return self.segment

    def _names(self):
        at = 0
        for i, (count, inner) in enumerate(self.tiers):
            if count:
                yield f"t{i}_", slice(at, at + count), count, inner
            at += count

    def fields(self, dim: int) -> dict[str, Field]:
        """Each tier's fields, one row a segment, and the order."""
        if sum(count for count, _ in self.tiers) != self.segment or self.segment > 256:
            raise ValueError(
                f"tiers must add up to the segment of {self.segment} tokens, which has at most 256"
            )
        out = {"order": Field((), "uint8")}
        for prefix, _, count, inner in self._names():
            if count % inner.unit:
                raise ValueError(f"a tier of {count} tokens is not whole groups of {inner.unit}")
            for name, field in inner.fields(dim).items():
                rows = (count // field.per,) if count > field.per else ()
                out[prefix + name] = Field((*rows, *field.suffix), field.dtype, per=self.segment)
        return out

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        b, h, n, d = x.shape
        y = x.reshape(b, h, n // self.segment, self.segment, d)
        if ctx.saliency is None:
            rank = jnp.broadcast_to(jnp.arange(self.segment - 1, -1, -1), y.shape[:4])
        else:
            rank = jnp.argsort(-ctx.saliency.reshape(y.shape[:4]), axis=-1)
        store = {"order": rank.reshape(b, h, n).astype(jnp.uint8)}
        for prefix, part, count, inner in self._names():
            # Inside a tier the tokens are in time order again.
            index = jnp.sort(rank[..., part], axis=-1)
            store["order"] = (
                store["order"]
                .reshape(y.shape[:4])
                .at[..., part]
                .set(index.astype(jnp.uint8))
                .reshape(b, h, n)
            )
            chosen = jnp.take_along_axis(y, index[..., None], axis=3).reshape(b, h, -1, d)
            for name, value in inner.encode(chosen, enter(ctx, prefix)).items():
                per = inner.fields(d)[name].per
                rows = (count // per,) if count > per else ()
                store[prefix + name] = value.reshape(b, h, n // self.segment, *rows, *value.shape[3:])
        return store

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        b, h, n = store["order"].shape
        parts = []
        for prefix, _, count, inner in self._names():
            mine = {}
            for name, field in inner.fields(dim).items():
                value = store[prefix + name]
                mine[name] = value.reshape(b, h, n // self.segment * (count // field.per), *field.suffix)
            x = inner.decode(mine, dim, enter(ctx, prefix))
            parts.append(x.reshape(b, h, n // self.segment, count, dim))
        back = jnp.argsort(
            store["order"].astype(jnp.int32).reshape(b, h, n // self.segment, self.segment), axis=-1
        )
        y = jnp.take_along_axis(jnp.concatenate(parts, axis=3), back[..., None], axis=3)
        return y.reshape(b, h, n, dim)

    def constants(self, layer, shape, side):
        """Those of the tiers."""
        out = {}
        for prefix, _, _, inner in self._names():
            out |= _prefixed(prefix, inner.constants(layer, shape, side))
        return out
