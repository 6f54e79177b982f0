"""AQUA-KV."""

from kvjax.codecs.predict import Predicted
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(
    title="Cache Me If You Must: Adaptive Key-Value Quantization for Large Language Models",
    arxiv="2501.19392",
    tiny=dict(calibration="zero", residual=8),
)
def aqua_kv(
    bits: float = 2, anchor_bits: float = 4, residual: int = 128, sink: int = 4, calibration: str = ""
) -> Policy:
    """Odd layers store only what a linear predictor from the layer before gets wrong, at `bits`; even ones at `anchor_bits`.

    K' = W_K K'_before + error, V' = W_V [K'; V'_before] + error, keys before RoPE, over all KV heads of a token.
    Errors and even layers are rotated and rounded to the Lloyd-Max levels of a Gaussian (the one-dimensional
    grid of the authors' quantizer). The authors chain all layers; a chain of two makes one step read two layers
    instead of all. Slots of the layers must agree, so that it does not compose with methods that evict.
    calibration: a path; default the shipped predictors; 'zero': no prediction.
    """
    file = "" if calibration == "zero" else calibration or "aqua_kv"
    return Policy(codec=Predicted(bits, anchor_bits, residual, sink, file), explicit=frozenset({"codec"}))
