"""Vector codes: several channels share one index into a codebook (Coupled Quantization, arXiv 2405.03917)."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs import packing
from kvjax.codecs.base import NO_CONTEXT, Context, Field, Store
from kvjax.codecs.quantizers import Quantizer
from kvjax.codecs.transforms import turn
from kvjax.types import ModelShape

Array = jax.Array
SHIPPED = pathlib.Path(__file__).parents[2] / "models" / "calibration"
_SLOTS = 512  # slots whose distances to all codewords are held at a time


@functools.cache
def load(path: str, mark: str) -> dict[str, np.ndarray]:
    """A calibration file of the model with fingerprint `mark`; ValueError for another model's."""
    from kvjax.policies import calibration  # the package registers methods, which import codecs

    return calibration.load(path, mark)


def _fingerprint(shape: ModelShape) -> str:
    from kvjax.policies import calibration

    return calibration.fingerprint(shape)


def shipped(name: str, shape: ModelShape) -> str:
    """Path of the shipped calibration `name` for a model of this shape; ValueError when there is none."""
    mark, seen = _fingerprint(shape), []
    for path in sorted(SHIPPED.glob(f"*/{name}.safetensors")):
        try:
            load(str(path), mark)
        except ValueError:
            seen.append(path.parent.name)
            continue
        return str(path)
    raise ValueError(
        f"no calibration {name!r} for this model ({mark}; there are some for: {', '.join(seen) or 'none'}); "
        "write one with python -m launch.calibrate and pass its path as calibration="
    )


def open_file(name: str, shape: ModelShape) -> dict[str, np.ndarray]:
    """Arrays of a calibration file: a path (it has a '/'), or the name of a shipped one."""
    path = name if "/" in name else shipped(name, shape)
    return load(path, _fingerprint(shape))


def entry(name: str, shape: ModelShape, array: str) -> np.ndarray:
    """One array of `open_file`; ValueError when the file is of another method."""
    found = open_file(name, shape)
    if array not in found:
        raise ValueError(
            f"calibration file {name!r} has no array {array!r}: it is of another method or older"
        )
    return found[array]


@dataclasses.dataclass(frozen=True)
class Vector(Quantizer):
    """Codes of `bits` bits for groups of channels, after a linear map of the channels that calibration chose.

    x' = back(book[code] of every group) + mean, code = argmin |y_group - codeword|^2 with y = (x - mean) @ into.
    sizes: channels of each group in the mapped order; a calibration file has its own for every layer, so that
    directions that matter get more codes. rate: mean bits per element, one of the file's. calibration: path, or
    name of a shipped file; '' means codebooks of a standard Gaussian and no map (tests, and models without a
    calibration), for groups of `couple` channels.
    """

    bits: int = 8
    sizes: tuple[int, ...] = ()
    calibration: str = ""
    rate: float = 1
    couple: int = 8

    def fields(self, dim: int) -> dict[str, Field]:
        """codes."""
        if self.sizes and sum(self.sizes) != dim:
            raise ValueError(f"vector codes for groups of {self.sizes} channels do not cover head_dim={dim}")
        # Before a layer is chosen, the mean over layers.
        mean = round(self.rate * dim / self.bits) if self.calibration else -(-dim // self.couple)
        count = len(self.sizes) or mean
        if count * self.bits % 8:
            raise ValueError(f"{count} codes of {self.bits} bits do not fill whole bytes")
        return {"codes": Field((packing.packed_bytes(count, self.bits),), "uint8")}

    def _file(self, shape: ModelShape) -> dict[str, np.ndarray]:
        return open_file(self.calibration, shape)

    def _rate(self, shape: ModelShape) -> str:
        """The prefix of this rate's arrays; ValueError lists the rates of the file."""
        rates = sorted({n.split(".k.")[0] for n in self._file(shape) if n.endswith(".k.0.book")}, key=float)
        if f"{self.rate:g}" not in rates:
            raise ValueError(
                f"{self.calibration!r} has no codebooks for {self.rate:g} bits; it has {', '.join(rates)}"
            )
        return f"{self.rate:g}"

    def for_layer(self, layer: int, shape: ModelShape, side: str) -> Vector:
        """With that layer's group sizes."""
        if not self.calibration:
            full, rest = divmod(shape.head_dim, self.couple)
            return dataclasses.replace(self, sizes=(self.couple,) * full + (rest,) * (rest > 0))
        sizes = self._file(shape)[f"{self._rate(shape)}.{side}.{layer}.sizes"]
        return dataclasses.replace(self, sizes=tuple(int(s) for s in sizes))

    def constants(self, layer: int, shape: ModelShape, side: str) -> dict[str, np.ndarray]:
        """mean [kv_heads, dim], into and back [kv_heads, dim, dim], book [kv_heads, 2^bits, dim]."""
        if self.calibration:
            found = self._file(shape)
            arrays = {n: found[f"{side}.{layer}.{n}"] for n in ("mean", "into", "back")}
            name = f"{self._rate(shape)}.{side}.{layer}"
            arrays["book"] = found[f"{name}.book"] * (
                found[f"{name}.scale"][:, None].astype(np.float32) / 127
            )
            return {n: x.astype(np.float32) for n, x in arrays.items()}
        rng = np.random.default_rng(0)
        book = rng.standard_normal((shape.kv_heads, 2**self.bits, shape.head_dim))
        eye = np.broadcast_to(np.eye(shape.head_dim), (shape.kv_heads, shape.head_dim, shape.head_dim))
        zero = np.zeros((shape.kv_heads, shape.head_dim))
        found = {"mean": zero, "into": eye, "back": eye, "book": book}
        return {n: np.asarray(x, np.float32) for n, x in found.items()}

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """(channel of each place of each group, or `dim` where the group is shorter; place of each channel)."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        widest = max(self.sizes)
        index = starts[:-1, None] + np.arange(widest)
        channel = np.where(np.arange(widest) < np.asarray(self.sizes)[:, None], index, starts[-1])
        flat = np.zeros(starts[-1], np.int32)
        for place, c in enumerate(channel.reshape(-1)):
            if c < starts[-1]:
                flat[c] = place
        return channel.astype(np.int32), flat

    def _book(self, ctx: Context) -> Array:
        """Codewords [kv_heads, groups, 2^bits, widest], zero where a group is shorter."""
        book = jnp.pad(ctx.const["book"], ((0, 0), (0, 0), (0, 1)))
        return jnp.moveaxis(book[:, :, self._places()[0]], 1, 2)

    def encode(self, x: Array, ctx: Context = NO_CONTEXT) -> Store:
        """See the class."""
        y = turn(x - ctx.const["mean"][:, None], ctx.const["into"])
        y = jnp.pad(y, ((0, 0),) * 3 + ((0, 1),))[..., self._places()[0]]  # [b, h, n, groups, widest]
        book = self._book(ctx)
        half = jnp.sum(book * book, axis=-1) / 2

        def search(part: Array) -> Array:
            dots = jnp.einsum("bhncs,hcks->bhnck", part, book, precision=jax.lax.Precision.HIGHEST)
            return jnp.argmax(dots - half[:, None], axis=-1)

        b, h, n = y.shape[:3]
        if n <= _SLOTS:
            codes = search(y)
        else:
            more = -n % _SLOTS
            blocks = jnp.pad(y, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0)))
            blocks = jnp.moveaxis(blocks.reshape(b, h, -1, _SLOTS, *y.shape[3:]), 2, 0)
            codes = jnp.moveaxis(jax.lax.map(search, blocks), 0, 2).reshape(b, h, n + more, -1)[:, :, :n]
        return {"codes": packing.pack(codes, self.bits)}

    def decode(self, store: Store, dim: int, ctx: Context = NO_CONTEXT) -> Array:
        """See the class."""
        codes = packing.unpack(store["codes"], self.bits, len(self.sizes))
        book = self._book(ctx)  # [h, groups, words, widest]
        heads, groups, words, widest = book.shape
        table = book.reshape(heads, groups * words, widest)
        index = codes + words * jnp.arange(groups)
        rows = jax.vmap(jax.vmap(lambda t, i: t[i]), in_axes=(None, 0))(
            table, index
        )  # [b, h, n, groups, widest]
        y = rows.reshape(*codes.shape[:3], groups * widest)[..., self._places()[1]]
        return turn(y, ctx.const["back"]) + ctx.const["mean"][:, None]
