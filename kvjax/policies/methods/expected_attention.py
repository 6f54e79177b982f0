"""Expected Attention."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.future import ExpectedAttention


@method(
    title="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    arxiv="2510.00636",
    tiny=dict(sink=2, future=16),
)
def expected_attention(
    budget: Budget = 0.5,
    future: int = 512,
    sink: int = 4,
    covariance: bool = True,
    value_norm: bool = True,
    epsilon: float = 0.0,
    stats: str | None = None,
) -> Policy:
    """Entries that a Gaussian model of the queries to come would attend to, times the norm of their value.

    score = (softmax_t(k.mu / sqrt(d) + k' S k / (2 d)) + epsilon) * ||v||, mean over the group; mu and S are the
    mean and covariance of the prompt's pre-RoPE queries, turned by the mean rotation of the next `future`
    positions. stats: a calibration file with `query_mean` and `query_cov` replaces the prompt's own statistics.
    """
    if future < 1:
        raise ValueError(f"expected_attention: future must be at least 1 position, got {future}")
    scorer = ExpectedAttention(future, sink, covariance, value_norm, epsilon, stats)
    return Policy(scorer=scorer, budget=budget, sink=sink, explicit=frozenset({"scorer"}))
