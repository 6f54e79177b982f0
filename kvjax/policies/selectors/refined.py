"""Two levels of codes: all keys coarsely, the most promising ones again with finer codes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.arrays import ArraySpec, nbytes
from kvjax.codecs.packing import pack, packed_bytes, unpack
from kvjax.policies import calibration
from kvjax.policies.head_scores import SHIPPED
from kvjax.policies.selectors.base import Call, Entries, Index, index_axes, over_group
from kvjax.policies.selectors.codes import ProductCodes
from kvjax.policies.selectors.grouping import group_sums, heads_map, kmeans, means, nearest, put_labels
from kvjax.types import ModelShape
from pallas_kernels.code_scores import look_up

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RefinedCodes(ProductCodes):
    """`ProductCodes`, and codes of what they leave over, read for the `shortlist` entries of largest coarse logit only.

    k = mean + (word + fine word) @ inverse(turn): codes are of (k - mean) @ turn, `parts` slices of `bits` bits, and what
    is left over is coded again by `fine_parts` slices of `fine_bits` bits. The logits of the shortlist are then
    accurate enough to read few entries. shortlist: fraction of the stored entries, at least what is read.

    file: calibration file (or the name of a shipped one) with turn [layers, kv_heads, head_dim, head_dim], mean, and
    books and fine_books as int8 with scales; they serve all prompts and cost no bytes per token. '' learns the books from
    each prompt, with turn = 1 and mean = 0: then they are part of the index, which pays for long prompts only.
    Index: as `ProductCodes` (books only without a file), fine uint8 [batch, kv_heads, slots, fine_parts * fine_bits / 8].
    """

    fine_parts: int = 16
    fine_bits: int = 4
    shortlist: float = 0.1
    file: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.shortlist <= 1.0:
            raise ValueError(f"{type(self).__name__}: shortlist must be in (0, 1], got {self.shortlist}")
        packed_bytes(self.parts, self.bits)
        packed_bytes(self.fine_parts, self.fine_bits)

    def check(self, shape: ModelShape) -> None:
        """ValueError when parts do not divide a head, or the file is another model's."""
        super().check(shape)
        if shape.head_dim % self.fine_parts:
            raise ValueError(
                f"{type(self).__name__}: {self.fine_parts} parts do not divide head_dim={shape.head_dim}"
            )
        if self.file:
            book = self.constants(0, shape)["books"]
            if book.shape[1:3] != (self.parts, 2**self.bits):
                raise ValueError(f"{self.file}: it has {book.shape[1]} parts of {book.shape[2]} codewords")

    def constants(self, layer: int, shape: ModelShape) -> dict[str, np.ndarray]:
        """turn, its inverse, mean f32 and both books f16 of a layer."""
        if not self.file:
            return {}
        every = _load(_path(self.file), calibration.fingerprint(shape))
        return {n: x[layer] for n, x in every.items()}

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        specs = super().specs(batch, slots, shape)
        lead, d = (batch, shape.kv_heads), shape.head_dim
        size = packed_bytes(self.fine_parts, self.fine_bits)
        specs["fine"] = ArraySpec((*lead, slots, size), "uint8", index_axes(1))
        if self.file:
            del specs["books"]
        else:
            book = (*lead, self.fine_parts, 2**self.fine_bits, d // self.fine_parts)
            specs["fine_books"] = dataclasses.replace(specs["books"], shape=book)
        return specs

    def _books(self, index: Index, call: Call) -> tuple[Array, Array]:
        """Both books f32 [batch or 1, kv_heads, parts, words, dim]."""
        if self.file:
            return tuple(call.const[n][None].astype(jnp.float32) for n in ("books", "fine_books"))  # type: ignore[return-value]
        return index["books"].astype(jnp.float32), index["fine_books"].astype(jnp.float32)

    def _turned(self, k: Array, call: Call) -> Array:
        k = k.astype(jnp.float32)
        if not self.file:
            return k
        k = k - call.const["mean"][:, None]
        return jnp.einsum("bhnd,hde->bhne", k, call.const["turn"], precision="highest")

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """Without a file, learn both books; then encode all entries."""
        if not self.file:
            x = self._turned(entries.k, call)
            for name, parts, bits in self._levels:
                book = _learn(x, entries.pos >= 0, parts, 2**bits, self.rounds)
                index = {**index, name: book.astype(index[name].dtype)}
                x = x - _encode(x, index[name].astype(jnp.float32))[1]
        return self.append(index, entries, call)

    @property
    def _levels(self) -> tuple[tuple[str, int, int], ...]:
        return ("books", self.parts, self.bits), ("fine_books", self.fine_parts, self.fine_bits)

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """Encode the new entries on both levels."""
        books, fine_books = self._books(index, call)
        x = self._turned(entries.k, call)
        coarse, near = _encode(x, books)
        fine, _ = _encode(x - near, fine_books)
        made = {
            **index,
            "codes": put_labels(index["codes"], entries.slots, pack(coarse, self.bits)),
            "fine": put_labels(index["fine"], entries.slots, pack(fine, self.fine_bits)),
            "end": jnp.maximum(index["end"], jnp.max(entries.slots, axis=-1) + 1),
        }
        if self.tail:
            v = jnp.where(entries.slots[..., None] >= 0, entries.v.astype(jnp.float32), 0)
            made["total"] = index["total"] + jnp.sum(v, axis=2)
        return made

    def most(self, slots: int) -> int:
        """Entries of a shortlist among `slots`."""
        return min(slots, max(int(slots * self.shortlist), self.entries(slots)))

    def logits(self, index: Index, call: Call) -> Array:
        """Approximate logits f32 [batch, kv_heads, groups, slots], finer on the shortlist; -inf where nothing is stored."""
        books, fine_books = self._books(index, call)
        q, shift = call.grouped * call.scale, 0.0
        if self.file:
            shift = jnp.einsum("bhgd,hd->bhg", q, call.const["mean"], precision="highest")[..., None]
            q = jnp.einsum("bhgd,hed->bhge", q, call.const["back"], precision="highest")
        codes = unpack(index["codes"], self.bits, self.parts)
        coarse = look_up(_table(q, books), codes) + shift
        slots = codes.shape[2]
        stored = jnp.arange(slots) < index["end"][..., None]
        coarse = jnp.where(stored[:, :, None], coarse, -jnp.inf)
        rank = over_group(_cap(coarse, call), self.over, stored[:, :, None])
        top, at = jax.lax.top_k(jnp.where(stored, rank, -1.0), self.most(slots))
        listed = jnp.take_along_axis(index["fine"], at[..., None], axis=2)
        fine = look_up(_table(q, fine_books), unpack(listed, self.fine_bits, self.fine_parts))
        add = heads_map(lambda x, i, y: x.at[:, i].add(y, unique_indices=True))
        return _cap(add(coarse, at, fine), call)

    def _scores_by_kernel(self, index: Index, call: Call) -> Array | None:
        """None: no kernel knows two levels."""
        return None

    def scanned(self, specs: dict[str, ArraySpec], slots: int, batch: int, shape: ModelShape) -> float:
        """Everything but the fine codes outside the shortlist, and calibrated books once for all rows."""
        fine = nbytes({"fine": specs["fine"]}) * (1 - self.most(slots) / slots)
        return float(nbytes(specs)) - fine + (self._constant_bytes(shape) if self.file else 0)

    def _constant_bytes(self, shape: ModelShape) -> int:
        """Of turn, its inverse, mean (float32) and both books (float16) of a layer's heads."""
        d, words = shape.head_dim, 2**self.bits + 2**self.fine_bits
        return shape.kv_heads * (4 * (2 * d * d + d) + 2 * d * words)


def _cap(logits: Array, call: Call) -> Array:
    return logits if call.softcap is None else call.softcap * jnp.tanh(logits / call.softcap)


def _slices(x: Array, parts: int) -> Array:
    """x [batch, kv_heads, n, dim] -> [batch, kv_heads * parts, n, dim / parts]."""
    b, h, n, d = x.shape
    return jnp.moveaxis(x.reshape(b, h, n, parts, d // parts), 3, 2).reshape(b, h * parts, n, -1)


def _learn(x: Array, valid: Array, parts: int, words: int, rounds: int) -> Array:
    """Codebooks [batch, kv_heads, parts, words, dim / parts] of x [batch, kv_heads, n, dim]."""
    b, h = x.shape[:2]
    x, valid = _slices(x, parts), jnp.repeat(valid, parts, axis=1)
    groups = jnp.clip(jnp.sum(valid, axis=-1, dtype=jnp.int32), 1, words)
    labels = kmeans(x, valid, groups, most=words, rounds=rounds)
    return means(*heads_map(lambda x, n: group_sums(x, n, words))(x, labels)).reshape(b, h, parts, words, -1)


def _encode(x: Array, books: Array) -> tuple[Array, Array]:
    """(codes int32 [batch, kv_heads, n, parts], their words [batch, kv_heads, n, dim]) of x [batch, kv_heads, n, dim]."""
    b, h, n, d = x.shape
    parts, words = books.shape[2:4]
    flat = jnp.broadcast_to(books, (b, *books.shape[1:])).reshape(b, h * parts, words, -1)
    live = jnp.ones((words,), bool)
    codes = heads_map(lambda x, c: nearest(x, c, live, cosine=False))(_slices(x, parts), flat)
    near = heads_map(lambda c, i: c[i])(flat, codes).reshape(b, h, parts, n, -1)
    return jnp.moveaxis(codes.reshape(b, h, parts, n), 2, 3), jnp.moveaxis(near, 2, 3).reshape(b, h, n, d)


def _table(q: Array, books: Array) -> Array:
    """f32 [batch, kv_heads, groups, parts, words]: q . every codeword, of q [batch, kv_heads, groups, dim]."""
    q = q.reshape(*q.shape[:3], books.shape[2], -1)
    books = jnp.broadcast_to(books, (q.shape[0], *books.shape[1:]))
    return jnp.einsum("bhgmd,bhmcd->bhgmc", q, books, precision="highest")


def _path(file: str) -> str:
    shipped = SHIPPED / file / "key_codes.safetensors"
    return str(shipped) if shipped.is_file() else file


@functools.cache
def _load(path: str, mark: str) -> dict[str, np.ndarray]:
    """The arrays of all layers, ready for use."""
    arrays = calibration.load(path, mark)
    missing = {"turn", "mean", "books", "books_scale", "fine_books", "fine_books_scale"} - arrays.keys()
    if missing:
        raise ValueError(f"calibration file {path!r} has no array {sorted(missing)[0]!r}")
    turn = arrays["turn"].astype(np.float32)
    out = {
        "turn": turn,
        "back": np.linalg.inv(turn).astype(np.float32),
        "mean": arrays["mean"].astype(np.float32),
    }
    for name in ("books", "fine_books"):
        out[name] = (arrays[name] * arrays[f"{name}_scale"]).astype(np.float16)
    return out
