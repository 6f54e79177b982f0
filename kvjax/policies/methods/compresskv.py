"""CompressKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.windows import RetrievalHeads


@method(
    title="CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation",
    arxiv="2508.02401",
    tiny=dict(window=4, kernel=3),
)
def compresskv(
    budget: Budget = 0.5,
    window: int = 8,
    kernel: int = 5,
    heads: tuple[tuple[int, ...], ...] | None = None,
    file: str | None = None,
) -> Policy:
    """A few semantic retrieval heads per layer decide which prompt entries all heads keep.

    score[j] = mean over the chosen query heads of avgpool_kernel( sum_{i in window} A[h, i, j] ); one ranking for
    every KV head, plus the window. heads: query heads of each layer; file: a calibration file with
    `retrieval_heads` [layers, n] (paper: 4 per layer, found on needles). Without either all heads vote. The
    paper's error-aware layer budgets are a separate allocator.
    """
    if heads is not None and file is not None:
        raise ValueError("compresskv: heads and file exclude each other")
    if window < 1 or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"compresskv: window must be positive and kernel odd, got {window} and {kernel}")
    chosen = None if heads is None else tuple(tuple(h) for h in heads)
    scorer = RetrievalHeads(window, kernel, chosen, file)
    return Policy(scorer=scorer, budget=budget, recent=window, explicit=frozenset({"scorer"}))
