"""Approximate leverage scores."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.compactor import Leverage


@method(
    title="Compactor: Calibrated Query-Agnostic KV Cache Compression (approximate leverage scores)",
    arxiv="2507.08143",
    tiny=dict(sketch=6),
)
def leverage_score(budget: Budget = 0.5, sketch: int = 48, seed: int = 0) -> Policy:
    """Keys that are hard to express by the other keys are kept.

    score = x' (X'X + 0.01 I)^-1 x with X = (K - mean K) Phi, K the keys before RoPE and Phi a Gaussian sketch to
    `sketch` columns, z-normalised. The sketch is fixed by the seed and the layer (kvpress draws it anew per call).
    """
    if sketch < 1:
        raise ValueError(f"leverage_score: sketch must be at least 1 column, got {sketch}")
    return Policy(scorer=Leverage(sketch, seed), budget=budget, explicit=frozenset({"scorer"}))
