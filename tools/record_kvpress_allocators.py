"""Record what kvpress computes, as fixtures for the tests of allocators and reducers in tests/policies.

Run with a Python that has torch, transformers and kvpress 0.5.5:

    python tools/record_kvpress_allocators.py tests/fixtures/kvpress/allocators.npz

Stored: PyramidKV's kept entries per layer for some prompt lengths and ratios; DuoAttention's masked heads for random
head scores; MergingPress' survivors and their values for random keys, values and scores; PerLayerCompression's kept
entries per layer.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import torch
from kvpress import DuoAttentionPress, KnormPress, MergingPress, PerLayerCompressionPress, PyramidKVPress

LENGTHS = (512, 640, 1024, 4096)
RATIOS = (0.25, 0.5, 0.75)
LAYERS, WINDOW = 12, 32


def pyramid() -> np.ndarray:
    """int32 [lengths, ratios, betas, layers] entries kept."""
    out = []
    for n in LENGTHS:
        for ratio in RATIOS:
            for beta in (5, 20):
                press = PyramidKVPress(ratio, window_size=WINDOW, beta=beta)
                modules = [
                    SimpleNamespace(layer_idx=i, config=SimpleNamespace(num_hidden_layers=LAYERS))
                    for i in range(LAYERS)
                ]
                out.append([press.get_layer_budget(m, n) for m in modules])
    return np.array(out, np.int32).reshape(len(LENGTHS), len(RATIOS), 2, LAYERS)


def duo(scores: np.ndarray, ratio: float) -> np.ndarray:
    """bool [layers, kv_heads] streaming heads."""
    press = DuoAttentionPress(ratio)
    press.load_attention_pattern = lambda model: (4, 8, scores)
    press.post_init_from_model(SimpleNamespace(device="cpu"))
    return press.streaming_mask.numpy()


@torch.inference_mode()
def main(path: str) -> None:
    """Record everything into one compressed npz file."""
    out = {"pyramid": pyramid()}
    rng = np.random.default_rng(0)
    out["duo/scores"] = rng.random((4, 3)).astype(np.float32)
    for ratio in (0.0, 0.25, 0.5, 1.0):
        out[f"duo/{ratio}"] = duo(out["duo/scores"], ratio)
    k, v = (torch.tensor(rng.standard_normal((2, 2, 40, 8)), dtype=torch.float32) for _ in range(2))
    out["merge/k"], out["merge/v"] = k.numpy(), v.numpy()
    for threshold, fraction in ((0.0, 1.0), (0.3, 1.0), (0.0, 0.5)):
        press = MergingPress(KnormPress(0.6), threshold, fraction)
        indices = press.press.score(None, None, k, v, None, {}).topk(16, dim=-1).indices.sort(-1).values
        _, merged = press.merge(k, v, indices)
        out["merge/index"] = indices.numpy().astype(np.int32)
        out[f"merge/{threshold}/{fraction}"] = merged.gather(
            2, indices[..., None].expand(-1, -1, -1, 8)
        ).numpy()
    ratios = [0.1, 0.5, 0.75]
    press = PerLayerCompressionPress(KnormPress(), ratios)
    kept = []
    for i in range(len(ratios)):
        press.press.compression_ratio = ratios[i]
        module = SimpleNamespace(layer_idx=i, head_dim=8)
        kept.append(press.press.compress(module, None, k, v, None, {})[0].shape[2])
    out["per_layer/ratios"], out["per_layer/kept"] = np.array(ratios), np.array(kept, np.int32)
    np.savez_compressed(path, **out)
    print(f"{path}: {len(out)} arrays")


if __name__ == "__main__":
    main(sys.argv[1])
