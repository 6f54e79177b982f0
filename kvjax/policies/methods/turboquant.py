"""TurboQuant."""

from kvjax.codecs.levels import Gaussian
from kvjax.codecs.quantizers import Pair
from kvjax.codecs.wrappers import Rotated, SignResidual
from kvjax.policies.base import Policy
from kvjax.policies.registry import method


@method(title="TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", arxiv="2504.19874")
def turboquant(
    bits: float = 3,
    variant: str = "mse",
    rotation: str = "haar",
    renormalise: bool = False,
    residual: int = 0,
    sink: int = 0,
) -> Policy:
    """A random rotation makes coordinates nearly Gaussian; each is rounded to the Lloyd-Max levels of a Gaussian.

    x' = n R^T level(R x / n) with n = |x| in float16, keys (after RoPE) and values alike, nothing calibrated.
    variant 'prod': keys use bits - 1 for the levels and one for the signs of a random projection of what is left
    (QJL), so that dot products are unbiased. bits=2.5: half of the rotated channels at 3 bits (the paper gives
    more bits to outlier channels instead). rotation: haar, or hadamard with random signs. renormalise: n = the
    length that makes x' a projection. residual, sink: newest and first entries that stay in the model's dtype.
    """
    if variant not in ("mse", "prod"):
        raise ValueError(f"turboquant: variant must be mse or prod, got {variant!r}")
    if not 1 <= bits <= 8 or (variant == "prod" and bits < 2):
        raise ValueError(f"turboquant: bits must be 1 to 8 (2 to 8 for prod), got {bits}")
    v = Rotated(Gaussian(bits, renormalise), rotation, 1)
    k = Rotated(Gaussian(bits, renormalise), rotation)
    if variant == "prod":
        k = SignResidual(Rotated(Gaussian(bits - 1, renormalise), rotation))
    return Policy(codec=Pair(k, v, residual, sink), explicit=frozenset({"codec"}))
