"""Codebooks of keys for selectors: pq_refined's two levels, and A2ATS's query-aware codewords."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.transforms import rope
from kvjax.policies.selectors.codes import query_factor
from kvjax.policies.selectors.refined import _encode, _learn
from kvjax.types import Array, AttentionInputs
from launch.calibration import samples
from launch.calibration.heads import Progress, collect
from launch.session import Session

EVERY = 4  # of a text's tokens one in so many enters
ROUNDS = 20


def _gather(session: Session, count: int, length: int, step: Progress, distance: int = 0):  # type: ignore[no-untyped-def]
    """(keys f32 [layers, kv_heads, n, dim], second moments of their queries f64 [layers, kv_heads, dim, dim]).

    distance: keys before RoPE, and queries turned to this position; 0: both after RoPE.
    """
    shape = session.lm.shape
    moment = np.zeros((shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim))
    keys = []

    def record(x: AttentionInputs) -> tuple[Array, Array]:
        k, q = x.k, x.q
        if distance:
            assert x.inv_freq is not None
            at = lambda a: jnp.broadcast_to(x.positions[:, None], a.shape[:3])  # noqa: E731
            k = rope(k, at(k), x.inv_freq, inverse=True)
            q = rope(q, at(q), x.inv_freq, inverse=True)
            q = rope(q, jnp.full_like(at(q), distance), x.inv_freq)
        return k[0, :, ::EVERY], q[0, :, ::EVERY]

    for index in range(count):
        tokens = samples.needle(session, length, index).tokens
        width = -(-length // samples.BIN) * samples.BIN + samples.BIN
        rows = collect(session.lm, session.model.params, *samples.padded(tokens[:width], width), record)
        n = -(-min(len(tokens), width) // EVERY)
        k = np.stack([np.asarray(r[0], np.float32)[:, :n] for r in rows])
        q = np.stack([np.asarray(r[1], np.float64)[:, :n] for r in rows])
        q = q.reshape(shape.layers, shape.kv_heads, -1, shape.head_dim)
        moment += np.einsum("lhnd,lhne->lhde", q, q)
        keys.append(k)
        step(1)
    return np.concatenate(keys, axis=2), moment


def _compact(name: str, book: np.ndarray) -> dict[str, np.ndarray]:
    """A book [layers, kv_heads, parts, words, dim] as int8 with a scale for every part."""
    scale = np.maximum(np.abs(book).max(axis=(-2, -1), keepdims=True), 1e-12) / 127
    return {name: np.round(book / scale).astype(np.int8), f"{name}_scale": scale.astype(np.float32)}


def basis(k: np.ndarray, moment: np.ndarray, parts: int, ridge: float = 1e-3) -> np.ndarray:
    """turn [dim, dim]: |x @ turn| is the size of x to the queries, and each of `parts` slices of the result has a like share
    of the variance of keys k [n, dim].

    turn = V sqrt(w) U P: moment = V w V', U the principal axes of the keys there, P deals them out to the slices.
    """
    d = len(moment)
    w, v = np.linalg.eigh(moment + ridge * np.trace(moment) / d * np.eye(d))
    first = v * np.sqrt(w / w.mean())
    x = (k - k.mean(0)) @ first
    axes = np.linalg.eigh(x.T @ x)[1][:, ::-1]
    dealt = np.arange(d).reshape(d // parts, parts).T.reshape(-1)
    return (first @ axes)[:, dealt]


def key_codes(
    session: Session,
    count: int,
    length: int,
    step: Progress,
    parts: int = 4,
    bits: int = 8,
    fine: tuple[int, int] = (16, 4),
) -> dict[str, np.ndarray]:
    """What `RefinedCodes` reads: turn f16 [layers, kv_heads, dim, dim], mean f32 [layers, kv_heads, dim], both books."""
    keys, moment = _gather(session, count, length, step)
    layers, heads = keys.shape[:2]
    turn = np.stack([[basis(keys[i, h], moment[i, h], parts) for h in range(heads)] for i in range(layers)])
    turn = turn.astype(np.float16)
    mean = keys.mean(axis=2)
    fit = jax.jit(_learn, static_argnums=(2, 3, 4))
    books, fine_books = [], []
    for i in range(layers):
        x = np.einsum("hnd,hde->hne", keys[i] - mean[i][:, None], turn[i].astype(np.float32))[None]
        valid = jnp.ones(x.shape[:3], bool)
        book = np.asarray(fit(x, valid, parts, 2**bits, ROUNDS))
        left = x - np.asarray(_encode(jnp.asarray(x), jnp.asarray(book))[1])
        books.append(book[0])
        fine_books.append(np.asarray(fit(left, valid, fine[0], 2 ** fine[1], ROUNDS))[0])
    return {
        "turn": turn,
        "mean": mean,
        **_compact("books", np.stack(books)),
        **_compact("fine_books", np.stack(fine_books)),
    }


def a2ats(
    session: Session, count: int, length: int, step: Progress, codes: int = 256, distance: int = 2048
) -> dict[str, np.ndarray]:
    """What `WindowedCodes` reads: codebook f16 [layers, kv_heads, codes, dim], factor f32 [layers, kv_heads, dim, dim]."""
    keys, moment = _gather(session, count, length, step, distance)
    factor = np.asarray(query_factor(jnp.asarray(moment, jnp.float32)))
    books = []
    for k, f in zip(keys, factor):
        x = np.einsum("hnd,hde->hne", k, f)[None]
        book = np.asarray(_learn(jnp.asarray(x), jnp.ones(x.shape[:3], bool), 1, codes, ROUNDS))[0, :, 0]
        books.append(np.einsum("hcd,hde->hce", book, np.linalg.inv(f)))
    return {"codebook": np.stack(books).astype(np.float16), "factor": factor}
