"""Small random observations, and an attention matrix in float64, for tests of scorers without a model."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.policies import Observation
from kvjax.policies.base import Policy, Scorer

BATCH, Q_HEADS, KV_HEADS, DIM, EMBED = 2, 4, 2, 8, 12
LENGTHS = (32, 21)  # the second row is padded in front
SLOTS = 32


def positions(lengths=LENGTHS, slots=SLOTS) -> np.ndarray:
    """int32 [batch, slots]: row 0 padded behind, the others in front."""
    out = np.full((len(lengths), slots), -1, np.int32)
    for i, n in enumerate(lengths):
        at = 0 if i == 0 else slots - n
        out[i, at : at + n] = np.arange(n)
    return out


def prompt(seed: int = 0, *, lengths=LENGTHS, slots=SLOTS, keep: int = 12, scale: float = 2.0) -> Observation:
    """A whole ragged prompt, garbage in the padding."""
    rng = np.random.default_rng(seed)
    pos, batch = positions(lengths, slots), len(lengths)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    return Observation(
        q=draw(batch, Q_HEADS, slots, DIM) * scale,
        q_pos=jnp.asarray(pos),
        k=draw(batch, KV_HEADS, slots, DIM),
        v=draw(batch, KV_HEADS, slots, DIM),
        pos=jnp.asarray(np.repeat(pos[:, None], KV_HEADS, axis=1)),
        length=jnp.asarray(lengths, jnp.int32),
        hidden=draw(batch, slots, EMBED),
        wo=draw(Q_HEADS, DIM, EMBED),
        inv_freq=jnp.asarray(100.0 ** -(np.arange(DIM // 2) / (DIM // 2)), jnp.float32),
        keep=jnp.full((batch,), keep, jnp.int32),
        steps=jnp.zeros((batch,), jnp.int32),
        layers=2,
        scale=DIM**-0.5,
    )


def step(before: Observation, state: dict, seed: int) -> tuple[Observation, dict]:
    """One decode step after `before`: a new entry in a slot of its own at the end, and its query's mass."""
    rng = np.random.default_rng(seed)
    new = prompt(seed)
    at = np.asarray(before.length)
    pos = np.concatenate([before.pos, np.repeat(at[:, None, None], KV_HEADS, 1)], axis=2)
    obs = before.replace(
        q=jnp.asarray(rng.standard_normal((BATCH, Q_HEADS, 1, DIM)), jnp.float32) * 2,
        q_pos=jnp.asarray(at[:, None]),
        k=jnp.concatenate([before.k, new.k[:, :, :1]], axis=2),
        v=jnp.concatenate([before.v, new.v[:, :, :1]], axis=2),
        pos=jnp.asarray(pos),
        length=jnp.asarray(at + 1),
        steps=before.steps + 1,
        prefilling=False,
    )
    obs = obs.replace(mass=jnp.asarray(attention(obs)[:, :, 0], jnp.float32))
    padded = {n: jnp.pad(s, [(0, 0), (0, 0), (0, 1)] + [(0, 0)] * (s.ndim - 3)) for n, s in state.items()}
    return obs, padded


@functools.partial(jax.jit, static_argnames=("scorer",))
def _score(scorer: Scorer, obs: Observation, state: dict) -> tuple[jax.Array, dict]:
    return scorer.score(obs, state)


def score(scorer: Scorer, obs: Observation, state: dict | None = None) -> tuple[np.ndarray, dict]:
    """(scores, state) of a scorer under jit, from zero state unless given."""
    if state is None:
        state = {n: jnp.zeros((*obs.pos.shape, *s), d) for n, (s, d) in scorer.slot_state().items()}
    scores, state = _score(scorer, obs, state)
    return np.asarray(scores), state


@functools.partial(jax.jit, static_argnames=("policy",))
def _kept(policy: Policy, obs: Observation) -> jax.Array:
    state = {n: jnp.zeros((*obs.pos.shape, *s), d) for n, (s, d) in policy.scorer.slot_state().items()}
    scores, _ = policy.scorer.score(obs, state)
    scores = policy.protect(scores, obs.pos, obs.length)
    keep = policy.allocator.layer_keep(obs.layer, obs.layers, obs.keep, obs.length)
    counts = policy.allocator.counts(scores, obs.valid, keep, obs.layer)
    slots = obs.pos.shape[2]
    index = policy.selection.select(scores, obs.valid, counts, slots)
    return jax.nn.one_hot(index, slots, dtype=jnp.int32).sum(axis=2)


def kept(policy: Policy, obs: Observation) -> np.ndarray:
    """bool [batch, kv_heads, slots]: what the policy's parts keep of `obs.keep` entries per head."""
    counts = np.asarray(_kept(policy, obs))
    assert counts.max() <= 1, "an entry was selected twice"
    assert not counts[~np.asarray(obs.valid)].any(), "an empty slot was selected"
    return counts.astype(bool)


def attention(obs: Observation) -> np.ndarray:
    """float64 [batch, q_heads, tokens, slots]: every query's softmax over what it sees; 0 rows for padding."""
    q, k = (np.asarray(x, np.float64) for x in (obs.q, obs.k))
    pos, q_pos = np.asarray(obs.pos), np.asarray(obs.q_pos)
    groups = q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:3], k.shape[2]))
    for b, h, i in np.ndindex(*q.shape[:3]):
        kv = h // groups
        see = (pos[b, kv] >= 0) & (pos[b, kv] <= q_pos[b, i])
        if q_pos[b, i] >= 0 and see.any():
            x = k[b, kv, see] @ q[b, h, i] * obs.scale
            e = np.exp(x - x.max())
            out[b, h, i, see] = e / e.sum()
    return out


def group_mean(x: np.ndarray) -> np.ndarray:
    """[batch, q_heads, ...] -> [batch, kv_heads, ...]."""
    return x.reshape(x.shape[0], KV_HEADS, -1, *x.shape[2:]).mean(axis=2)


OBS = prompt()
VALID = np.asarray(OBS.valid)
POS = np.asarray(OBS.pos)


def close(got, want, obs=OBS, tol=1e-5):
    valid = np.asarray(obs.valid)
    np.testing.assert_allclose(np.asarray(got)[valid], np.asarray(want)[valid], atol=tol, rtol=tol)
