"""Scores and kept sets against kvpress 0.5.5 on a tiny random Llama (fixtures by tools/record_kvpress_scorers.py).

The two recorded prompts (64 and 51 tokens) form one ragged, padded batch here; kvpress ran them one at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.policies import Observation, parse
from kvjax.policies.base import Policy

FIXTURE = np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "kvpress" / "scorers.npz")
LENGTHS = (64, 51)
RATIOS = (0.25, 0.5, 0.7)
LAYERS = 2

# fixture name -> our spec without the budget
SAME_SCORES = {
    "tova": "tova({budget})",
    "l2norm": "l2norm({budget})",
    "keydiff": "keydiff({budget})",
}
SAME_SETS = {
    **SAME_SCORES,
    "snapkv": "snapkv({budget}, window=8, kernel=5)",
    "streaming_llm": "streaming_llm({budget}, sink=4)",
    "adakv_snapkv": "adakv(snapkv({budget}, window=8, kernel=5))",
    "adakv_keydiff": "adakv(keydiff({budget}))",
}


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
    scores, _ = policy.scorer.score(obs, state)
    protected = policy.protect(scores, obs.pos, obs.length)
    keep = policy.allocator.layer_keep(obs.layer, obs.layers, keep, obs.length)
    counts = policy.allocator.counts(protected, obs.valid, keep, obs.layer)
    index = policy.selection.select(protected, obs.valid, counts, obs.pos.shape[2])
    return scores, jax.nn.one_hot(index, obs.pos.shape[2], dtype=jnp.int32).sum(axis=2) > 0


def scores_and_kept(spec: str, ratio: float, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores f32, kept bool), both [batch, kv_heads, slots], through the policy's own parts."""
    policy = parse(spec.format(budget=f"budget={1 - ratio!r}"))
    keep = jnp.asarray([policy.keep(n) for n in LENGTHS], jnp.int32)
    # Counts are traced, so that one compilation serves all ratios.
    policy = dataclasses.replace(policy, budget=0.5, name="")
    scores, kept = _scores_and_kept(policy, observation(layer), keep)
    return np.asarray(scores), np.asarray(kept)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("name", SAME_SCORES)
def test_scores(name: str, layer: int) -> None:
    """Equal to 1e-4, except at entries that kvpress lifts to the maximum because they are always kept."""
    ours, _ = scores_and_kept(SAME_SCORES[name], 0.5, layer)
    for n, length in enumerate(LENGTHS):
        theirs = FIXTURE[f"scores/{name}/{n}/{layer}"]
        free = slice(0, length - 1) if name == "tova" else slice(0, length)
        np.testing.assert_allclose(ours[n, :, free], theirs[:, free], atol=1e-4)


def test_snapkv_scores() -> None:
    """Before the observation window, scores equal kvpress' to 1e-6."""
    ours, _ = scores_and_kept(SAME_SETS["snapkv"], 0.5, 0)
    for n, length in enumerate(LENGTHS):
        theirs = FIXTURE[f"scores/snapkv/{n}/0"]
        np.testing.assert_allclose(ours[n, :, : length - 8], theirs[:, : length - 8], atol=1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", SAME_SETS)
def test_kept_sets(name: str, ratio: float) -> None:
    """The same entries survive in every layer and head, from a ragged batch."""
    for layer in range(LAYERS):
        _, kept = scores_and_kept(SAME_SETS[name], ratio, layer)
        for n, length in enumerate(LENGTHS):
            packed = FIXTURE[f"kept/{name}/{n}/{layer}/{ratio}"]
            theirs = np.unpackbits(packed, axis=-1)[:, :length].astype(bool)
            np.testing.assert_array_equal(kept[n, :, :length], theirs, err_msg=f"layer {layer} row {n}")
            assert not kept[n, :, length:].any()
