"""Named shapes for random weights: for benchmarks and ahead-of-time compilation, and tiny ones for tests."""

from __future__ import annotations

from typing import Any

from models.config import ModelConfig, from_hf
from models.rope import Rope


def _llama(layers: int, embed: int, mlp: int, heads: int) -> ModelConfig:
    """A Llama 3.1 shape."""
    rope = Rope(
        theta=500000.0,
        rotary_dim=128,
        kind="llama3",
        factor=8.0,
        original_context=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        embed_dim=embed,
        layers=layers,
        q_heads=heads,
        kv_heads=8,
        head_dim=128,
        mlp_dim=mlp,
        ropes=(rope,) * layers,
        windows=(None,) * layers,
        max_context=131072,
        norm_eps=1e-5,
        attention_scale=128**-0.5,
        bos_id=128000,
        eos_ids=(128001,),
        dtype="bfloat16",
    )


def _kvref(layers: int, embed: int, mlp: int, heads: int, kv_heads: int) -> ModelConfig:
    """The shape of an embedded checkpoint."""
    return ModelConfig(
        family="llama",
        vocab_size=8192,
        embed_dim=embed,
        layers=layers,
        q_heads=heads,
        kv_heads=kv_heads,
        head_dim=64,
        mlp_dim=mlp,
        ropes=(Rope(theta=500000.0, rotary_dim=64),) * layers,
        windows=(None,) * layers,
        max_context=8192,
        norm_eps=1e-5,
        tied=True,
        attention_scale=64**-0.5,
        bos_id=1,
        eos_ids=(2,),
        pad_id=3,
        dtype="bfloat16",
    )


SHAPES: dict[str, ModelConfig] = {
    "llama3-8b": _llama(32, 4096, 14336, 32),
    "llama3-70b": _llama(80, 8192, 28672, 64),
    "kvref-22m": _kvref(12, 384, 1024, 6, 2),
    "kvref-draft-2m": _kvref(2, 192, 512, 3, 1),
}


def shape(name: str) -> ModelConfig:
    """The configuration of a named shape. Raises ValueError listing the names."""
    if name not in SHAPES:
        raise ValueError(f"model shape {name!r} is not known; known: {', '.join(SHAPES)}")
    return SHAPES[name]


_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_TINY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 20}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma": ("GemmaForCausalLM", {"model_type": "gemma"}),
    "gemma2": ("Gemma2ForCausalLM", {"model_type": "gemma2", "sliding_window": 20}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {"model_type": "gemma3_text", "sliding_window": 20, "sliding_window_pattern": 2},
    ),
    "phi3": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.75}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _MOE | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _MOE | {"norm_topk_prob": True}),
}


def tiny(family: str) -> ModelConfig:
    """A two-layer float32 model of a family, for tests. Raises ValueError listing the families."""
    if family not in _TINY_FAMILIES:
        raise ValueError(f"family {family!r} is not known; known: {', '.join(_TINY_FAMILIES)}")
    architecture, settings = _TINY_FAMILIES[family]
    return from_hf(_TINY | {"architectures": [architecture]} | settings)


def families() -> list[str]:
    """The names that `tiny` knows."""
    return list(_TINY_FAMILIES)
