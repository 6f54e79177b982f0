"""Pools hold what allocators promise: bytes, pages and limits in the cache of a small model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies import parse
from kvjax.types import ModelShape
from tests.toy import Toy, ragged, steps

SHAPE = ModelShape(4, 4, 2, 64, (None,) * 4)
INLINE = "heads=((0.1, 0.9), (0.8, 0.2), (0.3, 0.4), (0.5, 0.6))"


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, 512])
@pytest.mark.parametrize(
    "spec",
    ["pyramidkv()", "zigzagkv()", "cake()", "dynamickv()", "prefixkv()", "d2o()", "fastgen()", "taskkv()"]
    + [f"{n}({INLINE})" for n in ("headkv", "headkv_r2", "duoattention")],
)
def test_bytes_stay_within_the_budget(spec, budget):
    """Allocated after prefill: the budget's share of the full cache x 1.03, and a page of slack per head."""
    name, _, rest = spec.partition("(")
    policy = parse(f"{name}(budget={budget}, {rest}")
    got = Plan(policy, SHAPE, 2, 4096, 0).nbytes()
    full = Plan(parse("full"), SHAPE, 2, 4096, 0).nbytes()
    share = budget if isinstance(budget, float) else budget / 4096
    page = 2 * SHAPE.layers * SHAPE.kv_heads * 16 * 2 * 64 * 4
    tables_ = 2 * SHAPE.layers * SHAPE.kv_heads * 4096 // 16 * 4
    state = 1.02 if policy.scorer.slot_state() else 1.0  # f32 per slot beside 2 x 64 f32
    pages = 1 + policy.evict_decode  # room for the token that comes before one leaves
    assert got <= share * full * 1.03 * state + pages * page + tables_


SPECS = ["keydiff(budget=0.4) | zigzagkv", f"keydiff(budget=13) | duoattention({INLINE}, sink=1, recent=2)"]
SPECS += ["snapkv(budget=0.3, window=4) | pyramidkv(beta=3)", "h2o(budget=12, recent=3) | dynamickv"]


@pytest.mark.parametrize("spec", SPECS)
def test_pools_never_overflow(spec):
    """Every promised entry has a page, in prefill and after as many steps as were reserved."""
    lm, lengths, reserve = Toy(layers=4), (40, 29, 7), 6
    policy = parse(spec)
    plan = Plan(policy, lm.shape, 3, 40, reserve, page_size=4)
    tokens, positions = ragged(lengths, 40)
    _, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
    held = lambda c: np.stack([(np.asarray(ops.view(plan, c, i).pos) >= 0).sum(-1) for i in range(4)], 1)  # noqa: E731
    fill = np.stack([np.asarray(layer.fill) for layer in cache.layers], 1)
    np.testing.assert_array_equal(held(cache), fill)
    np.testing.assert_array_equal(fill.sum((1, 2)), [4 * 2 * policy.keep(n) for n in lengths])
    used = np.concatenate([np.asarray(layer.table).ravel() for layer in cache.layers])
    used = used[used >= 0]
    assert len(set(used.tolist())) == used.size <= cache.pools[0].pos.shape[0]
    before = held(cache)
    params = jax.tree.map(jnp.asarray, lm.init())
    _, cache = steps(lm, plan, params, cache, np.arange(3 * reserve).reshape(3, reserve))
    want = before + reserve
    if policy.evict_decode:
        want = np.stack([np.asarray(layer.limit) for layer in cache.layers], 1)
        want = np.minimum(before + reserve, want)
    np.testing.assert_array_equal(held(cache), want)


def test_fixed_roles_through_the_cache():
    """sparsity=0.5: the two best heads hold every token, the others sinks and the window."""
    lm, lengths = Toy(), (40, 29, 3)
    policy = parse("duoattention(heads=((0.1, 0.9), (0.8, 0.2)), sink=2, recent=4, sparsity=0.5)")
    plan = Plan(policy, lm.shape, 3, 40, 4, page_size=4)
    tokens, positions = ragged(lengths, 40)
    _, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
    for i, full_head in enumerate((1, 0)):
        pos = np.asarray(ops.view(plan, cache, i).pos)
        for row, n in enumerate(lengths):
            held = [sorted(x[x >= 0].tolist()) for x in pos[row]]
            assert held[full_head] == list(range(n))
            assert held[1 - full_head] == sorted({*range(min(2, n)), *range(max(n - 4, 0), n)})


def test_a_question_after_a_shared_pool_keeps_every_layer():
    """Extending without compression re-packs all layers that share a pool, not one over the others."""
    lm = Toy(layers=4)
    policy = parse("h2o(budget=12, recent=3) | zigzagkv")
    plan = Plan(policy, lm.shape, 2, 40, 8, page_size=4)
    tokens, positions = ragged((40, 29), 40)
    _, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
    limits = np.stack([np.asarray(layer.limit) for layer in cache.layers])
    more, at = np.arange(6).reshape(2, 3), np.array([[40, 41, 42], [29, 30, -1]])
    _, cache = engine.extend(lm, plan, lm.init(), cache, more, at, compress=False)
    for i in range(4):
        pos = np.asarray(ops.view(plan, cache, i).pos)
        np.testing.assert_array_equal((pos >= 0).sum(-1), np.minimum(limits[i], 12 * 4))
        for row, newest in enumerate((42, 30)):
            assert (pos[row].max(-1) == newest).all()
            for h in range(2):
                x = pos[row, h][pos[row, h] >= 0]
                assert len(set(x.tolist())) == x.size
