"""Decode attention as float64 numpy loops, and random problems to run it on."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import formats


def attention(q, k, v, seen, scale, softcap=None):
    """q [B, Hq, T, D], k and v [B, Hkv, S, D], seen bool [B, Hkv, T, S] -> (out, lse, mass), all float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, q_heads, tokens, dim = q.shape
    group = q_heads // k.shape[1]
    out = np.zeros((batch, q_heads, tokens, dim))
    lse = np.full((batch, q_heads, tokens), -np.inf)
    mass = np.zeros((batch, q_heads, k.shape[2]))
    for b in range(batch):
        for h in range(q_heads):
            for t in range(tokens):
                slots = np.flatnonzero(seen[b, h // group, t])
                if not slots.size:
                    continue
                s = scale * (k[b, h // group, slots] @ q[b, h, t])
                if softcap is not None:
                    s = softcap * np.tanh(s / softcap)
                p = np.exp(s - s.max())
                lse[b, h, t] = np.log(p.sum()) + s.max()
                p /= p.sum()
                out[b, h, t] = p @ v[b, h // group, slots]
                mass[b, h, slots] += p
    return out, lse, mass


def visibility(total, positions, q_positions, mask, window, tokens, valid, order):
    """Loop form of the rule in `decode_attention`'s docstring.

    valid, order: [B, Hkv, N]: the entry holds a token; which stored token of its (row, head) it is.
    """
    batch, kv_heads, n = valid.shape
    seen = np.zeros((batch, kv_heads, tokens, n), bool)
    for b in range(batch):
        for h in range(kv_heads):
            for t in range(tokens):
                for s in range(n):
                    if not valid[b, h, s]:
                        continue
                    pos = order[b, h, s] if positions is None else positions[b, h, s]
                    ok = pos >= 0
                    new = None if mask is None else order[b, h, s] - (total[b, h] - mask.shape[2])
                    if q_positions is not None:
                        ok &= q_positions[b, t] >= 0
                        if new is None or new < 0:
                            ok &= pos <= q_positions[b, t]
                        if window is not None:
                            ok &= pos > q_positions[b, t] - window
                    if new is not None and new >= 0:
                        ok &= mask[b, t, new]
                    seen[b, h, t, s] = ok
    return seen


@dataclasses.dataclass
class Problem:
    """A random problem in every form that the entry point takes."""

    q: np.ndarray
    k: np.ndarray  # float32 [B, Hkv, S, D], what is stored after rounding to the format
    v: np.ndarray
    store: formats.KVStore
    lengths: np.ndarray
    table: np.ndarray | None


def make(rng, *, batch=2, kv_heads=2, group=2, tokens=1, dim=64, slots=256, fmt="dense", dtype=jnp.float32,
         page=None, lengths=None, kv_group=32, residual=0, meta=None, poison=True, make_kv=None):  # fmt: skip
    """Random q, k, v; garbage (NaN where the dtype has one) in every slot and page that is not valid."""
    q = rng.standard_normal((batch, kv_heads * group, tokens, dim)).astype(np.float32)
    if make_kv is None:
        k, v = rng.standard_normal((2, batch, kv_heads, slots, dim)).astype(np.float32)
    else:
        k, v = make_kv(q, slots)
    if lengths is None:
        lengths = rng.integers(0, slots + 1, (batch, kv_heads))
    lengths = np.broadcast_to(np.asarray(lengths, np.int32), (batch, kv_heads)).copy()
    valid = np.arange(slots) < lengths[..., None]
    q = jnp.asarray(q, dtype)
    if fmt == "dense":
        store = formats.KVStore(jnp.asarray(k, dtype), jnp.asarray(v, dtype))
    else:
        store = formats.encode(jnp.asarray(k), jnp.asarray(v), fmt, group=kv_group, meta_dtype=meta)
    k, v = (np.asarray(x, np.float32) for x in formats.decode(store))
    if poison:
        store = _poison(store, valid)
    table = None
    if page is not None:
        store, table = _paged(rng, store, lengths, page)
    if residual:
        res = rng.standard_normal((2, batch, kv_heads, residual, dim)).astype(np.float32)
        res = jnp.asarray(res, dtype)
        res_lengths = rng.integers(0, residual + 1, (batch, kv_heads)).astype(np.int32)
        hole = (np.arange(residual) >= res_lengths[..., None])[..., None]
        bad = jnp.asarray(np.nan if poison else 0.0, dtype)
        k_res, v_res = (jnp.where(hole, bad, x) for x in res)
        store = dataclasses.replace(store, k_res=k_res, v_res=v_res, res_lengths=jnp.asarray(res_lengths))
        k, v = (np.concatenate([a, np.asarray(x, np.float32)], 2) for a, x in zip((k, v), res))
    return Problem(q, k, v, store, lengths, table)


def entries(problem):
    """(valid, order, total) of every entry of problem.k, residual window last."""
    slots = problem.k.shape[2] - problem.store.residual
    order = np.broadcast_to(np.arange(slots), (*problem.lengths.shape, slots))
    valid = order < problem.lengths[..., None]
    total = problem.lengths.copy()
    if problem.store.residual:
        place = np.arange(problem.store.residual)
        fill = np.asarray(problem.store.res_lengths)
        valid = np.concatenate([valid, place < fill[..., None]], -1)
        order = np.concatenate([order, place + problem.lengths[..., None]], -1)
        total = total + fill
    return valid, order, total


def _poison(store, valid):
    """NaN where the field's dtype has one, in everything that belongs to invalid slots alone."""
    fields = {}
    for name, (axis, per) in store.slot_fields().items():
        x = getattr(store, name)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        live = valid.reshape(*valid.shape[:2], -1, per).any(-1)
        live = live[..., None] if axis == -2 else live[:, :, None] if x.ndim == 4 else live
        fields[name] = jnp.where(jnp.asarray(live), x, jnp.asarray(jnp.nan, x.dtype))
    return dataclasses.replace(store, **fields)


def _paged(rng, store, lengths, page):
    """Scatter a dense store into shuffled pages; pages that nobody owns hold NaN."""
    batch, kv_heads = lengths.shape
    pages = store.slots // page
    count = batch * kv_heads * pages
    spare = 3
    place = rng.permutation(count + spare)[:count].astype(np.int32)
    fields = {}
    for name, (axis, per) in store.slot_fields().items():
        x = np.asarray(getattr(store, name))
        at = x.ndim + axis
        x = x.reshape(*x.shape[:at], pages, page // per, *x.shape[at + 1 :])
        x = np.moveaxis(x, at, 2).reshape(count, *np.moveaxis(x, at, 2).shape[3:])
        pool = np.zeros((count + spare, *x.shape[1:]), x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating):
            pool[:] = np.nan
        pool[place] = x
        fields[name] = jnp.asarray(pool)
    table = place.reshape(batch, kv_heads, pages).copy()
    unused = np.arange(pages) >= -(-lengths[..., None] // page)
    table[unused] = -1
    return dataclasses.replace(store, **fields), table
