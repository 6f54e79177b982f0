"""KVQuant."""

from kvjax.codecs.levels import Table
from kvjax.codecs.quantizers import Pair, Quantizer
from kvjax.codecs.wrappers import Outliers
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(
    title="KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization",
    arxiv="2401.18079",
    tiny=dict(group=8, residual=8),
)
def kvquant(
    bits: int = 3,
    outliers: int = 1,
    group: int = 128,
    residual: int = 128,
    sink: int = 1,
    calibration: str = "",
) -> Policy:
    """Non-uniform levels (nuq) for keys before RoPE per channel and values per token, outliers kept exactly.

    x' = level[code] * r + z. calibration: 'shipped' or a path: thresholds of key channels are static and levels
    come from k-means weighted by squared gradients (at 2 bits with Q-Norm). Without: z and r of key channels over
    every `group` tokens, Lloyd-Max levels of a Gaussian. Each token keeps its `outliers` largest and smallest
    channels of every head in float16; the first `sink` tokens stay exact.
    """
    if bits not in (2, 3, 4):
        raise ValueError(f"kvquant: bits must be 2, 3 or 4, got {bits}")
    file = "nuq" if calibration == "shipped" else calibration
    k: Quantizer = Table(bits, axis="static", calibration=file) if file else Table(bits, group, "channel")
    v: Quantizer = Table(bits, calibration=file)
    if outliers:
        k, v = Outliers(k, outliers), Outliers(v, outliers)
    return Policy(codec=Pair(k, v, residual, sink, pre_rope=True), explicit=frozenset({"codec"}))
