"""Compactor."""

from kvjax.policies.base import Policy
from kvjax.policies.methods.non_causal_attn import VARIANTS
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.compactor import Compactor


@method(
    title="Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
    arxiv="2507.08143",
    tiny=dict(chunk=8, sketch=6, sink=2, recent=2),
)
def compactor(
    budget: Budget = 0.5,
    blending: float | None = None,
    chunk: int = 256,
    sketch: int = 48,
    sink: int = 8,
    recent: int = 4,
    seed: int = 0,
    variant: str = "paper",
) -> Policy:
    """Non-causal attention inside chunks plus `blending` times the keys' leverage; both ends of the row are kept.

    score = blending * z(leverage) + z(non-causal), over the row without its ends. blending None: the removed
    share 1 - budget, kvpress' heuristic, and 0.35 for an absolute budget. Here the ends are protected; kvpress
    lets them tie with the best token, so that a tiny budget may drop them.
    """
    if variant not in VARIANTS:
        raise ValueError(f"compactor: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if min(chunk, sketch) < 1:
        raise ValueError(f"compactor: chunk and sketch must be positive, got {chunk} and {sketch}")
    if blending is None:
        blending = 1.0 - budget if isinstance(budget, float) else 0.35
    scorer = Compactor(blending, chunk, sketch, seed, variant == "kvpress", sink, recent)
    return Policy(scorer=scorer, budget=budget, sink=sink, recent=recent, explicit=frozenset({"scorer"}))
