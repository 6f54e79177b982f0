"""A prefix that many rows share: its keys and values are stored once and read once a step (Hydragen, RelayAttention).

The prefix is an argument of the loops of its own, never part of a `KVCache`: those are donated, and many sessions use
one prefix. A row's own entries follow it, at positions from the prefix's length on; a layer's attention is that over
the own entries merged with that over the prefix by log-sum-exp, in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from kvjax.cache import compensation, deferred, ops
from kvjax.cache.plan import Plan
from kvjax.cache.state import KVCache
from kvjax.types import AttentionInputs
from pallas_kernels.merge_partials import merge_partials
from pallas_kernels.prefill_attention import shared_attention

Array = jax.Array
_TILE = 128


@struct.dataclass
class PrefixLayer:
    """What one layer keeps of each prefix. Rows of a batch belong to groups in equal, contiguous parts."""

    k: Array  # [groups, kv_heads, slots, head_dim] in the model's dtype
    v: Array  # [groups, kv_heads, slots, head_dim]
    pos: Array  # int32 [groups, kv_heads, slots], -1 = empty


@struct.dataclass
class Prefix:
    """A prefilled prefix, or one per group of rows. Immutable: nothing is appended to it or evicted from it."""

    layers: tuple[PrefixLayer, ...]
    length: (
        Array  # int32 [groups] tokens of each prefix, which is also the position of a row's first own token
    )

    @property
    def groups(self) -> int:
        """How many prefixes these are."""
        return self.length.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers, counted once however many rows read them."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def starts(self, batch: int) -> Array:
        """int32 [batch]: position of each row's first own token."""
        return jnp.repeat(self.length, batch // self.groups, total_repeat_length=batch)


def of_cache(plan: Plan, cache: KVCache) -> Prefix:
    """What a prefilled cache holds, decoded, as a prefix per row of it. Call it outside `jit`."""
    layers = []
    for i in range(plan.shape.layers):
        if compensation.counts_slots(plan, i):
            raise ValueError(
                f"{plan.policy.name}: a token that stands for many cannot be part of a shared prefix"
            )
        if plan.layers[i].policy.codec.deferred:
            k, v, pos = deferred.decoded(plan, cache, i, None)
        else:
            seen = ops.view(plan, cache, i)
            pos = seen.pos
            ctx = ops.context(plan, i, pos, None)
            k, v = plan.layers[i].policy.codec.decode(seen.store, plan.shape.dtype, ctx)
        most = int(jnp.max(jnp.sum(pos >= 0, axis=-1)))
        tile = _TILE if most > _TILE else 8
        index = ops.all_entries(pos >= 0, -(-max(most, 1) // tile) * tile)
        layers.append(
            PrefixLayer(
                ops.take_slots(k, index), ops.take_slots(v, index), ops.take_slots(pos, index, fill=-1)
            )
        )
    return Prefix(tuple(layers), cache.next_position)


def check(plan: Plan, prefix: Prefix) -> None:
    """ValueError for parts of the policy that cannot follow a shared prefix, and for groups that do not divide the batch."""
    policy, codec = plan.policy, plan.policy.codec
    why = None
    if policy.probe is not None:
        why = "a probe runs against the uncompressed prompt"
    elif policy.placement is not None:
        why = "offloaded entries are read by another path"
    elif policy.rerotate:
        why = "rerotate moves entries to the positions of the prefix"
    elif any(compensation.counts_slots(plan, i) for i in range(plan.shape.layers)):
        why = "a token that stands for many is merged differently"
    elif policy.compresses and policy.evict_decode and "mass" in policy.needs:
        why = "eviction by the attention of decode steps needs the prefix's share of it"
    elif getattr(codec, "pre_rope", False) or codec.predicts:
        why = f"{type(codec).__name__} derives positions from slots"
    if why is not None:
        raise ValueError(f"{policy.name} does not compose with a shared prefix: {why}")
    if plan.batch % prefix.groups:
        raise ValueError(f"{plan.batch} rows cannot be divided equally among {prefix.groups} shared prefixes")


def attend(
    x: AttentionInputs, layer: PrefixLayer, own: Array, lse: Array, implementation: str | None
) -> tuple[Array, Array]:
    """(out f32, lse f32) of own entries and prefix together, from `own` f32 [batch, q_heads, tokens, head_dim], lse."""
    with jax.named_scope("prefix_attention"):
        out, total = shared_attention(
            x.q,
            layer.k,
            layer.v,
            q_positions=x.positions,
            k_positions=layer.pos,
            scale=x.scale,
            window=x.window,
            softcap=x.softcap,
            implementation=implementation,
        )
        return merge_partials(jnp.stack([own, out]), jnp.stack([lse, total]))
