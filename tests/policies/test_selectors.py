"""What every selector must satisfy, over the registry: it reads what it says, all of it, and nothing else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax.attend import decode
from kvjax.cache import selecting, traffic
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies.registry import build, lookup
from kvjax.types import AttentionInputs
from tests.toy import Toy, ragged, steps

LM = Toy()
LENGTHS, PROMPT, RESERVE = (40, 29, 17), 40, 8
NAMES = [n for n in P.names() if build(n, **lookup(n).tiny).selector is not None]
CORE = ("clusterkv", "exact_topk", "pqcache", "quest")  # the others' programs are compiled in the slow run
every = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in NAMES])


def policy(name, **kwargs):
    return build(name, **{**lookup(name).tiny, **kwargs})


def filled(p, lm=LM):
    plan = Plan(p, lm.shape, 3, PROMPT, RESERVE)
    tokens, positions = ragged(LENGTHS, PROMPT)
    _, cache = engine.prefill(lm, plan, lm.init(), tokens, positions)
    return plan, cache


def query(cache, layer, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda h: jnp.asarray(rng.standard_normal((3, h, 1, LM.head_dim)), jnp.float32)  # noqa: E731
    return AttentionInputs(
        q=draw(LM.q_heads) * 2,
        k=draw(LM.kv_heads),
        v=draw(LM.kv_heads),
        positions=cache.next_position[:, None],
        hidden=jnp.asarray(rng.standard_normal((3, 1, 32)), jnp.float32),
        inv_freq=10000.0 ** (-jnp.arange(4) / 4),
        layer=layer,
        scale=LM.head_dim**-0.5,
    )


def active_layer(plan):
    return next(i for i in range(LM.layers) if selecting.active(plan, i))


def chosen_slots(plan, cache, x):
    """{(row, head): slots} that the next step reads after x was appended, and the cache with it."""
    from kvjax import attend

    cache = cache.replace(token_ids=jnp.zeros((3, 1), jnp.int32), hidden=x.hidden)
    cache = attend._append(plan, cache, x)
    table, _ = selecting.choose(plan, cache, x)
    fill, block = np.asarray(cache.layers[x.layer].fill), plan.block(x.layer)
    slots = np.asarray(selecting.slot_numbers(table, block))
    out = {}
    for b in range(3):
        for h in range(LM.kv_heads):
            named = np.asarray(table)[b, h]
            assert (np.diff(named[named >= 0]) > 0).all()  # ascending, so each block once
            assert (named[(named >= 0).sum() :] == -1).all()
            valid = np.repeat(named >= 0, block) & (slots[b, h] < fill[b, h])
            out[b, h] = sorted(slots[b, h][valid].tolist())
    return out, cache


@every
def test_reads_the_newest_and_the_first_entries_and_no_more_than_asked(name):
    p = policy(name)
    plan, cache = filled(p)
    i = active_layer(plan)
    s, block = p.selector, plan.block(i)
    slots, after = chosen_slots(plan, cache, query(cache, i))
    for (b, h), got in slots.items():
        fill = int(after.layers[i].fill[b, h])
        assert set(range(max(0, fill - s.recent), fill)) <= set(got)
        assert set(range(min(s.sink, fill))) <= set(got)
        if not s.reorders:
            assert fill == LENGTHS[b] + 1
        allowed = -(-s.entries(fill) // block) * block + 2 * block  # the first and the last recent block
        assert len(got) <= max(allowed, s.sink + s.recent + 2 * block)


@every
def test_unread_entries_do_not_matter(name):
    p = dataclasses.replace(
        policy(name), placement=None
    )  # the poison below is written where the device has it
    plan, cache = filled(p)
    i = active_layer(plan)
    if p.selector.estimates or not p.selector.specs(3, 48, LM.shape):
        pytest.skip("what is not read is summarised, or the entries are the index")
    if plan.layers[i].ragged:
        pytest.skip("the poison below is written into Dense pools")
    x = query(cache, i)
    slots, _ = chosen_slots(plan, cache, x)
    step = jax.jit(decode(plan))
    cache = cache.replace(token_ids=jnp.zeros((3, 1), jnp.int32), hidden=x.hidden)
    want, _ = step(x, cache)
    pool = cache.pools[plan.layers[i].pool]
    read = np.zeros(pool.pos.shape, bool)
    for (b, h), got in slots.items():
        read[b, h, got] = True
    store = {n: jnp.where(read[..., None], a, 7.0) if a.ndim == 4 else a for n, a in pool.store.items()}
    pools = list(cache.pools)
    pools[plan.layers[i].pool] = pool.replace(store=store)
    got, _ = step(x, cache.replace(pools=tuple(pools)))
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.xdist_group(n)] + [pytest.mark.slow] * (n not in CORE))
        for n in NAMES
    ],
)
def test_reading_everything_is_full_attention(name):
    p = policy(name, read=1.0)
    if p.selector.estimates or p.selector.biased:
        pytest.skip("logits of sampled or summarised entries differ by design")
    tokens = np.random.default_rng(7).integers(0, 64, (3, 5))
    got, _ = steps(LM, *_start(p), tokens)
    want, _ = steps(LM, *_start(P.parse("full")), tokens)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-4, atol=2e-4)


def _start(p, lm=LM):
    plan, cache = filled(p, lm)
    return plan, lm.init(), cache


@every
def test_fraction_read_counts_entries_and_index(name):
    p = policy(name, skip_layers=0) if "skip_layers" in lookup(name).arguments else policy(name)
    plan, cache = filled(p)
    assert traffic.read_fraction(plan, cache) > 0.0
    full_plan, full_cache = filled(P.parse("full"))
    assert traffic.read_fraction(full_plan, full_cache) == 1.0
    scanned = 0.0
    for i, lp in enumerate(plan.layers):
        if lp.policy.selector is not None:
            own = {
                n: s
                for n, s in plan.index_specs(i).items()
                if n not in selecting.FRAMEWORK and not n.startswith("held.")
            }
            scanned += lp.policy.selector.scanned(own, lp.capacity, 3, LM.shape)
    assert traffic.read_bytes(plan, cache) <= traffic.read_bytes(full_plan, full_cache) * 1.2 + scanned


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("exact_topk", "keydiff(budget=0.5) | adakv"),
        ("quest", "keydiff(budget=0.5)"),
        ("quest", "keydiff(budget=0.5) | adakv"),
        ("quest", "int8"),
        ("quest", "int4(group=8, residual=8, sink=2)"),
        ("quest", "keydiff(budget=0.6) | zipcache(segment=8, residual=8)"),
    ],
)
def test_composes_with_eviction_and_codecs(name, spec):
    """Reading everything beside a codec or an eviction is that codec or eviction alone."""
    tokens = np.random.default_rng(7).integers(0, 64, (3, 5))
    alone, lm = P.parse(spec), Toy(layers=1)
    want, _ = steps(lm, *_start(alone, lm), tokens)
    got, _ = steps(lm, *_start(alone | policy(name, read=1.0), lm), tokens)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-4, atol=2e-4)
    if spec == "int8":
        some, _ = steps(lm, *_start(alone | policy(name, read=8), lm), tokens)
        assert np.isfinite(np.asarray(some)).all()
        assert np.abs(np.asarray(some) - np.asarray(want)).max() > 1e-3  # it does read less


@pytest.mark.parametrize("page", [1, 4])
def test_quest_bounds_every_key_of_the_page(page):
    p = policy("quest", page=page, over="max", read=16)
    plan, cache = filled(p)
    tokens = np.random.default_rng(1).integers(0, 64, (3, 6))
    _, cache = steps(LM, plan, LM.init(), cache, tokens)  # appended entries widen the bounds
    x = query(cache, 0)
    call = selecting._call(plan, cache, x)
    scores = np.asarray(p.selector.score(selecting._own(cache.layers[0].index)[0], call)[0])
    entries = selecting.stored_entries(plan, cache, 0, x.inv_freq)
    k, pos, slots = (np.asarray(a, np.float64) for a in (entries.k, entries.pos, entries.slots))
    q = np.asarray(call.grouped, np.float64)
    for b in range(3):
        for h in range(LM.kv_heads):
            best = np.full(scores.shape[2], -np.inf)
            for j in range(k.shape[2]):
                if pos[b, h, j] >= 0:
                    unit = int(slots[b, h, j]) // page
                    best[unit] = max(best[unit], (q[b, h] @ k[b, h, j]).max())
            seen = best > -np.inf
            assert (scores[b, h][seen] >= best[seen] - 1e-4).all()
            if page == 1:
                np.testing.assert_allclose(scores[b, h][seen], best[seen], rtol=1e-4, atol=1e-4)


def test_a_token_of_largest_logit_is_read():
    plan, cache = filled(policy("exact_topk", read=2))
    x = query(cache, 0)
    slots, after = chosen_slots(plan, cache, x)
    k = np.asarray(selecting.stored_entries(plan, after, 0, None).k, np.float64)
    q = np.asarray(x.q, np.float64)[:, :, 0].reshape(3, LM.kv_heads, -1, LM.head_dim)
    for (b, h), got in slots.items():
        n = int(after.layers[0].fill[b, h])
        logits = q[b, h] @ k[b, h, :n].T * x.scale
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True)).max(0)
        p[n - 1] = np.inf
        assert got == sorted(np.argsort(-p)[:2].tolist())


def test_bad_arguments():
    for spec, word in (
        ("quest(read=0)", "read"),
        ("quest(read=1.5)", "read"),
        ("quest(read=4, sink=8)", "always read"),
        ("quest | streaming_llm(budget=0.5)", "eviction while decoding"),
        ("quest | exact_topk", "exclude each other"),
    ):
        with pytest.raises(ValueError, match=word):
            P.parse(spec)


def test_fed_one_by_one_tokens_meet_the_selection():
    """Reading everything it is `extend`; reading less, the logits differ, and rows of other lengths do not matter."""
    tokens, positions = ragged((5, 3, 0), 6, seed=3)
    valid = positions >= 0
    logits = {}
    for read in (1.0, 8):
        plan, cache = filled(policy("exact_topk", read=read))
        at = np.where(valid, positions + np.asarray(cache.next_position)[:, None], -1)
        want, _ = engine.extend(
            LM, plan, LM.init(), jax.tree.map(jnp.copy, cache), tokens, at, compress=False, all_logits=True
        )
        last, _ = engine.feed(LM, plan, LM.init(), jax.tree.map(jnp.copy, cache), tokens, valid)
        got, after = engine.feed(LM, plan, LM.init(), cache, tokens, valid, all_logits=True)
        assert np.asarray(after.length).tolist() == [n + m for n, m in zip(LENGTHS, (5, 3, 0))]
        logits[read] = np.abs(np.asarray(got) - np.asarray(want))[valid].max()
        for row, n in ((0, 5), (1, 3)):
            np.testing.assert_array_equal(last[row], got[row, n - 1])
        assert not np.asarray(last[2]).any()
    assert logits[1.0] < 1e-3 < 1e-2 < logits[8]


def test_heads_share_what_is_read():
    """Shares follow the scores, never exceed 1, and their mean is the budget; the tables hold as many blocks."""
    from kvjax.policies.selectors.head_reads import HeadReads

    scores = ((0.9, 0.0), (0.05, 0.05))
    shares = HeadReads(scores, beta=2.0).shares(0.5) / 1024
    want = np.array([[1.0, 0.25], [0.25 + 0.375, 0.25 + 0.375]])  # 0.25 each, 0.75 to the first, 0.25 left
    want[1] = 0.25 + (1.0 - 0.75) / 2
    np.testing.assert_allclose(shares, want, atol=2e-3)
    p = policy("exact_topk", read=0.5) | P.head_reads(heads=scores, beta=2.0)
    plan, cache = filled(p)
    for layer in range(LM.layers):
        slots, after = chosen_slots(plan, cache, query(cache, layer))
        for (b, h), got in slots.items():
            fill = int(after.layers[layer].fill[b, h])
            assert len(got) == max(1, fill * int(want[layer, h] * 1024 + 1e-6) // 1024)
    with pytest.raises(ValueError, match="fraction"):
        filled(policy("exact_topk", read=8) | P.head_reads(heads=scores))
