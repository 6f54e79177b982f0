"""Non-causal chunked attention."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.compactor import NonCausalAttention

VARIANTS = ("paper", "kvpress")


@method(
    title="Compactor: Calibrated Query-Agnostic KV Cache Compression (non-causal attention scores)",
    arxiv="2507.08143",
    tiny=dict(chunk=8),
)
def non_causal_attn(budget: Budget = 0.5, chunk: int = 256, variant: str = "paper") -> Policy:
    """Entries that all queries of their chunk attend to, later ones included, times the norm of their value.

    score = avgpool_3( mean_group( sum_i softmax_j(q_i.k_j) ) * ||v_j|| ), z-normalised; the softmax runs over the
    chunk without a causal mask and without a scale. variant='kvpress' counts a short last chunk as filled up
    with zero vectors, as kvpress does; 'paper' masks them.
    """
    _check(variant, "non_causal_attn")
    if chunk < 1:
        raise ValueError(f"non_causal_attn: chunk must be at least 1 token, got {chunk}")
    return Policy(
        scorer=NonCausalAttention(chunk, padded=variant == "kvpress"),
        budget=budget,
        explicit=frozenset({"scorer"}),
    )


def _check(variant: str, name: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"{name}: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
