"""RazorAttention's compensation token: the reducer, and attention that counts it N times."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import ops
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies import Observation, parse
from kvjax.policies.base import PROTECTED
from kvjax.policies.methods.razorattention import roles
from kvjax.policies.reducers.compensation import Compensate
from kvjax.policies.reducing import LOG_COUNT
from kvjax.types import ModelShape
from tests.toy import Toy, ragged, steps

HEADS = "heads=((0.1, 0.9), (0.8, 0.2))"
SPEC = f"razorattention({HEADS}, sink=2, recent=4, budget=0.5)"


def observation(k, v, n):
    pos = np.where(np.arange(k.shape[2]) < n, np.arange(k.shape[2]), -1).astype(np.int32)
    return Observation(
        q=None,
        q_pos=None,
        k=jnp.asarray(k),
        v=jnp.asarray(v),
        pos=jnp.asarray(np.broadcast_to(pos, k.shape[:3])),
        length=jnp.asarray([n]),
    )


def softmax_mean(q, k, v, log_count):
    e = np.exp(np.asarray(k, np.float64) @ q + log_count)
    return e @ np.asarray(v, np.float64) / e.sum()


def test_identical_losers_give_the_output_of_full_attention():
    """Two sinks, seven equal entries, three recents; six of the equal ones are dropped, padding follows."""
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((1, 2, 16, 8)).astype(np.float32) for _ in range(2))
    k[:, :, 2:9], v[:, :, 2:9] = k[:, :, 2:3], v[:, :, 2:3]
    k[:, :, 12:], v[:, :, 12:] = np.nan, np.nan
    index = jnp.asarray(np.broadcast_to([0, 1, 8, 9, 10, 11, 16], (1, 2, 7)))
    scores = np.broadcast_to(np.arange(16.0), (1, 2, 16)).astype(np.float32).copy()
    scores[..., [0, 1, 9, 10, 11]] = PROTECTED
    state = {LOG_COUNT: jnp.zeros((1, 2, 16))}
    got_k, got_v, got = jax.jit(Compensate().apply)(observation(k, v, 12), index, jnp.asarray(scores), state)
    count = np.asarray(got[LOG_COUNT])
    np.testing.assert_allclose(count, np.broadcast_to([0, 0, np.log(7), 0, 0, 0, 0], (1, 2, 7)), atol=1e-6)
    q = rng.standard_normal(8)
    for h in range(2):
        want = softmax_mean(q, k[0, h, :12], v[0, h, :12], 0)
        short = softmax_mean(q, got_k[0, h, :6], got_v[0, h, :6], count[0, h, :6])
        np.testing.assert_allclose(short, want, atol=1e-6)
    np.testing.assert_array_equal(got_k[0, :, [0, 1, 3, 4, 5]], k[0, :, [0, 1, 9, 10, 11]])


def test_a_later_chunk_counts_what_was_merged_before():
    """Merging twice gives the mean of all that was dropped, each token counted once."""
    rng = np.random.default_rng(1)
    k, v = (rng.standard_normal((1, 1, 8, 4)).astype(np.float32) for _ in range(2))
    apply = jax.jit(Compensate().apply)
    scores = jnp.asarray(np.arange(8.0, dtype=np.float32))[None, None]
    state = {LOG_COUNT: jnp.zeros((1, 1, 8))}
    first = apply(observation(k, v, 8), jnp.asarray([[[3, 4, 5, 6, 7]]]), scores, state)
    k2, v2, state2 = first
    second = apply(
        observation(np.asarray(k2), np.asarray(v2), 5), jnp.asarray([[[2, 3, 4]]]), scores[..., :5], state2
    )
    np.testing.assert_allclose(second[0][0, 0, 0], k[0, 0, :6].mean(0), atol=1e-6)
    np.testing.assert_allclose(second[1][0, 0, 0], v[0, 0, :6].mean(0), atol=1e-6)
    np.testing.assert_allclose(np.exp(second[2][LOG_COUNT][0, 0]), [6, 1, 1], atol=1e-5)


def test_without_losers_or_free_survivors_nothing_is_compensated():
    rng = np.random.default_rng(2)
    k, v = (rng.standard_normal((1, 1, 6, 4)).astype(np.float32) for _ in range(2))
    state = {LOG_COUNT: jnp.zeros((1, 1, 6))}
    whole = jnp.arange(6)[None, None]
    got_k, _, got = Compensate().apply(observation(k, v, 6), whole, jnp.zeros((1, 1, 6)), state)
    np.testing.assert_array_equal(got_k, k)
    assert not np.asarray(got[LOG_COUNT]).any()
    scores = jnp.asarray([[[0, 0, 0, 0, PROTECTED, PROTECTED]]])
    got_k, _, got = Compensate().apply(observation(k, v, 6), jnp.asarray([[[4, 5]]]), scores, state)
    np.testing.assert_array_equal(got_k[0, 0], k[0, 0, 4:])
    assert not np.asarray(got[LOG_COUNT]).any()


@pytest.mark.parametrize("extend", [False, True])
def test_attention_counts_the_token(extend):
    """Logits of a step, or of a question, after compression: a float64 loop with exp(logit) * N."""
    lm, lengths = Toy(layers=1), (40, 29)
    spec = "razorattention(heads=((0.1, 0.9),), sink=2, recent=4, budget=0.7)"
    plan = Plan(parse(spec), lm.shape, 2, 40, 4, page_size=4)
    params = jax.tree.map(jnp.asarray, lm.init())
    tokens, positions = ragged(lengths, 40)
    _, cache = engine.prefill(lm, plan, params, tokens, positions)
    seen = ops.view(plan, cache, 0)
    held = np.asarray(seen.pos) >= 0
    count = np.where(held, np.asarray(seen.slot_state[LOG_COUNT]), 0.0)
    assert (np.exp(count[:, 0]).max(-1) > 2).all() and not count[:, 1].any()
    for b, n in enumerate(lengths):  # every token of the prompt is stored, or counted once
        np.testing.assert_allclose(np.exp(count)[b].sum(-1, where=held[b]), n, rtol=1e-5)
    token = np.array([[5], [9]])
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    want = []
    for b, n in enumerate(lengths):
        x = w["embed"][token[b, 0]]
        h = x / np.sqrt(np.mean(x * x) + 1e-6)
        inv_freq = 10000.0 ** (-np.arange(4) / 4)
        cos, sin = np.cos(n * inv_freq), np.sin(n * inv_freq)
        turn = lambda y: np.r_[y[:4] * cos - y[4:] * sin, y[4:] * cos + y[:4] * sin]  # noqa: E731, B023
        layer, out = w["layers"][0], np.zeros_like(x)
        for head in range(4):
            kv, used = head // 2, held[b, head // 2]
            keys = np.vstack([np.asarray(seen.store["k"])[b, kv][used], turn(h @ layer["k"][:, kv])])
            values = np.vstack([np.asarray(seen.store["v"])[b, kv][used], h @ layer["v"][:, kv]])
            q = turn(h @ layer["q"][:, head]) * 8**-0.5
            out += softmax_mean(q, keys, values, np.r_[count[b, kv][used], 0]) @ layer["o"][head]
        want.append((x + out) @ w["embed"].T)
    if extend:
        at = np.asarray(lengths)[:, None]
        got, _ = engine.extend(lm, plan, params, cache, token, at, compress=False)
    else:
        got = steps(lm, plan, params, cache, token)[0][0]
    np.testing.assert_allclose(got, np.stack(want), rtol=2e-4, atol=2e-4)


def test_shipped_roles():
    """Of 24 heads the best of echo and the best 4 of induction retrieve; the ranking starts with them."""
    table, file, share = roles("kvref-22m", 0.01, 0.14)
    scores = np.asarray(table)
    assert file.endswith("heads.safetensors") and scores.shape == (12, 2)
    assert (scores >= 1).sum() == round(share * 24) and 4 <= round(share * 24) <= 5


@pytest.mark.parametrize("spec", [f"{SPEC} | kivi(bits=2)", f"razorattention({HEADS}, scorer=h2o)"])
def test_parts_that_do_not_fit(spec):
    with pytest.raises(ValueError, match="stands for many"):
        Plan(parse(spec), ModelShape(2, 4, 2, 64, (None, None)), 1, 512, 8)
