"""ZigZagKV."""

from kvjax.policies.allocators.layers import Uncertainty
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method


@method(
    title="ZigZagKV: Dynamic KV Cache Compression for Long-context Modeling based on Layer Uncertainty",
    arxiv="2412.09036",
    tiny=dict(scorer=snapkv(window=4, kernel=3)),
)
def zigzagkv(
    scorer: Policy | str | None = None, budget: Budget | None = None, p: float = 0.9, floor: float = 0.2
) -> Policy:
    """Layers whose score mass is spread over more entries keep more: budgets by layer uncertainty.

    LMBA_l = entries needed for the fraction p of the mass, mean over heads; B_l = B_min + (B - B_min) L LMBA_l /
    sum LMBA with B_min = floor * B. Mass means the scorer's scores outside the protected window (shifted to be
    non-negative when some are negative); with snapkv, the default, that is window attention.
    """
    if not (0.0 < p <= 1.0 and 0.0 <= floor <= 1.0):
        raise ValueError(f"zigzagkv: p must be in (0, 1] and floor in [0, 1], got p={p}, floor={floor}")
    inner = scoring("zigzagkv", scorer, snapkv())
    return wrap(inner, scorer is not None, budget, allocator=Uncertainty(p, floor))
