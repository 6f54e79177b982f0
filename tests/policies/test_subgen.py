"""SubGen: the law of its samples, unbiased sums, and attention with two weights a slot, all against float64 loops."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import ops, weighted
from kvjax.cache.plan import Plan
from kvjax.cache.state import View
from kvjax.generation import engine
from kvjax.policies import Observation, parse
from kvjax.policies.base import PROTECTED
from kvjax.policies.reducers.sketch import NUMBER, SAMPLE, StreamingSketch
from kvjax.policies.reducing import LOG_COUNT, LOG_VALUE
from kvjax.types import AttentionInputs, ModelShape
from tests.toy import Toy, ragged, steps

D, N, SPLIT, RECENT, RUNS = 8, 40, 28, 4, 1000
SPEC = "subgen(budget=0.5, sink=2, recent=4, interval=4)"


def drawn(seed=0, n=N):
    rng = np.random.default_rng(seed)
    k, v = (rng.standard_normal((1, 1, n, D)).astype(np.float32) for _ in range(2))
    return k, v * rng.uniform(0.2, 2.0, (1, 1, n, 1)).astype(np.float32)


def first_state(n):
    return {x: jnp.zeros((1, 1, n), dtype) for x, (_, dtype) in StreamingSketch().slot_state().items()}


def compact(reducer, k, v, pos, state, mass, length, keep):
    """One compaction to `keep` entries, the newest RECENT of which are protected."""
    obs = Observation(
        q=None, q_pos=None, k=k, v=v, pos=pos, length=jnp.asarray([length]), state={"mass": mass}
    )
    scores = jnp.where(pos >= length - RECENT, PROTECTED, pos).astype(jnp.float32)
    order = jnp.argsort(jnp.where(pos >= 0, -scores, jnp.inf), axis=-1)[..., :keep]
    return reducer.survivors(obs, jnp.sort(order, axis=-1), scores, state)


@functools.partial(jax.jit, static_argnums=(2, 3))
def sketches(k, v, copies=1, keep=20, radius=0.0):
    """Sketches of N entries, one a seed: the first SPLIT in one compaction, then all others in a second."""

    def one(seed):
        reducer = StreamingSketch(copies, 0.5, radius, seed)
        pos = jnp.arange(N)[None, None]
        begin = (x[:, :, :SPLIT] for x in (k, v, pos))
        a = compact(reducer, *begin, first_state(SPLIT), jnp.zeros((1, 1)), SPLIT, keep)
        join = lambda x, y: jnp.concatenate([x, y], axis=2)  # noqa: E731
        rest = first_state(N - SPLIT)
        return compact(
            reducer,
            join(a.k, k[:, :, SPLIT:]),
            join(a.v, v[:, :, SPLIT:]),
            join(a.pos, pos[..., SPLIT:]),
            {n: join(x, rest[n]) for n, x in a.slot_state.items()},
            a.state["mass"],
            N,
            keep,
        )

    return jax.vmap(one)(jnp.arange(RUNS))


def sums(made, q):
    """(z, tau) float64 by seed from the slots and their weights."""
    ok = np.asarray(made.pos)[:, 0, 0] >= 0
    state = {n: np.asarray(x, np.float64)[:, 0, 0] for n, x in made.slot_state.items()}
    e = np.exp(np.asarray(made.k, np.float64)[:, 0, 0] @ q)
    tau = (e * np.exp(state[LOG_COUNT]) * ok).sum(-1)
    weight = e * np.exp(state[LOG_VALUE]) * ok
    return np.einsum("sn,snd->sd", weight, np.asarray(made.v, np.float64)[:, 0, 0]), tau


@pytest.mark.parametrize("copies", [1, 2])
def test_sums_are_unbiased(copies):
    """Mean over seeds of z and tau, after two compactions, within four standard errors of the exact sums."""
    k, v = drawn()
    q = np.random.default_rng(1).standard_normal(D) * 0.5
    z, tau = sums(sketches(k, v, copies), q)
    e = np.exp(np.asarray(k, np.float64)[0, 0] @ q)
    assert abs(tau.mean() - e.sum()) < 4 * tau.std() / RUNS**0.5 + 1e-4
    assert (np.abs(z.mean(0) - e @ v[0, 0]) < 4 * z.std(0) / RUNS**0.5 + 1e-4).all()
    assert tau.std() > 0 and (z.std(0) > 0).all()


def test_the_law_of_the_samples():
    """Values in proportion to ||v||^2, keys uniform in their cluster; slots are independent draws."""
    k, v = drawn(3)
    made = sketches(k, v, 2)
    pos, sample = np.asarray(made.pos)[:, 0, 0], np.asarray(made.slot_state[SAMPLE])[:, 0, 0]
    lost = np.arange(N - RECENT)
    want = (v[0, 0, lost].astype(np.float64) ** 2).sum(-1)
    mass, want = want.sum(), want / want.sum()
    slots = np.flatnonzero(sample[0] < 0)
    assert len(slots) == 8 and (np.asarray(made.state["mass"]) > mass * 0.99999).all()
    for j in slots:
        share = np.bincount(pos[:, j], minlength=N)[lost] / RUNS
        assert (np.abs(share - want) < 5 * np.sqrt(want / RUNS) + 1e-3).all()
    pair = (pos[:, slots[0]] == pos[:, slots[1]]).mean()
    assert abs(pair - (want**2).sum()) < 0.03
    number = np.asarray(made.slot_state[NUMBER])[:, 0, 0]
    keys = np.flatnonzero(sample[0] > 0)
    assert (number[:, keys[::2]].sum(-1) == len(lost)).all() and (
        number[:, keys[::2]] == number[:, keys[1::2]]
    ).all()
    for c in keys:
        share = np.bincount(pos[:, c], minlength=N)[lost] / RUNS
        members = np.flatnonzero(share)
        assert len(members) == number[0, c]
        assert (np.abs(share[members] - 1 / len(members)) < 5 * np.sqrt(1 / len(members) / RUNS)).all()


def test_clusters_are_greedy_k_centres():
    """Centres, farthest first, and the number of keys nearest to each; a second compaction joins them."""
    k, v = drawn(5)
    made = sketches(k, v)
    keys = k[0, 0].astype(np.float64)
    centres = [0]
    gap = lambda i, c: ((keys[i] - keys[c]) ** 2).sum()  # noqa: E731
    early = range(SPLIT - RECENT)
    while len(centres) < 8:
        centres.append(max(early, key=lambda i: min(gap(i, c) for c in centres)))
    count = [0] * 8
    for i in range(N - RECENT):
        count[int(np.argmin([gap(i, c) for c in centres]))] += 1
    sample = np.asarray(made.slot_state[SAMPLE])[0, 0, 0]
    at = [int(np.flatnonzero(sample == 1 + c)[0]) for c in range(8)]
    np.testing.assert_array_equal(np.asarray(made.v)[0, 0, 0, at], keys[centres].astype(np.float32))
    np.testing.assert_array_equal(np.asarray(made.slot_state[NUMBER])[0, 0, 0, at], count)
    np.testing.assert_allclose(np.exp(np.asarray(made.slot_state[LOG_COUNT])[0, 0, 0, at]), count, rtol=1e-5)
    exact = np.flatnonzero(sample == 0)
    np.testing.assert_array_equal(np.asarray(made.pos)[0, 0, 0, exact[:RECENT]], np.arange(N - RECENT, N))


def test_duplicates_within_the_radius_make_the_denominator_exact():
    k, v = drawn(7)
    k[:, :, : N - RECENT] = k[:, :, np.arange(N - RECENT) % 6]
    q = np.random.default_rng(2).standard_normal(D)
    for radius in (0.0, 1e-3):
        _, tau = sums(sketches(k, v, radius=radius), q)
        np.testing.assert_allclose(tau, np.exp(k[0, 0].astype(np.float64) @ q).sum(), rtol=1e-5)


def test_more_samples_make_smaller_errors():
    """Root mean square error of the output over seeds: 2 + 2 samples of 36 entries, and 8 + 8."""
    k, v = drawn(9)
    q = np.random.default_rng(4).standard_normal(D) * 0.5
    e = np.exp(k[0, 0].astype(np.float64) @ q)
    errors = []
    for keep in (8, 20):
        z, tau = sums(sketches(k, v + 1, 1, keep), q)
        errors.append(np.sqrt(((z / tau[:, None] - e @ (v[0, 0] + 1) / e.sum()) ** 2).sum(-1).mean()))
    assert errors[0] > 1.6 * errors[1], errors


@pytest.mark.parametrize("tokens, softcap", [(1, None), (150, 20.0)])
def test_weighted_attention(tokens, softcap):
    """Two log-weights a slot, empty slots and -inf weights: out and lse of a float64 loop."""
    rng = np.random.default_rng(0)
    b, kv, heads, n = 2, 2, 4, 12
    q, k, v = (
        rng.standard_normal(s).astype(np.float32)
        for s in ((b, heads, tokens, D), (b, kv, n, D), (b, kv, n, D))
    )
    pos = np.where(rng.random((b, kv, n)) < 0.8, 1, -1).astype(np.int32)
    k[pos < 0] = np.nan
    count, value = (rng.normal(0, 2, (b, kv, n)).astype(np.float32) for _ in range(2))
    count[..., 3], value[..., 4] = -1e30, -1e30
    state = {LOG_COUNT: jnp.asarray(count), LOG_VALUE: jnp.asarray(value)}
    x = AttentionInputs(q=jnp.asarray(q), k=None, v=None, positions=None, scale=0.3, softcap=softcap)
    out, lse, mass = jax.jit(weighted.attention)(x, k, v, View({}, jnp.asarray(pos), state))
    total = np.zeros((b, heads, n))
    for i, h, t in np.ndindex(b, heads, tokens):
        g, ok = h // 2, pos[i, h // 2] >= 0
        s = 0.3 * k[i, g, ok].astype(np.float64) @ q[i, h, t]
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        tau = np.exp(s + count[i, g, ok]).sum()
        np.testing.assert_allclose(
            out[i, h, t], np.exp(s + value[i, g, ok]) @ v[i, g, ok] / tau, rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(lse[i, h, t], np.log(tau), atol=1e-5)
        total[i, h, ok] += np.minimum(np.exp(s) / tau, 1)
    np.testing.assert_allclose(mass, total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spec, extend",
    [(SPEC, False), (SPEC, True), ("kvmerger(h2o(recent=4), threshold=-1.0, counted=True)", False)],
)
def test_steps_and_questions_read_the_weights(spec, extend):
    """Logits after a compressed prompt: a float64 loop over the stored slots with their weights."""
    lm, lengths = Toy(layers=1), (40, 29)
    plan = Plan(parse(spec), lm.shape, 2, 40, 4, page_size=4)
    params = jax.tree.map(jnp.asarray, lm.init())
    tokens, positions = ragged(lengths, 40)
    _, cache = engine.prefill(lm, plan, params, tokens, positions)
    seen = ops.view(plan, cache, 0)
    held = np.asarray(seen.pos) >= 0
    state = {n: np.asarray(x, np.float64) for n, x in seen.slot_state.items()}
    for b, h in np.ndindex(2, 2):  # every token of the prompt is stored, or counted in one cluster
        total = np.exp(state[LOG_COUNT][b, h, held[b, h]]).sum()
        if spec == SPEC:
            np.testing.assert_allclose(total, lengths[b], rtol=1e-5)
        assert held[b, h].sum() < total < lengths[b] + 1e-3
    more = np.array([[5, 7], [9, 3]]) if extend else np.array([[5], [9]])
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    want = []
    for b, n in enumerate(lengths):
        x = w["embed"][more[b]]
        h = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)
        angle = (n + np.arange(len(x)))[:, None] * 10000.0 ** (-np.arange(4) / 4)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = lambda y: np.concatenate([y[:, :4] * cos - y[:, 4:] * sin, y[:, 4:] * cos + y[:, :4] * sin], 1)  # noqa: E731, B023
        layer, out = w["layers"][0], np.zeros(len(x[0]))
        for head in range(4):
            kv, used = head // 2, held[b, head // 2]
            keys = np.vstack([np.asarray(seen.store["k"])[b, kv][used], turn(h @ layer["k"][:, kv])])
            values = np.vstack([np.asarray(seen.store["v"])[b, kv][used], h @ layer["v"][:, kv]])
            s = keys @ turn(h @ layer["q"][:, head])[-1] * 8**-0.5
            zeros = np.zeros(len(x))
            e = np.exp(s + np.r_[state.get(LOG_VALUE, state[LOG_COUNT])[b, kv][used], zeros])
            tau = np.exp(s + np.r_[state[LOG_COUNT][b, kv][used], zeros]).sum()
            out += e @ values / tau @ layer["o"][head]
        want.append((x[-1] + out) @ w["embed"].T)
    if extend:
        at = np.asarray(lengths)[:, None] + np.arange(2)
        got, _ = engine.extend(lm, plan, params, cache, more, at, compress=False)
    else:
        got = steps(lm, plan, params, cache, more)[0][0]
    np.testing.assert_allclose(got, np.stack(want), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize(
    "spec, words",
    [(f"{SPEC} | minference", "weighs slots"), ("cake(subgen(interval=1), budget=80)", "one by one")],
)
def test_parts_that_do_not_fit(spec, words):
    with pytest.raises(ValueError, match=words):
        Plan(parse(spec), ModelShape(2, 4, 2, 64, (None, None)), 1, 512, 8)


@pytest.mark.parametrize("spec, words", [("subgen(copies=0)", "copies"), ("subgen(values=1.0)", "values")])
def test_bad_arguments(spec, words):
    with pytest.raises(ValueError, match=words):
        parse(spec)
