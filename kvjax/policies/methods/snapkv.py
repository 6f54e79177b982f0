"""SnapKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.attention import WindowAttention


@method(
    title="SnapKV: LLM Knows What You are Looking for Before Generation",
    arxiv="2404.14469",
    tiny=dict(window=4, kernel=3),
)
def snapkv(budget: Budget = 0.5, window: int = 32, kernel: int = 5, pooling: str = "avg") -> Policy:
    """Prompt entries that the last `window` prompt queries attend to, pooled over neighbours, plus the window.

    score[h, j] = mean over the query group of pool_kernel( mean_{i in window} A[h, i, j] ). Evicts once, after
    the prompt; generated tokens are appended.
    """
    if pooling not in ("avg", "max"):
        raise ValueError(f"snapkv: pooling must be avg or max, got {pooling!r}")
    if window < 1 or kernel < 1 or kernel % 2 == 0:
        raise ValueError(
            f"snapkv: window must be positive and kernel odd, got window={window}, kernel={kernel}"
        )
    return Policy(
        scorer=WindowAttention(window, kernel, pooling),
        budget=budget,
        recent=window,
        explicit=frozenset({"scorer"}),
    )
