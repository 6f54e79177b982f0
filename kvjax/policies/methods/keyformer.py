"""Keyformer."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.statistics import NoisyAttention


@method(
    title="Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
    arxiv="2403.09054",
    tiny=dict(recent=4, horizon=8),
)
def keyformer(
    budget: Budget = 0.6,
    recent: int = 32,
    tau0: float = 1.0,
    tau1: float = 2.0,
    horizon: int = 1024,
    noise: float = 1.0,
    seed: int = 0,
    evict_decode: bool = True,
    interval: int = 1,
) -> Policy:
    """Heavy hitters of attention with Gumbel noise on its logits, so that lost mass does not bias the choice.

    score[h, j] += sum_i softmax_j((x_ij + G_ij) / tau_t), tau rising from tau0 to tau1 over `horizon` decode steps;
    mean over the group, plus the `recent` newest entries. The output attention has no noise. G is a hash of seed,
    layer, head and positions; noise=0 with tau0=tau1=1 is H2O.
    """
    if not min(tau0, tau1) > 0.0 or horizon < 1:
        raise ValueError(f"keyformer: tau0, tau1 and horizon must be positive, got {tau0}, {tau1}, {horizon}")
    return Policy(
        scorer=NoisyAttention(tau0, tau1, horizon, noise, seed),
        budget=budget,
        recent=recent,
        evict_decode=evict_decode,
        interval=interval,
        explicit=frozenset({"scorer"}),
    )
