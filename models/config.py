"""`ModelConfig`: every supported family is a setting of one decoder. Read from Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kvjax.types import ModelShape
from models import rope as rope_lib
from models.rope import Rope

Json = dict[str, Any]
Windows = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """A mixture-of-experts MLP."""

    experts: int
    top_k: int
    mlp_dim: int  # of one expert
    normalize: bool = True  # the weights of the chosen experts sum to 1
    shared_mlp_dim: int = 0  # Qwen2-MoE's expert that every token visits; 0: none
    layers: tuple[bool, ...] = ()  # which layers have experts; the others have a plain MLP
    # "ragged" sorts tokens by expert and computes only the chosen ones; "dense" computes every expert and
    # weights the results, which partitions along "experts" on any mesh.
    dispatch: str = "ragged"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. Hashable, so that it can be a static argument of `jit`."""

    family: str
    vocab_size: int
    embed_dim: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    ropes: tuple[Rope, ...]  # per layer
    windows: Windows  # per layer: sliding window in tokens
    max_context: int = 8192
    norm_eps: float = 1e-6
    tied: bool = False  # the output projection is the embedding
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head, before RoPE
    activation: str = "silu"  # or "gelu_tanh"
    unit_offset_norm: bool = False  # norms scale by 1 + weight (Gemma)
    post_norms: bool = False  # norms after attention and after the MLP too (Gemma 2, 3)
    embed_scale: float = 1.0
    attention_scale: float = 1.0  # logits = attention_scale * q.k
    attention_softcap: float | None = None
    final_softcap: float | None = None
    moe: MoeConfig | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dtype: str = "float32"  # of the stored weights

    def __post_init__(self) -> None:
        for name in ("ropes", "windows"):
            found = len(getattr(self, name))
            if found != self.layers:
                raise ValueError(f"{name} has {found} entries for {self.layers} layers")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads={self.q_heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation {self.activation!r} is not supported; supported: silu, gelu_tanh")

    def shape(self, dtype: str | None = None) -> ModelShape:
        """What the cache must know; `dtype` of keys and values defaults to the stored weights'."""
        return ModelShape(
            layers=self.layers,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            windows=self.windows,
            dtype=dtype or self.dtype,
            max_context=self.max_context,
        )

    def has_experts(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self.moe is not None and self.moe.layers[layer]


def from_hf(hf: Json) -> ModelConfig:
    """Builds the configuration of a Hugging Face `config.json`, of transformers 4 or 5.

    Raises ValueError naming the architecture or setting that is not supported, and the supported ones.
    """
    names = hf.get("architectures") or []
    name = names[0] if names else f"none (model_type {hf.get('model_type')!r})"
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name} is not supported; supported: {', '.join(ARCHITECTURES)}")
    for setting in ("mlp_bias", "use_bidirectional_attention"):
        if hf.get(setting):
            raise ValueError(f"{setting}=true of {name} is not supported; supported: false")
    return ARCHITECTURES[name](hf)


def _common(hf: Json, family: str, **overrides: Any) -> ModelConfig:
    layers, q_heads = hf["num_hidden_layers"], hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // q_heads
    eos = hf.get("eos_token_id")
    settings: Json = dict(
        family=family,
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        layers=layers,
        q_heads=q_heads,
        kv_heads=hf.get("num_key_value_heads") or q_heads,
        head_dim=head_dim,
        mlp_dim=hf["intermediate_size"],
        ropes=(_rope(hf, head_dim),) * layers,
        windows=(None,) * layers,
        max_context=hf["max_position_embeddings"],
        norm_eps=hf["rms_norm_eps"],
        tied=bool(hf.get("tie_word_embeddings", False)),
        activation=_activation(hf),
        attention_scale=head_dim**-0.5,
        bos_id=hf.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_id=hf.get("pad_token_id"),
        dtype=hf.get("dtype") or hf.get("torch_dtype") or "float32",
    )
    settings.update(overrides)
    return ModelConfig(**settings)


def _activation(hf: Json) -> str:
    names = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    # Gemma 1's `hidden_act: gelu` is a known mistake of its config; the model was trained with the tanh form.
    gemma = hf.get("model_type", "").startswith("gemma")
    name = hf.get("hidden_activation") or hf.get("hidden_act") or ("gelu_pytorch_tanh" if gemma else "silu")
    if gemma and name == "gelu":
        name = "gelu_pytorch_tanh"
    if name not in names:
        raise ValueError(f"activation {name!r} is not supported; supported: {', '.join(names)}")
    return names[name]


def _rope(hf: Json, head_dim: int, parameters: Json | None = None, theta: float | None = None) -> Rope:
    """The rope of `parameters`, else of the config (transformers 5 `rope_parameters`, 4 `rope_scaling`)."""
    if parameters is None:
        parameters = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if "original_max_position_embeddings" in hf:  # Phi-3 keeps it beside the scaling, not inside
        original = {"original_max_position_embeddings": hf["original_max_position_embeddings"]}
        parameters = parameters | original
    partial = parameters.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    return rope_lib.from_hf(
        parameters,
        theta=theta or hf.get("rope_theta", 10000.0),
        rotary_dim=int(head_dim * float(partial)),
        max_context=hf["max_position_embeddings"],
    )


def _layer_windows(hf: Json, default: Callable[[int], bool]) -> Windows:
    """`layer_types` if the config lists them, else `default(layer)` says which layers slide."""
    window = hf.get("sliding_window")
    types = hf.get("layer_types")
    slides = (
        [t == "sliding_attention" for t in types]
        if types
        else [default(i) for i in range(hf["num_hidden_layers"])]
    )
    return tuple(window if s else None for s in slides)


def _llama(hf: Json) -> ModelConfig:
    bias = bool(hf.get("attention_bias"))
    return _common(hf, "llama", qkv_bias=bias, out_bias=bias)


def _mistral(hf: Json) -> ModelConfig:
    hf = {"sliding_window": 4096} | hf  # what an absent key means to the reference; null means none
    return _common(hf, "mistral", windows=_layer_windows(hf, lambda i: True))


def _qwen_windows(hf: Json) -> Windows:
    if not hf.get("use_sliding_window"):
        return (None,) * hf["num_hidden_layers"]
    return _layer_windows(hf, lambda i: i >= hf.get("max_window_layers", 28))


def _qwen2(hf: Json) -> ModelConfig:
    return _common(hf, "qwen2", qkv_bias=True, windows=_qwen_windows(hf))


def _qwen3(hf: Json) -> ModelConfig:
    bias = bool(hf.get("attention_bias"))
    head_dim = hf.get("head_dim") or 128
    return _common(
        hf | {"head_dim": head_dim},
        "qwen3",
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=_qwen_windows(hf),
    )


def _gemma(hf: Json) -> ModelConfig:
    return _common(
        hf,
        "gemma",
        head_dim=hf.get("head_dim", 256),
        tied=hf.get("tie_word_embeddings", True),
        unit_offset_norm=True,
        embed_scale=hf["hidden_size"] ** 0.5,
        qkv_bias=bool(hf.get("attention_bias")),
        out_bias=bool(hf.get("attention_bias")),
    )


def _gemma2(hf: Json) -> ModelConfig:
    return dataclasses.replace(
        _gemma(hf),
        family="gemma2",
        post_norms=True,
        windows=_layer_windows(hf, lambda i: i % 2 == 0),
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=hf.get("attn_logit_softcapping", 50.0),
        final_softcap=hf.get("final_logit_softcapping", 30.0),
    )


def _gemma3(hf: Json) -> ModelConfig:
    every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    windows = _layer_windows(hf, lambda i: (i + 1) % every != 0)
    head_dim = hf.get("head_dim", 256)
    by_type = hf.get("rope_parameters") or {}
    if "full_attention" in by_type:
        wide = _rope(hf, head_dim, by_type["full_attention"])
        near = _rope(hf, head_dim, by_type["sliding_attention"])
    else:
        wide = _rope(hf, head_dim, hf.get("rope_scaling") or {}, hf.get("rope_theta", 1e6))
        near = _rope(hf, head_dim, {}, hf.get("rope_local_base_freq", 1e4))
    return dataclasses.replace(
        _gemma(hf | {"rope_parameters": None, "rope_scaling": None, "sliding_window": hf["sliding_window"]}),
        family="gemma3",
        post_norms=True,
        qk_norm=True,
        windows=windows,
        ropes=tuple(wide if w is None else near for w in windows),
        attention_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=hf.get("attn_logit_softcapping"),
        final_softcap=hf.get("final_logit_softcapping"),
    )


def _phi3(hf: Json) -> ModelConfig:
    scaling = hf.get("rope_scaling") or {}
    if scaling.get("type", scaling.get("rope_type")) in (
        "su",
        "yarn",
    ):  # older names of this family's longrope
        hf = hf | {
            "rope_scaling": {k: v for k, v in scaling.items() if k != "type"} | {"rope_type": "longrope"}
        }
    return _common(hf, "phi3", windows=_layer_windows(hf, lambda i: True))


def _mixtral(hf: Json) -> ModelConfig:
    layers = hf["num_hidden_layers"]
    moe = MoeConfig(
        experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        mlp_dim=hf["intermediate_size"],
        layers=(True,) * layers,
    )
    return _common(hf, "mixtral", moe=moe, windows=_layer_windows(hf, lambda i: True))


def _qwen_moe(hf: Json, shared_mlp_dim: int, normalize: bool) -> MoeConfig:
    every, plain = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
    return MoeConfig(
        experts=hf.get("num_experts") or hf["num_local_experts"],  # transformers 4, 5
        top_k=hf["num_experts_per_tok"],
        mlp_dim=hf["moe_intermediate_size"],
        normalize=bool(hf.get("norm_topk_prob", normalize)),
        shared_mlp_dim=shared_mlp_dim,
        layers=tuple(i not in plain and (i + 1) % every == 0 for i in range(hf["num_hidden_layers"])),
    )


def _qwen2_moe(hf: Json) -> ModelConfig:
    moe = _qwen_moe(hf, hf["shared_expert_intermediate_size"], False)
    bias = bool(hf.get("qkv_bias", True))
    return dataclasses.replace(_qwen2(hf), family="qwen2_moe", moe=moe, qkv_bias=bias)


def _qwen3_moe(hf: Json) -> ModelConfig:
    return dataclasses.replace(_qwen3(hf), family="qwen3_moe", moe=_qwen_moe(hf, 0, False))


ARCHITECTURES: dict[str, Callable[[Json], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Phi3ForCausalLM": _phi3,
    "MixtralForCausalLM": _mixtral,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
