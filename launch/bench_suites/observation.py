"""Suite `observation`: window mass and column mass beside the prefill they observe."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax

from launch.bench_suites import prefill, timing
from pallas_kernels.observe import column_mass, window_mass, window_probs
from pallas_kernels.prefill_attention import prefill_attention

Row = dict[str, Any]

WINDOW = 32  # last queries that SnapKV and its kin observe


def rows() -> Iterator[Row]:
    """Per length: the flash pass with its log-sum-exp, then each observation; `of_prefill` is their ratio."""
    small = jax.default_backend() == "cpu"
    for tokens in prefill.LENGTHS[jax.default_backend()]:
        q, k, v, pos = prefill.operands(tokens, small)
        q_heads, dim = q.shape[1], q.shape[3]
        shared = dict(scale=dim**-0.5)
        pairs = q_heads * tokens * (tokens + 1) / 2

        def flash(q, k, v, pos, shared=shared):
            return prefill_attention(
                q, k, v, q_positions=pos, k_positions=pos, causal_aligned=True, return_lse=True, **shared
            )

        def columns(q, k, pos, lse, shared=shared):
            return column_mass(q, k, q_positions=pos, k_positions=pos, lse=lse, causal_aligned=True, **shared)

        def window(fn, q, k, pos, lse, shared=shared):
            return fn(
                q[:, :, -WINDOW:], k, q_positions=pos[:, -WINDOW:], k_positions=pos,
                lse=lse[:, :, -WINDOW:], **shared,
            )  # fmt: skip

        flash = jax.jit(flash)
        base = timing.measure(flash, q, k, v, pos)
        lse = flash(q, k, v, pos)[1]
        measured = [("flash_pass", timing.own_name(), base, 4 * dim * pairs)]
        seconds = timing.measure(jax.jit(columns), q, k, pos, lse)
        measured.append(("column_mass", timing.own_name(), seconds, 2 * dim * pairs))
        for name, fn in (("window_probs", window_probs), ("window_mass", window_mass)):
            seconds = timing.measure(jax.jit(functools.partial(window, fn)), q, k, pos, lse)
            how = timing.own_name() if fn is window_mass else "xla"
            measured.append((f"{name}_{WINDOW}", how, seconds, 2 * dim * q_heads * WINDOW * tokens))
        for name, implementation, seconds, flops in measured:
            row = timing.row(name, q.shape, q.dtype, implementation, seconds, flops=flops)
            yield row | {"of_prefill": seconds / base}
