"""Loading and saving: shards, tied weights, Orbax, dtypes, shardings, and every error by its message."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import recorded
import safetensors
from safetensors.numpy import save_file

from models import checkpoint
from models.params import param_axes, param_specs, split_qkv
from models.weights import CheckpointError, TensorReader, assemble


def _tensors(name: str) -> dict[str, np.ndarray]:
    with safetensors.safe_open(recorded.DIRECTORY / name / "model.safetensors", "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _write(path, name="llama2", tensors=None, **settings):
    """A Hugging Face directory made of a recorded model, the embedded tokenizer, and changes."""
    path.mkdir(exist_ok=True)
    config = json.loads((recorded.DIRECTORY / name / "config.json").read_text()) | settings
    (path / "config.json").write_text(json.dumps(config))
    save_file(_tensors(name) if tensors is None else tensors, path / "model.safetensors")
    shutil.copy(checkpoint.EMBEDDED / "kvref-draft-2m" / "tokenizer.model", path)
    return path


def test_weights_arrive_where_they_belong(tmp_path):
    """Each projection of the fused arrays, against the tensors of the file."""
    tensors = _tensors("llama2")
    model = checkpoint.load(_write(tmp_path / "m"))
    layer, prefix = model.params.layers[1], "model.layers.1."
    q, k, v = (np.asarray(w) for w in split_qkv(layer))
    for found, name in ((q, "q"), (k, "k"), (v, "v")):
        expected = tensors[f"{prefix}self_attn.{name}_proj.weight"].T
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    gate_up = np.asarray(layer.mlp.gate_up)
    np.testing.assert_array_equal(gate_up[:, 0], tensors[prefix + "mlp.gate_proj.weight"].T)
    np.testing.assert_array_equal(gate_up[:, 1], tensors[prefix + "mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(np.asarray(model.params.head), tensors["lm_head.weight"])
    assert model.params.embedding.dtype == jnp.bfloat16


def test_tensors_are_streamed():
    """Reading holds a few tensors at a time, far from the 44 MB of the model."""
    directory = checkpoint.EMBEDDED / "kvref-22m"
    config = checkpoint.read_hf_config(directory)
    largest = config.vocab_size * config.embed_dim * 2
    tracemalloc.start()
    with TensorReader(directory) as reader:
        shapes = assemble(reader, config, lambda array, spec: array.shape)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shapes.embedding == (8192, 384)
    assert largest <= peak < 3 * largest


def test_shards_equal_one_file(tmp_path):
    single = checkpoint.load(_write(tmp_path / "one"))
    path, tensors = _write(tmp_path / "two"), _tensors("llama2")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, path / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = checkpoint.load(path)
    chex.assert_trees_all_equal(sharded.params, single.params)
    assert sharded.fingerprint == single.fingerprint
    (path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is listed in .* but does not exist"):
        checkpoint.load(path)


def test_tied_model_ignores_a_stored_head(tmp_path):
    model = checkpoint.load(_write(tmp_path / "m", tie_word_embeddings=True))
    assert model.params.head is None


@pytest.mark.parametrize("name", recorded.FAMILIES)
def test_declared_shapes_and_axes_match_the_weights(name):
    config, params, _, _ = recorded.load(name)
    specs = param_specs(config, "float32")
    chex.assert_trees_all_equal_shapes_and_dtypes(params, specs)

    def check(spec, axes):
        assert len(axes) == len(spec.shape)
        assert {a for a in axes if a} <= {
            "vocab",
            "embed",
            "q_heads",
            "kv_heads",
            "head_dim",
            "mlp",
            "experts",
        }

    jax.tree.map(check, specs, param_axes(config))


def test_dtype_and_sharding_are_the_callers(tmp_path):
    asked = {}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def sharding(axes, shape):
        asked[axes] = shape
        return device

    model = checkpoint.load(_write(tmp_path / "m"), jnp.float32, sharding)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    assert asked["embed", "kv_heads", None, "head_dim"] == (32, 2, 4, 16)
    assert asked["vocab", "embed"] == (96, 32)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2_moe", "phi3_long"])
def test_orbax_round_trip(tmp_path, name):
    model = checkpoint.load(_write(tmp_path / "hf", name))
    checkpoint.save_orbax(model, tmp_path / "orbax")
    shutil.rmtree(tmp_path / "hf")
    found = checkpoint.load(tmp_path / "orbax")
    assert found.config == model.config
    assert found.fingerprint == model.fingerprint
    chex.assert_trees_all_equal(found.params, model.params)
    chex.assert_trees_all_equal_dtypes(found.params, model.params)
    assert found.tokenizer.encode("a token") == model.tokenizer.encode("a token")
    wide = checkpoint.load(tmp_path / "orbax", jnp.float32)
    assert wide.fingerprint == model.fingerprint
    chex.assert_trees_all_equal(wide.params, jax.tree.map(lambda x: x.astype("float32"), model.params))
    with pytest.raises(CheckpointError, match="already holds a model"):
        checkpoint.save_orbax(model, tmp_path / "orbax")


def test_fingerprint_tells_models_apart(tmp_path):
    tensors = _tensors("llama2")
    base = checkpoint.load(_write(tmp_path / "a")).fingerprint
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * ml_dtypes.bfloat16(2)
    assert checkpoint.load(_write(tmp_path / "b", tensors=tensors)).fingerprint != base
    assert checkpoint.load(_write(tmp_path / "c", rms_norm_eps=1e-4)).fingerprint != base
    longer = checkpoint.load(_write(tmp_path / "d"), jnp.float32)
    assert longer.fingerprint == base


def _without(name):
    return lambda tensors: tensors.pop(name)


def _cut(tensors):
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].copy()


def _nan(tensors):
    tensors["model.layers.0.self_attn.k_proj.weight"][3, 4] = np.nan


def _infinite(tensors):
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = -np.inf


def _nan_f32(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float32)
    tensors["lm_head.weight"][-1, -1] = np.nan


def _extra(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)


def _integers(tensors):
    tensors["model.norm.weight"] = np.zeros(32, np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _without("model.layers.1.mlp.up_proj.weight"),
            r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing",
        ),
        (_without("lm_head.weight"), r"tensor lm_head\.weight is missing"),
        (_cut, r"model\.layers\.1\.mlp\.down_proj\.weight has shape \(32, 47\), expected \(32, 48\)"),
        (_nan, r"tensor model\.layers\.0\.self_attn\.k_proj\.weight has NaN or infinite values"),
        (_infinite, r"tensor model\.layers\.0\.self_attn\.v_proj\.weight has NaN or infinite values"),
        (_nan_f32, r"tensor lm_head\.weight has NaN or infinite values"),
        (_extra, r"tensor model\.layers\.0\.self_attn\.q_proj\.bias is not part of the model"),
        (_integers, r"tensor model\.norm\.weight is int32; supported: float32, float16, bfloat16"),
    ],
)
def test_bad_tensors_are_named(tmp_path, change, message):
    tensors = _tensors("llama2")
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(_write(tmp_path / "m", tensors=tensors))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architectures": ["BertModel"]},
            r"architecture BertModel is not supported; supported: LlamaForCausalLM, ",
        ),
        ({"architectures": None}, r"architecture none \(model_type 'llama'\) is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true of LlamaForCausalLM is not supported"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported; supported: silu"),
        (
            {"rope_parameters": {"rope_type": "dynamic"}},
            "rope kind 'dynamic' is not supported; supported: default",
        ),
        ({"num_key_value_heads": 3}, "q_heads=4 is not a multiple of kv_heads=3"),
    ],
)
def test_unsupported_settings_are_named(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(_write(tmp_path / "m", **settings))
    assert "\n" not in str(error.value)


def test_missing_setting_is_named(tmp_path):
    path = _write(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    del config["vocab_size"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lacks the setting 'vocab_size'"):
        checkpoint.load(path)


def test_damaged_files_are_named(tmp_path):
    path = _write(tmp_path / "m")
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        checkpoint.load(path)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        checkpoint.load(path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        checkpoint.load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON"):
        checkpoint.load(path)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has neither config\.json"):
        checkpoint.load(path)


def test_missing_tokenizer_and_unknown_name(tmp_path):
    path = _write(tmp_path / "m")
    (path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="is not a readable SentencePiece model"):
        checkpoint.load(path)
    (path / "tokenizer.model").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer; expected tokenizer\.model or tokenizer\.json"
    ):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="embedded: kvref-22m, kvref-draft-2m"):
        checkpoint.load("kvref-7b")


def test_damaged_orbax_is_named(tmp_path):
    model = checkpoint.load(_write(tmp_path / "hf"))
    checkpoint.save_orbax(model, tmp_path / "orbax")
    settings = json.loads((tmp_path / "orbax" / checkpoint.CONFIG_FILE).read_text())
    shutil.rmtree(tmp_path / "orbax" / "params")
    with pytest.raises(CheckpointError, match="params is not a readable checkpoint"):
        checkpoint.load(tmp_path / "orbax")
    del settings["ropes"]
    (tmp_path / "orbax" / checkpoint.CONFIG_FILE).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="does not describe a model: 'ropes'"):
        checkpoint.load(tmp_path / "orbax")


def test_end_tokens_come_from_the_generation_config_too(tmp_path):
    path = _write(tmp_path / "m")
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    model = checkpoint.load(path)
    assert model.config.eos_ids == model.tokenizer.eos_ids == (2, 7)
    assert dataclasses.replace(model.config, eos_ids=(2,)) == checkpoint.load(_write(tmp_path / "n")).config
