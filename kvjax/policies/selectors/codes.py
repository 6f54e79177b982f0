"""Selectors over codes of single keys: a few bits a token give its logit approximately (PQCache, A2ATS)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.arrays import ArraySpec
from kvjax.codecs.packing import pack, packed_bytes, unpack
from kvjax.codecs.transforms import rope
from kvjax.policies import calibration
from kvjax.policies.selectors.base import Call, Entries, Index, Selector, index_axes, over_group
from kvjax.policies.selectors.clusters import summary_attention
from kvjax.policies.selectors.grouping import group_sums, heads_map, kmeans, means, nearest, put_labels
from kvjax.types import ModelShape
from pallas_kernels.code_scores import code_scores, has_kernel, look_up

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ProductCodes(Selector):
    """Entries, or pages, of largest approximate logit: each of `parts` slices of a key is one of 2**bits words (PQCache).

    Codebooks are learned per prompt and KV head by k-means; new entries are encoded once, when they are appended.
    Index: codes uint8 [batch, kv_heads, slots, parts * bits / 8] (a byte a part where the bits do not fill whole
    bytes), books [batch, kv_heads, parts, 2**bits, head_dim / parts] in the keys' dtype, end int32 [batch, kv_heads]
    (slots that are encoded), and with `tail` total f32 [batch, kv_heads, head_dim] (sum of all values).

    tail: the entries that are not read join the attention as one, with the mean value of all entries and the mass that
    their approximate logits give: what is read is no longer taken for the whole. page: consecutive slots that are chosen
    and read as one, by the largest score among them; the index is that of single entries.
    """

    parts: int = 2
    bits: int = 6
    rounds: int = 10
    tail: bool = False
    over: str = "softmax_max"
    page: int = 1

    @property
    def unit(self) -> int:  # type: ignore[override]
        """Slots per page."""
        return self.page

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts < 1 or not 1 <= self.bits <= 8 or self.rounds < 1:
            raise ValueError(f"{type(self).__name__}: needs parts >= 1, bits of 1 to 8 and rounds >= 1")

    def check(self, shape: ModelShape) -> None:
        """ValueError when the parts do not divide a head."""
        if shape.head_dim % self.parts:
            raise ValueError(
                f"{type(self).__name__}: {self.parts} parts do not divide head_dim={shape.head_dim}"
            )

    @property
    def estimates(self) -> bool:
        """With `tail`."""
        return self.tail

    @property
    def _bits(self) -> int:
        try:
            packed_bytes(self.parts, self.bits)
        except ValueError:
            return 8
        return self.bits

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        lead, names = (batch, shape.kv_heads), ("batch", "kv_heads")
        book = (*lead, self.parts, 2**self.bits, shape.head_dim // self.parts)
        size = packed_bytes(self.parts, self._bits)
        specs = {
            "codes": ArraySpec((*lead, slots, size), "uint8", index_axes(1)),
            "books": ArraySpec(book, shape.dtype, (*names, None, None, None)),
            "end": ArraySpec(lead, "int32", names),
        }
        if self.tail:
            specs["total"] = ArraySpec((*lead, shape.head_dim), "float32", (*names, None))
        return specs

    def _slices(self, k: Array) -> Array:
        """k [batch, kv_heads, n, head_dim] -> [batch, kv_heads * parts, n, head_dim / parts]."""
        b, h, n, d = k.shape
        k = k.reshape(b, h, n, self.parts, d // self.parts)
        return jnp.moveaxis(k, 3, 2).reshape(b, h * self.parts, n, -1)

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """Learn the codebooks, then encode all entries."""
        x = self._slices(entries.k)
        valid = jnp.repeat(entries.pos >= 0, self.parts, axis=1)
        size = 2**self.bits
        groups = jnp.clip(jnp.sum(valid, axis=-1, dtype=jnp.int32), 1, size)
        labels = kmeans(x, valid, groups, most=size, rounds=self.rounds)
        books = means(*heads_map(lambda x, n: group_sums(x, n, size))(x, labels))
        return self.append(
            {**index, "books": books.reshape(index["books"].shape).astype(index["books"].dtype)},
            entries,
            call,
        )

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """Encode the new entries with the codebooks that are there."""
        b, h, n, _ = entries.k.shape
        books = index["books"].astype(jnp.float32).reshape(b, h * self.parts, 2**self.bits, -1)
        live = jnp.ones((2**self.bits,), bool)
        find = heads_map(lambda x, c: nearest(x, c, live, cosine=False))
        codes = find(self._slices(entries.k).astype(jnp.float32), books)
        codes = pack(jnp.moveaxis(codes.reshape(b, h, self.parts, n), 2, 3), self._bits)
        made = {
            **index,
            "codes": put_labels(index["codes"], entries.slots, codes),
            "end": jnp.maximum(index["end"], jnp.max(entries.slots, axis=-1) + 1),
        }
        if self.tail:
            v = jnp.where(entries.slots[..., None] >= 0, entries.v.astype(jnp.float32), 0)
            made["total"] = index["total"] + jnp.sum(v, axis=2)
        return made

    def _tables(self, index: Index, call: Call) -> Array:
        """Logits of all words for the newest query: f32 [batch, kv_heads, groups, parts, 2**bits]."""
        q = call.grouped * call.scale
        q = q.reshape(*q.shape[:3], self.parts, -1)
        return jnp.einsum("bhgmd,bhmcd->bhgmc", q, index["books"].astype(jnp.float32), precision="highest")

    def logits(self, index: Index, call: Call) -> Array:
        """Approximate logits f32 [batch, kv_heads, groups, slots], -inf where nothing is stored."""
        codes = unpack(index["codes"], self._bits, self.parts)
        logits = look_up(self._tables(index, call), codes)
        if call.softcap is not None:
            logits = call.softcap * jnp.tanh(logits / call.softcap)
        stored = jnp.arange(codes.shape[2]) < index["end"][..., None]
        return jnp.where(stored[:, :, None], logits, -jnp.inf)

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """The group's approximate logits, of a page the largest."""
        scores = self._scores_by_kernel(index, call)
        if scores is None:
            logits = self.logits(index, call)
            scores = over_group(logits, self.over, (logits > -jnp.inf))
            scores = jnp.max(scores.reshape(*scores.shape[:2], -1, self.page), axis=-1)
        return scores, index

    def _scores_by_kernel(self, index: Index, call: Call) -> Array | None:
        """The same order from a kernel, by the logarithm of a softmax; None where none runs."""
        if self.over not in ("max", "softmax_max") or call.softcap is not None:
            return None
        tables, codes, how = self._tables(index, call), index["codes"], dict(bits=self._bits, block=self.page)
        if not has_kernel(tables, codes, **how):
            return None
        best, lse = code_scores(tables, codes, index["end"], **how)
        if self.over == "softmax_max":
            best = best - jnp.where(lse > -jnp.inf, lse, 0.0)[..., None]
        return jnp.max(best, axis=2)

    def estimate(self, index: Index, call: Call, chosen: Array) -> tuple[Array, Array] | None:
        """Everything that is not read as one entry, with the mean value."""
        if not self.tail:
            return None
        chosen = jnp.repeat(chosen, self.page, axis=2)
        logits = self.logits(index, call)[..., : chosen.shape[2]]
        rest = jax.nn.logsumexp(jnp.where(chosen[:, :, None], -jnp.inf, logits), axis=-1, keepdims=True)
        value = index["total"] / jnp.maximum(index["end"], 1)[..., None]
        return summary_attention(rest, value[:, :, None])


@dataclasses.dataclass(frozen=True)
class WindowedCodes(Selector):
    """Entries by the logit of their codeword at a fixed distance (A2ATS: windowed RoPE, query-aware codes).

    Keys before RoPE are one of `codes` codewords, the nearest in the norm |(k - c) L| where L L' = H is the second moment
    of queries turned to position `distance`; a far entry's logit is that of its codeword for the query at this
    position. Near entries are read anyway (`recent`). file: a calibration file with codebook [layers, kv_heads, codes,
    head_dim] and factor [layers, kv_heads, head_dim, head_dim] (L), which serves all prompts; '' learns both from each
    prompt. Index: codes int16 [batch, kv_heads, slots]; without a file also book [batch, kv_heads, codes, head_dim] and
    factor [batch, kv_heads, head_dim, head_dim].
    """

    codes: int = 4096
    distance: int = 2048
    rounds: int = 10
    file: str = ""
    over: str = "softmax_max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.codes < 2**15 or min(self.distance, self.rounds) < 1:
            raise ValueError(
                f"{type(self).__name__}: codes must be in 1..32767; distance and rounds at least 1"
            )

    def check(self, shape: ModelShape) -> None:
        """ValueError when the file belongs to another model, or has another number of codewords."""
        if self.file:
            found = self._load(0, shape)["codebook"].shape[1]
            if found != self.codes:
                raise ValueError(
                    f"{self.file}: the codebook has {found} codewords, {self.codes} were asked for"
                )

    def _load(self, layer: int, shape: ModelShape) -> dict[str, np.ndarray]:
        return calibration.load_layer(self.file, ("codebook", "factor"), layer, shape)

    def constants(self, layer: int, shape: ModelShape) -> dict[str, np.ndarray]:
        """The calibrated codebook and factor of a layer."""
        return self._load(layer, shape) if self.file else {}

    def specs(self, batch: int, slots: int, shape: ModelShape) -> dict[str, ArraySpec]:
        """As in the class docstring."""
        lead, d, axes = (batch, shape.kv_heads), shape.head_dim, ("batch", "kv_heads", None, None)
        specs = {"codes": ArraySpec((*lead, slots), "int16", index_axes(0), fill=-1)}
        if not self.file:
            specs["book"] = ArraySpec((*lead, self.codes, d), shape.dtype, axes)
            specs["factor"] = ArraySpec((*lead, d, d), "float32", axes)
        return specs

    def _turn(self, call: Call, q: Array, pos: Array) -> Array:
        """Queries [..., n, head_dim] at pos int32 [..., n], turned to `distance`."""
        assert call.inv_freq is not None
        plain = rope(q, pos, call.inv_freq, inverse=True)
        return rope(plain, jnp.full_like(pos, self.distance), call.inv_freq)

    def _learned(self, index: Index, call: Call) -> tuple[Array, Array]:
        """(codebook f32 [batch or 1, kv_heads, codes, head_dim], factor)."""
        if self.file:
            return call.const["codebook"][None].astype(jnp.float32), call.const["factor"][None].astype(
                jnp.float32
            )
        return index["book"].astype(jnp.float32), index["factor"]

    def build(self, index: Index, entries: Entries, call: Call, previous: Index) -> Index:
        """Without a file, learn the codebook from this prompt's queries and keys; then encode."""
        if not self.file:
            valid = call.q_pos >= 0
            b, hq, t, d = call.q.shape
            h = entries.k.shape[1]
            q = self._turn(call, call.q, jnp.broadcast_to(call.q_pos[:, None], (b, hq, t)))
            q = jnp.where(valid[:, None, :, None], q, 0).reshape(b, h, -1, d)
            factor = query_factor(jnp.einsum("bhnd,bhne->bhde", q, q, precision="highest"))
            k = self._plain(entries, call)
            x = jnp.einsum("bhnd,bhde->bhne", k, factor, precision="highest")
            kept = entries.pos >= 0
            groups = jnp.clip(jnp.sum(kept, axis=-1, dtype=jnp.int32), 1, self.codes)
            labels = kmeans(x, kept, groups, most=self.codes, rounds=self.rounds)
            book = means(*heads_map(lambda x, n: group_sums(x, n, self.codes))(k, labels))
            index = {**index, "book": book.astype(index["book"].dtype), "factor": factor}
        return self.append(index, entries, call)

    def _plain(self, entries: Entries, call: Call) -> Array:
        assert call.inv_freq is not None
        return rope(entries.k, entries.pos, call.inv_freq, inverse=True)

    def append(self, index: Index, entries: Entries, call: Call) -> Index:
        """Encode the new entries."""
        book, factor = self._learned(index, call)
        b, h = entries.k.shape[:2]
        turn = lambda x: jnp.einsum("bhnd,bhde->bhne", x, factor, precision="highest")  # noqa: E731
        words = jnp.broadcast_to(turn(book), (b, h, *book.shape[2:]))
        live = jnp.ones((self.codes,), bool)
        x = turn(self._plain(entries, call))
        labels = heads_map(lambda x, c: nearest(x, c, live, cosine=False))(x, words)
        return {**index, "codes": put_labels(index["codes"], entries.slots, labels)}

    def score(self, index: Index, call: Call) -> tuple[Array, Index]:
        """The table of all codewords' logits, looked up for every slot."""
        book, _ = self._learned(index, call)
        q = self._turn(
            call,
            call.grouped,
            jnp.max(call.q_pos, axis=1)[:, None, None]
            + jnp.zeros((1, call.fill.shape[1], call.groups), jnp.int32),
        )
        table = (
            jnp.einsum(
                "bhgd,bhcd->bhgc",
                q,
                jnp.broadcast_to(book, (q.shape[0], *book.shape[1:])),
                precision="highest",
            )
            * call.scale
        )
        codes = index["codes"].astype(jnp.int32)
        logits = heads_map(lambda t, c: t[:, jnp.maximum(c, 0)])(table, codes)
        stored = (codes >= 0)[:, :, None]
        return over_group(jnp.where(stored, logits, -jnp.inf), self.over, stored), index


def query_factor(moment: Array, ridge: float = 1e-6) -> Array:
    """Lower-triangular L with L L' = H + ridge I, H: second moments [..., dim, dim] scaled to mean diagonal 1."""
    d = moment.shape[-1]
    size = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None] / d
    return jnp.linalg.cholesky(moment / jnp.maximum(size, 1e-30) + ridge * jnp.eye(d))
