"""Scores and kept sets against kvpress 0.5.5 on a tiny random Llama (fixtures by tools/record_kvpress_scorers.py).

The two recorded prompts (64 and 51 tokens) form one ragged, padded batch here; kvpress ran them one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import Observation, parse
from kvjax.policies.base import Policy
from kvjax.policies.scorers.compactor import Leverage
from kvjax.policies.scorers.probed import Reconstruction

FIXTURE = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "kvpress" / "scorers.npz")
LENGTHS = (64, 51)
RATIOS = (0.25, 0.5, 0.7)
LAYERS = 2

# fixture name -> our spec
SPECS = {
    "snapkv": "snapkv({budget}, window=8, kernel=5)",
    "tova": "tova({budget})",
    "streaming_llm": "streaming_llm({budget}, sink=4)",
    "l2norm": "l2norm({budget})",
    "keydiff": "keydiff({budget})",
    "adakv_snapkv": "adakv(snapkv({budget}, window=8, kernel=5))",
    "adakv_keydiff": "adakv(keydiff({budget}))",
    "lagkv": "lagkv({budget}, lag=8)",
    "lagkv_cross": "lagkv({budget}, lag=8, cross=True)",
    "lagkv_short": "lagkv({budget}, lag=32)",
    "expected_attention": "expected_attention({budget}, future=64)",
    "expected_attention_eps": "expected_attention({budget}, epsilon=1e-2, covariance=False)",
    "cap": "cap({budget}, future=64)",
    "non_causal_attn": "non_causal_attn({budget}, chunk=16, variant='kvpress')",
    "leverage_score": "leverage_score({budget}, sketch=8)",
    "compactor": "compactor({budget}, chunk=16, sketch=8, variant='kvpress')",
    "cur": "cur({budget})",
    "cur_mean": "cur({budget}, kind='mean', block=5)",
    "criticalkv": "criticalkv(snapkv(window=8, kernel=5), {budget})",
    "chunkkv": "chunkkv(snapkv(window=8, kernel=5), {budget}, chunk=6)",
    "entropy_gated_chunkkv": "entropy_gated_chunkkv(snapkv(window=8), {budget}, chunk=6, reduced=3)",
    "block_keydiff": "block(keydiff(), {budget}, block=8)",
    "simlayerkv": "simlayerkv(threshold=0.6, recent={recent})",
    "observed_attention": "h2o({budget}, recent=0, per_query=True)",
    "rerotated_knorm": "l2norm({budget})",
    "finch": "finch({budget}, window=8)",
    "finch_plain": "finch({budget}, window=8, normalize=False)",
}
# Positions at which kvpress writes a constant because the entry is always kept: (first, last).
ENDS = {
    "snapkv": (0, 8),
    "tova": (0, 1),
    "expected_attention": (4, 0),
    "expected_attention_eps": (4, 0),
    "cap": (4, 0),
    "compactor": (8, 4),
    "cur": (4, 0),
    "cur_mean": (4, 0),
}
SCORED = [n for n in SPECS if f"scores/{n}/0/0" in FIXTURE.files and n != "streaming_llm"]
# Ranks of different partitions tie by design; at the boundary any of them may stay.
TIED = {"lagkv", "lagkv_cross"}


def _padded(name: str, layer: int, axis: int) -> np.ndarray:
    """Both prompts' recorded array, padded with huge values that must not matter."""
    rows = [FIXTURE[f"{name}/{n}/{layer}"] for n in range(len(LENGTHS))]
    longest = max(LENGTHS)
    pads = [[(0, longest - r.shape[axis] if a == axis else 0) for a in range(r.ndim)] for r in rows]
    return np.stack([np.pad(r, p, constant_values=7.0) for r, p in zip(rows, pads)])


def observation(layer: int) -> Observation:
    """What our policies see of the recorded layer."""
    positions = np.stack(
        [np.where(np.arange(max(LENGTHS)) < n, np.arange(max(LENGTHS)), -1) for n in LENGTHS]
    )
    positions = positions.astype(np.int32)
    k = _padded("k", layer, 1)
    return Observation(
        q=jnp.asarray(_padded("q", layer, 1)),
        q_pos=jnp.asarray(positions),
        k=jnp.asarray(k),
        v=jnp.asarray(_padded("v", layer, 1)),
        pos=jnp.asarray(np.broadcast_to(positions[:, None], k.shape[:3])),
        length=jnp.asarray(LENGTHS, jnp.int32),
        hidden=jnp.asarray(_padded("hidden", layer, 0)),
        wo=jnp.asarray(FIXTURE[f"wo/{layer}"]),
        inv_freq=jnp.asarray(FIXTURE["inv_freq"]),
        layers=LAYERS,
        scale=16**-0.5,
    )


@functools.partial(jax.jit, static_argnames=("policy",))
def _scores_and_kept(policy: Policy, obs: Observation, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    state = {
        n: jnp.zeros((*obs.pos.shape, *suffix), dtype)
        for n, (suffix, dtype) in policy.scorer.slot_state().items()
    }
    scores, _ = policy.scorer.score(obs.replace(keep=keep), state)
    protected = policy.protect(scores, obs.pos, obs.length)
    keep = policy.allocator.layer_keep(obs.layer, obs.layers, keep, obs.length)
    counts = policy.allocator.counts(protected, obs.valid, keep, obs.layer)
    index = policy.selection.select(protected, obs.valid, counts, obs.pos.shape[2])
    return scores, jax.nn.one_hot(index, obs.pos.shape[2], dtype=jnp.int32).sum(axis=2) > 0


@functools.cache
def scores_and_kept(name: str, ratio: float, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores f32, kept bool), both [batch, kv_heads, slots], through the policy's own parts."""
    recent = int(24 / ratio) // 4  # recorded SimLayerKV has no ratio
    policy = parse(SPECS[name].format(budget=f"budget={1 - ratio!r}", recent=recent))
    keep = jnp.asarray([policy.keep(n) for n in LENGTHS], jnp.int32)
    if name == "chunkkv":  # kvpress keeps max(1, int(chunks * (1 - ratio))) chunks, whatever the tokens
        keep = jnp.asarray([max(1, int(-(-n // 6) * (1 - ratio))) * 6 for n in LENGTHS], jnp.int32)
    # Counts are traced, so that one compilation serves all ratios.
    policy = dataclasses.replace(policy, budget=0.5, name="")
    scores, kept = _scores_and_kept(policy, observation(layer), keep)
    return np.asarray(scores), np.asarray(kept)


@pytest.fixture(autouse=True)
def recorded_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides project with the same random matrix."""
    monkeypatch.setattr(Leverage, "draw", lambda self, layer, heads, dim: jnp.asarray(FIXTURE["sketch"]))


@pytest.mark.parametrize("name", SCORED)
def test_scores(name: str) -> None:
    """Equal to 1e-4, except at entries that are always kept."""
    first, last = ENDS.get(name, (0, 0))
    for layer in range(LAYERS):
        ours, _ = scores_and_kept(name, 0.5, layer)
        for n, length in enumerate(LENGTHS):
            theirs = FIXTURE[f"scores/{name}/{n}/{layer}"][:, first : length - last]
            mine = ours[n, :, first : length - last]
            chosen = theirs > 1e30  # CriticalKV's first stage
            np.testing.assert_array_equal(mine > 1e19, chosen)
            np.testing.assert_allclose(mine[~chosen], theirs[~chosen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SPECS)
def test_kept_sets(name: str) -> None:
    """The same entries survive in every layer and head, from a ragged batch."""
    for ratio, layer in itertools.product(RATIOS, range(LAYERS)):
        scores, kept = scores_and_kept(name, ratio, layer)
        for n, length in enumerate(LENGTHS):
            packed = FIXTURE[f"kept/{name}/{n}/{layer}/{ratio}"]
            theirs = np.unpackbits(packed, axis=-1)[:, :length].astype(bool)
            ours = kept[n, :, :length]
            if name in TIED:
                for h in range(ours.shape[0]):
                    got, want = (np.sort(np.round(scores[n, h, :length][m[h]], 4)) for m in (ours, theirs))
                    np.testing.assert_array_equal(got, want)
            else:
                np.testing.assert_array_equal(ours, theirs, err_msg=f"ratio {ratio} layer {layer} row {n}")
            assert not kept[n, :, length:].any()


def test_rerotated_keys() -> None:
    """Kept keys turned to positions 0..K-1, in time order."""
    for layer in range(LAYERS):
        obs = observation(layer)
        _, kept = scores_and_kept("rerotated_knorm", 0.5, layer)
        for n, head in itertools.product(range(len(LENGTHS)), range(2)):
            index = np.flatnonzero(kept[n, head])
            turned = obs.rotate(obs.k[n, head, index], jnp.arange(len(index)) - index)
            want = FIXTURE[f"keys/rerotated_knorm/{n}/{layer}"][head]
            np.testing.assert_allclose(turned, want, atol=1e-5)


@pytest.mark.parametrize("name", ["kvzip", "kvzip_plus"])
def test_kvzip(name: str) -> None:
    """Two repeat passes over halves of the first prompt; then all heads compete for half of the entries."""
    scorer, n, half = Reconstruction(sink=4, plus=name == "kvzip_plus"), LENGTHS[0], LENGTHS[0] // 2
    run = jax.jit(lambda obs, state: scorer.score(obs, state)[1])
    layers = []
    for layer in range(LAYERS):
        state = {"score": jnp.zeros((1, 2, n))}
        for p in range(2):
            q, k, v, hidden = (
                jnp.asarray(FIXTURE[f"kvzip/{x}/{p}/{layer}"]) for x in ("q", "k", "v", "hidden")
            )
            count = q.shape[1]
            after = jnp.arange(n, n + count, dtype=jnp.int32)
            pos = jnp.concatenate([jnp.arange(n, dtype=jnp.int32), after])
            obs = Observation(
                q=q[None],
                q_pos=after[None],
                k=jnp.concatenate([FIXTURE[f"k/0/{layer}"], k], axis=1)[None],
                v=jnp.concatenate([FIXTURE[f"v/0/{layer}"], v], axis=1)[None],
                pos=jnp.broadcast_to(pos, (1, 2, n + count)),
                length=jnp.asarray([n + count]),
                hidden=hidden[None],
                wo=jnp.asarray(FIXTURE[f"wo/{layer}"]),
                span=(jnp.asarray([p * half]), jnp.asarray([p * half + half])),
                scale=16**-0.5,
            )
            padded = {"score": jnp.pad(state["score"], ((0, 0), (0, 0), (0, count)))}
            state = {"score": run(obs, padded)["score"][:, :, :n]}
        scores = np.asarray(state["score"])[0]
        theirs = FIXTURE[f"scores/{name}"][layer]
        np.testing.assert_allclose(scores, theirs, atol=1e-4, rtol=1e-4)
        layers.append(state["score"])
    policy = parse(f"{name}(budget=0.5)")
    pos = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (1, 2, n))
    scores = [policy.protect(s, pos, jnp.asarray([n])) for s in layers]
    valid, keep = [pos >= 0] * LAYERS, jnp.asarray([policy.keep(n)])
    counts = policy.allocator.model_counts(scores, valid, keep, jnp.asarray([n]), [None] * LAYERS)
    theirs = np.unpackbits(FIXTURE[f"kept/{name}"], axis=-1)[..., :n].astype(bool)
    for layer in range(LAYERS):
        index = np.asarray(policy.selection.select(scores[layer], valid[layer], counts[layer], n))
        for head in range(2):
            np.testing.assert_array_equal(
                index[0, head][index[0, head] < n], np.flatnonzero(theirs[layer, head])
            )
