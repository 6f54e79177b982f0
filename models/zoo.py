"""Named shapes: the models that benchmarks and ahead-of-time compilation use with random weights."""

from __future__ import annotations

from models.config import ModelConfig
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
