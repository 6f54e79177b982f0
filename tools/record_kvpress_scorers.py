"""Record what kvpress computes on a tiny random Llama, as fixtures for tests/policies/test_kvpress_scorers.py.

Run with a Python that has torch, transformers and kvpress 0.5.5:

    python tools/record_kvpress_scorers.py tests/fixtures/kvpress/scorers.npz

Two prompts of different length are run one at a time (kvpress couples the rows of a batch); the test puts both
into one ragged batch. Stored per prompt and layer: hidden states, post-RoPE queries and keys, values; per press
and prompt and layer: scores f32 [kv_heads, tokens], and per compression ratio the kept entries as packed bits.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    BlockPress,
    CapPress,
    ChunkKVPress,
    CompactorPress,
    CriticalKVPress,
    CURPress,
    EntropyGatedChunkKVPress,
    ExpectedAttentionPress,
    FinchPress,
    KeyDiffPress,
    KeyRerotationPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    LeverageScorePress,
    NonCausalAttnPress,
    ObservedAttentionPress,
    SimLayerKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

RATIOS = (0.25, 0.5, 0.7)
LENGTHS = (64, 51)
PREFIX = [5, 9, 11]  # stands for KVzip's repeat instruction
SEED = 100  # of the random sketches


def presses(ratio: float) -> dict:
    """Fixture name -> press."""
    return {
        "snapkv": SnapKVPress(ratio, window_size=8, kernel_size=5),
        "tova": TOVAPress(ratio),
        "streaming_llm": StreamingLLMPress(ratio, n_sink=4),
        "l2norm": KnormPress(ratio),
        "keydiff": KeyDiffPress(ratio),
        "adakv_snapkv": AdaKVPress(SnapKVPress(ratio, window_size=8, kernel_size=5), alpha_safeguard=0.2),
        "adakv_keydiff": AdaKVPress(KeyDiffPress(ratio), alpha_safeguard=0.2),
        "lagkv": LagKVPress(ratio, n_sink=4, lag_size=8),
        "lagkv_cross": LagKVPress(ratio, n_sink=4, lag_size=8, cross_scoring=True),
        "lagkv_short": LagKVPress(ratio, n_sink=4, lag_size=32),
        "expected_attention": ExpectedAttentionPress(ratio, n_future_positions=64),
        "expected_attention_eps": ExpectedAttentionPress(ratio, epsilon=1e-2, use_covariance=False),
        "cap": CapPress(ratio, n_future_positions=64),
        "non_causal_attn": NonCausalAttnPress(ratio, chunk_size=16),
        "leverage_score": LeverageScorePress(ratio, sketch_dimension=8),
        "compactor": CompactorPress(ratio, chunk_size=16, sketch_dimension=8),
        "cur": CURPress(ratio),
        "cur_mean": CURPress(ratio, leverage_type="kv_avg", local_window_size=5),
        "criticalkv": CriticalKVPress(SnapKVPress(ratio, window_size=8, kernel_size=5)),
        "chunkkv": ChunkKVPress(SnapKVPress(ratio, window_size=8, kernel_size=5), chunk_length=6),
        "entropy_gated_chunkkv": EntropyGatedChunkKVPress(
            SnapKVPress(ratio, window_size=8, kernel_size=5), chunk_length=6, low_entropy_chunk_length=3
        ),
        "block_keydiff": BlockPress(KeyDiffPress(ratio), block_size=8),
        "simlayerkv": SimLayerKVPress(
            lazy_threshold=0.6, n_last=1, n_recent=int(24 / ratio) // 4, n_initial=4
        ),
        "observed_attention": ObservedAttentionPress(ratio),
        "rerotated_knorm": KeyRerotationPress(KnormPress(ratio)),
        "finch": finch(ratio, True),
        "finch_plain": finch(ratio, False),
    }


def finch(ratio: float, normalize: bool) -> FinchPress:
    """Finch with the last 8 tokens as the question."""
    press = FinchPress(ratio, normalize_scores=normalize)
    press.window_size = 8
    return press


def tiny_llama() -> LlamaForCausalLM:
    """Random weights, wide enough that attention is far from uniform."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Llama's RoPE partner channels."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def capture(model: LlamaForCausalLM, tokens: torch.Tensor) -> list[dict]:
    """Per layer: the attention module, its input, its keyword arguments, keys and values."""
    layers: list[dict] = []
    cache = DynamicCache()

    def hook(module, args, kwargs, output):
        layer = cache.layers[module.layer_idx]
        layers.append(
            dict(module=module, hidden=kwargs["hidden_states"], kwargs=kwargs, k=layer.keys, v=layer.values)
        )

    handles = []
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
    model(tokens, past_key_values=cache)
    for handle in handles:
        handle.remove()
    return layers


def seen(press, x: dict) -> torch.Tensor | None:
    """Attention weights [1, q_heads, tokens, tokens], for the one press that reads them."""
    if not isinstance(press, ObservedAttentionPress):
        return None
    logits = x["q"] @ x["k"].repeat_interleave(2, dim=1).transpose(2, 3) * 16**-0.5
    mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    return logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)


def kept(press, x: dict) -> tuple[np.ndarray, np.ndarray]:
    """(bool [kv_heads, tokens]: entries that the press leaves, their keys)."""
    module, v = x["module"], x["v"]
    module.masked_key_indices = None
    torch.manual_seed(SEED)
    keys, survivors = press.compress(
        module, x["hidden"], x["k"].clone(), v.clone(), seen(press, x), x["kwargs"]
    )
    mask = np.zeros(v.shape[1:3], bool)
    for head in range(v.shape[1]):
        distance = torch.cdist(survivors[0, head].double(), v[0, head].double())
        mask[head, distance.argmin(dim=1).numpy()] = True
    if module.masked_key_indices is not None:
        _, heads, slots = (i.numpy() for i in module.masked_key_indices)
        mask[heads, slots] = False
    return mask, keys[0].numpy()


def record_kvzip(model: LlamaForCausalLM, tokens: torch.Tensor, out: dict[str, np.ndarray]) -> None:
    """Two repeat passes over halves of the prompt: inputs of every layer, scores, and kept entries at 50%.

    The repeat prompt is PREFIX, then the last 4 tokens of the half before, then the half.
    """
    n, half = tokens.shape[1], tokens.shape[1] // 2
    for plus in (False, True):
        press = KVzipPress(0.5, kvzip_plus_normalization=plus)
        cache = DynamicCache()
        model(tokens, past_key_values=cache)
        heads = model.config.num_key_value_heads
        press.context_length, press.score_val = n, torch.zeros(model.config.num_hidden_layers, 1, heads, n)
        for p, start in enumerate((0, half)):
            press.start_idx, press.end_idx = start, min(start + half, n)
            body = tokens[:, max(start - 4, 0) : press.end_idx]
            repeat = torch.cat([torch.tensor([PREFIX]), body], dim=1)

            def hook(module, args, kwargs, output, p=p, count=repeat.shape[1], press=press, cache=cache):
                layer = cache.layers[module.layer_idx]
                cos, sin = kwargs["position_embeddings"]
                q = module.q_proj(kwargs["hidden_states"]).view(1, count, 4, 16).transpose(1, 2)
                i = module.layer_idx
                out[f"kvzip/q/{p}/{i}"] = (q * cos[:, None] + rotate_half(q) * sin[:, None])[0].numpy()
                out[f"kvzip/k/{p}/{i}"] = layer.keys[0, :, n:].numpy()
                out[f"kvzip/v/{p}/{i}"] = layer.values[0, :, n:].numpy()
                out[f"kvzip/hidden/{p}/{i}"] = kwargs["hidden_states"][0].numpy()
                return press.forward_hook(module, args, kwargs, output)

            handles = [x.self_attn.register_forward_hook(hook, with_kwargs=True) for x in model.model.layers]
            model.model(input_ids=repeat, past_key_values=cache)
            for handle in handles:
                handle.remove()
        name = "kvzip_plus" if plus else "kvzip"
        out[f"scores/{name}"] = press.score_val[:, 0].numpy().copy()
        press.compress_post(model)
        mask = np.ones((len(model.model.layers), heads, n), bool)
        for i, layer in enumerate(model.model.layers):
            _, head, slot = (x.numpy() for x in layer.self_attn.masked_key_indices)
            mask[i, head, slot] = False
            layer.self_attn.masked_key_indices = None
        out[f"kept/{name}"] = np.packbits(mask, axis=-1)


@torch.inference_mode()
def main(path: str) -> None:
    """Record everything into one compressed npz file."""
    model = tiny_llama()
    out: dict[str, np.ndarray] = {"inv_freq": model.model.rotary_emb.inv_freq.numpy()}
    torch.manual_seed(SEED)
    out["sketch"] = (torch.randn(1, 2, 16, 8) * 8**-0.5)[0].numpy()
    for n, length in enumerate(LENGTHS):
        # Distinct tokens, so that values identify entries.
        tokens = torch.randperm(128, generator=torch.Generator().manual_seed(n))[None, :length]
        for i, x in enumerate(capture(model, tokens)):
            attn, (cos, sin) = x["module"], x["kwargs"]["position_embeddings"]
            q = attn.q_proj(x["hidden"]).view(1, length, 4, 16).transpose(1, 2)
            q = q * cos[:, None] + rotate_half(q) * sin[:, None]
            x["q"] = q
            out[f"q/{n}/{i}"], out[f"hidden/{n}/{i}"] = q[0].numpy(), x["hidden"][0].numpy()
            out[f"k/{n}/{i}"], out[f"v/{n}/{i}"] = x["k"][0].numpy(), x["v"][0].numpy()
            if n == 0:
                out[f"wo/{i}"] = attn.o_proj.weight.T.reshape(4, 16, 64).numpy()
            for ratio in RATIOS:
                for name, press in presses(ratio).items():
                    key = f"{name}/{n}/{i}"
                    if hasattr(press, "score") and ratio == 0.5:
                        torch.manual_seed(SEED)
                        scores = press.score(
                            x["module"], x["hidden"], x["k"], x["v"], seen(press, x), x["kwargs"]
                        )
                        out[f"scores/{key}"] = scores[0].float().numpy()
                    mask, keys = kept(press, x)
                    out[f"kept/{key}/{ratio}"] = np.packbits(mask, axis=-1)
                    if name.startswith("rerotated") and ratio == 0.5:
                        out[f"keys/{key}"] = keys
        if n == 0:
            record_kvzip(model, tokens, out)
    np.savez_compressed(path, **out)
    print(f"{path}: {len(out)} arrays")


if __name__ == "__main__":
    main(sys.argv[1])
