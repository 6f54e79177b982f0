"""TOVA."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.attention import LastQuery


@method(title="Transformers are Multi-State RNNs", arxiv="2401.06104")
def tova(budget: Budget = 0.5, recent: int = 1, evict_decode: bool = True, interval: int = 1) -> Policy:
    """Entries that the newest query attends to most, one ranking for all heads of a layer.

    score[j] = mean over all query heads of A[h, last, j]. recent=1 keeps the newest token, as kvpress does; the
    paper protects none (recent=0). While decoding, the least attended entry leaves after each step.
    """
    return Policy(
        scorer=LastQuery(),
        budget=budget,
        recent=recent,
        evict_decode=evict_decode,
        interval=interval,
        explicit=frozenset({"scorer"}),
    )
