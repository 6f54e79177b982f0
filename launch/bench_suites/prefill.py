"""Suite `prefill_attention`: own kernels beside cuDNN and XLA through JAX, and torch SDPA where torch is present."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.bench_suites import timing
from pallas_kernels.prefill_attention import BlockTable, block_table, prefill_attention

Array = jax.Array
Row = dict[str, Any]

HEADS = (32, 8, 128)  # query heads, KV heads, head_dim
LENGTHS = {"gpu": (8192, 32768, 131072), "tpu": (8192, 32768), "cpu": (512, 1024)}
XLA_LIMIT = 8192  # the XLA path is for correctness: timing it at 128k would take minutes
DENSITY = 0.10


def operands(tokens: int, small: bool) -> tuple[Array, Array, Array, Array]:
    """Random q, k, v of one row and its positions: bfloat16, or float32 on 4 + 2 heads of 64 for a CPU."""
    q_heads, kv_heads, dim = (4, 2, 64) if small else HEADS
    dtype = jnp.float32 if small else jnp.bfloat16
    keys = jax.random.split(jax.random.key(tokens), 3)
    q = jax.random.normal(keys[0], (1, q_heads, tokens, dim), dtype)
    k, v = (jax.random.normal(key, (1, kv_heads, tokens, dim), dtype) for key in keys[1:])
    return q, k, v, jnp.arange(tokens, dtype=jnp.int32)[None]


def sparse_table(q_heads: int, tokens: int, density: float = DENSITY) -> tuple[BlockTable, float]:
    """Random causal blocks of 128 x 128 with every diagonal block, and the share of causal blocks they are."""
    n = tokens // 128
    causal = np.tril(np.ones((n, n), bool))
    keep = np.random.default_rng(0).random((1, q_heads, n, n)) < density
    keep = (keep | np.eye(n, dtype=bool)) & causal
    width = int(keep.sum(-1).max())
    make = jax.jit(functools.partial(block_table.from_mask, block_q=128, block_k=128, width=width))
    return make(jnp.asarray(keep)), float(keep.sum() / (q_heads * causal.sum()))


def calls(tokens: int, small: bool) -> Iterator[tuple[str, str, Callable, tuple, float]]:
    """(name, implementation, function, operands, flops) of everything measured at one length."""
    q, k, v, pos = operands(tokens, small)
    q_heads, dim = q.shape[1], q.shape[3]
    scale = dim**-0.5
    flops = 4 * q_heads * dim * tokens * (tokens + 1) / 2

    def own(q, k, v, pos, blocks=None, implementation=None):
        return prefill_attention(
            q, k, v, q_positions=pos, k_positions=pos, scale=scale, causal_aligned=True, blocks=blocks,
            return_lse=True, implementation=implementation,
        )  # fmt: skip

    yield "causal", timing.own_name(), own, (q, k, v, pos), flops
    if tokens >= 1024:
        table, density = sparse_table(q_heads, tokens)
        name = f"block_sparse_{density:.0%}"
        yield name, timing.own_name(), own, (q, k, v, pos, table), flops * density
    if tokens <= XLA_LIMIT and timing.own_name() != "xla":
        xla = functools.partial(own, implementation="xla")
        yield "causal", "xla", xla, (q, k, v, pos), flops
    tokens_first = [jnp.asarray(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
    if jax.default_backend() == "gpu":
        cudnn = functools.partial(
            jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation="cudnn"
        )
        yield "causal", "jax.nn cudnn", cudnn, tuple(tokens_first), flops
    if tokens <= XLA_LIMIT:
        plain = functools.partial(
            jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation="xla"
        )
        yield "causal", "jax.nn xla", plain, tuple(tokens_first), flops


def rows() -> Iterator[Row]:
    """One row per length and implementation, own first; torch's peers last, in a second pass."""
    small = jax.default_backend() == "cpu"
    for tokens in LENGTHS[jax.default_backend()]:
        for name, implementation, fn, args, flops in calls(tokens, small):
            seconds = timing.measure(jax.jit(fn), *args)
            yield timing.row(name, args[0].shape, args[0].dtype, implementation, seconds, flops=flops)
    if not small:
        yield from _torch_rows()


def _torch_rows() -> Iterator[Row]:
    torch = timing.torch_with_gpu()
    if torch is None:
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q_heads, kv_heads, dim = HEADS
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True
    )
    for tokens in LENGTHS["gpu"]:
        make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        q, k, v = (make(1, heads, tokens, dim) for heads in (q_heads, kv_heads, kv_heads))
        flops = 4 * q_heads * dim * tokens * (tokens + 1) / 2
        for name, backend in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
        ):
            with sdpa_kernel(backend):
                seconds = timing.measure_torch(torch, functools.partial(attend, q, k, v))
            yield timing.row("causal", tuple(q.shape), "bfloat16", f"torch {name}", seconds, flops=flops)
