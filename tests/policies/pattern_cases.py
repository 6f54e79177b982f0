"""A ragged prompt, the prefill patterns on it, and float64 oracles of what they read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.policies.prefill_patterns.flexprefill import FlexPrefill
from kvjax.policies.prefill_patterns.static import AShape, Streaming
from kvjax.policies.prefill_patterns.vertical_slash import MInference, VerticalSlash
from kvjax.policies.prefill_patterns.xattention import XAttention
from pallas_kernels.prefill_attention import block_table
from tests.kernels.prefill.attention_oracle import attention
from tests.policies.observations import KV_HEADS, prompt

BLOCK, SLOTS = 4, 30
LENGTHS = (30, 19)
GATES = ((0.1, 0.9), (0.8, 0.2))
PATTERNS = {
    "a_shape": AShape(sink=2, window=5, block=BLOCK),
    "tri_shape": AShape(sink=2, window=5, last=3, block=BLOCK),
    "streaming": Streaming(scores=GATES, sink=2, recent=4, block=BLOCK),
    "vertical_slash": VerticalSlash(
        vertical=2, slash=3, first=1, nearest=1, block=BLOCK, sample=5, min_recall=0.0
    ),
    "minference": MInference(
        vertical=2,
        slash=3,
        first=1,
        nearest=1,
        sink=1,
        window=3,
        tokens=8,
        block=BLOCK,
        sample=5,
        min_recall=0.6,
    ),
    "xattention": XAttention(stride=2, threshold=0.7, block=BLOCK, min_recall=0.0),
    "flexprefill": FlexPrefill(gamma=0.6, tau=0.2, min_budget=4, block=BLOCK, sample=5, min_recall=0.0),
}


def case(seed=0, slots=SLOTS, lengths=LENGTHS, scale=3.0):
    """A ragged prompt, rows padded behind; garbage, NaN included, in the padding."""
    obs = prompt(seed, lengths=lengths, slots=slots, scale=scale)
    pos = np.full((len(lengths), slots), -1, np.int32)
    for i, n in enumerate(lengths):
        pos[i, :n] = np.arange(n)
    bad = jnp.asarray(pos < 0)[:, None, :, None]
    return obs.replace(
        q_pos=jnp.asarray(pos),
        pos=jnp.asarray(np.repeat(pos[:, None], KV_HEADS, 1)),
        k=jnp.where(bad, jnp.nan, obs.k),
        v=jnp.where(bad, jnp.nan, obs.v),
    )


@functools.partial(jax.jit, static_argnames=("pattern", "aligned"))
def _mask(pattern, obs, aligned):
    table = pattern.blocks(obs, aligned=aligned)
    return block_table.to_mask(table, -(-obs.k.shape[2] // pattern.block))


def mask_of(pattern, obs, aligned=True):
    return np.asarray(_mask(pattern, obs, aligned))


def exact(obs, keep=None):
    """(out, lse, probs) of the float64 oracle, restricted to the blocks of `keep`."""
    allowed = None if keep is None else lambda b, h, t, s: keep[b, h, t // BLOCK, s // BLOCK]
    return attention(
        obs.q, obs.k, obs.v, obs.q_pos, obs.pos, scale=obs.scale, softcap=obs.softcap, allowed=allowed
    )


def causal(obs):
    """bool [batch, 1, q_blocks, k_blocks]: some query of the block sees some key of the block."""
    n = -(-obs.k.shape[2] // BLOCK)
    out = np.zeros((obs.k.shape[0], 1, n, n), bool)
    for b, pos in enumerate(np.asarray(obs.q_pos)):
        for t in np.flatnonzero(pos >= 0):
            out[b, 0, t // BLOCK, : t // BLOCK + 1] = True
    return out
