"""What a policy costs on a device, from shapes alone: prefill time, decode step, tokens per second, what fits.

Every byte comes from the specs that the cache is allocated from (`Plan.specs`) and from the declared weights; no array
is made. Times are floors: bytes over bandwidth, operations over the matrix units' rate, the larger of the two per part
(weights, attention), parts one after the other, then what offloaded layers fetch: measured, next to none of it is hidden
(docs/results_offload.md). Launch gaps, collectives, what XLA copies and reads from disk are not in them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.arrays import nbytes
from kvjax.cache import index_layout
from kvjax.cache.plan import Plan
from kvjax.cache.traffic import moved_per_slot
from kvjax.policies.base import Policy
from models import params as model_params
from models.config import ModelConfig

# Of the data sheet's numbers, what one H200 reached: decode attention read 4,460 of 4,800 GB/s, an 8192^3 bf16 matrix
# product ran at 788 of 989 TFLOP/s, and gathers from pinned host memory moved 47.8 of 64 GB/s. Other devices get the same.
READ, MATMUL, LINK = 0.93, 0.80, 0.75


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as it performs: bytes/s, FLOP/s (dense bf16), host bytes/s in one direction, bytes of memory."""

    name: str
    bandwidth: float
    flops: float
    host_link: float
    memory: float


def _device(name: str, gb_s: float, tflops: float, link_gb_s: float, gib: float) -> Device:
    return Device(name, gb_s * 1e9 * READ, tflops * 1e12 * MATMUL, link_gb_s * 1e9 * LINK, gib * 2**30)


# Data sheets: GB/s of memory, dense bf16 TFLOP/s, GB/s of the host link in one direction, GiB of memory. A tpu7x device is
# half a chip. TPU host links are PCIe of the host machines (generation 3 or 4 x16), not published per chip.
DEVICES = {
    d.name: d
    for d in (
        _device("a100", 2039, 312, 32, 74.5),
        _device("h100", 3350, 989, 64, 74.5),
        _device("h200", 4800, 989, 64, 131.3),
        _device("v5e", 819, 197, 16, 16),
        _device("v5p", 2765, 459, 16, 95),
        _device("v6e", 1640, 918, 32, 32),
        _device("tpu7x", 3690, 1153, 32, 96),
    )
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes and multiply-adds of a model's weights."""

    total: int  # bytes held
    read: Callable[[int], float]  # rows -> bytes that a decode step reads
    products: int  # multiply-adds per token in matrix products, without the output head
    head: int  # multiply-adds of the output head per token


def weights(config: ModelConfig, dtype: str) -> Weights:
    """Counted from the declared arrays. Of experts, a step reads those that its rows are expected to choose:
    experts * (1 - (1 - chosen / experts) ** rows), as if each row chose at random."""
    specs = model_params.param_specs(config, dtype)
    total = nbytes(specs)
    per_item = jnp.dtype(dtype).itemsize
    head = math.prod(specs.embedding.shape)
    lookup = 0 if specs.head is None else head * per_item  # a separate embedding: only its rows are read
    expert_bytes = expert_products = share = 0.0
    products = 0
    for layer in specs.layers:
        matrices = [x for x in jax.tree.leaves(layer) if len(x.shape) > 1]
        if isinstance(layer.mlp, model_params.Moe):
            assert config.moe is not None
            experts = [layer.mlp.gate, layer.mlp.up, layer.mlp.down]
            matrices = [x for x in matrices if not any(x is e for e in experts)]
            count = sum(math.prod(x.shape) for x in experts)
            share = config.moe.top_k / config.moe.experts
            expert_bytes += count * per_item
            expert_products += count * share
        products += sum(math.prod(x.shape) for x in matrices)

    def read(rows: int) -> float:
        embedding = rows * config.embed_dim * per_item if lookup else 0
        return total - lookup + embedding - expert_bytes * (1 - share) ** rows

    return Weights(total, read, int(products + expert_products), head)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one decode step moves for all rows, and entries attended per layer."""

    cache: float  # stored fields and windows, from device memory
    index: float  # read by selectors, per step
    state: float  # scores and positions of policies that evict while decoding, read and written
    entries: float  # attended, summed over layers, rows and KV heads
    host: (
        float  # moved from host memory by offloaded layers, if a step finds none of its blocks on the device
    )


def step_traffic(plan: Plan) -> Traffic:
    """Of a step on rows that have just been prefilled with `plan.prompt` tokens each, from `plan.prompt_only()`."""
    plan = plan.prompt_only()
    shape, heads = plan.shape, plan.batch * plan.shape.kv_heads
    cache = index = state = entries = host = 0.0
    specs = plan.specs()
    for pool in plan.pool_specs:
        if pool is not None:
            cache += nbytes(pool.store)
    for i, lp in enumerate(plan.layers):
        policy, layer, pool = lp.policy, specs.layers[i], plan.pool_specs[lp.pool]
        assert pool is not None
        per_slot = policy.codec.bits_per_element(shape.head_dim, shape.dtype) * 2 * shape.head_dim / 8
        held = lp.pages * plan.page(policy) if lp.ragged else heads * lp.capacity
        if layer.residual is not None:
            cache += nbytes((layer.residual.k, layer.residual.v))
        if policy.compresses and policy.evict_decode:
            state += 2 * nbytes(pool.slot_state) + (0 if pool.pos is None else nbytes(pool.pos))
        if policy.selector is None:
            entries += held
            host += held * moved_per_slot(plan, i) if lp.offloaded else 0
            continue
        stored = np.full((plan.batch, shape.kv_heads), lp.capacity, np.int64)
        read = int(index_layout.planned(plan, i, stored).sum())
        cache -= (held - read) * per_slot
        entries += read
        host += read * moved_per_slot(plan, i) if lp.offloaded else 0
        shared = policy.selector.interval if not policy.selector.triggered else 1
        index += index_layout.scanned(plan, i) / shared
    return Traffic(cache, index, state, entries, host)


def prefill_flops(config: ModelConfig, shape: Any, batch: int, tokens: int) -> float:
    """Operations of a whole prompt: two per multiply-add; causal attention counts the visible half."""
    w = weights(config, shape.dtype)
    total = 2.0 * batch * (tokens * w.products + w.head)
    for window in shape.windows:
        near = min(tokens, window or tokens)
        pairs = near * (near + 1) / 2 + (tokens - near) * near
        total += 4.0 * batch * shape.q_heads * shape.head_dim * pairs
    return total


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n in 0..limit with fits(n), for a `fits` that is true up to some n."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, high * 2
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def estimate(
    config: ModelConfig,
    policy: Policy,
    device: Device,
    *,
    batch: int,
    context: int,
    new_tokens: int = 128,
    memory_fraction: float = 0.9,
) -> dict[str, Any]:
    """One row of numbers; keys are documented by `python -m launch.estimate --help`.

    memory_fraction: of the device's memory, what weights and cache may take; the rest is for activations.

    Raises:
      ValueError: context and new tokens exceed the model's, or the policy does not fit the model.
    """
    shape = config.shape()
    if context + new_tokens > shape.max_context:
        raise ValueError(
            f"--context={context} and {new_tokens} new tokens exceed the model's context of {shape.max_context}"
        )
    plan = functools.partial(Plan, shape=shape, reserve=new_tokens)
    this, full = plan(policy, batch=batch, prompt=context), plan(Policy(), batch=batch, prompt=context)
    w = weights(config, shape.dtype)
    room = device.memory * memory_fraction - w.total

    def fits(rows: int, tokens: int) -> bool:
        return plan(policy, batch=rows, prompt=tokens).device_nbytes() <= room

    moved, dense = step_traffic(this), step_traffic(full)
    attention = 4.0 * (shape.q_heads // shape.kv_heads) * shape.head_dim * moved.entries
    bytes_read = moved.cache + moved.index + moved.state
    weight_s = max(w.read(batch) / device.bandwidth, 2.0 * batch * (w.products + w.head) / device.flops)
    attention_s = max(bytes_read / device.bandwidth, attention / device.flops)
    transfer_s = moved.host / device.host_link
    step_s = weight_s + attention_s + transfer_s
    flops = prefill_flops(config, shape, batch, context)
    prefill_s = max(flops / device.flops, w.read(batch * context) / device.bandwidth)
    longest = shape.max_context - new_tokens
    return {
        "device": device.name,
        "batch": batch,
        "context": context,
        "new_tokens": new_tokens,
        "policy": policy.name,
        "weight_bytes": w.total,
        "cache_bytes": this.prompt_only().nbytes(),
        "host_cache_bytes": this.prompt_only().host_nbytes(),
        "disk_cache_bytes": this.prompt_only().disk_nbytes(),
        "full_cache_bytes": full.prompt_only().nbytes(),
        "allocated_bytes": this.nbytes(),
        "read_bytes": {
            "weights": w.read(batch),
            "cache": moved.cache,
            "index": moved.index,
            "state": moved.state,
            "host": moved.host,
        },
        "read_fraction": bytes_read / dense.cache,
        "prefill_flops": flops,
        "prefill_s": prefill_s,
        "step_s": step_s,
        "attention_s": attention_s,
        "transfer_s": transfer_s,
        "tokens_per_s": batch / step_s,
        "largest_batch": largest(lambda n: fits(n, context), 1 << 20) if room > 0 else 0,
        "largest_context": largest(lambda n: fits(batch, n), longest) if room > 0 else 0,
        "model_context": shape.max_context,
    }
