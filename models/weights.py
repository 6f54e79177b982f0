"""Hugging Face safetensors, read one tensor at a time and rearranged into `Params`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import ml_dtypes  # registers bfloat16 with numpy, which safetensors needs
import numpy as np
import safetensors

from models.config import ModelConfig
from models.params import Layer, Mlp, Moe, Params, ParamSpec, declare
from models.rope import channel_order

INDEX_FILE = "model.safetensors.index.json"
# Buffers that some exporters store though they follow from the configuration.
DERIVED = ("rotary_emb.inv_freq", "masked_bias")
FLOATS = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)

Place = Callable[[np.ndarray, ParamSpec], jax.Array]


class CheckpointError(ValueError):
    """A model directory that cannot be loaded; one line that names the path, file or tensor."""


class TensorReader:
    """The tensors of a directory, from one or many safetensors files, by name."""

    def __init__(self, directory: Path) -> None:
        """Opens every file. Raises CheckpointError if one is missing or damaged."""
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self._read: set[str] = set()
        self._directory = directory
        for path in _files(directory):
            try:
                handle = self._stack.enter_context(safetensors.safe_open(path, framework="np"))
            except FileNotFoundError as error:
                raise CheckpointError(f"{path} is listed in {INDEX_FILE} but does not exist") from error
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or truncated: {error}") from error
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor, checked: present, of this shape, a float type, finite."""
        if name not in self._files:
            raise CheckpointError(f"tensor {name} is missing from {self._directory}")
        found = tuple(self._files[name].get_slice(name).get_shape())
        if found != shape:
            raise CheckpointError(f"tensor {name} has shape {found}, expected {shape}")
        try:
            array = self._files[name].get_tensor(name)
        except (TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"tensor {name} cannot be read: {error}") from error
        if array.dtype not in FLOATS:
            raise CheckpointError(f"tensor {name} is {array.dtype}; supported: float32, float16, bfloat16")
        if not np.isfinite(array).all():
            raise CheckpointError(f"tensor {name} has NaN or infinite values")
        self._read.add(name)
        return array

    def skip(self, name: str) -> None:
        """Marks a tensor as known and not needed."""
        self._read.add(name)

    def check_all_read(self) -> None:
        """Raises CheckpointError if a tensor was never asked for: the configuration does not describe it."""
        left = [n for n in self._files if n not in self._read and not n.endswith(DERIVED)]
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise CheckpointError(
                f"tensor {left[0]}{more} is not part of the model that config.json describes"
            )


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a readable index: {error}") from error
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} has no .safetensors file")
    return files


def assemble(reader: TensorReader, config: ModelConfig, place: Place) -> Params:
    """Reads every array of the model in turn and hands it to `place`."""
    specs = declare(config)
    vocab = (config.vocab_size, config.embed_dim)
    if config.tied:
        reader.skip("lm_head.weight")
    return Params(
        embedding=place(reader.get("model.embed_tokens.weight", vocab), specs.embedding),
        layers=tuple(_layer(reader, config, i, specs.layers[i], place) for i in range(config.layers)),
        final_norm=place(reader.get("model.norm.weight", (config.embed_dim,)), specs.final_norm),
        head=None if config.tied else place(reader.get("lm_head.weight", vocab), specs.head),
    )


def _layer(reader: TensorReader, config: ModelConfig, index: int, spec: Any, place: Place) -> Layer:
    prefix = f"model.layers.{index}."
    attention, embed = prefix + "self_attn.", (config.embed_dim,)

    def norm(name: str, leaf: Any) -> Any:
        return None if leaf is None else place(reader.get(f"{prefix}{name}.weight", embed), leaf)

    def head_norm(name: str, leaf: Any) -> Any:
        if leaf is None:
            return None
        weight = reader.get(f"{attention}{name}.weight", (config.head_dim,))
        return place(_to_pairs(weight, config, index, axis=0), leaf)

    heads = config.q_heads * config.head_dim
    wo = reader.get(attention + "o_proj.weight", (config.embed_dim, heads)).T
    mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return Layer(
        qkv=place(_qkv(reader, config, index, attention), spec.qkv),
        qkv_bias=place(_qkv_bias(reader, config, index, attention), spec.qkv_bias) if spec.qkv_bias else None,
        wo=place(wo.reshape(spec.wo.shape), spec.wo),
        out_bias=place(reader.get(attention + "o_proj.bias", embed), spec.out_bias)
        if spec.out_bias
        else None,
        mlp=_mlp_or_moe(reader, config, prefix, spec.mlp, place),
        attention_norm=norm("input_layernorm", spec.attention_norm),
        mlp_norm=norm(mlp_norm, spec.mlp_norm),
        q_norm=head_norm("q_norm", spec.q_norm),
        k_norm=head_norm("k_norm", spec.k_norm),
        attention_post_norm=norm("post_attention_layernorm", spec.attention_post_norm),
        mlp_post_norm=norm("post_feedforward_layernorm", spec.mlp_post_norm),
    )


def _to_pairs(weight: np.ndarray, config: ModelConfig, layer: int, axis: int) -> np.ndarray:
    """Orders the channels of a partly rotated head as `rope` expects; attention does not notice."""
    rotary_dim = config.ropes[layer].rotary_dim
    if rotary_dim == config.head_dim:
        return weight
    return np.take(weight, channel_order(config.head_dim, rotary_dim), axis=axis)


def _group(config: ModelConfig, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """[heads * head_dim, ...] of each projection -> [kv_heads, group + 2, head_dim, ...]."""
    kv, dim = config.kv_heads, config.head_dim
    q, k, v = (w.reshape(kv, -1, dim, *w.shape[1:]) for w in (q, k, v))
    q, k = (_to_pairs(w, config, layer, axis=2) for w in (q, k))
    return np.concatenate([q, k, v], axis=1)


def _qkv(reader: TensorReader, config: ModelConfig, layer: int, prefix: str) -> np.ndarray:
    q_dim, kv_dim = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    e = config.embed_dim
    if config.family == "phi3":
        fused = reader.get(prefix + "qkv_proj.weight", (q_dim + 2 * kv_dim, e))
        q, k, v = np.split(fused, [q_dim, q_dim + kv_dim])
    else:
        q, k, v = (
            reader.get(f"{prefix}{n}_proj.weight", (d, e)) for n, d in zip("qkv", (q_dim, kv_dim, kv_dim))
        )
    return np.ascontiguousarray(np.moveaxis(_group(config, layer, q, k, v), -1, 0))


def _qkv_bias(reader: TensorReader, config: ModelConfig, layer: int, prefix: str) -> np.ndarray:
    heads = (config.q_heads, config.kv_heads, config.kv_heads)
    q, k, v = (reader.get(f"{prefix}{n}_proj.bias", (h * config.head_dim,)) for n, h in zip("qkv", heads))
    return _group(config, layer, q, k, v)


def _mlp_or_moe(reader: TensorReader, config: ModelConfig, prefix: str, spec: Any, place: Place) -> Mlp | Moe:
    if isinstance(spec, Mlp):
        return _mlp(reader, prefix + "mlp.", spec, place, fused=config.family == "phi3")
    mixtral = config.family == "mixtral"
    root = prefix + ("block_sparse_moe." if mixtral else "mlp.")
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    experts, e, f = spec.gate.shape

    def stacked(name: str, leaf: Any, shape: tuple[int, int]) -> jax.Array:
        """One expert at a time into the stacked array."""
        out: Any = None
        for i in range(experts):
            weight = reader.get(f"{root}experts.{i}.{name}.weight", shape)
            out = np.empty(leaf.shape, weight.dtype) if out is None else out
            out[i] = weight.T
        return place(out, leaf)

    router = reader.get(root + "gate.weight", (experts, e)).T
    shared = shared_gate = None
    if spec.shared is not None and spec.shared_gate is not None:
        shared = _mlp(reader, root + "shared_expert.", spec.shared, place)
        shared_gate = place(reader.get(root + "shared_expert_gate.weight", (1, e))[0], spec.shared_gate)
    return Moe(
        router=place(router, spec.router),
        gate=stacked(names[0], spec.gate, (f, e)),
        up=stacked(names[1], spec.up, (f, e)),
        down=stacked(names[2], spec.down, (e, f)),
        shared=shared,
        shared_gate=shared_gate,
    )


def _mlp(reader: TensorReader, prefix: str, spec: Any, place: Place, fused: bool = False) -> Mlp:
    e, _, f = spec.gate_up.shape
    if fused:
        gate_up = reader.get(prefix + "gate_up_proj.weight", (2 * f, e)).reshape(2, f, e)
    else:
        gate_up = np.stack([reader.get(f"{prefix}{n}_proj.weight", (f, e)) for n in ("gate", "up")])
    down = reader.get(prefix + "down_proj.weight", (e, f)).T
    return Mlp(gate_up=place(np.moveaxis(gate_up, -1, 0), spec.gate_up), down=place(down, spec.down))
