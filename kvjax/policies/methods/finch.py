"""Finch."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.windows import PromptGuided


@method(
    title="FINCH: Prompt-guided Key-Value Cache Compression for Large Language Models",
    arxiv="",
    tiny=dict(window=4, rerotate=False),
)
def finch(budget: Budget = 0.5, window: int = 32, normalize: bool = True, rerotate: bool = True) -> Policy:
    """Context entries that the question at the end of the prompt attends to, with keys moved to compact positions.

    score[h, j] = mean_group mean_i (visible_i - 1) A[i, j] over the last `window` queries (set it to the question's
    length), which are kept. rerotate: kept keys are rotated to positions 0..K-1 and the next token is at K. With
    chunked prefill every chunk is compressed as it comes, as in the paper. TACL, doi 10.1162/tacl_a_00716.
    """
    if window < 1:
        raise ValueError(f"finch: window must be at least 1 token, got {window}")
    return Policy(
        scorer=PromptGuided(window, normalize),
        budget=budget,
        recent=window,
        rerotate=rerotate,
        explicit=frozenset({"scorer"}),
    )
