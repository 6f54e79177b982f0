"""Configurations of transformers 4 and 5, RoPE at long positions, named shapes and random weights."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recorded

from models import rope, zoo
from models.config import ARCHITECTURES, from_hf
from models.params import init_params, param_specs
from models.rope import Rope

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_transformers_4_and_5_name_the_same_llama():
    """The published Llama 3.1 8B configuration, in both forms, is the zoo's shape."""
    old = LLAMA | {"rope_theta": 500000.0, "rope_scaling": SCALING, "torch_dtype": "bfloat16"}
    new = LLAMA | {"rope_parameters": SCALING | {"rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert from_hf(old) == from_hf(new) == zoo.shape("llama3-8b")
    assert zoo.shape("llama3-8b").shape().windows == (None,) * 32


def test_transformers_4_gemma3():
    """Published Gemma 3 configurations give the local theta and the pattern as plain settings."""
    hf = LLAMA | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 12,
        "head_dim": 256,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    config = from_hf({k: v for k, v in hf.items() if k != "tie_word_embeddings"})
    near, wide = Rope(1e4, 256), Rope(1e6, 256, kind="linear", factor=8.0)
    assert config.ropes == ((near,) * 5 + (wide,)) * 2
    assert config.windows == ((1024,) * 5 + (None,)) * 2
    assert config.tied


@pytest.mark.parametrize("kind", ["su", "longrope", "yarn"])
def test_older_phi3_scaling_names(kind):
    factors = [1.0] * 48
    hf = LLAMA | {
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": 3072,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": kind, "short_factor": factors, "long_factor": factors},
        "sliding_window": 262144,
    }
    found = from_hf(hf).ropes[0]
    assert (found.kind, found.original_context, found.rotary_dim) == ("longrope", 4096, 96)
    np.testing.assert_allclose(found.amplitude, np.sqrt(1 + np.log(32) / np.log(4096)))


def test_windows_of_families():
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "num_hidden_layers": 3}
    assert from_hf(mistral | {"sliding_window": None}).windows == (None, None, None)
    assert from_hf(mistral | {"sliding_window": 7}).windows == (7, 7, 7)
    assert from_hf(mistral).windows == (4096, 4096, 4096)
    qwen = mistral | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 7, "max_window_layers": 2}
    assert from_hf(qwen).windows == (None, None, None)
    assert from_hf(qwen | {"use_sliding_window": True}).windows == (None, None, 7)
    gemma = mistral | {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 7, "model_type": "gemma2"}
    assert from_hf(gemma).windows == (7, None, 7)


@pytest.mark.parametrize("start", [0, 40_000, 120_000])
def test_rope_at_long_positions(start):
    """Against float64; int32 positions far over 32,768 keep their angle."""
    head_dim, settings = 64, Rope(theta=500000.0, rotary_dim=64)
    freq = rope.inv_freq(settings, head_dim, 131072)
    np.testing.assert_allclose(freq, 500000.0 ** (-np.arange(32) / 32.0), rtol=1e-6)
    positions = start + np.arange(5, dtype=np.int32)
    x = np.random.default_rng(0).normal(size=(1, 2, 5, head_dim)).astype(np.float32)
    found = rope.rotate(jnp.asarray(x), *rope.cos_sin(settings, freq, jnp.asarray(positions)[None]))
    pairs = x[..., :32].astype(np.float64) + 1j * x[..., 32:]
    turned = pairs * np.exp(1j * positions[:, None] * freq.astype(np.float64))
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(found, expected, atol=1e-5 + 1e-7 * start)


def test_partial_rotation_leaves_the_other_channels():
    order = rope.channel_order(8, 4)
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    settings = Rope(
        theta=100.0, rotary_dim=4, kind="longrope", amplitude=3.0, short_factor=(1, 1), long_factor=(1, 1)
    )
    freq = rope.inv_freq(settings, 8, 16)
    cos, sin = rope.cos_sin(settings, freq, jnp.asarray([[5]], jnp.int32))
    np.testing.assert_allclose(cos[0, 0, 0], [3 * np.cos(5), 3 * np.cos(0.5), 1, 1], rtol=1e-5)
    np.testing.assert_allclose(sin[0, 0, 0], [3 * np.sin(5), 3 * np.sin(0.5), 0, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama3-8b", 8.03), ("llama3-70b", 70.55), ("kvref-22m", 0.02203)]
)
def test_published_parameter_counts(name, billions):
    leaves = jax.tree.leaves(param_specs(zoo.shape(name), "bfloat16"))
    np.testing.assert_allclose(sum(leaf.size for leaf in leaves) / 1e9, billions, rtol=1e-3)


def test_unknown_shape_and_bad_settings():
    with pytest.raises(ValueError, match=r"model shape 'gpt' is not known; known: llama3-8b, "):
        zoo.shape("gpt")
    config = zoo.shape("kvref-draft-2m")
    with pytest.raises(ValueError, match="windows has 1 entries for 2 layers"):
        dataclasses.replace(config, windows=(None,))
    with pytest.raises(ValueError, match="activation 'tanh' is not supported"):
        dataclasses.replace(config, activation="tanh")
    with pytest.raises(ValueError, match="longrope short_factor has 1 entries, expected 2"):
        Rope(theta=1e4, rotary_dim=4, kind="longrope", short_factor=(1.0,))


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_random_weights(name):
    config = recorded.config_of(name)
    params = init_params(config, jax.random.key(0), "float32")
    chex.assert_trees_all_equal_shapes_and_dtypes(params, param_specs(config, "float32"))
    layer = params.layers[0]
    np.testing.assert_allclose(np.std(layer.qkv), config.embed_dim**-0.5, rtol=0.1)
    np.testing.assert_array_equal(layer.attention_norm, float(not config.unit_offset_norm))
    assert not np.array_equal(params.layers[0].qkv, params.layers[1].qkv)
    if config.qkv_bias:
        np.testing.assert_array_equal(layer.qkv_bias, 0.0)


def test_every_architecture_has_a_tiny_shape():
    configs = [zoo.tiny(name) for name in zoo.families()]
    assert [c.family for c in configs] == zoo.families()
    assert len(set(configs)) == len(ARCHITECTURES)
    assert zoo.tiny("gemma3").windows == (20, None)
    with pytest.raises(ValueError, match="family 'bert' is not known; known: llama, mistral"):
        zoo.tiny("bert")
