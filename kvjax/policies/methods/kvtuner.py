"""KVTuner."""

from kvjax.codecs.precision import PerLayer
from kvjax.policies.base import Policy
from kvjax.policies.registry import method

ALLOWED = (2, 4, 8)


@method(
    title="KVTuner: Sensitivity-Aware Layer-Wise Mixed-Precision KV Cache Quantization",
    arxiv="2502.04420",
    tiny=dict(pairs=((8, 4), (4, 2))),
)
def kvtuner(
    bits: float = 4,
    pairs: tuple = (),
    group: int = 0,
    residual: int = 0,
    sink: int = 0,
    calibration: str = "",
) -> Policy:
    """One static (key bits, value bits) pair per layer, each of 2, 4 or 8, found by an offline search.

    Rounding per token over `group` channels (0: the head) with an integer zero. pairs: given by hand, repeated over
    the layers. Otherwise the search's file: calibration is a path or by default the one shipped for the model,
    and `bits` the cap on the mean that was searched for. The search minimises the expected square of the logit
    margin's change, from gradients, where the authors evolve configurations on a task's accuracy.
    """
    if any(len(p) != 2 or any(b not in ALLOWED for b in p) for p in pairs):
        raise ValueError(f"kvtuner: pairs must be (key bits, value bits) of 2, 4 or 8, got {pairs!r}")
    file = "" if pairs else calibration or "kvtuner"
    codec = PerLayer(pairs or ((4, 4),), 1, group, residual, sink, file, bits)
    return Policy(codec=codec, explicit=frozenset({"codec"}))
