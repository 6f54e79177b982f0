"""Blocks that streaming heads read; which heads stream is said by `kvjax.policies.selectors.head_reads`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kvjax.cache import index_layout
from kvjax.cache.index_layout import put_heads
from kvjax.cache.plan import Plan
from kvjax.types import Array


def table(plan: Plan, i: int, fill: Array, stored: tuple[Array, Array]) -> Array:
    """Blocks of heads that stream, ascending: sinks, and the newest that their share allows, -1 at the end.

    int32 [batch, kv_heads, streaming_width], of all heads of layer i. fill: entries in slots; stored: all entries, and those
    outside the slots (always read). The newest entry is always read.
    """
    reads, codec, block = plan.layers[i].policy.head_reads, plan.layers[i].policy.codec, plan.block(i)
    total, exact = stored
    share = reads.entries(plan.layers[i].policy.selector.read, i, total)
    share = jnp.maximum(share, jnp.minimum(total, reads.sink + 1))
    end = -(-fill // block)
    sinks = jnp.minimum(-(-max(0, reads.sink - codec.sink) // block), end)
    newest = jnp.maximum(-(-jnp.maximum(share - exact - reads.sink, 0) // block), jnp.where(exact > 0, 0, 1))
    start, sinks = jnp.maximum(end - newest, sinks)[..., None], sinks[..., None]
    number = jnp.arange(index_layout.streaming_width(plan, i), dtype=jnp.int32)
    block_of = jnp.where(number < sinks, number, start + number - sinks)
    return jnp.where(block_of < end[..., None], block_of, -1)


def beside(chosen: Array, streamed: Array, heads: tuple[int, ...], width: int) -> Array:
    """One table int32 [batch, kv_heads, width] of the retrieval heads' blocks and, for the others, of the streamed ones."""
    kv_heads = streamed.shape[1]
    fit = lambda t: jnp.pad(t, ((0, 0), (0, 0), (0, width - t.shape[2])), constant_values=-1)  # noqa: E731
    mine = np.isin(np.arange(kv_heads), heads)[:, None]
    return jnp.where(mine, put_heads(fit(chosen), heads, kv_heads, -1), fit(streamed))
