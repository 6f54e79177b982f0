"""The embedded checkpoint against transformers: logits of 400 tokens of a novel, and greedy text."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
import simple_cache

from models import checkpoint, decoder, zoo


@pytest.fixture(scope="module")
def model():
    return checkpoint.load("kvref-22m", jnp.float32)


def test_logits_equal_transformers(model):
    expected = np.load(recorded.DIRECTORY / "kvref-22m.npz")
    ids = expected["ids"]

    @jax.jit
    def run(params):
        positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
        logits = decoder.forward(
            params, model.config, jnp.asarray(ids)[None], positions, None, decoder.causal_attend
        )[0][0]
        return logits, jax.nn.logsumexp(logits, axis=-1)

    logits, logsumexp = map(np.asarray, run(model.params))
    found = logits[expected["rows"]][:, expected["columns"]]
    assert recorded.relative_error(found, expected["logits"]) < 1e-4
    np.testing.assert_allclose(logsumexp, expected["logsumexp"], rtol=1e-4)
    np.testing.assert_array_equal(logits.argmax(-1), expected["argmax"])


def test_greedy_continuations_equal_transformers(model):
    """20 prompts of different lengths as one ragged batch."""
    greedy = json.loads((recorded.DIRECTORY / "kvref-22m-greedy.json").read_text())
    width, config = max(len(g["prompt"]) for g in greedy), model.config
    tokens = np.array([g["prompt"] + [config.pad_id] * (width - len(g["prompt"])) for g in greedy], np.int32)
    lengths = np.array([len(g["prompt"]) for g in greedy], np.int32)
    positions = np.where(np.arange(width) < lengths[:, None], np.arange(width), -1).astype(np.int32)

    @jax.jit
    def generate(params):
        cache = simple_cache.init(config, len(greedy), width + 32)
        logits, cache = decoder.forward(
            params,
            config,
            jnp.asarray(tokens),
            jnp.asarray(positions),
            cache,
            simple_cache.attend,
            last_only=True,
        )

        def step(state, _):
            token, position, cache = state
            logits, cache = decoder.forward(params, config, token, position, cache, simple_cache.attend)
            # The continuations were recorded with `min_new_tokens`: the end token is not allowed.
            return (_best(logits), position + 1, cache), token[:, 0]

        state = (_best(logits), jnp.asarray(lengths)[:, None], cache)
        return jax.lax.scan(step, state, length=32)[1].T

    def _best(logits):
        return jnp.argmax(logits.at[..., config.eos_ids[0]].set(-jnp.inf), axis=-1).astype(jnp.int32)

    np.testing.assert_array_equal(generate(model.params), [g["continuation"] for g in greedy])


@pytest.mark.parametrize("name", ["kvref-22m", "kvref-draft-2m"])
def test_embedded_checkpoints_have_their_zoo_shape(name):
    loaded = checkpoint.load(name)
    assert loaded.config == zoo.shape(name)
    assert loaded.params.embedding.dtype == jnp.bfloat16
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size
