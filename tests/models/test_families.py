"""Every family against transformers, in float32: the whole prompt, and prefill plus 64 cached steps."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded
import simple_cache

from models import decoder

PREFILL = 32


def _positions(tokens: int):
    return jnp.arange(tokens, dtype=jnp.int32)[None]


@functools.partial(jax.jit, static_argnums=1)
def _full(params, config, ids):
    return decoder.forward(params, config, ids, _positions(ids.shape[1]), None, decoder.causal_attend)[0]


@functools.partial(jax.jit, static_argnums=1)
def _cached(params, config, ids):
    """Logits of a prefill of 32 tokens, then of one step for each token that follows."""
    cache = simple_cache.init(config, 1, ids.shape[1])
    prompt = ids[:, :PREFILL]
    first, cache = decoder.forward(params, config, prompt, _positions(PREFILL), cache, simple_cache.attend)

    def step(cache, inputs):
        token, position = inputs
        row, cache = decoder.forward(
            params, config, token[None, None], position[None, None], cache, simple_cache.attend
        )
        return cache, row[0, 0]

    later = (ids[0, PREFILL:], jnp.arange(PREFILL, ids.shape[1], dtype=jnp.int32))
    return jnp.concatenate([first[0], jax.lax.scan(step, cache, later)[1]])


@pytest.mark.parametrize("name", recorded.FAMILIES)
def test_full_forward_equals_transformers(name):
    config, params, ids, logits = recorded.load(name)
    assert recorded.relative_error(_full(params, config, ids[None])[0], logits) < 1e-4


@pytest.mark.parametrize("name", recorded.FAMILIES)
def test_prefill_and_64_steps_equal_transformers(name):
    config, params, ids, logits = recorded.load(name)
    assert len(ids) - PREFILL == 64
    assert recorded.relative_error(_cached(params, config, ids[None]), logits) < 1e-4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"ropes": "theta"}),
        ("mistral", {"windows": (None, None)}),
        ("qwen3", {"qk_norm": None}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"final_softcap": None}),
        ("gemma3", {"embed_scale": 1.0}),
        ("gemma", {"activation": "silu"}),
        ("phi3_short", {"max_context": 256}),
    ],
)
def test_each_setting_matters(name, change):
    """The recorded logits can tell a wrong setting from the right one."""
    config, params, ids, logits = recorded.load(name)
    if "ropes" in change:
        change = {"ropes": tuple(dataclasses.replace(r, kind="default") for r in config.ropes)}
    if "qk_norm" in change:
        layers = tuple(layer.replace(q_norm=None, k_norm=None) for layer in params.layers)
        params, change = params.replace(layers=layers), {}
    wrong = dataclasses.replace(config, **change)
    assert recorded.relative_error(_full(params, wrong, ids[None])[0], logits) > 1e-3


@pytest.mark.parametrize("name", ["llama2", "gemma2", "qwen2_moe"])
def test_padding_has_no_effect(name):
    """Rows of 20 tokens padded on the left, the right and in the middle give the logits of the bare row."""
    config, params, ids, logits = recorded.load(name)
    tokens, positions = np.full((3, 26), 3, np.int32), np.full((3, 26), -1, np.int32)
    columns = [np.arange(6, 26), np.arange(20), np.r_[0:7, 13:26]]
    for row, where in enumerate(columns):
        tokens[row, where], positions[row, where] = ids[:20], np.arange(20)
    found, _ = jax.jit(decoder.forward, static_argnums=(1, 5))(
        params, config, jnp.asarray(tokens), jnp.asarray(positions), None, decoder.causal_attend
    )
    assert np.isfinite(np.asarray(found)).all()
    for row, where in enumerate(columns):
        assert recorded.relative_error(found[row, where], logits[:20]) < 1e-4


def test_last_only_takes_each_rows_last_token():
    config, params, ids, logits = recorded.load("llama2")
    tokens = jnp.asarray(np.stack([ids[:12], ids[:12]]))
    positions = jnp.asarray([[*range(12)], [*range(9), -1, -1, -1]], jnp.int32)
    found, _ = jax.jit(decoder.forward, static_argnums=(1, 5), static_argnames="last_only")(
        params, config, tokens, positions, None, decoder.causal_attend, last_only=True
    )
    assert found.shape == (2, 1, config.vocab_size)
    assert recorded.relative_error(found[:, 0], logits[[11, 8]]) < 1e-4


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_dense_experts_equal_ragged(name):
    config, params, ids, logits = recorded.load(name)
    assert config.moe.dispatch == "ragged"
    dense = dataclasses.replace(config, moe=dataclasses.replace(config.moe, dispatch="dense"))
    assert recorded.relative_error(_full(params, dense, ids[None])[0], logits) < 1e-4


def test_attention_inputs_say_what_the_layer_is():
    """What `attend` receives: shapes, pre-projection hidden states, frequencies, per-layer windows."""
    config, params, ids, _ = recorded.load("gemma3")

    def attend(inputs, seen):
        return decoder.causal_attend(inputs, None)[0], (*seen, inputs)

    @jax.jit
    def run(params):
        return decoder.forward(params, config, jnp.asarray(ids[None, :8]), _positions(8), (), attend)[1]

    seen = run(params)
    assert [s.layer for s in seen] == [0, 1, 2]
    assert [s.window for s in seen] == [20, 20, None]
    assert [s.scale for s in seen] == [24**-0.5] * 3
    freq = np.arange(8) / 8
    np.testing.assert_allclose(seen[0].inv_freq, 1e3**-freq, rtol=1e-5)
    np.testing.assert_allclose(seen[2].inv_freq, 1e5**-freq / 8, rtol=1e-5)
    for inputs in seen:
        assert inputs.q.shape == (1, 4, 8, 16)
        assert inputs.k.shape == inputs.v.shape == (1, 2, 8, 16)
        assert inputs.hidden.shape == (1, 8, 32)
        assert inputs.wo.shape == (4, 16, 32)
        value = jnp.einsum("bte,ekd->bktd", inputs.hidden, params.layers[inputs.layer].qkv[:, :, -1])
        np.testing.assert_allclose(inputs.v, value, rtol=1e-4, atol=1e-5)
