"""Coupled quantization."""

from kvjax.codecs.quantizers import Pair
from kvjax.codecs.vector import Vector
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(
    title="KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with Coupled Quantization",
    arxiv="2405.03917",
    tiny=dict(calibration="gaussian"),
)
def cq(bits: float = 1, calibration: str = "", residual: int = 32, sink: int = 4) -> Policy:
    """Channels of a head are coded together: one 8-bit index into a calibrated codebook for several channels.

    Keys before RoPE. x' = codeword of each group, found by weighted k-means; weights are squared gradients, as in
    the paper. The shipped calibrations (0.75 to 4 bits) also map the channels to the basis in which errors cost the
    same in every direction, and give each layer as many codes as pay off there; `bits` is the mean. Codebooks are
    shared by all requests, like weights. calibration: path of a file; default the one shipped for the model;
    'gaussian': no calibration, groups of 8 / bits channels.
    """
    if not 0.25 <= bits <= 8:
        raise ValueError(f"cq: bits must be 0.25 to 8, got {bits}")
    name = "" if calibration == "gaussian" else calibration or "cq"
    part = Vector(calibration=name, rate=bits, couple=round(8 / bits))
    return Policy(codec=Pair(part, part, residual, sink, pre_rope=True), explicit=frozenset({"codec"}))
