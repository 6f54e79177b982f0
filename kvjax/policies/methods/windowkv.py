"""WindowKV."""

from kvjax.policies.allocators.groups import GroupDecay
from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.attention import WindowAttention
from kvjax.policies.selections.chunks import Chunks

MODES = ("average", "max")


@method(
    title="WindowKV: Task-Adaptive Group-Wise KV Cache Window Selection for Efficient LLM Inference",
    arxiv="2503.17922",
    tiny=dict(suffix=4, size=2, group=1),
)
def windowkv(
    budget: Budget = 0.5,
    mode: str = "average",
    suffix: int | None = None,
    size: int = 8,
    group: int = 8,
    beta: int = 14,
) -> Policy:
    """Whole windows of `size` tokens, one choice for all heads that the layers of a group share.

    Window score = mean over heads of the mean (mode average) or of the best size/2 tokens (max) of
    sum_{i in suffix} A[h, i, j]; the last `suffix` tokens are kept. Groups of `group` layers get budgets that fall
    linearly from 2 b - 8 b / beta to 8 b / beta. The paper's classifier picks max with suffix 32 for questions and
    average with suffix 16 for the rest; here mode is an argument.
    """
    if mode not in MODES:
        raise ValueError(f"windowkv: mode must be one of {', '.join(MODES)}, got {mode!r}")
    suffix = suffix if suffix is not None else 32 if mode == "max" else 16
    if min(suffix, size, group) < 1 or beta < 8:
        raise ValueError(
            f"windowkv: suffix, size and group must be positive and beta >= 8, got {suffix}, {size}, {group}, {beta}"
        )
    return Policy(
        scorer=WindowAttention(suffix, 1),
        allocator=GroupDecay(group, beta, suffix),
        selection=Chunks(size, max(size // 2, 1) if mode == "max" else None, separate=True, reuse=group),
        budget=budget,
        recent=suffix,
        explicit=frozenset({"scorer", "allocator", "selection"}),
    )
